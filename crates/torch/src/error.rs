//! Errors of libtorch as values.

/// What libtorch refused to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TorchError {
    /// An operation called through tch failed.
    #[error(transparent)]
    Tch(#[from] tch::TchError),
    /// An operation called through the shim failed.
    #[error("libtorch: {operation}: {message}")]
    Shim {
        /// What was asked.
        operation: &'static str,
        /// The first line of what libtorch said.
        message: String,
    },
}
