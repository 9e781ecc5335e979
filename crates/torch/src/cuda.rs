//! libtorch's CUDA: loaded when a run asks for it, and working on a stream of ours.
//!
//! A binary links libtorch_cpu only, so that ranks on the CPU start and stay small. [`load`] brings in libtorch_cuda, which registers its
//! operations for the whole process; there is no way back. It has to come before anything that asks libtorch what it has: before
//! the first backward pass, for one.
//!
//! Which stream operations go to is a setting of each thread. The backward pass runs in threads of libtorch's own, each operation on the
//! stream of its forward pass; so it is enough that the rank's thread calls [`use_stream`] before the first layer.

use std::ffi::c_void;

use tch::Tensor;

use crate::TorchError;
use crate::sys::{
    CudaMemory, adopt, check, raw, sw_cuda_load, sw_cuda_memory, sw_cuda_release_cached, sw_cuda_reset_peak,
    sw_cuda_set_cudnn_attention, sw_cuda_set_deterministic, sw_cuda_upload, sw_cuda_use_stream,
};

/// Whether operations have to give the same bits each time they run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Determinism {
    /// The fastest form of each operation. Some add in an order of chance, above all attention's backward pass.
    #[default]
    Off,
    /// A form that adds in one order where there is one; an operation that has none is an error.
    On,
}

/// libtorch's memory on a GPU. The engine's own buffers do not count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GpuMemory {
    /// In use by tensors.
    pub allocated_bytes: usize,
    /// The most that was in use since the start or [`reset_peak`].
    pub peak_allocated_bytes: usize,
    /// Taken from the driver.
    pub reserved_bytes: usize,
    /// The most that was taken since the start or [`reset_peak`].
    pub peak_reserved_bytes: usize,
    /// Requests to the driver so far; constant in steady state.
    pub num_device_allocations: usize,
}

/// Loads libtorch's CUDA and makes sure that it sees GPU `ordinal`.
///
/// # Errors
/// [`TorchError::NoCuda`] if it is not there or a library that it needs is not, [`TorchError::NoSuchGpu`].
pub fn load(ordinal: u32) -> Result<(), TorchError> {
    let mut num_gpus = 0;
    // SAFETY: writes one number.
    let message = unsafe { sw_cuda_load(&mut num_gpus) };
    check("load CUDA", message).map_err(|error| match error {
        TorchError::Shim { message, .. } => TorchError::NoCuda { message },
        other => other,
    })?;
    let num_gpus = usize::try_from(num_gpus).unwrap_or(0);
    if ordinal as usize >= num_gpus {
        return Err(TorchError::NoSuchGpu { ordinal, num_gpus });
    }
    Ok(())
}

/// Has what this thread does on GPU `ordinal`, which becomes its current one, go to `stream`.
///
/// # Safety
/// `stream` is a stream of that GPU's primary context (`CUstream`, which is `cudaStream_t`), and lives as long as libtorch is used.
///
/// # Errors
/// What libtorch says, of a driver that is too old among others.
pub unsafe fn use_stream(ordinal: u32, stream: *mut c_void) -> Result<(), TorchError> {
    // SAFETY: as the caller promises.
    check("use a stream", unsafe { sw_cuda_use_stream(ordinal as i32, stream) })
}

/// A copy of a host tensor on GPU `ordinal`. It goes by way of pinned memory, on this thread's stream; nothing waits for it.
///
/// # Errors
/// What libtorch says.
pub fn upload(tensor: &Tensor, ordinal: u32) -> Result<Tensor, TorchError> {
    let mut result = std::ptr::null_mut();
    // SAFETY: the tensor is valid, and `result` has room for one.
    check("upload", unsafe { sw_cuda_upload(raw(tensor), ordinal as i32, &mut result) })?;
    // SAFETY: without an error it is a tensor made for us.
    unsafe { adopt(result) }.ok_or(TorchError::Shim { operation: "upload", message: "no tensor".to_owned() })
}

/// Chooses for the process.
///
/// # Errors
/// What libtorch says.
pub fn set_determinism(determinism: Determinism) -> Result<(), TorchError> {
    // SAFETY: sets a flag of libtorch.
    check("set determinism", unsafe { sw_cuda_set_deterministic(u8::from(determinism == Determinism::On)) })
}

/// Lets attention take cuDNN's form, where libtorch finds it the fastest, or not. That form is compiled anew for each shape, which takes much
/// longer than attention to a text that grows word by word. For the process; it is let at first.
///
/// # Errors
/// What libtorch says.
pub fn let_cudnn_attend(may: bool) -> Result<(), TorchError> {
    // SAFETY: sets a flag of libtorch.
    check("choose a form of attention", unsafe { sw_cuda_set_cudnn_attention(u8::from(may)) })
}

/// What libtorch has of GPU `ordinal`'s memory.
///
/// # Errors
/// What libtorch says, before [`load`] for one.
pub fn memory(ordinal: u32) -> Result<GpuMemory, TorchError> {
    let mut found = CudaMemory::default();
    // SAFETY: fills a structure of the same layout.
    check("memory of a GPU", unsafe { sw_cuda_memory(ordinal as i32, &mut found) })?;
    Ok(GpuMemory {
        allocated_bytes: found.allocated_bytes as usize,
        peak_allocated_bytes: found.peak_allocated_bytes as usize,
        reserved_bytes: found.reserved_bytes as usize,
        peak_reserved_bytes: found.peak_reserved_bytes as usize,
        num_device_allocations: found.num_device_allocations as usize,
    })
}

/// Starts the peaks anew from what there is now.
///
/// # Errors
/// What libtorch says.
pub fn reset_peak(ordinal: u32) -> Result<(), TorchError> {
    // SAFETY: writes counters under the allocator's lock.
    check("reset the peak of memory", unsafe { sw_cuda_reset_peak(ordinal as i32) })
}

/// Gives memory that no tensor uses back to the driver.
///
/// # Errors
/// What libtorch says.
pub fn release_cached() -> Result<(), TorchError> {
    // SAFETY: kept blocks belong to no tensor.
    check("release memory", unsafe { sw_cuda_release_cached() })
}
