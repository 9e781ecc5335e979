//! What can go wrong on a processor.

use shardwise_device::DeviceError;
use shardwise_device::cuda::CudaError;

use crate::cuda::CudaKernelError;

/// Errors of [`super::Processor`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProcessorError {
    /// Memory that is elsewhere, or none.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// What a GPU or its driver reported.
    #[error(transparent)]
    Cuda(#[from] CudaError),
    /// Kernels that could not be compiled or loaded.
    #[error(transparent)]
    Kernels(#[from] CudaKernelError),
}
