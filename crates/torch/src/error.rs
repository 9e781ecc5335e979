//! Errors of libtorch as values.

/// What libtorch refused to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TorchError {
    /// An operation called through tch failed.
    #[error("{}", without_trace(&.0.to_string()))]
    Tch(#[from] tch::TchError),
    /// An operation called through the shim failed.
    #[error("libtorch: {operation}: {message}")]
    Shim {
        /// What was asked.
        operation: &'static str,
        /// What libtorch said, without the calls that led there.
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

/// What libtorch says of an error ends with the calls that led there, of which users know none.
pub(crate) fn without_trace(message: &str) -> &str {
    let end = message.find("\nException raised from").unwrap_or(message.len());
    message[..end].trim_end()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_end_before_the_calls_that_led_there() {
        let said = "CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation\nException raised from malloc at Alloc.cpp:1\nframe #0: ..";
        assert_eq!(
            without_trace(said),
            "CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation"
        );
        assert_eq!(without_trace("short"), "short");
        let error = TorchError::from(tch::TchError::Torch(said.to_owned())).to_string();
        assert!(error.ends_with("See the documentation"), "{error}");
    }
}
