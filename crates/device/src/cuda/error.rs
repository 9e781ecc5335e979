//! What can go wrong with GPUs.

use std::path::PathBuf;

use super::{Capability, DriverVersion};
use crate::{DType, Place};

/// Errors of the driver, of devices, streams and kernels.
///
/// A GPU works behind the host's back: a driver's error may come from work that was queued before the call that
/// reports it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CudaError {
    /// The driver's library is not there, or cannot be loaded.
    #[error("no CUDA driver: could not load `{}`: {reason}; install NVIDIA's driver, or run on `cpu`", path.display())]
    NoDriver {
        /// The library asked for.
        path: PathBuf,
        /// What the dynamic linker said.
        reason: String,
    },
    /// The library lacks something we call.
    #[error("`{}` (CUDA {}) has no symbol `{symbol}`: is it NVIDIA's driver?", path.display(), said(*version))]
    MissingSymbol {
        /// The library.
        path: PathBuf,
        /// The missing symbol.
        symbol: &'static str,
        /// The driver's version, if it could say.
        version: Option<DriverVersion>,
    },
    /// The driver is older than something needs.
    #[error("the driver supports CUDA {got}, {needed_by} needs {needed}: install a newer driver")]
    DriverTooOld {
        /// What the driver supports.
        got: DriverVersion,
        /// What is needed.
        needed: DriverVersion,
        /// Who needs it.
        needed_by: String,
    },
    /// A driver without a GPU it could use.
    #[error("the driver (CUDA {version}) sees no GPU: is `CUDA_VISIBLE_DEVICES` set to hide them?")]
    NoGpus {
        /// What the driver supports.
        version: DriverVersion,
    },
    /// The ordinal of no GPU.
    #[error("there is no GPU `{ordinal}`: the driver sees `{num_gpus}`, numbered from 0")]
    NoSuchGpu {
        /// The GPU asked for.
        ordinal: u32,
        /// How many there are.
        num_gpus: usize,
    },
    /// More ranks than GPUs, and nobody asked to share.
    #[error(
        "local rank `{local_rank}` has no GPU of its own: the driver sees `{num_gpus}`; start fewer ranks, or ask for ranks to share GPUs"
    )]
    TooFewGpus {
        /// The rank on this host.
        local_rank: usize,
        /// How many GPUs there are.
        num_gpus: usize,
    },
    /// A GPU older than any kernel is compiled for.
    #[error("GPU `{ordinal}` (`{name}`) is {got}, the oldest supported is {oldest}")]
    UnsupportedGpu {
        /// Which GPU.
        ordinal: u32,
        /// Its name.
        name: String,
        /// Its compute capability.
        got: Capability,
        /// The oldest we support.
        oldest: Capability,
    },
    /// An element type that the GPU cannot compute with.
    #[error("GPU `{ordinal}` (`{name}`, {capability}) does not compute in `{dtype}`: use fp16")]
    UnsupportedDType {
        /// Which GPU.
        ordinal: u32,
        /// Its name.
        name: String,
        /// Its compute capability.
        capability: Capability,
        /// The type asked for.
        dtype: DType,
    },
    /// The GPU has no memory left.
    #[error("GPU `{ordinal}` has no memory for `{bytes}` bytes: `{free_bytes}` of `{total_bytes}` are free")]
    OutOfMemory {
        /// Which GPU.
        ordinal: u32,
        /// Bytes asked for.
        bytes: usize,
        /// Bytes free when it was refused.
        free_bytes: usize,
        /// Bytes the GPU has.
        total_bytes: usize,
    },
    /// The host has no memory that could be pinned.
    #[error("the host has no `{bytes}` bytes of memory to pin: see `ulimit -l` and the memory that is free")]
    OutOfPinnedMemory {
        /// Bytes asked for.
        bytes: usize,
    },
    /// Any other error of the driver.
    #[error("`{call}` failed with `{name}` ({text}): {asked}")]
    Call {
        /// The entry point that reported it.
        call: &'static str,
        /// The driver's number.
        code: i32,
        /// The driver's name for it.
        name: String,
        /// The driver's explanation.
        text: String,
        /// What was asked: bytes, device, kernel.
        asked: String,
    },
    /// Source and destination of a copy differ.
    #[error("cannot copy `{from_numel}` x `{from}` into `{to_numel}` x `{to}`")]
    CopyMismatch {
        /// Elements of the source.
        from_numel: usize,
        /// Type of the source.
        from: DType,
        /// Elements of the destination.
        to_numel: usize,
        /// Type of the destination.
        to: DType,
    },
    /// Host memory that may move or go while a stream uses it.
    #[error(
        "a stream cannot use host memory that is not pinned: take it from a pinned pool, or use `copy_and_wait`"
    )]
    NotPinned,
    /// Memory that this stream has no business with.
    #[error("a stream of GPU `{ordinal}` was given memory on `{from}` and `{to}`")]
    WrongPlaces {
        /// The stream's GPU.
        ordinal: u32,
        /// Where it would read.
        from: Place,
        /// Where it would write.
        to: Place,
    },
    /// An argument in memory that the kernel's GPU does not reach.
    #[error("argument `{index}` of kernel `{kernel}` is on `{place}`, the kernel runs on GPU `{ordinal}`")]
    UnreachableArgument {
        /// The kernel.
        kernel: String,
        /// Which argument, from 0.
        index: usize,
        /// Where its memory is.
        place: Place,
        /// Where the kernel runs.
        ordinal: u32,
    },
    /// Arguments that are not the kernel's parameters.
    #[error("kernel `{kernel}` takes parameters of `{expected:?}` bytes, got arguments of `{got:?}`")]
    WrongArguments {
        /// The kernel.
        kernel: String,
        /// Bytes of each parameter.
        expected: Vec<usize>,
        /// Bytes of each argument.
        got: Vec<usize>,
    },
    /// A stream, event or kernel of one GPU was used with another's.
    #[error("a `{what}` of GPU `{got}` was used on GPU `{expected}`")]
    WrongGpu {
        /// What was used.
        what: &'static str,
        /// The GPU it was used on.
        expected: u32,
        /// The GPU it belongs to.
        got: u32,
    },
    /// Bytes that are no CUBIN, or not all of one.
    #[error("module `{module}` is no CUBIN: {reason}")]
    InvalidCubin {
        /// What the caller calls it.
        module: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A kernel that a module does not have.
    #[error("module `{module}` has no kernel `{kernel}`")]
    NoSuchKernel {
        /// The module.
        module: String,
        /// The kernel.
        kernel: String,
    },
}

fn said(version: Option<DriverVersion>) -> String {
    version.map_or_else(|| "unknown".to_owned(), |version| version.to_string())
}
