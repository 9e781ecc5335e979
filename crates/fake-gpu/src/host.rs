//! The kernels of the tree on the host, without a driver: compiled as C++, the threads of a block in turn.

use std::ffi::{CStr, c_char, c_int, c_uint, c_ulong, c_void};
use std::sync::OnceLock;

use libloading::{Library, Symbol};
use shardwise_kernels::cuda::{Launch, LaunchPlan, Params};

use crate::library_file;

/// A kernel: what it takes is the address of its structure.
type Kernel = unsafe extern "C" fn(*const c_void);

/// `host_launch` of `host.cpp`.
pub(crate) type Launcher =
    unsafe extern "C" fn(Kernel, *const c_void, c_uint, c_uint, c_uint, c_int) -> *const c_char;

/// How the driver asks for a kernel and the size of its structure.
pub(crate) type Find = unsafe extern "C" fn(*const c_char, *mut usize) -> Option<Kernel>;

/// Which thread of a block comes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// The first.
    Forwards,
    /// The last.
    Backwards,
}

/// All kernels, and some that are wrong on purpose (`broken.cu`).
pub struct HostKernels {
    library: Library,
}

impl HostKernels {
    /// Loaded once.
    pub fn get() -> &'static HostKernels {
        static KERNELS: OnceLock<HostKernels> = OnceLock::new();
        KERNELS.get_or_init(|| {
            let file = library_file(include_bytes!(concat!(env!("OUT_DIR"), "/kernels.so")));
            // SAFETY: built from our sources, without initialisers that matter.
            HostKernels { library: unsafe { Library::new(file.path()) }.unwrap() }
        })
    }

    /// Bytes of a kernel's structure, if there is such a kernel.
    pub fn structure_bytes(&self, name: &str) -> Option<usize> {
        // SAFETY: host.h declares such a function for every kernel.
        unsafe {
            let bytes: Symbol<'_, unsafe extern "C" fn() -> c_ulong> =
                self.library.get(format!("host_{name}_bytes\0")).ok()?;
            Some(bytes() as usize)
        }
    }

    /// Runs the call, with the threads of each block in this order.
    ///
    /// # Errors
    /// What a device would not do.
    ///
    /// # Safety
    /// The addresses in the call are valid for what the kernel does.
    pub unsafe fn launch<P: Params>(&self, launch: &Launch<P>, order: Order) -> Result<(), String> {
        // SAFETY: the structure is a `P`, alive during this call; the rest is this function's contract.
        unsafe { self.launch_raw(launch.entry().name, launch.plan(), launch.params(), size_of::<P>(), order) }
    }

    /// Runs the kernel `name` with the structure at `params`.
    ///
    /// # Errors
    /// What a device would not do.
    ///
    /// # Panics
    /// If there is no such kernel, or its structure has another size.
    ///
    /// # Safety
    /// `params` is valid for reads of `num_bytes` bytes, and the addresses there for what the kernel does.
    pub unsafe fn launch_raw(
        &self,
        name: &str,
        plan: LaunchPlan,
        params: *const c_void,
        num_bytes: usize,
        order: Order,
    ) -> Result<(), String> {
        assert_eq!(self.structure_bytes(name), Some(num_bytes), "the parameter of `{name}` on both sides");
        let LaunchPlan { grid, block, shared_bytes } = plan;
        let kernel = self.kernel(name).unwrap();
        // SAFETY: the structure is as large as the kernel's; the rest is this function's contract.
        let fault = unsafe { self.launcher()(kernel, params, grid, block, shared_bytes, order as c_int) };
        match fault.is_null() {
            true => Ok(()),
            // SAFETY: a string of the library's, which stays until the thread's next launch.
            false => Err(unsafe { CStr::from_ptr(fault) }.to_str().unwrap().to_owned()),
        }
    }

    fn kernel(&self, name: &str) -> Option<Kernel> {
        // SAFETY: host.h declares such a function for every kernel; the library stays.
        unsafe { self.library.get::<Kernel>(format!("host_{name}\0")).ok().map(|kernel| *kernel) }
    }

    pub(crate) fn launcher(&self) -> Launcher {
        // SAFETY: host.cpp declares it so; the library stays.
        unsafe { *self.library.get::<Launcher>("host_launch\0").unwrap() }
    }
}

/// For the driver.
///
/// # Safety
/// `name` is zero-terminated, `num_bytes` valid for a write.
pub(crate) unsafe extern "C" fn find(name: *const c_char, num_bytes: *mut usize) -> Option<Kernel> {
    // SAFETY: the caller's promise.
    let name = unsafe { CStr::from_ptr(name) }.to_str().ok()?;
    let kernels = HostKernels::get();
    let bytes = kernels.structure_bytes(name)?;
    // SAFETY: the caller's promise.
    unsafe { num_bytes.write(bytes) };
    kernels.kernel(name)
}
