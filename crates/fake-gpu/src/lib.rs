//! A CUDA driver without a GPU, for tests.
//!
//! `cpp/driver.cpp` is a driver over host memory that is as unhelpful as the rules allow: it runs work late, in any order that
//! streams and events leave open, and faults where a host touches a device's memory. It runs the kernels of the tree:
//! their CUDA sources, compiled as C++ (`cpp/host.h`, `cpp/host.cpp`), so that all that is built on
//! [`shardwise_device::cuda`] and [`GpuProcessor`] works on it.
//!
//! ```text
//! FakeGpu::new(way) ── driver() ─► Driver ── open(0) ─► Gpu ─► streams, buffers
//!                                                        └─ processor(&gpu) ─► GpuProcessor
//!                  └─ path() ───► NCCL over the same streams (`cpp/nccl.cpp`)
//! at the end          report() ─► what is still alive and what went wrong, or nothing
//! ```
//!
//! [`real_processor`] is the machine's own GPU, for tests that ask for one.
//!
//! Nothing here is for use outside of tests: what fails panics.

#![allow(clippy::unwrap_used)] // a test's tool may panic anywhere

mod host;
mod real;
mod words;

use std::ffi::{CStr, CString, c_char, c_int, c_long};
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use libloading::Library;
use shardwise_device::cuda::{Driver, Gpu, Priority};
use shardwise_kernels::cuda::{CudaKernelError, Source};
use shardwise_kernels::processor::{GpuProcessor, MachineCode};
use tempfile::NamedTempFile;

pub use host::{HostKernels, Order};
pub use real::real_processor;
pub use words::{cubin, module, on_gpu, pinned, stream, values};

/// How eager the fake is to run work that nothing waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum Eagerness {
    /// Not at all.
    Lazy = 0,
    /// It throws dice.
    Random = 1,
    /// At once.
    Eager = 2,
}

/// Seeds and eagerness that tests of order go through.
pub const ALL_WAYS: [(u64, Eagerness); 6] = [
    (1, Eagerness::Lazy),
    (2, Eagerness::Eager),
    (3, Eagerness::Random),
    (4, Eagerness::Random),
    (5, Eagerness::Random),
    (6, Eagerness::Random),
];

/// A driver of one test's own, with its own GPUs. Threads may share it.
pub struct FakeGpu {
    library: Library,
    /// A file of its own is loaded as a library of its own.
    file: NamedTempFile,
}

impl FakeGpu {
    /// One GPU, and work in an order that the seed and the eagerness say.
    pub fn new((seed, eagerness): (u64, Eagerness)) -> FakeGpu {
        let file = library_file(include_bytes!(concat!(env!("OUT_DIR"), "/driver.so")));
        // SAFETY: our own library, without initialisers that matter.
        let library = unsafe { Library::new(file.path()).unwrap() };
        let fake = FakeGpu { library, file };
        fake.function::<extern "C" fn(u64, c_int)>("fake_adversary")(seed, eagerness as c_int);
        let launch = HostKernels::get().launcher();
        fake.function::<extern "C" fn(host::Find, host::Launcher)>("fake_kernels")(host::find, launch);
        fake
    }

    /// One GPU that runs only what something waits for.
    pub fn lazy() -> FakeGpu {
        FakeGpu::new((1, Eagerness::Lazy))
    }

    /// The host reaches device memory at its address, and work runs at once: so that libtorch's CPU operations
    /// can stand in for its CUDA ones. For memory that is allocated from now on.
    pub fn allow_host_access(&self) {
        self.function::<extern "C" fn()>("fake_host_access")()
    }

    /// The library, for whoever loads drivers by path. It is gone with the fake.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// The driver, loaded.
    pub fn driver(&self) -> Arc<Driver> {
        Driver::load(Some(self.path())).unwrap()
    }

    /// Opens GPU `ordinal`.
    pub fn open(&self, ordinal: u32) -> Gpu {
        self.driver().open(ordinal).unwrap()
    }

    /// Opens GPU 0.
    pub fn gpu(&self) -> Gpu {
        self.open(0)
    }

    /// A stream of its own on `gpu`, with the kernels.
    pub fn processor(&self, gpu: &Gpu) -> Arc<GpuProcessor> {
        let stream = gpu.stream(Priority::Normal).unwrap();
        // SAFETY: what the fake takes for machine code.
        Arc::new(unsafe { GpuProcessor::new(stream, FakeCode) })
    }

    /// The driver supports CUDA `version`: 13000 for 13.0.
    pub fn set_version(&self, version: i32) {
        self.function::<extern "C" fn(c_int)>("fake_driver_version")(version)
    }

    /// How many GPUs there are. Before any is opened.
    pub fn set_devices(&self, count: i32) {
        self.function::<extern "C" fn(c_int)>("fake_devices")(count)
    }

    /// What GPU `ordinal` is.
    pub fn set_device(&self, ordinal: i32, name: &str, (major, minor): (i32, i32), total_bytes: usize) {
        let name = CString::new(name).unwrap();
        let set = self.function::<extern "C" fn(c_int, *const c_char, c_int, c_int, usize)>("fake_device");
        set(ordinal, name.as_ptr(), major, minor, total_bytes);
    }

    /// Whether GPUs reach each other's memory.
    pub fn set_peers(&self, can: bool) {
        self.function::<extern "C" fn(c_int)>("fake_peers")(can as c_int)
    }

    /// How much memory can be pinned.
    pub fn set_pinned_limit(&self, bytes: usize) {
        self.function::<extern "C" fn(usize)>("fake_pinned_limit")(bytes)
    }

    /// The `calls`-th call from now fails with the driver's number `code`.
    pub fn fail_at(&self, calls: i64, code: i32) {
        self.function::<extern "C" fn(c_long, c_int)>("fake_fail_at")(calls, code)
    }

    /// Calls of entry points so far.
    pub fn num_calls(&self) -> i64 {
        self.function::<extern "C" fn() -> c_long>("fake_calls")()
    }

    /// Operations on streams that have run.
    pub fn num_ran(&self) -> i64 {
        self.function::<extern "C" fn() -> c_long>("fake_ran")()
    }

    /// Allocations that were ever made, of devices and pinned.
    pub fn num_allocations(&self) -> i64 {
        self.function::<extern "C" fn() -> c_long>("fake_allocations")()
    }

    /// NCCL is of version `version`: 22809 for 2.28.9. Its library is [`FakeGpu::path`] too.
    pub fn set_nccl_version(&self, version: i32) {
        self.function::<extern "C" fn(c_int)>("fake_nccl_version")(version)
    }

    /// The `calls`-th call of NCCL on GPU `ordinal` from now fails with NCCL's number `code`.
    pub fn fail_nccl_at(&self, ordinal: i32, calls: i64, code: i32) {
        self.function::<extern "C" fn(c_int, c_long, c_int)>("fake_nccl_fail_at")(ordinal, calls, code)
    }

    /// Calls of NCCL on GPU `ordinal` so far.
    pub fn num_nccl_calls(&self, ordinal: i32) -> i64 {
        self.function::<extern "C" fn(c_int) -> c_long>("fake_nccl_calls")(ordinal)
    }

    /// Communicators of GPU `ordinal` report NCCL's error `code` from the background from now on.
    pub fn set_nccl_async_error(&self, ordinal: i32, code: i32) {
        self.function::<extern "C" fn(c_int, c_int)>("fake_nccl_async_error")(ordinal, code)
    }

    /// What GPU `ordinal` exchanges is never over from now on.
    pub fn stall_nccl(&self, ordinal: i32) {
        self.function::<extern "C" fn(c_int)>("fake_nccl_stall")(ordinal)
    }

    /// What is alive and what went wrong; empty at the end of a good test.
    pub fn report(&self) -> String {
        let report = self.function::<extern "C" fn() -> *const c_char>("fake_report")();
        // SAFETY: a string of the fake's own, zero-terminated, which stays until the next report.
        unsafe { CStr::from_ptr(report) }.to_string_lossy().into_owned()
    }

    /// Panics unless all is well and nothing is alive.
    #[track_caller]
    pub fn assert_clean(&self) {
        assert_eq!(self.report(), "");
    }

    /// A function of `driver.cpp` or `nccl.cpp`; its callers here say what it takes.
    fn function<F: Copy>(&self, name: &str) -> F {
        // SAFETY: each caller names the type that the function has there.
        unsafe { *self.library.get::<F>(name.as_bytes()).unwrap() }
    }
}

/// What fake GPUs take for machine code of a source: the names of its kernels. For processors on streams of a test's own.
#[derive(Debug, Clone, Copy)]
pub struct FakeCode;

impl MachineCode for FakeCode {
    fn of(&self, source: Source) -> Result<Vec<u8>, CudaKernelError> {
        Ok(cubin(&source.entries().collect::<Vec<_>>()))
    }
}

/// A library as a file, which goes with the result.
fn library_file(bytes: &[u8]) -> NamedTempFile {
    let mut file = tempfile::Builder::new().prefix("shardwise-fake-").suffix(".so").tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}
