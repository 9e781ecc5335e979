//! What streams accept and refuse, several GPUs, and several threads.

use std::time::Duration;

use shardwise_device::cuda::{Priority, Sharing, Timing, gpu_for_rank, host_waited};
use shardwise_device::{Buffer, BufferPool, DType, Memory, Place, Slice, SliceMut};
use shardwise_fake_gpu::{ALL_WAYS, Eagerness, FakeGpu, on_gpu, pinned, stream, values};

#[test]
fn memory_that_a_stream_cannot_use_is_refused() {
    let fake = FakeGpu::lazy();
    fake.set_devices(2);
    let driver = fake.driver();
    let (gpu, other) = (driver.open(0).unwrap(), driver.open(1).unwrap());
    let work = gpu.stream(Priority::High).unwrap();
    let mut buffer = on_gpu(&gpu, 8);
    let refused = |result: Result<(), shardwise_device::cuda::CudaError>| result.unwrap_err().to_string();
    assert_eq!(
        refused(work.copy(Slice::of(&[0f32; 8]), buffer.view_mut())),
        "a stream cannot use host memory that is not pinned: take it from a pinned pool, or use `copy_and_wait`"
    );
    assert_eq!(
        refused(work.copy(pinned(&gpu, &[0.0; 7]).view(), buffer.view_mut())),
        "cannot copy `7` x `f32` into `8` x `f32`"
    );
    let mut bytes = Buffer::allocate(DType::U8, 8, &Memory::Pinned(gpu.clone())).unwrap();
    assert!(refused(work.copy(buffer.view(), bytes.view_mut())).contains("into `8` x `u8`"));
    let there = on_gpu(&other, 8);
    let mut host = pinned(&gpu, &[0.0; 8]);
    assert_eq!(
        refused(work.copy(there.view(), host.view_mut())),
        "a stream of GPU `0` was given memory on `cuda:1` and `cpu`"
    );
    assert!(refused(work.fill(host.view_mut(), 0)).contains("`cpu`"));
    // The host does not reach a GPU's memory, and is told so rather than killed.
    assert!(buffer.typed::<f32>().unwrap_err().to_string().contains("`cuda:0`"));
    assert!(buffer.typed_mut::<f32>().is_err());
    assert!(buffer.view().host_bytes().is_err());
    assert!(buffer.view_mut().into_range(1..2).host_bytes().is_err());
    let error = Buffer::zeroed(DType::F32, 1, Place::Cuda { ordinal: 0 }).unwrap_err().to_string();
    assert!(error.contains("comes from an opened GPU"), "{error}");
    assert!(BufferPool::new(Place::Cuda { ordinal: 0 }).take(DType::F32, 1).is_err());
}

/// Whether the host may touch an address, as the system sees it.
fn is_accessible(address: usize) -> bool {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let line = maps.lines().find(|line| {
        let mut ends = line.split(['-', ' ']).map(|end| usize::from_str_radix(end, 16));
        matches!((ends.next(), ends.next()), (Some(Ok(start)), Some(Ok(end))) if (start..end).contains(&address))
    });
    line.is_some_and(|line| !line.contains(" ---p "))
}

#[test]
fn the_fake_keeps_the_host_out_of_device_memory_and_of_freed_memory() {
    let fake = FakeGpu::lazy();
    let gpu = fake.gpu();
    let (device, host) = (on_gpu(&gpu, 8), pinned(&gpu, &[0.0; 8]));
    let [device_at, host_at] = [&device, &host].map(|buffer| buffer.as_ptr().addr().get());
    assert!(!is_accessible(device_at) && is_accessible(host_at));
    drop((device, host));
    assert!(!is_accessible(device_at) && !is_accessible(host_at));
}

#[test]
fn pageable_memory_is_copied_before_the_call_returns() {
    for way in ALL_WAYS {
        let fake = FakeGpu::new(way);
        let gpu = fake.gpu();
        let stream = stream(&gpu);
        let mut buffer = on_gpu(&gpu, 20);
        let mut numbers = vec![6.0f32; 20];
        stream.copy_and_wait(Slice::of(&numbers), buffer.view_mut()).unwrap();
        numbers.fill(0.0);
        let mut back = vec![0f32; 20];
        stream.copy_and_wait(buffer.view(), SliceMut::of(&mut back)).unwrap();
        assert_eq!(back, [6.0; 20]);
    }
}

#[test]
fn gpus_copy_to_each_other_in_order() {
    for (way, peers) in ALL_WAYS.into_iter().zip([true, false, true, false, true, false]) {
        let fake = FakeGpu::new(way);
        fake.set_devices(2);
        fake.set_peers(peers);
        let driver = fake.driver();
        let (first, second) = (driver.open(0).unwrap(), driver.open(1).unwrap());
        assert_eq!(first.enable_peer_access(&second).is_ok(), peers);
        assert_eq!(first.enable_peer_access(&second).is_ok(), peers, "twice is as good as once");
        let (here, there) = (stream(&first), stream(&second));
        let mut back = pinned(&first, &[0.0; 9]);
        {
            let mut a = on_gpu(&first, 9);
            let mut b = on_gpu(&second, 9);
            here.copy(pinned(&second, &[8.0; 9]).view(), a.view_mut()).unwrap();
            here.copy(a.view(), b.view_mut()).unwrap();
            there.copy(a.view(), b.view_mut()).unwrap();
            there.copy(b.view(), back.view_mut()).unwrap();
        }
        assert_eq!(back.typed::<f32>().unwrap(), [8.0; 9]);
        drop((here, there, back, first, second));
        fake.assert_clean();
    }
}

#[test]
fn threads_share_streams_and_sources() {
    for way in ALL_WAYS {
        let fake = FakeGpu::new(way);
        let gpu = fake.gpu();
        let shared = stream(&gpu);
        let source = pinned(&gpu, &[2.0; 32]);
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let (gpu, shared, source) = (&gpu, &shared, &source);
                scope.spawn(move || {
                    let own = stream(gpu);
                    let mut device = BufferPool::of(Memory::Gpu(gpu.clone()));
                    let mut host = BufferPool::of(Memory::Pinned(gpu.clone()));
                    for step in 0..20usize {
                        let mut there = device.take(DType::F32, 32).unwrap();
                        let mut back = host.take(DType::F32, 32).unwrap();
                        let (up, down) = if step % 2 == thread % 2 { (shared, &own) } else { (&own, shared) };
                        up.copy(source.view(), there.view_mut()).unwrap();
                        if step % 3 == 0 {
                            up.fill(there.view_mut().into_range(0..16), 0).unwrap();
                        }
                        down.copy(there.view(), back.view_mut()).unwrap();
                        device.give_back(there);
                        let low = if step % 3 == 0 { 0.0 } else { 2.0 };
                        let numbers = back.typed::<f32>().unwrap();
                        assert_eq!((&numbers[..16], &numbers[16..]), (&[low; 16][..], &[2.0; 16][..]));
                        host.give_back(back);
                    }
                    assert_eq!(device.stats().num_allocations, 1);
                    assert_eq!(host.stats().num_allocations, 1);
                });
            }
        });
        drop((shared, source, gpu));
        fake.assert_clean();
    }
}

#[test]
fn steps_in_steady_state_allocate_nothing_and_wait_for_nothing() {
    let fake = FakeGpu::lazy();
    let gpu = fake.gpu();
    let (gather, compute) = (stream(&gpu), stream(&gpu));
    let mut pool = BufferPool::of(Memory::Gpu(gpu.clone()));
    let shard = pinned(&gpu, &[1.0; 64]);
    let mut out = on_gpu(&gpu, 64);
    let mut step = |pool: &mut BufferPool| {
        for _unit in 0..4 {
            let mut full = pool.take(DType::F32, 64).unwrap();
            gather.copy(shard.view(), full.view_mut()).unwrap();
            compute.copy(full.view(), out.view_mut()).unwrap();
            pool.give_back(full);
        }
    };
    step(&mut pool);
    let (allocations, calls, ran) = (fake.num_allocations(), fake.num_calls(), fake.num_ran());
    step(&mut pool);
    let calls = fake.num_calls() - calls;
    assert_eq!(fake.num_allocations(), allocations);
    assert_eq!(fake.num_ran(), ran, "the host waited for nothing");
    assert!(calls <= 4 * 2 * 6, "{calls} calls of the driver for eight copies");
    let stats = pool.stats();
    assert_eq!((stats.num_allocations, stats.peak_bytes, stats.peak_live_bytes), (1, 256, 256));
    assert_eq!(values(&gpu, &out), [1.0; 64]);
}

#[test]
fn a_rank_takes_the_gpu_of_its_number() {
    let fake = FakeGpu::lazy();
    fake.set_devices(3);
    let driver = fake.driver();
    let ordinal = gpu_for_rank(2, driver.num_gpus(), Sharing::Exclusive).unwrap();
    assert_eq!(driver.open(ordinal).unwrap().info().pci_bus_id, "0000:11:00.0");
}

#[test]
fn a_gpu_counts_what_buffers_hold() {
    let fake = FakeGpu::lazy();
    let gpu = fake.gpu();
    let device = Buffer::allocate(DType::F32, 1000, &Memory::Gpu(gpu.clone())).unwrap();
    let pinned = Buffer::allocate(DType::U8, 100, &Memory::Pinned(gpu.clone())).unwrap();
    let held = gpu.held_memory();
    assert_eq!((held.device_bytes, held.pinned_bytes), (4000, 100));
    drop((device, pinned));
    let held = gpu.held_memory();
    assert_eq!((held.device_bytes, held.peak_device_bytes), (0, 4000));
    assert_eq!((held.pinned_bytes, held.peak_pinned_bytes), (0, 100));
    drop(gpu);
    fake.assert_clean();
}

#[test]
fn a_trace_says_what_each_stream_did() {
    for way in ALL_WAYS {
        let fake = FakeGpu::new(way);
        let gpu = fake.gpu();
        let (copies, compute) = (stream(&gpu).named("copies"), stream(&gpu).named("compute"));
        let from = pinned(&gpu, &[1.0; 64]);
        let mut buffer = on_gpu(&gpu, 64);
        copies.copy(from.view(), buffer.view_mut()).unwrap();
        let trace = gpu.trace().unwrap();
        copies.copy(from.view(), buffer.view_mut()).unwrap();
        {
            let _layer = compute.span(|| "a layer".to_owned()).unwrap();
            compute.fill(buffer.view_mut(), 0).unwrap();
        }
        let spans = trace.finish().unwrap();
        let told: Vec<_> = spans.iter().map(|span| (span.stream, span.name.as_str())).collect();
        assert_eq!(
            told,
            [
                ("copies", "copy `256` bytes from `cpu` to `cuda:0`"),
                ("compute", "fill `256` bytes"),
                ("compute", "a layer")
            ]
        );
        assert!(spans.iter().all(|span| span.start_us > 0.0 && span.duration_us > 0.0), "{spans:?}");
        assert!(spans[1].start_us >= spans[0].start_us + spans[0].duration_us, "the fill waits: {spans:?}");
        copies.copy(from.view(), buffer.view_mut()).unwrap();
        drop((copies, compute, buffer, from, gpu));
        fake.assert_clean();
    }
}

#[test]
fn a_stream_says_how_long_it_stood_still() {
    for way in ALL_WAYS {
        let fake = FakeGpu::new(way);
        let gpu = fake.gpu();
        let (copies, compute) = (stream(&gpu), stream(&gpu).measuring_stalls());
        let from = pinned(&gpu, &[1.0; 64]);
        let (mut buffer, mut alone) = (on_gpu(&gpu, 64), on_gpu(&gpu, 64));
        let told = || {
            // It comes first: the other does its work while this one waits for it.
            compute.synchronize().unwrap();
            compute.stalled().unwrap()
        };
        // For the zeros that new memory has.
        compute.fill(alone.view_mut(), 0).unwrap();
        let before = told();
        compute.fill(alone.view_mut(), 0).unwrap();
        assert_eq!(told(), before, "it waited for nobody");
        // The fake's time is the work that it has run: a microsecond each.
        for _ in 0..40 {
            copies.copy(from.view(), buffer.view_mut()).unwrap();
        }
        compute.fill(buffer.view_mut(), 0).unwrap();
        let waited = told() - before;
        match way.1 {
            Eagerness::Lazy => assert!(waited >= Duration::from_micros(40), "{waited:?}"),
            _ => assert!(waited > Duration::ZERO, "{waited:?}"),
        }
        // A wait within a moment is part of it, and a stream that measures nothing says nothing.
        let before = told();
        {
            let _still = compute.stall().unwrap();
            copies.copy(from.view(), buffer.view_mut()).unwrap();
            let over = gpu.event(Timing::Untimed).unwrap();
            over.record(&copies).unwrap();
            compute.wait(&over).unwrap();
            compute.fill(buffer.view_mut(), 0).unwrap();
        }
        assert!(told() > before);
        assert_eq!(copies.stalled().unwrap(), Duration::ZERO);
        // Many moments: their events are used again.
        for _ in 0..500 {
            copies.copy(from.view(), buffer.view_mut()).unwrap();
            compute.fill(buffer.view_mut(), 0).unwrap();
        }
        assert!(told() > before);
        drop((copies, compute, buffer, alone, from, gpu));
        fake.assert_clean();
    }
}

#[test]
fn a_thread_says_how_long_it_waited_for_gpus() {
    let fake = FakeGpu::lazy();
    let gpu = fake.gpu();
    let before = host_waited();
    gpu.synchronize().unwrap();
    stream(&gpu).synchronize().unwrap();
    assert!(host_waited() > before);
    assert_eq!(std::thread::spawn(host_waited).join().unwrap(), Duration::ZERO, "each thread has its own");
}
