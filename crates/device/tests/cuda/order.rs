//! Streams that share buffers, and buffers that end while streams use them.

use shardwise_device::cuda::{Access, Timing};
use shardwise_device::{Buffer, DType, Memory, Slice, SliceMut};
use shardwise_fake_gpu::{ALL_WAYS, FakeGpu, module, on_gpu, pinned, stream, values};

#[test]
fn bytes_survive_the_way_there_and_back() {
    for way in ALL_WAYS {
        let fake = FakeGpu::new(way);
        let gpu = fake.gpu();
        let streams = [stream(&gpu), stream(&gpu), stream(&gpu)];
        let numbers: Vec<f32> = (0..1000).map(|i| i as f32).collect();
        let from = pinned(&gpu, &numbers);
        let (mut a, mut b) = (on_gpu(&gpu, 1000), on_gpu(&gpu, 1000));
        let mut back = pinned(&gpu, &[0.0; 1000]);
        streams[0].copy(from.view(), a.view_mut()).unwrap();
        streams[1].copy(a.view(), b.view_mut()).unwrap();
        streams[2].copy(b.view(), back.view_mut()).unwrap();
        // The host waits because it reads, not because it was told to.
        assert_eq!(back.typed::<f32>().unwrap(), numbers);
        drop((streams, from, a, b, back, gpu));
        fake.assert_clean();
    }
}

#[test]
fn new_memory_is_zero_on_every_stream() {
    for way in ALL_WAYS {
        let fake = FakeGpu::new(way);
        let gpu = fake.gpu();
        let buffer = on_gpu(&gpu, 300);
        assert_eq!(values(&gpu, &buffer), [0.0; 300]);
        let host = Buffer::allocate(DType::U8, 77, &Memory::Pinned(gpu.clone())).unwrap();
        assert_eq!(host.typed::<u8>().unwrap(), [0; 77]);
    }
}

#[test]
fn readers_and_writers_take_turns_across_streams() {
    for way in ALL_WAYS {
        let fake = FakeGpu::new(way);
        let gpu = fake.gpu();
        let add = module(&gpu, &["add"]).kernel("add").unwrap();
        let streams = [stream(&gpu), stream(&gpu), stream(&gpu), stream(&gpu)];
        let mut sum = on_gpu(&gpu, 64);
        let mut other = on_gpu(&gpu, 64);
        let one = pinned(&gpu, &[1.0; 64]);
        for step in 0..40 {
            // other = sum + 1 on one stream, sum = other on the next: each step reads what the last has written.
            let grid = shardwise_device::cuda::Grid::linear(1, 64);
            let args = shardwise_device::cuda::Args::new()
                .read(sum.view())
                .read(one.view())
                .write(other.view_mut())
                .value(64u64);
            // SAFETY: the arguments are those of the kernel.
            unsafe { streams[step % 4].launch(&add, grid, args) }.unwrap();
            streams[(step * 3 + 1) % 4].copy(other.view(), sum.view_mut()).unwrap();
        }
        assert_eq!(values(&gpu, &sum), [40.0; 64]);
        drop((streams, sum, other, one, add, gpu));
        fake.assert_clean();
    }
}

#[test]
fn a_buffer_that_ends_waits_for_the_streams_that_use_it() {
    for way in ALL_WAYS {
        let fake = FakeGpu::new(way);
        let gpu = fake.gpu();
        let (upload, compute) = (stream(&gpu), stream(&gpu));
        let mut kept = on_gpu(&gpu, 50);
        {
            let from = pinned(&gpu, &[7.0; 50]);
            let mut between = on_gpu(&gpu, 50);
            upload.copy(from.view(), between.view_mut()).unwrap();
            compute.copy(between.view(), kept.view_mut()).unwrap();
        }
        assert_eq!(values(&gpu, &kept), [7.0; 50]);
        drop((upload, compute, kept, gpu));
        fake.assert_clean();
    }
}

#[test]
fn a_stream_that_ends_leaves_its_work_in_order() {
    for way in ALL_WAYS {
        let fake = FakeGpu::new(way);
        let gpu = fake.gpu();
        let mut a = on_gpu(&gpu, 10);
        let mut b = on_gpu(&gpu, 10);
        {
            let from = pinned(&gpu, &[3.0; 10]);
            stream(&gpu).copy(from.view(), a.view_mut()).unwrap();
            stream(&gpu).copy(a.view(), b.view_mut()).unwrap();
            stream(&gpu).fill(a.view_mut(), 0).unwrap();
        }
        assert_eq!(values(&gpu, &b), [3.0; 10]);
        assert_eq!(values(&gpu, &a), [0.0; 10]);
        drop((a, b, gpu));
        fake.assert_clean();
    }
}

#[test]
fn the_host_waits_before_it_overwrites_what_a_copy_reads() {
    let fake = FakeGpu::lazy();
    let gpu = fake.gpu();
    let upload = stream(&gpu);
    let mut staging = pinned(&gpu, &[1.0; 8]);
    let (mut first, mut second) = (on_gpu(&gpu, 8), on_gpu(&gpu, 8));
    upload.copy(staging.view(), first.view_mut()).unwrap();
    staging.typed_mut::<f32>().unwrap().fill(2.0);
    upload.copy(staging.view(), second.view_mut()).unwrap();
    // Reading does not wait for a reader.
    let before = fake.num_ran();
    assert_eq!(staging.typed::<f32>().unwrap(), [2.0; 8]);
    assert_eq!(fake.num_ran(), before);
    assert_eq!(values(&gpu, &first), [1.0; 8]);
    assert_eq!(values(&gpu, &second), [2.0; 8]);
}

#[test]
fn disjoint_parts_and_readers_do_not_wait_for_each_other() {
    let fake = FakeGpu::lazy();
    let gpu = fake.gpu();
    let (one, two) = (stream(&gpu), stream(&gpu));
    let mut buffer = on_gpu(&gpu, 100);
    gpu.synchronize().unwrap();
    // Whether stream two, once it is through, has left stream one's work where it was.
    let left_alone = || {
        two.synchronize().unwrap();
        let left_alone = !one.is_idle().unwrap();
        gpu.synchronize().unwrap();
        left_alone
    };
    one.fill(buffer.view_mut().into_range(0..50), 1).unwrap();
    two.fill(buffer.view_mut().into_range(50..100), 2).unwrap();
    assert!(left_alone(), "disjoint");
    one.fill(buffer.view_mut().into_range(0..51), 1).unwrap();
    two.fill(buffer.view_mut().into_range(50..100), 2).unwrap();
    assert!(!left_alone(), "overlapping");
    let (mut a, mut b) = (pinned(&gpu, &[0.0; 100]), pinned(&gpu, &[0.0; 100]));
    one.copy(buffer.view(), a.view_mut()).unwrap();
    two.copy(buffer.view(), b.view_mut()).unwrap();
    assert!(left_alone(), "readers");
}

#[test]
fn work_that_the_log_does_not_see_is_put_in_order_by_hand() {
    for way in ALL_WAYS {
        let fake = FakeGpu::new(way);
        let gpu = fake.gpu();
        let upload = stream(&gpu);
        let owned = stream(&gpu);
        // SAFETY: the stream outlives the borrow.
        let library = unsafe { gpu.borrow_stream(owned.as_raw()) };
        let mut out = pinned(&gpu, &[0.0; 16]);
        {
            let mut buffer = on_gpu(&gpu, 16);
            let from = pinned(&gpu, &[5.0; 16]);
            upload.copy(from.view(), buffer.view_mut()).unwrap();
            // As libtorch would: through the address alone.
            library.wait_for(buffer.view(), Access::Read).unwrap();
            // SAFETY: the buffer is alive, and the use is in order and noted.
            let unseen =
                unsafe { Slice::from_raw(buffer.as_ptr(), buffer.numel(), buffer.dtype(), buffer.place()) };
            library.copy(unseen, out.view_mut()).unwrap();
            library.note(buffer.view(), Access::Read).unwrap();
            upload.fill(buffer.view_mut(), 0xff).unwrap();
        }
        assert_eq!(out.typed::<f32>().unwrap(), [5.0; 16]);
        drop((upload, library, owned, out, gpu));
        fake.assert_clean();
    }
}

#[test]
fn events_order_streams_and_keep_time() {
    for way in ALL_WAYS {
        let fake = FakeGpu::new(way);
        let gpu = fake.gpu();
        let (one, two) = (stream(&gpu), stream(&gpu));
        let mut buffer = on_gpu(&gpu, 4);
        gpu.synchronize().unwrap();
        let address = buffer.as_ptr();
        let (start, done) = (gpu.event(Timing::Timed).unwrap(), gpu.event(Timing::Timed).unwrap());
        // SAFETY: the buffer outlives the work, whose order the events make.
        let unseen = || unsafe {
            SliceMut::from_raw(address, 4, DType::F32, shardwise_device::Place::Cuda { ordinal: 0 })
        };
        assert!(start.is_over().unwrap(), "never recorded");
        start.record(&one).unwrap();
        one.fill(unseen(), 1).unwrap();
        done.record(&one).unwrap();
        two.wait(&done).unwrap();
        two.fill(unseen(), 0).unwrap();
        two.synchronize().unwrap();
        assert!(done.is_over().unwrap() && two.is_idle().unwrap());
        assert!(done.elapsed_ms(&start).unwrap() > 0.0);
        let mut polls = 0;
        one.fill(unseen(), 0).unwrap();
        while !one.is_idle().unwrap() {
            polls += 1;
            assert!(polls < 100);
        }
        assert_eq!(values(&gpu, &buffer), [0.0; 4]);
        buffer.view_mut();
    }
}

#[test]
fn logs_stay_short_and_forget_nothing_in_use() {
    let fake = FakeGpu::lazy();
    let gpu = fake.gpu();
    let streams = [stream(&gpu), stream(&gpu)];
    let fill = |buffer: &mut Buffer, byte| {
        for i in 0..1000usize {
            streams[usize::from(i > 0)].fill(buffer.view_mut().into_range(i..i + 1), byte).unwrap();
            if byte == 0 && i % 50 == 0 {
                gpu.synchronize().unwrap();
            }
        }
    };
    let mut buffer = on_gpu(&gpu, 1000);
    fill(&mut buffer, 0);
    let told = format!("{:?}", buffer.view());
    let entries = told.split("Uses(").nth(1).and_then(|rest| rest.split(')').next()).unwrap();
    assert!(entries.parse::<usize>().unwrap() < 200, "{told}");
    // Now nothing is over, and so nothing may be forgotten, not even the one use of the first stream: the end of the
    // buffer has to wait for all.
    fill(&mut buffer, 1);
    drop(buffer);
    drop((streams, gpu));
    fake.assert_clean();
}

#[test]
fn a_log_of_many_uses_is_not_searched_for_each() {
    let fake = FakeGpu::lazy();
    let gpu = fake.gpu();
    let (upload, other) = (stream(&gpu), stream(&gpu));
    let from = pinned(&gpu, &[1.0; 2000]);
    let mut into = on_gpu(&gpu, 2000);
    let before = fake.num_calls();
    // Every other element, so no use covers another.
    for i in (0..2000).step_by(2) {
        upload.copy(from.view().range(i..i + 1), into.view_mut().into_range(i..i + 1)).unwrap();
    }
    let calls = fake.num_calls() - before;
    assert!(calls < 30 * 1000, "{calls} calls for 1000 copies");
    other.copy(into.view().range(0..1), on_gpu(&gpu, 1).view_mut()).unwrap();
    assert_eq!(values(&gpu, &into)[..4], [1.0, 0.0, 1.0, 0.0]);
}
