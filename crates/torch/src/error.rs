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
    /// An operation of ours within a graph failed.
    #[error("{operation}: {source}")]
    Own {
        /// What was asked.
        operation: &'static str,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// libtorch has no CUDA here, or cannot load it.
    #[error("libtorch's CUDA cannot be loaded: {message}")]
    NoCuda {
        /// What the dynamic linker said.
        message: String,
    },
    /// libtorch sees fewer GPUs than the driver, or none.
    #[error("libtorch sees `{num_gpus}` GPUs, this rank is to use GPU `{ordinal}`")]
    NoSuchGpu {
        /// The GPU asked for.
        ordinal: u32,
        /// How many there are.
        num_gpus: usize,
    },
}

impl TorchError {
    /// How to mend it, where that is known.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            TorchError::NoCuda { .. } => Some(
                "fetch libtorch with its CUDA libraries (`make setup CUDA=1`, then `make build`), or set `LIBTORCH` to one that has \
                 them",
            ),
            TorchError::NoSuchGpu { .. } => Some(
                "see `shardwise doctor`: libtorch of CUDA 13 needs a driver of release 580 or later, and a GPU of sm_75 or later",
            ),
            _ => None,
        }
    }
}
