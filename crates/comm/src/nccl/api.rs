//! The entry points of `libnccl`, with the types of `nccl.h`.
//!
//! A configuration is laid out as in 2.18. Later versions append to it, read as much as it says it has, and take its version to
//! know which fields that is.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};

use libloading::os::unix::Library;

/// `ncclResult_t`.
pub(super) type Code = c_int;

pub(super) const SUCCESS: Code = 0;
pub(super) const IN_PROGRESS: Code = 7;

/// `ncclDataType_t`: everything travels as bytes, as NCCL computes nothing for us.
pub(super) const UINT8: c_int = 1;

/// `ncclComm_t`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub(super) struct Handle(pub *mut c_void);

// SAFETY: a communicator may be used from any thread, by one at a time; who holds the handle sees to that.
unsafe impl Send for Handle {}

/// Bytes of a `ncclUniqueId`.
pub(super) const ID_BYTES: usize = 128;

/// `ncclUniqueId`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct UniqueId(pub [u8; ID_BYTES]);

/// `ncclConfig_t` of 2.18.
#[repr(C)]
pub(super) struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
    /// What 2.18 has as padding and later versions as a field that they set themselves for who knows 2.18.
    later: c_int,
}

impl Config {
    /// `NCCL_CONFIG_INITIALIZER` with calls that never block.
    pub(super) fn non_blocking() -> Self {
        const UNDEFINED: c_int = c_int::MIN;
        Config {
            size: size_of::<Config>(),
            magic: 0xcafe_beef,
            version: 21800,
            blocking: 0,
            cga_cluster_size: UNDEFINED,
            min_ctas: UNDEFINED,
            max_ctas: UNDEFINED,
            net_name: std::ptr::null(),
            split_share: UNDEFINED,
            later: UNDEFINED,
        }
    }
}

type Stream = *mut c_void;

/// The functions used, as in `nccl.h`.
#[derive(Clone, Copy)]
pub(super) struct Api {
    pub unique_id: unsafe extern "C" fn(*mut UniqueId) -> Code,
    pub init_rank: unsafe extern "C" fn(*mut Handle, c_int, UniqueId, c_int, *mut Config) -> Code,
    pub async_error: unsafe extern "C" fn(Handle, *mut Code) -> Code,
    pub finalize: unsafe extern "C" fn(Handle) -> Code,
    pub destroy: unsafe extern "C" fn(Handle) -> Code,
    pub abort: unsafe extern "C" fn(Handle) -> Code,
    pub error_string: unsafe extern "C" fn(Code) -> *const c_char,
    pub last_error: unsafe extern "C" fn(Handle) -> *const c_char,
    pub group_start: unsafe extern "C" fn() -> Code,
    pub group_end: unsafe extern "C" fn() -> Code,
    pub send: unsafe extern "C" fn(*const c_void, usize, c_int, c_int, Handle, Stream) -> Code,
    pub recv: unsafe extern "C" fn(*mut c_void, usize, c_int, c_int, Handle, Stream) -> Code,
    pub all_gather: unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, Handle, Stream) -> Code,
    pub broadcast:
        unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Handle, Stream) -> Code,
}

/// The version, as `ncclGetVersion` tells it: asked for first, so that an old library is called old and not incomplete.
///
/// # Safety
/// `library` is NCCL.
pub(super) unsafe fn version(library: &Library) -> Result<c_int, String> {
    // SAFETY: the caller's promise; the type is that of `nccl.h`.
    let ask = unsafe { get::<unsafe extern "C" fn(*mut c_int) -> Code>(library, c"ncclGetVersion") }?;
    let mut version = 0;
    // SAFETY: writes one integer.
    match unsafe { ask(&mut version) } {
        SUCCESS => Ok(version),
        code => Err(format!("does not tell its version (`{code}`)")),
    }
}

impl Api {
    /// # Safety
    /// `library` is NCCL, 2.18 or later.
    pub(super) unsafe fn find(library: &Library) -> Result<Self, String> {
        // SAFETY: the caller's promise; the types are those of `nccl.h`.
        unsafe {
            Ok(Api {
                unique_id: get(library, c"ncclGetUniqueId")?,
                init_rank: get(library, c"ncclCommInitRankConfig")?,
                async_error: get(library, c"ncclCommGetAsyncError")?,
                finalize: get(library, c"ncclCommFinalize")?,
                destroy: get(library, c"ncclCommDestroy")?,
                abort: get(library, c"ncclCommAbort")?,
                error_string: get(library, c"ncclGetErrorString")?,
                last_error: get(library, c"ncclGetLastError")?,
                group_start: get(library, c"ncclGroupStart")?,
                group_end: get(library, c"ncclGroupEnd")?,
                send: get(library, c"ncclSend")?,
                recv: get(library, c"ncclRecv")?,
                all_gather: get(library, c"ncclAllGather")?,
                broadcast: get(library, c"ncclBroadcast")?,
            })
        }
    }
}

/// # Safety
/// The function called `name` is of type `T`.
unsafe fn get<T: Copy>(library: &Library, name: &CStr) -> Result<T, String> {
    // SAFETY: the caller's promise.
    unsafe { library.get::<T>(name.to_bytes_with_nul()) }
        .map(|symbol| *symbol)
        .map_err(|_| format!("has no function `{}`", name.to_string_lossy()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;

    #[test]
    fn a_configuration_is_laid_out_as_in_the_header() {
        assert_eq!(size_of::<Config>(), 48);
        assert_eq!((offset_of!(Config, blocking), offset_of!(Config, net_name)), (16, 32));
        assert_eq!((offset_of!(Config, split_share), offset_of!(Config, later)), (40, 44));
    }
}
