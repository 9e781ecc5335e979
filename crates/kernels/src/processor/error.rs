//! What can go wrong on a processor.

use shardwise_device::cuda::CudaError;
use shardwise_device::{DeviceError, Place};

use crate::cuda::CudaKernelError;

/// Errors of [`super::Processor`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProcessorError {
    /// Memory that a GPU's kernels were asked to work on and that is not this GPU's.
    #[error("the memory is on `{got}`, the processor computes on `{expected}`: copy it there first")]
    Elsewhere {
        /// Where the processor computes.
        expected: Place,
        /// Where the memory is.
        got: Place,
    },
    /// Memory that the host cannot reach, or none left.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// What a GPU or its driver reported.
    #[error(transparent)]
    Cuda(#[from] CudaError),
    /// Kernels that could not be compiled or loaded.
    #[error(transparent)]
    Kernels(#[from] CudaKernelError),
}
