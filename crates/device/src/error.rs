//! What can go wrong with memory.

use crate::DType;

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
}
