//! The fake sees what a test of it relies on: wrong kernels, memory used wrongly, hosts that reach too far.

#![allow(clippy::unwrap_used)] // a failed test may panic anywhere

use shardwise_device::cuda::{Args, Gpu, Grid, Kernel, Stream};
use shardwise_device::{Buffer, DType, Memory, Slice};
use shardwise_fake_gpu::{ALL_WAYS, Eagerness, FakeGpu, module, on_gpu, pinned, stream, values};
use shardwise_kernels::Processor;

/// What kernels of `broken.cu` take.
#[repr(C)]
struct Broken {
    out: u64,
    numel: u64,
}

/// Launches a kernel of `broken.cu` on 64 threads.
fn launch(stream: &Stream, kernel: &Kernel, out: u64) {
    let params = Broken { out, numel: 64 };
    // SAFETY: the structure is alive and as large as its type.
    let args = unsafe { Args::new().structure((&raw const params).cast(), size_of::<Broken>()) };
    let grid = Grid { shared_bytes: 256, ..Grid::linear(1, 64) };
    // SAFETY: the buffers of a test end after the stream is through; what is wrong with a kernel the fake sees.
    unsafe { stream.launch(kernel, grid, args) }.unwrap();
}

fn address(buffer: &Buffer) -> u64 {
    buffer.as_ptr().addr().get() as u64
}

fn broken(gpu: &Gpu, name: &str) -> Kernel {
    module(gpu, &[name]).kernel(name).unwrap()
}

#[test]
fn faults_of_kernels_are_reported_and_end_the_context() {
    for (name, fault) in [
        ("broken_barrier", "threads of a block went different ways around a barrier"),
        ("broken_shared", "a block wrote beyond its shared memory"),
        ("broken_alignment", "a store is not aligned"),
    ] {
        let fake = FakeGpu::lazy();
        let gpu = fake.gpu();
        let (stream, out) = (stream(&gpu), on_gpu(&gpu, 64));
        gpu.synchronize().unwrap();
        launch(&stream, &broken(&gpu, name), address(&out));
        let told = stream.synchronize().unwrap_err().to_string();
        assert!(told.contains("CUDA_ERROR_LAUNCH_FAILED"), "{told}");
        assert!(fake.report().starts_with(&format!("{name}: {fault}; ")), "{}", fake.report());
    }
}

#[test]
fn threads_run_in_either_order() {
    let mut seen = std::collections::BTreeSet::new();
    for seed in 0..20 {
        let fake = FakeGpu::new((seed, Eagerness::Lazy));
        let gpu = fake.gpu();
        let (stream, out) = (stream(&gpu), on_gpu(&gpu, 64));
        gpu.synchronize().unwrap();
        launch(&stream, &broken(&gpu, "broken_race"), address(&out));
        stream.synchronize().unwrap();
        seen.insert(values(&gpu, &out).into_iter().map(f32::to_bits).collect::<Vec<_>>());
        drop((stream, out, gpu));
        fake.assert_clean();
    }
    assert_eq!(seen.len(), 2, "a race shows");
}

#[test]
fn kernels_that_leave_their_memory_are_seen() {
    let fake = FakeGpu::lazy();
    let gpu = fake.gpu();
    let (work, out) = (stream(&gpu), on_gpu(&gpu, 64));
    gpu.synchronize().unwrap();
    // 64 numbers from the 33rd of 64 on.
    launch(&work, &broken(&gpu, "broken_race"), address(&out) + 32 * 4);
    work.synchronize().unwrap();
    assert!(fake.report().starts_with("broken_race wrote past the end of its memory; "), "{}", fake.report());

    let fake = FakeGpu::lazy();
    let gpu = fake.gpu();
    let (work, out) = (stream(&gpu), on_gpu(&gpu, 64));
    let ended = address(&out);
    drop(out);
    launch(&work, &broken(&gpu, "broken_race"), ended);
    work.synchronize().unwrap();
    assert!(fake.report().starts_with("broken_race uses freed memory; "), "{}", fake.report());
}

#[test]
fn memory_of_another_gpu_needs_access() {
    for access in [true, false] {
        let fake = FakeGpu::lazy();
        fake.set_devices(2);
        let (gpu, other) = (fake.open(0), fake.open(1));
        let (work, there) = (stream(&gpu), on_gpu(&other, 64));
        other.synchronize().unwrap();
        if access {
            gpu.enable_peer_access(&other).unwrap();
        }
        launch(&work, &broken(&gpu, "broken_race"), address(&there));
        work.synchronize().unwrap();
        assert_eq!(values(&other, &there) != [0.0; 64], access);
        let refused = fake.report().starts_with("broken_race uses memory of another GPU; ");
        assert_eq!(refused, !access, "{}", fake.report());
    }
}

#[test]
fn a_host_with_access_computes_on_device_memory() {
    for way in ALL_WAYS {
        let fake = FakeGpu::new(way);
        fake.allow_host_access();
        let gpu = fake.gpu();
        let processor = Processor::Gpu(fake.processor(&gpu));
        let from = pinned(&gpu, &[1.5; 1000]);
        let (mut a, mut b) = (on_gpu(&gpu, 1000), on_gpu(&gpu, 1000));
        stream(&gpu).copy(from.view(), a.view_mut()).unwrap();
        processor.scale(a.view(), 2.0, b.view_mut()).unwrap();
        // SAFETY: device memory that the host reaches; its work ran at once.
        let on_host = unsafe { Slice::from_raw(b.as_ptr(), 1000, DType::F32, shardwise_device::Place::Cpu) };
        assert_eq!(on_host.typed::<f32>().unwrap(), [3.0; 1000]);
        assert_eq!(processor.sums_of_squares(&[b.view()]).unwrap(), [9000.0]);
        drop((from, a, b, processor, gpu));
        fake.assert_clean();
    }
}

#[test]
fn blocks_are_of_any_size() {
    for way in ALL_WAYS {
        let fake = FakeGpu::new(way);
        let gpu = fake.gpu();
        for memory in [Memory::Gpu(gpu.clone()), Memory::Pinned(gpu.clone())] {
            for bytes in [1, 4095, 4096, 4097, 10_000] {
                let mut buffer = Buffer::allocate(DType::U8, bytes, &memory).unwrap();
                let mut back = vec![0; bytes];
                if memory.place() == shardwise_device::Place::Cpu {
                    buffer.typed_mut::<u8>().unwrap().fill(7);
                    back.copy_from_slice(buffer.typed().unwrap());
                } else {
                    stream(&gpu).fill(buffer.view_mut(), 7).unwrap();
                    stream(&gpu)
                        .copy_and_wait(buffer.view(), shardwise_device::SliceMut::of(&mut back))
                        .unwrap();
                }
                assert_eq!(back, vec![7; bytes]);
            }
        }
        drop(gpu);
        fake.assert_clean();
    }
}
