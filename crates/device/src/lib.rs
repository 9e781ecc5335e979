//! Typed memory on a device.
//!
//! Everything below the engine works on three things: a [`Buffer`] owns memory, a [`Slice`] reads a part of
//! it, a [`SliceMut`] writes a part of it. Each knows its element type ([`DType`]) and where it lives
//! ([`Place`]). The engine wraps the same memory as tensors; no crate below it knows what a tensor is.
//!
//! Host memory comes from `mmap`, so that dropping a buffer really gives its pages back and a large buffer can
//! use huge pages. CUDA is a second [`Place`] that this version cannot construct yet.

mod buffer;
mod dtype;
mod error;
mod pool;
mod slice;

pub use buffer::Buffer;
pub use dtype::{DType, Element};
pub use error::DeviceError;
pub use pool::{BufferPool, PoolStats};
pub use slice::{Slice, SliceMut};

/// Where memory lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Place {
    /// Host memory.
    Cpu,
}
