//! The shim's functions, as declared in `shim/shim.h`.

use std::ffi::{CStr, c_char, c_void};

use tch::Tensor;

use crate::TorchError;
use crate::error::without_trace;

/// `at::Tensor`, always behind a pointer.
#[repr(C)]
pub(crate) struct AtTensor {
    _private: [u8; 0],
}

#[repr(C)]
pub(crate) struct Backward {
    pub context: *mut c_void,
    pub run: unsafe extern "C" fn(
        *mut c_void,
        *const *const AtTensor,
        usize,
        *const *const AtTensor,
        usize,
        *const u8,
        *mut *mut AtTensor,
        usize,
    ) -> *mut c_char,
    pub release: unsafe extern "C" fn(*mut c_void),
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct MemoryStats {
    pub live_bytes: u64,
    pub cached_bytes: u64,
    pub peak_live_bytes: u64,
    pub num_segments: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct CudaMemory {
    pub allocated_bytes: u64,
    pub peak_allocated_bytes: u64,
    pub reserved_bytes: u64,
    pub peak_reserved_bytes: u64,
    pub num_device_allocations: u64,
}

unsafe extern "C" {
    pub(crate) fn sw_free_message(message: *mut c_char);
    pub(crate) fn sw_grad(
        outputs: *const *const AtTensor,
        grad_outputs: *const *const AtTensor,
        num_outputs: usize,
        inputs: *const *const AtTensor,
        num_inputs: usize,
        keep_graph: u8,
        results: *mut *mut AtTensor,
    ) -> *mut c_char;
    pub(crate) fn sw_set_storage(tensor: *const AtTensor, data: *mut c_void, num_bytes: usize)
    -> *mut c_char;
    pub(crate) fn sw_link(
        backward: Backward,
        inputs: *const *const AtTensor,
        num_inputs: usize,
        outputs: *const *const AtTensor,
        num_outputs: usize,
        saved: *const *const AtTensor,
        is_output: *const u8,
        num_saved: usize,
    ) -> *mut c_char;
    pub(crate) fn sw_install_allocator();
    pub(crate) fn sw_memory_stats() -> MemoryStats;
    pub(crate) fn sw_reset_peak();
    pub(crate) fn sw_release_cached();
    pub(crate) fn sw_library_folder() -> *mut c_char;
    pub(crate) fn sw_cuda_load(num_gpus: *mut i32) -> *mut c_char;
    pub(crate) fn sw_cuda_use_stream(ordinal: i32, stream: *mut c_void) -> *mut c_char;
    pub(crate) fn sw_cuda_upload(
        tensor: *const AtTensor,
        ordinal: i32,
        result: *mut *mut AtTensor,
    ) -> *mut c_char;
    pub(crate) fn sw_cuda_set_deterministic(on: u8) -> *mut c_char;
    pub(crate) fn sw_cuda_set_cudnn_attention(on: u8) -> *mut c_char;
    pub(crate) fn sw_cuda_memory(ordinal: i32, memory: *mut CudaMemory) -> *mut c_char;
    pub(crate) fn sw_cuda_reset_peak(ordinal: i32) -> *mut c_char;
    pub(crate) fn sw_cuda_release_cached() -> *mut c_char;
}

/// The `at::Tensor` behind a tch tensor.
pub(crate) fn raw(tensor: &Tensor) -> *const AtTensor {
    tensor.as_ptr().cast()
}

/// Takes a new `at::Tensor` from the shim; null is no tensor.
///
/// # Safety
/// `pointer` is null or an `at::Tensor` that the shim allocated for the caller.
pub(crate) unsafe fn adopt(pointer: *mut AtTensor) -> Option<Tensor> {
    // SAFETY: the caller hands over ownership of a valid tensor.
    (!pointer.is_null()).then(|| unsafe { Tensor::from_ptr(pointer.cast()) })
}

/// Another handle on a tensor that the shim lends; null is no tensor.
///
/// # Safety
/// `pointer` is null or a valid `at::Tensor` for the duration of the call.
pub(crate) unsafe fn borrow(pointer: *const AtTensor) -> Option<Tensor> {
    // SAFETY: the tensor is valid now; the clone counts its own reference.
    (!pointer.is_null()).then(|| unsafe { Tensor::clone_from_ptr(pointer.cast_mut().cast()) })
}

/// Takes a text from the shim; null is none.
pub(crate) fn text(message: *mut c_char) -> Option<String> {
    if message.is_null() {
        return None;
    }
    // SAFETY: the shim returns a NUL-terminated string that is ours to read and to free once.
    let text = unsafe { CStr::from_ptr(message) }.to_string_lossy().into_owned();
    // SAFETY: as above; the text was copied.
    unsafe { sw_free_message(message) };
    Some(text)
}

/// Turns the shim's message into a result.
pub(crate) fn check(operation: &'static str, message: *mut c_char) -> Result<(), TorchError> {
    let Some(text) = text(message) else { return Ok(()) };
    Err(TorchError::Shim { operation, message: without_trace(&text).to_owned() })
}
