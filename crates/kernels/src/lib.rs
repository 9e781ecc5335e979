//! Arithmetic on buffers: fused optimizers, casts, norms, counter-based random numbers.
//!
//! Kernels take Rust slices and know neither tensors nor ranks. Each is written once, runs with AVX-512, AVX2 or
//! plain Rust as the machine allows, and gives the same bits on all of them: a run does not change with the
//! processor it lands on. Functions whose names end in `_on` use several threads, told by the caller, and give the
//! same bits again. [`attention`] is an exception, as its vector path and its plain reference round at different places, and so are
//! the matrix products of [`optimizer::Muon`].
//!
//! Slices that must match in length and do not are a caller's bug, and panic, as slices do.

pub mod add;
pub mod attention;
pub mod cast;
pub mod convert;
pub mod cross_entropy;
pub mod cuda;
pub mod dropout;
pub mod gelu;
pub mod layer_norm;
pub mod norm;
pub mod optimizer;
pub mod philox;
pub mod processor;
pub mod reduce;
pub mod rms_norm;
pub mod rotary;
pub mod swiglu;

mod isa;
mod parallel;
mod plain;
mod rows;
mod simd;
#[cfg(test)]
mod testing;

pub use parallel::Threads;
pub use processor::Processor;
pub use simd::Float;
