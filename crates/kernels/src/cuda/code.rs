//! Machine code for a GPU at hand: compiled when it is asked for, and kept on disk.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use shardwise_device::cuda::{Capability, Gpu};

use super::{Arch, CudaKernelError, KernelCache, Nvrtc, Origin, Source};
use crate::processor::MachineCode;

/// The sources' machine code for one architecture, by NVRTC, through a folder of what was compiled before.
#[derive(Debug)]
pub struct CompiledCode {
    nvrtc: Arc<Nvrtc>,
    cache: KernelCache,
    arch: Arch,
    /// Why the folder did not take what was compiled, the first time.
    not_kept: Mutex<Option<io::Error>>,
}

impl CompiledCode {
    /// For a GPU's architecture.
    ///
    /// # Errors
    /// [`CudaKernelError::UnsupportedArch`] if this NVRTC does not know it.
    pub fn for_gpu(nvrtc: Arc<Nvrtc>, cache: KernelCache, gpu: &Gpu) -> Result<Self, CudaKernelError> {
        CompiledCode::new(nvrtc, cache, gpu.info().capability.into())
    }

    /// For an architecture.
    ///
    /// # Errors
    /// [`CudaKernelError::UnsupportedArch`] if this NVRTC does not know it.
    pub fn new(nvrtc: Arc<Nvrtc>, cache: KernelCache, arch: Arch) -> Result<Self, CudaKernelError> {
        nvrtc.require(arch)?;
        Ok(CompiledCode { nvrtc, cache, arch, not_kept: Mutex::default() })
    }

    /// The architecture.
    pub fn arch(&self) -> Arch {
        self.arch
    }

    /// Takes the first error that kept machine code out of the folder since the last call: nothing fails by it, but the next run
    /// compiles again. Worth a warning.
    pub fn take_not_kept(&self) -> Option<io::Error> {
        self.not_kept.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl MachineCode for CompiledCode {
    fn of(&self, source: Source) -> Result<Vec<u8>, CudaKernelError> {
        let cubin = self.cache.cubin(&self.nvrtc, &source.program(), self.arch)?;
        if let Origin::NotKept(error) = cubin.origin {
            self.not_kept.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        }
        Ok(cubin.code)
    }
}

impl From<Capability> for Arch {
    fn from(capability: Capability) -> Self {
        Arch::new(capability.major, capability.minor)
    }
}
