//! What can go wrong between a kernel's source and its machine code.

use std::fmt;
use std::io;
use std::path::PathBuf;

use super::{Arch, Version};

/// A place where NVRTC was looked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attempt {
    /// The file, the folder, or the name that the system's loader was asked for.
    pub place: String,
    /// Why it did not do.
    pub problem: String,
}

impl fmt::Display for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}`: {}", self.place, self.problem)
    }
}

/// Why a kernel could not be compiled or kept.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CudaKernelError {
    /// NVRTC is nowhere, or not usable.
    #[error(
        "no usable NVRTC, which compiles the CUDA kernels{}; \
         install the package `nvidia-cuda-nvrtc` 13.0 beside libtorch (`scripts/setup_nvrtc.sh` does), \
         or name the folder that holds `libnvrtc.so.13` in `SHARDWISE_NVRTC`",
        listed(.tried)
    )]
    NotFound {
        /// All places, in order.
        tried: Vec<Attempt>,
    },
    /// This NVRTC knows no such GPU.
    #[error("NVRTC `{version}` compiles for {}, not for `{arch}`", listed_archs(.supported))]
    UnsupportedArch {
        /// What was asked for.
        arch: Arch,
        /// What there is.
        supported: Vec<Arch>,
        /// Of the NVRTC that was loaded.
        version: Version,
    },
    /// The source is wrong, for this compiler at least.
    #[error("compiling `{program}` for `{arch}` failed\n{log}")]
    Compile {
        /// The source's name.
        program: String,
        /// The architecture.
        arch: Arch,
        /// The compiler's words, with names and lines.
        log: String,
    },
    /// A call of NVRTC failed.
    #[error("`{call}` of NVRTC failed: {message}")]
    Nvrtc {
        /// The function.
        call: &'static str,
        /// NVRTC's word for its result.
        message: String,
    },
    /// A text for NVRTC holds a zero byte.
    #[error("`{what}` holds a zero byte, which NVRTC would take for its end")]
    ZeroByte {
        /// Which text.
        what: String,
    },
    /// Machine code without a kernel that it should have.
    #[error("the machine code of `{program}` has no kernel `{entry}`")]
    MissingEntry {
        /// The source's name.
        program: String,
        /// The kernel's name.
        entry: String,
    },
    /// No machine code at all.
    #[error("no machine code of kernels: {problem}")]
    NotCubin {
        /// What is wrong with the file.
        problem: &'static str,
    },
    /// The cache's folder cannot be made or looked at.
    #[error("the folder `{}` for compiled kernels cannot be used: {source}", .path.display())]
    CacheFolder {
        /// The folder.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// Others could put machine code into the cache's folder.
    #[error(
        "the folder `{}` for compiled kernels {problem}, so others could put code there; \
         `chmod 700` it or choose another",
        .path.display()
    )]
    ForeignCacheFolder {
        /// The folder.
        path: PathBuf,
        /// Whose it is, or who may write.
        problem: &'static str,
    },
}

fn listed(tried: &[Attempt]) -> String {
    tried.iter().map(|attempt| format!("; {attempt}")).collect()
}

fn listed_archs(archs: &[Arch]) -> String {
    let names: Vec<String> = archs.iter().map(|arch| format!("`{arch}`")).collect();
    names.join(", ")
}
