//! Typed memory on a device.
//!
//! Everything below the engine works on three things: a [`Buffer`] owns memory, a [`Slice`] reads a part of
//! it, a [`SliceMut`] writes a part of it. Each knows its element type ([`DType`]) and where it lives
//! ([`Place`]). The engine wraps the same memory as tensors; no crate below it knows what a tensor is.
//!
//! Host memory comes from `mmap`, so that dropping a buffer really gives its pages back and a large buffer can
//! use huge pages. GPUs, their memory and the host memory they copy from are in [`cuda`], whose driver is loaded
//! only when it is asked for.

mod buffer;
pub mod cuda;
mod dtype;
mod error;
mod pool;
mod slice;

use std::fmt;

pub use buffer::{Buffer, Memory};
pub use dtype::{DType, Element};
pub use error::DeviceError;
pub use pool::{BufferPool, PoolStats};
pub use slice::{Slice, SliceMut};

/// Where memory lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Place {
    /// Host memory, pinned or not.
    Cpu,
    /// The memory of a GPU.
    Cuda {
        /// Its number among those the driver sees.
        ordinal: u32,
    },
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Cpu => f.write_str("cpu"),
            Place::Cuda { ordinal } => write!(f, "cuda:{ordinal}"),
        }
    }
}
