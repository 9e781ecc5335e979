//! The fake driver (`driver.cpp`): compiled once, loaded anew for each test.

use std::ffi::{CStr, CString, c_char, c_int, c_long};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use libloading::Library;
use shardwise_device::cuda::{Driver, Gpu, Module, Priority, Stream};
use shardwise_device::{Buffer, DType, Memory};

const SOURCES: [&str; 2] = [include_str!("driver.cpp"), include_str!("machine.h")];

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

pub const ALL_WAYS: [(u64, Eagerness); 6] = [
    (1, Eagerness::Lazy),
    (2, Eagerness::Eager),
    (3, Eagerness::Random),
    (4, Eagerness::Random),
    (5, Eagerness::Random),
    (6, Eagerness::Random),
];

/// A driver of one test's own, with its own GPUs.
pub struct Fake {
    library: Library,
    path: PathBuf,
}

impl Fake {
    /// One GPU, and work in an order that `seed` and `eagerness` say.
    pub fn new((seed, eagerness): (u64, Eagerness)) -> Fake {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = compiled().with_file_name(format!("fake-{}-{number}.so", std::process::id()));
        // A file of its own is loaded as a library of its own.
        std::fs::copy(compiled(), &path).unwrap();
        // SAFETY: our own library, without initialisers that matter.
        let library = unsafe { Library::new(&path).unwrap() };
        let fake = Fake { library, path };
        fake.function::<extern "C" fn(u64, c_int)>("fake_adversary")(seed, eagerness as c_int);
        fake
    }

    pub fn lazy() -> Fake {
        Fake::new((1, Eagerness::Lazy))
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn driver(&self) -> Arc<Driver> {
        Driver::load(Some(&self.path)).unwrap()
    }

    pub fn gpu(&self) -> Gpu {
        self.driver().open(0).unwrap()
    }

    pub fn set_version(&self, version: i32) {
        self.function::<extern "C" fn(c_int)>("fake_driver_version")(version)
    }

    pub fn set_devices(&self, count: i32) {
        self.function::<extern "C" fn(c_int)>("fake_devices")(count)
    }

    pub fn set_device(&self, ordinal: i32, name: &str, (major, minor): (i32, i32), total_bytes: usize) {
        let name = CString::new(name).unwrap();
        let set = self.function::<extern "C" fn(c_int, *const c_char, c_int, c_int, usize)>("fake_device");
        set(ordinal, name.as_ptr(), major, minor, total_bytes);
    }

    pub fn set_peers(&self, can: bool) {
        self.function::<extern "C" fn(c_int)>("fake_peers")(can as c_int)
    }

    pub fn set_pinned_limit(&self, bytes: usize) {
        self.function::<extern "C" fn(usize)>("fake_pinned_limit")(bytes)
    }

    /// The `calls`-th call from now fails.
    pub fn fail_at(&self, calls: i64, code: i32) {
        self.function::<extern "C" fn(c_long, c_int)>("fake_fail_at")(calls, code)
    }

    pub fn num_calls(&self) -> i64 {
        self.function::<extern "C" fn() -> c_long>("fake_calls")()
    }

    /// Operations on streams that have run.
    pub fn num_ran(&self) -> i64 {
        self.function::<extern "C" fn() -> c_long>("fake_ran")()
    }

    pub fn num_allocations(&self) -> i64 {
        self.function::<extern "C" fn() -> c_long>("fake_allocations")()
    }

    /// What is alive and what went wrong; empty at the end of a good test.
    pub fn report(&self) -> String {
        let report = self.function::<extern "C" fn() -> *const c_char>("fake_report")();
        // SAFETY: a string of the fake's own, zero-terminated, which stays until the next report.
        unsafe { CStr::from_ptr(report) }.to_string_lossy().into_owned()
    }

    #[track_caller]
    pub fn assert_clean(&self) {
        assert_eq!(self.report(), "");
    }

    /// A function of `driver.cpp`; its callers here say what it takes.
    fn function<F: Copy>(&self, name: &str) -> F {
        // SAFETY: each caller names the type that the function has in `driver.cpp`.
        unsafe { *self.library.get::<F>(name.as_bytes()).unwrap() }
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// The library, compiled from the source as it is now.
fn compiled() -> &'static Path {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let mut hasher = DefaultHasher::new();
        SOURCES.hash(&mut hasher);
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fake-cuda");
        std::fs::create_dir_all(&folder).unwrap();
        let library = folder.join(format!("{:016x}.so", hasher.finish()));
        if !library.exists() {
            let partial = folder.join(format!("{}.partial", std::process::id()));
            let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cuda/driver.cpp");
            // Without unique symbols: each copy of the library has its own state.
            let output = Command::new("c++")
                .args([
                    "-std=c++17",
                    "-O1",
                    "-Wall",
                    "-Wextra",
                    "-Werror",
                    "-fPIC",
                    "-shared",
                    "-fno-gnu-unique",
                ])
                .arg(source)
                .arg("-o")
                .arg(&partial)
                .output()
                .expect("these tests need a C++ compiler called `c++`");
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            std::fs::rename(partial, &library).unwrap();
        }
        library
    })
}

/// A module with the fake's kernels of these names.
pub fn cubin(kernels: &[&str]) -> Vec<u8> {
    let mut image = vec![0; 64];
    image[..6].copy_from_slice(b"\x7fELF\x02\x01");
    image[18] = 190;
    for kernel in kernels {
        image.extend_from_slice(kernel.as_bytes());
        image.push(0);
    }
    image.push(0);
    image
}

pub fn module(gpu: &Gpu, kernels: &[&str]) -> Module {
    // SAFETY: what the fake takes for a CUBIN.
    unsafe { gpu.load_module("test", &cubin(kernels)) }.unwrap()
}

pub fn stream(gpu: &Gpu) -> Stream {
    gpu.stream(Priority::Normal).unwrap()
}

pub fn on_gpu(gpu: &Gpu, numel: usize) -> Buffer {
    Buffer::allocate(DType::F32, numel, &Memory::Gpu(gpu.clone())).unwrap()
}

pub fn pinned(gpu: &Gpu, values: &[f32]) -> Buffer {
    let mut buffer = Buffer::allocate(DType::F32, values.len(), &Memory::Pinned(gpu.clone())).unwrap();
    buffer.typed_mut().unwrap().copy_from_slice(values);
    buffer
}

/// What a buffer of a GPU holds once all streams are through with it.
pub fn values(gpu: &Gpu, buffer: &Buffer) -> Vec<f32> {
    let mut out = vec![0f32; buffer.numel()];
    stream(gpu).copy_and_wait(buffer.view(), shardwise_device::SliceMut::of(&mut out)).unwrap();
    out
}
