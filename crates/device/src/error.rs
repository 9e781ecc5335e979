//! What can go wrong with memory.

use crate::cuda::CudaError;
use crate::{DType, Place};

/// Errors of buffers and views.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// The operating system refused the memory.
    #[error("could not allocate `{bytes}` bytes of host memory")]
    OutOfMemory {
        /// Bytes asked for.
        bytes: usize,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// A view was read as another element type than its own.
    #[error("view holds `{got}`, expected `{expected}`")]
    WrongDType {
        /// The type asked for.
        expected: DType,
        /// The type of the view.
        got: DType,
    },
    /// The host was to read or write a GPU's memory.
    #[error("the memory is on `{place}`, where the host cannot reach it: copy it to pinned memory first")]
    NotOnHost {
        /// Where it is.
        place: Place,
    },
    /// A place alone does not say which opening of a GPU to allocate with.
    #[error("memory on `{place}` comes from an opened GPU: use `Buffer::allocate` or `BufferPool::of`")]
    NotOpened {
        /// Where it should be.
        place: Place,
    },
    /// What a GPU or its driver reported.
    #[error(transparent)]
    Cuda(#[from] CudaError),
}
