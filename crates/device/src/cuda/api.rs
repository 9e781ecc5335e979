//! The entry points of `libcuda.so.1` that we use, as a table of function pointers.
//!
//! Nothing is linked: the table is filled when a run asks for CUDA. Signatures follow `cuda.h` of CUDA 13, with
//! the versioned symbols behind its macros. CUDA 11.0 has all but the optional ones.

use std::ffi::{c_char, c_int, c_uint, c_void};

use libloading::Library;

/// What every entry point returns; 0 is success.
pub(crate) type Code = c_int;

/// Address in a GPU's memory. Also the address of pinned host memory as GPUs see it.
pub(crate) type Address = u64;

/// An opaque pointer of the driver: context, stream, event, module or function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub(crate) struct Handle(pub(crate) *mut c_void);

// SAFETY: a handle is a name for an object of the driver, whose entry points may be called from any thread.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

impl Handle {
    pub(crate) const NULL: Handle = Handle(std::ptr::null_mut());
}

pub(crate) const SUCCESS: Code = 0;
pub(crate) const OUT_OF_MEMORY: Code = 2;
pub(crate) const NO_DEVICE: Code = 100;
pub(crate) const NOT_FOUND: Code = 500;
pub(crate) const NOT_READY: Code = 600;
pub(crate) const PEER_ACCESS_ALREADY_ENABLED: Code = 704;

pub(crate) const ATTRIBUTE_MULTIPROCESSORS: c_int = 16;
pub(crate) const ATTRIBUTE_CAPABILITY_MAJOR: c_int = 75;
pub(crate) const ATTRIBUTE_CAPABILITY_MINOR: c_int = 76;
pub(crate) const P2P_PERFORMANCE_RANK: c_int = 1;
pub(crate) const P2P_NATIVE_ATOMICS: c_int = 3;
pub(crate) const FUNCTION_MAX_DYNAMIC_SHARED_BYTES: c_int = 8;
pub(crate) const STREAM_NON_BLOCKING: c_uint = 1;
pub(crate) const EVENT_DEFAULT: c_uint = 0;
pub(crate) const EVENT_DISABLE_TIMING: c_uint = 2;
pub(crate) const HOST_ALLOC_PORTABLE: c_uint = 1;

/// Declares the table and fills it from a library, symbol by symbol.
macro_rules! entry_points {
    (
        required { $($field:ident: $symbol:literal ($($argument:ty),*);)* }
        optional { $($extra:ident: $name:literal ($($type:ty),*);)* }
    ) => {
        /// The entry points of one loaded driver.
        pub(crate) struct Api {
            $(pub(crate) $field: unsafe extern "C" fn($($argument),*) -> Code,)*
            $(pub(crate) $extra: Option<unsafe extern "C" fn($($type),*) -> Code>,)*
        }

        impl Api {
            /// Looks all symbols up; the name of the first that is missing is the error.
            pub(crate) fn of(library: &Library) -> Result<Self, &'static str> {
                Ok(Api {
                    $($field: symbol(library, $symbol).ok_or($symbol)?,)*
                    $($extra: symbol(library, $name),)*
                })
            }
        }
    };
}

entry_points! {
    required {
        init: "cuInit" (c_uint);
        error_name: "cuGetErrorName" (Code, *mut *const c_char);
        error_text: "cuGetErrorString" (Code, *mut *const c_char);
        device_get: "cuDeviceGet" (*mut c_int, c_int);
        device_count: "cuDeviceGetCount" (*mut c_int);
        device_name: "cuDeviceGetName" (*mut c_char, c_int, c_int);
        device_attribute: "cuDeviceGetAttribute" (*mut c_int, c_int, c_int);
        device_memory: "cuDeviceTotalMem_v2" (*mut usize, c_int);
        device_pci: "cuDeviceGetPCIBusId" (*mut c_char, c_int, c_int);
        can_access_peer: "cuDeviceCanAccessPeer" (*mut c_int, c_int, c_int);
        p2p_attribute: "cuDeviceGetP2PAttribute" (*mut c_int, c_int, c_int, c_int);
        primary_retain: "cuDevicePrimaryCtxRetain" (*mut Handle, c_int);
        primary_release: "cuDevicePrimaryCtxRelease_v2" (c_int);
        context_push: "cuCtxPushCurrent_v2" (Handle);
        context_pop: "cuCtxPopCurrent_v2" (*mut Handle);
        context_synchronize: "cuCtxSynchronize" ();
        enable_peer_access: "cuCtxEnablePeerAccess" (Handle, c_uint);
        priority_range: "cuCtxGetStreamPriorityRange" (*mut c_int, *mut c_int);
        stream_create: "cuStreamCreateWithPriority" (*mut Handle, c_uint, c_int);
        stream_destroy: "cuStreamDestroy_v2" (Handle);
        stream_synchronize: "cuStreamSynchronize" (Handle);
        stream_query: "cuStreamQuery" (Handle);
        stream_wait_event: "cuStreamWaitEvent" (Handle, Handle, c_uint);
        event_create: "cuEventCreate" (*mut Handle, c_uint);
        event_destroy: "cuEventDestroy_v2" (Handle);
        event_record: "cuEventRecord" (Handle, Handle);
        event_query: "cuEventQuery" (Handle);
        event_synchronize: "cuEventSynchronize" (Handle);
        event_elapsed: "cuEventElapsedTime" (*mut f32, Handle, Handle);
        memory_info: "cuMemGetInfo_v2" (*mut usize, *mut usize);
        memory_alloc: "cuMemAlloc_v2" (*mut Address, usize);
        memory_free: "cuMemFree_v2" (Address);
        host_alloc: "cuMemHostAlloc" (*mut *mut c_void, usize, c_uint);
        host_free: "cuMemFreeHost" (*mut c_void);
        copy_to_device: "cuMemcpyHtoDAsync_v2" (Address, *const c_void, usize, Handle);
        copy_to_host: "cuMemcpyDtoHAsync_v2" (*mut c_void, Address, usize, Handle);
        copy_on_device: "cuMemcpyDtoDAsync_v2" (Address, Address, usize, Handle);
        copy_to_peer: "cuMemcpyPeerAsync" (Address, Handle, Address, Handle, usize, Handle);
        fill: "cuMemsetD8Async" (Address, u8, usize, Handle);
        module_load: "cuModuleLoadData" (*mut Handle, *const c_void);
        module_unload: "cuModuleUnload" (Handle);
        module_function: "cuModuleGetFunction" (*mut Handle, Handle, *const c_char);
        function_set_attribute: "cuFuncSetAttribute" (Handle, c_int, c_int);
        launch: "cuLaunchKernel" (
            Handle, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Handle, *mut *mut c_void, *mut *mut c_void
        );
    }
    optional {
        // CUDA 12.4: sizes of a kernel's parameters, against which arguments are checked.
        function_parameter: "cuFuncGetParamInfo" (Handle, usize, *mut usize, *mut usize);
    }
}

/// A function of the library, by its full symbol.
pub(crate) fn symbol<F: Copy>(library: &Library, name: &str) -> Option<F> {
    // SAFETY: `F` is the type that `cuda.h` declares for this symbol; the library is never unloaded, so the
    // pointer stays valid.
    unsafe { library.get::<F>(name.as_bytes()).ok().map(|symbol| *symbol) }
}
