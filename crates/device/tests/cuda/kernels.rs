//! Kernels and their arguments.

use shardwise_device::cuda::{Access, Args, CudaError, Grid, Kernel, Stream};
use shardwise_device::{Buffer, DType, Memory, Place, Slice, SliceMut};
use shardwise_fake_gpu::{ALL_WAYS, FakeGpu, cubin, module, on_gpu, pinned, stream, values};

const GRID: Grid = Grid { blocks: [2, 1, 1], threads: [64, 1, 1], shared_bytes: 0 };

/// A launch of one of the fake's kernels. They check their bounds, and wrong arguments are refused: that is tested here.
fn launch(stream: &Stream, kernel: &Kernel, grid: Grid, args: Args<'_>) -> Result<(), CudaError> {
    // SAFETY: as said above.
    unsafe { stream.launch(kernel, grid, args) }
}

fn told(result: Result<(), CudaError>) -> String {
    result.unwrap_err().to_string()
}

#[test]
fn arguments_arrive_as_they_are() {
    for way in ALL_WAYS {
        let fake = FakeGpu::new(way);
        let gpu = fake.gpu();
        let stream = stream(&gpu);
        let module = module(&gpu, &["add", "fill", "scale_small"]);
        let (add, fill) = (module.kernel("add").unwrap(), module.kernel("fill").unwrap());
        let small = module.kernel("scale_small").unwrap();
        let (mut a, mut sum) = (on_gpu(&gpu, 100), on_gpu(&gpu, 100));
        let b = pinned(&gpu, &[0.5; 100]);
        let args = Args::new().write(a.view_mut().into_range(10..100)).value(1.5f32).value(90u64);
        launch(&stream, &fill, GRID, args).unwrap();
        let args = Args::new().read(a.view()).read(b.view()).write(sum.view_mut()).value(100u64);
        launch(&stream, &add, GRID, args).unwrap();
        let args =
            Args::new().write(sum.view_mut()).value(255u8).value(65535u16).value(-65790i32).value(100u32);
        launch(&stream, &small, GRID, args).unwrap();
        // The kernel runs after the module and its kernels are gone from here.
        drop((module, add, fill, small));
        let values = values(&gpu, &sum);
        assert_eq!(values[..10], [0.5; 10]);
        assert_eq!(values[10..], [2.0; 90]);
        drop((a, b, sum, stream, gpu));
        fake.assert_clean();
    }
}

#[test]
fn a_module_waits_for_its_kernels() {
    let fake = FakeGpu::lazy();
    let gpu = fake.gpu();
    let stream = stream(&gpu);
    let mut out = on_gpu(&gpu, 4);
    let module = module(&gpu, &["fill"]);
    let args = Args::new().write(out.view_mut()).value(4.0f32).value(4u64);
    launch(&stream, &module.kernel("fill").unwrap(), GRID, args).unwrap();
    drop(module);
    assert_eq!(values(&gpu, &out), [4.0; 4]);
    drop((out, stream, gpu));
    fake.assert_clean();
}

#[test]
fn wrong_arguments_are_refused_before_they_reach_the_gpu() {
    let fake = FakeGpu::lazy();
    fake.set_devices(2);
    let driver = fake.driver();
    let (gpu, other) = (driver.open(0).unwrap(), driver.open(1).unwrap());
    let stream = stream(&gpu);
    let module = module(&gpu, &["fill"]);
    let fill = module.kernel("fill").unwrap();
    let mut out = on_gpu(&gpu, 8);
    let refused = |args: Args<'_>| told(launch(&stream, &fill, GRID, args));
    assert_eq!(
        refused(Args::new().write(out.view_mut()).value(1.0f64).value(8u64)),
        "kernel `fill` takes parameters of `[8, 4, 8]` bytes, got arguments of `[8, 8, 8]`"
    );
    assert!(refused(Args::new().write(out.view_mut()).value(1.0f32)).contains("got arguments of `[8, 4]`"));
    let mut there = on_gpu(&other, 8);
    assert_eq!(
        refused(Args::new().write(there.view_mut()).value(1.0f32).value(8u64)),
        "argument `0` of kernel `fill` is on `cuda:1`, the kernel runs on GPU `0`"
    );
    let mut host = [0f32; 8];
    assert!(
        refused(Args::new().write(SliceMut::of(&mut host)).value(1.0f32).value(8u64)).contains("is on `cpu`")
    );
    let elsewhere = other.stream(Default::default()).unwrap();
    let args = Args::new().write(there.view_mut()).value(1.0f32).value(8u64);
    let error = told(launch(&elsewhere, &fill, GRID, args));
    assert_eq!(error, "a `kernel` of GPU `0` was used on GPU `1`");
    assert_eq!(module.kernel("absent").unwrap_err().to_string(), "module `test` has no kernel `absent`");
    let image = cubin(&["fill"]);
    // SAFETY: it is cut short, which is found out.
    let cut = unsafe { gpu.load_module("cut", &image[..40]) }.unwrap_err();
    assert_eq!(cut.to_string(), "module `cut` is no CUBIN: it is shorter than an ELF header");
    let args = Args::new().write(out.view_mut()).value(1.0f32).value(8u64);
    let error = told(launch(&stream, &fill, Grid::linear(1, 2000), args));
    assert!(
        error.starts_with("`cuLaunchKernel` failed with `CUDA_ERROR_INVALID_VALUE` (invalid argument)"),
        "{error}"
    );
    assert!(error.contains("launch kernel `fill`"), "{error}");
}

/// What `sum_in_order`, a kernel of the tree, takes.
#[repr(C)]
struct SumInOrder {
    terms: u64,
    total: u64,
    numel: u64,
}

fn structure<T>(structure: &T) -> Args<'_> {
    // SAFETY: it is alive and as large as its type.
    unsafe { Args::new().structure((&raw const *structure).cast(), size_of::<T>()) }
}

/// The address of a view, for a structure.
fn address(view: Slice<'_>) -> u64 {
    view.as_ptr().addr() as u64
}

#[test]
fn a_structure_arrives_and_its_memory_is_in_use() {
    for way in ALL_WAYS {
        let fake = FakeGpu::new(way);
        let gpu = fake.gpu();
        let (upload, compute, download) = (stream(&gpu), stream(&gpu), stream(&gpu));
        let sum = module(&gpu, &["sum_in_order"]).kernel("sum_in_order").unwrap();
        let bytes = |memory| Buffer::allocate(DType::U8, 16 * 8, &memory).unwrap();
        let mut terms = bytes(Memory::Pinned(gpu.clone()));
        let numbers: Vec<u8> = (0..16).flat_map(|i| f64::from(i).to_ne_bytes()).collect();
        terms.typed_mut::<u8>().unwrap().copy_from_slice(&numbers);
        let (mut a, b) = (bytes(Memory::Gpu(gpu.clone())), bytes(Memory::Gpu(gpu.clone())));
        upload.copy(terms.view(), a.view_mut()).unwrap();
        let params = SumInOrder { terms: address(a.view()), total: address(b.view()) + 8, numel: 16 };
        // It waits for the copy that it reads, and the next copies wait for it: by what is said of the structure alone.
        let args = structure(&params).uses(a.view(), Access::Read).uses(b.view(), Access::Write);
        launch(&compute, &sum, Grid::linear(1, 256), args).unwrap();
        upload.fill(a.view_mut(), 0xff).unwrap();
        let mut told = bytes(Memory::Pinned(gpu.clone()));
        download.copy(b.view(), told.view_mut()).unwrap();
        assert_eq!(told.typed::<u8>().unwrap()[8..16], 120f64.to_ne_bytes());
        // Buffers that end wait for it too.
        let args = structure(&params).uses(a.view(), Access::Read).uses(b.view(), Access::Write);
        launch(&compute, &sum, Grid::linear(1, 256), args).unwrap();
        drop((terms, a, b, told, upload, compute, download, sum, gpu));
        fake.assert_clean();
    }
}

#[test]
fn a_structure_of_another_size_and_memory_out_of_reach_are_refused() {
    let fake = FakeGpu::lazy();
    fake.set_devices(2);
    let driver = fake.driver();
    let (gpu, other) = (driver.open(0).unwrap(), driver.open(1).unwrap());
    let stream = stream(&gpu);
    let sum = module(&gpu, &["sum_in_order"]).kernel("sum_in_order").unwrap();
    let (here, there, host) = (on_gpu(&gpu, 4), on_gpu(&other, 4), [0f32; 4]);
    let pinned = pinned(&gpu, &[0.0; 4]);
    let nothing = SumInOrder { terms: 0, total: address(here.view()), numel: 0 };
    let told = |args: Args<'_>| told(launch(&stream, &sum, Grid::linear(1, 32), args));
    assert_eq!(
        told(structure(&0u64).uses(here.view(), Access::Write)),
        "kernel `sum_in_order` takes parameters of `[24]` bytes, got arguments of `[8]`"
    );
    assert!(told(structure(&nothing).value(1u64)).contains("got arguments of `[24, 8]`"));
    assert_eq!(
        told(structure(&nothing).uses(here.view(), Access::Write).uses(there.view(), Access::Read)),
        "argument `0` of kernel `sum_in_order` is on `cuda:1`, the kernel runs on GPU `0`"
    );
    assert!(told(structure(&nothing).uses(Slice::of(&host), Access::Read)).contains("is on `cpu`"));
    // SAFETY: a view without a log, of memory that lives longer than the launch.
    let unlogged = unsafe { Slice::from_raw(here.as_ptr(), 4, DType::F32, here.place()) };
    let args = structure(&nothing).uses(unlogged, Access::Write).uses(pinned.view(), Access::Read);
    launch(&stream, &sum, Grid::linear(1, 32), args).unwrap();
    stream.synchronize().unwrap();
    assert_eq!(values(&gpu, &here)[..2], [0.0; 2]);
}

#[test]
fn shared_memory_beyond_the_default_has_to_be_allowed() {
    let fake = FakeGpu::lazy();
    let gpu = fake.gpu();
    let stream = stream(&gpu);
    let fill = module(&gpu, &["fill"]).kernel("fill").unwrap();
    let mut out = on_gpu(&gpu, 8);
    let grid = Grid { shared_bytes: 100 << 10, ..GRID };
    let mut launch = || {
        let args = Args::new().write(out.view_mut()).value(1.0f32).value(8u64);
        launch(&stream, &fill, grid, args)
    };
    assert!(launch().is_err());
    fill.allow_shared_bytes(100 << 10).unwrap();
    launch().unwrap();
    assert!(fill.allow_shared_bytes(1 << 30).is_err());
}

#[test]
fn a_kernel_that_fails_is_reported_by_who_waits() {
    let fake = FakeGpu::lazy();
    let gpu = fake.gpu();
    let stream = stream(&gpu);
    let module = module(&gpu, &["fail"]);
    let fail = module.kernel("fail").unwrap();
    let mut out = Buffer::allocate(DType::F32, 4, &Memory::Pinned(gpu.clone())).unwrap();
    let from = on_gpu(&gpu, 4);
    launch(&stream, &fail, GRID, Args::new()).unwrap();
    stream.copy(from.view(), out.view_mut()).unwrap();
    let error = out.typed::<f32>().unwrap_err().to_string();
    assert_eq!(
        error,
        "`cuEventSynchronize` failed with `CUDA_ERROR_ILLEGAL_ADDRESS` (an illegal memory access was encountered): \
         GPU `0`, asked to wait for the use of a buffer"
    );
    drop((module, fail, out, from, stream));
    assert!(gpu.take_lost_error().is_some(), "destructors say that the GPU has failed");
}

#[test]
fn empty_views_are_null_and_touch_nothing() {
    let fake = FakeGpu::lazy();
    let gpu = fake.gpu();
    let stream = stream(&gpu);
    let fill = module(&gpu, &["fill"]).kernel("fill").unwrap();
    let mut empty = on_gpu(&gpu, 0);
    assert_eq!(empty.place(), Place::Cuda { ordinal: 0 });
    stream.fill(empty.view_mut(), 1).unwrap();
    stream.copy(Slice::from(on_gpu(&gpu, 8).view_mut().into_range(3..3)), empty.view_mut()).unwrap();
    let mut out = on_gpu(&gpu, 1);
    launch(&stream, &fill, GRID, Args::new().write(out.view_mut().into_range(1..1)).value(1f32).value(1u64))
        .unwrap();
    stream.synchronize().unwrap();
    assert_eq!(
        fake.report().split("; ").next(),
        Some("fill uses an unknown address"),
        "the null was passed on"
    );
}
