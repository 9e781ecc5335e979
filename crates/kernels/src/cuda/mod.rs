//! CUDA kernels: sources, compilation by NVRTC, and what to launch.
//!
//! The sources are part of the program (`cuda/*.cu`). NVRTC compiles them for the architecture of a GPU, on machines
//! without one too, and a folder on disk keeps the results. Nothing here runs a kernel or names a stream: a launcher
//! takes the machine code from here ([`CompiledCode`]), and a [`Launch`] for each call.
//!
//! ```text
//! cuda/*.cu ── Source::program() ─┐
//! libnvrtc.so ─ Nvrtc::load(..) ──┼─ KernelCache::cubin(..) ─► machine code ─┐
//! the GPU ───── Arch::new(..) ────┘                                          ├─► the launcher
//! Adam::cuda_step(..), SwigluForward { .. }.launch(..) ─► Launch ────────────┘   entry, grid, block, parameters
//! ```
//!
//! Every kernel has one parameter, a structure that is declared on both sides and checked by running the kernels'
//! source, compiled as C++, against the CPU kernels (`tests/cuda_host`). Element-wise kernels, sums over ranks and sums of squares
//! give the bits of the CPU kernels; sums over a row differ in rounding.

mod cache;
mod code;
mod column_sums;
mod cubin;
mod dropout;
mod error;
mod gelu;
mod lamb;
mod launch;
mod layers;
mod norm;
mod nvrtc;
mod optimizer;
mod pack;
mod row_norm;
mod search;
mod source;
mod split;
mod sum_ranks;

pub use cache::{Cubin, KernelCache, Origin};
pub use code::CompiledCode;
pub use column_sums::ColumnSums;
pub use cubin::entry_points;
pub use dropout::Dropout;
pub use error::{Attempt, CudaKernelError};
pub use gelu::{GeluBackward, GeluForward};
pub use lamb::{LambApply, LambApplyBuffers, LambMomentBuffers, LambMoments, LambNorms, LambRowSums};
pub use launch::{DevicePtr, Entry, FloatType, Launch, LaunchPlan, Params};
pub use layers::{CrossEntropy, Rotate, SwigluBackward, SwigluForward};
pub use norm::{SumInOrder, SumsOfSquares};
pub use nvrtc::{Arch, Compiled, Nvrtc, Version};
pub use optimizer::{AdagradStep, AdamStep, DeviceCopy, DeviceStates, LionStep, SgdStep, StepBuffers};
pub use pack::{Pack, Segment};
pub use row_norm::{AddNormBackward, AddNormForward, NormBackward, NormForward, RowNorm};
pub use search::Search;
pub use source::{Header, Program, Source};
pub use split::{SplitCombine, SplitGradients, SplitPartial};
pub use sum_ranks::{SumRanks, SumType};
