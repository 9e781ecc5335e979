//! The only crate that names `tch`.
//!
//! It re-exports tch's [`Tensor`] and adds what tch lacks, through a small C++ shim:
//!
//! - [`autograd::grad`]: gradients of a layer's outputs with given output gradients, as values;
//! - [`FlatTensor`]: a tensor over memory that the engine owns, may take away and bring back elsewhere;
//! - [`function::link`]: differentiable functions whose backward is Rust;
//! - [`memory`]: a host allocator that keeps large blocks, and its statistics;
//! - [`cuda`]: libtorch's CUDA by dlopen, on a stream of ours.
//!
//! Callers use tch's `f_*` methods, which return errors; [`TorchError`] keeps what libtorch said.

pub mod autograd;
pub mod cuda;
mod error;
mod flat;
pub mod function;
pub mod memory;
mod sys;

pub use error::TorchError;
pub use flat::FlatTensor;
pub use tch;
pub use tch::{Device, Kind, Tensor, no_grad};

use std::path::PathBuf;

use shardwise_device::DType;

/// The libtorch element type of a buffer's element type.
pub const fn kind_of(dtype: DType) -> Kind {
    match dtype {
        DType::F32 => Kind::Float,
        DType::Bf16 => Kind::BFloat16,
        DType::F16 => Kind::Half,
        DType::U8 => Kind::Uint8,
    }
}

/// The folder that libtorch's libraries were loaded from, if the system says.
pub fn library_folder() -> Option<PathBuf> {
    // SAFETY: asks the dynamic linker.
    sys::text(unsafe { sys::sw_library_folder() }).map(PathBuf::from)
}

/// Sets how many threads libtorch uses inside one operation, for the whole process.
pub fn set_num_threads(num_threads: usize) {
    tch::set_num_threads(num_threads as i32);
}
