//! Memory that runs out, drivers that fail at any call, and drivers that are not what we need.

use std::path::Path;
use std::sync::Mutex;

use shardwise_device::cuda::{Args, CudaError, Driver, DriverVersion, Grid, Timing};
use shardwise_device::{Buffer, BufferPool, DType, DeviceError, Memory, Slice};
use shardwise_fake_gpu::{Eagerness, FakeGpu, cubin, stream};

const LAUNCH_FAILED: i32 = 719;
const OUT_OF_MEMORY: i32 = 2;

#[test]
fn what_is_missing_is_named() {
    let error = Driver::load(Some(Path::new("/nowhere/libcuda.so.1"))).unwrap_err().to_string();
    assert!(error.starts_with("no CUDA driver: could not load `/nowhere/libcuda.so.1`: "), "{error}");
    let error = Driver::load(Some(Path::new("libc.so.6"))).unwrap_err().to_string();
    assert_eq!(
        error,
        "`libc.so.6` (CUDA unknown) has no symbol `cuDriverGetVersion`: is it NVIDIA's driver?"
    );
    let fake = FakeGpu::lazy();
    fake.set_version(10020);
    let error = Driver::load(Some(fake.path())).unwrap_err().to_string();
    assert_eq!(error, "the driver supports CUDA 10.2, Shardwise needs 11.0: install a newer driver");
    fake.set_version(12040);
    let libtorch = DriverVersion { major: 13, minor: 0 };
    let error = fake.driver().require(libtorch, "libtorch 2.11.0+cu130").unwrap_err().to_string();
    assert_eq!(
        error,
        "the driver supports CUDA 12.4, libtorch 2.11.0+cu130 needs 13.0: install a newer driver"
    );
    assert_eq!(
        fake.driver().open(1).unwrap_err().to_string(),
        "there is no GPU `1`: the driver sees `1`, numbered from 0"
    );
    fake.set_devices(0);
    let error = Driver::load(Some(fake.path())).unwrap_err();
    assert!(matches!(error, CudaError::NoGpus { .. }), "{error}");
}

#[test]
fn old_gpus_are_refused_and_turing_has_no_bf16() {
    let fake = FakeGpu::lazy();
    fake.set_devices(2);
    fake.set_device(0, "Tesla V100", (7, 0), 1 << 30);
    fake.set_device(1, "Tesla T4", (7, 5), 1 << 30);
    let driver = fake.driver();
    let error = driver.open(0).unwrap_err().to_string();
    assert_eq!(error, "GPU `0` (`Tesla V100`) is sm_70, the oldest supported is sm_75");
    let turing = driver.open(1).unwrap();
    assert!(!turing.supports_bf16());
    turing.require_dtype(DType::F16).unwrap();
    let error = turing.require_dtype(DType::Bf16).unwrap_err().to_string();
    assert_eq!(error, "GPU `1` (`Tesla T4`, sm_75) does not compute in `bf16`: use fp16");
}

#[test]
fn what_is_kept_for_later_is_given_back_before_memory_is_refused() {
    let fake = FakeGpu::lazy();
    fake.set_device(0, "Small", (9, 0), 4000);
    let gpu = fake.gpu();
    let bytes = |numel| Buffer::allocate(DType::U8, numel, &Memory::Gpu(gpu.clone()));
    let kept = Mutex::new(Some(bytes(3000).unwrap()));
    gpu.when_out_of_memory(move || drop(kept.lock().unwrap().take()));
    let used = bytes(2000).unwrap();
    // There is nothing more to give.
    let error = bytes(3000).unwrap_err().to_string();
    assert!(error.contains("`3000` bytes") && error.contains("`2000`"), "{error}");
    drop((used, gpu));
    fake.assert_clean();
}

#[test]
fn memory_that_runs_out_is_counted_in_the_error() {
    let fake = FakeGpu::lazy();
    fake.set_device(0, "Small", (9, 0), 4000);
    fake.set_pinned_limit(1000);
    let gpu = fake.gpu();
    let _half = Buffer::allocate(DType::U8, 3000, &Memory::Gpu(gpu.clone())).unwrap();
    let error = Buffer::allocate(DType::F32, 500, &Memory::Gpu(gpu.clone())).unwrap_err().to_string();
    assert_eq!(error, "GPU `0` has no memory for `2000` bytes: `1000` of `4000` are free");
    let error = Buffer::allocate(DType::F32, 500, &Memory::Pinned(gpu.clone())).unwrap_err();
    assert!(matches!(error, DeviceError::Cuda(CudaError::OutOfPinnedMemory { bytes: 2000 })), "{error}");
    assert!(Buffer::allocate(DType::F32, usize::MAX, &Memory::Gpu(gpu.clone())).is_err());
    assert_eq!(gpu.memory_info().unwrap().free_bytes, 1000);
}

#[test]
fn a_pool_gives_up_what_waits_before_it_gives_up() {
    let fake = FakeGpu::lazy();
    fake.set_device(0, "Small", (9, 0), 4000);
    fake.set_pinned_limit(4000);
    let gpu = fake.gpu();
    for memory in [Memory::Gpu(gpu.clone()), Memory::Pinned(gpu.clone())] {
        let mut pool = BufferPool::of(memory);
        let small = pool.take(DType::U8, 1500).unwrap();
        let live = pool.take(DType::U8, 1000).unwrap();
        pool.give_back(small);
        let large = pool.take(DType::U8, 3000).unwrap();
        assert_eq!(pool.stats().free_bytes, 0);
        assert_eq!(pool.stats().live_bytes, 4000);
        assert!(pool.take(DType::U8, 1).is_err(), "there is nothing left to give up");
        pool.give_back(live);
        pool.give_back(large);
    }
    drop(gpu);
    fake.assert_clean();
}

/// A bit of everything, up to numbers on the host.
fn sequence(fake: &FakeGpu) -> Result<Vec<f32>, DeviceError> {
    let driver = Driver::load(Some(fake.path()))?;
    let gpu = driver.open(0)?;
    gpu.memory_info()?;
    let (upload, compute) = (gpu.stream(Default::default())?, gpu.stream(Default::default())?);
    // SAFETY: what the fake takes for a CUBIN.
    let fill = unsafe { gpu.load_module("test", &cubin(&["fill"])) }?.kernel("fill")?;
    let mut pinned = BufferPool::of(Memory::Pinned(gpu.clone()));
    let mut device = BufferPool::of(Memory::Gpu(gpu.clone()));
    let event = gpu.event(Timing::Untimed)?;
    let mut host = pinned.take(DType::F32, 64)?;
    for step in 0..2 {
        let mut from = pinned.take(DType::F32, 64)?;
        from.typed_mut::<f32>()?.fill(step as f32);
        let mut there = device.take(DType::F32, 64)?;
        upload.copy(from.view(), there.view_mut())?;
        let args = Args::new().write(there.view_mut().into_range(0..32)).value(9f32).value(32u64);
        // SAFETY: the arguments are those of the kernel.
        unsafe { compute.launch(&fill, Grid::linear(1, 32), args) }?;
        event.record(&compute)?;
        upload.wait(&event)?;
        compute.copy(there.view(), host.view_mut())?;
        pinned.give_back(from);
        device.give_back(there);
    }
    Ok(host.typed::<f32>()?.to_vec())
}

#[test]
fn a_failure_at_any_call_is_an_error_and_leaks_nothing() {
    for (way, code) in [
        ((1, Eagerness::Lazy), LAUNCH_FAILED),
        ((2, Eagerness::Random), LAUNCH_FAILED),
        ((3, Eagerness::Lazy), OUT_OF_MEMORY),
    ] {
        let fake = FakeGpu::new(way);
        let before = fake.num_calls();
        let numbers = sequence(&fake).unwrap();
        assert_eq!((numbers[0], numbers[63]), (9.0, 1.0));
        let num_calls = fake.num_calls() - before;
        assert!(num_calls > 100);
        fake.assert_clean();
        let mut failed = 0;
        for call in 1..=num_calls {
            fake.fail_at(call, code);
            match sequence(&fake) {
                // Where the end of an object met the error, or a pool freed what it had and tried again.
                Ok(numbers) => assert_eq!((numbers[0], numbers[63]), (9.0, 1.0), "call {call}"),
                Err(error) => {
                    failed += 1;
                    let told = error.to_string();
                    let named = told.contains("LAUNCH_FAILED") || told.contains("memory");
                    assert!(named, "call {call}: {told}");
                }
            }
            assert_eq!(fake.report(), "", "call {call} of {num_calls} with {code}");
        }
        assert!(failed * 2 > num_calls, "{failed} of {num_calls} calls were noticed");
    }
}

#[test]
fn a_copy_that_waits_is_over_even_if_the_wait_fails() {
    let fake = FakeGpu::lazy();
    let gpu = fake.gpu();
    let stream = stream(&gpu);
    let mut buffer = Buffer::allocate(DType::F32, 8, &Memory::Gpu(gpu.clone())).unwrap();
    // Counted once the events are made that later copies use again.
    let mut num_calls = 0;
    for _ in 0..3 {
        let before = fake.num_calls();
        stream.copy_and_wait(Slice::of(&[1f32; 8]), buffer.view_mut()).unwrap();
        num_calls = fake.num_calls() - before;
    }
    for call in 1..=num_calls {
        fake.fail_at(call, LAUNCH_FAILED);
        let copied = stream.copy_and_wait(Slice::of(&[1f32; 8]), buffer.view_mut());
        assert!(copied.is_err() || gpu.take_lost_error().is_some());
        assert!(stream.is_idle().unwrap(), "call {call} of {num_calls}");
    }
}

#[test]
fn errors_of_destructors_can_be_asked_for() {
    let fake = FakeGpu::lazy();
    let gpu = fake.gpu();
    let work = stream(&gpu);
    // Its context is entered, then it is destroyed.
    fake.fail_at(2, LAUNCH_FAILED);
    drop(work);
    let error = gpu.take_lost_error().unwrap().to_string();
    assert!(error.starts_with("`cuStreamDestroy` failed with `CUDA_ERROR_LAUNCH_FAILED`"), "{error}");
    assert_eq!(gpu.take_lost_error(), None);
}
