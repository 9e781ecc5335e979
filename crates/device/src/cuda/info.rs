//! Facts about drivers and GPUs, as plain data, and what follows from them.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::CudaError;
use crate::DType;

/// The newest CUDA that a driver supports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct DriverVersion {
    /// As in 13.0.
    pub major: u32,
    /// As in 13.0.
    pub minor: u32,
}

impl DriverVersion {
    /// The oldest that has every entry point this crate calls.
    pub const OLDEST: DriverVersion = DriverVersion { major: 11, minor: 0 };

    /// As a driver writes it: 13000 for 13.0.
    pub(super) fn from_number(number: i32) -> Self {
        let number = number.unsigned_abs();
        DriverVersion { major: number / 1000, minor: number % 1000 / 10 }
    }
}

impl fmt::Display for DriverVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// Compute capability: which instructions a GPU has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Capability {
    /// 7 for Turing (T4), 8 for Ampere and Ada, 9 for Hopper.
    pub major: u32,
    /// Within a generation.
    pub minor: u32,
}

impl Capability {
    /// Turing: the oldest that CUDA 13 compiles for.
    pub const OLDEST: Capability = Capability { major: 7, minor: 5 };

    /// Whether it computes in bf16: from sm_80 on.
    pub fn supports_bf16(self) -> bool {
        self.major >= 8
    }
}

impl fmt::Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sm_{}{}", self.major, self.minor)
    }
}

/// What the driver says about a GPU without using it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuInfo {
    /// Its number among those the driver sees, from 0.
    pub ordinal: u32,
    /// Its name, as the driver gives it.
    pub name: String,
    /// Which instructions it has.
    pub capability: Capability,
    /// Memory it has.
    pub total_bytes: usize,
    /// Its address on the bus, the same in all processes.
    pub pci_bus_id: String,
    /// Streaming multiprocessors, for shapes of launches.
    pub num_multiprocessors: u32,
}

impl GpuInfo {
    /// Whether it computes in bf16.
    pub fn supports_bf16(&self) -> bool {
        self.capability.supports_bf16()
    }

    /// Checks that it is new enough for our kernels.
    ///
    /// # Errors
    /// [`CudaError::UnsupportedGpu`] below sm_75.
    pub fn require_supported(&self) -> Result<(), CudaError> {
        if self.capability < Capability::OLDEST {
            return Err(CudaError::UnsupportedGpu {
                ordinal: self.ordinal,
                name: self.name.clone(),
                got: self.capability,
                oldest: Capability::OLDEST,
            });
        }
        Ok(())
    }

    /// Checks that it computes with numbers of type `dtype`.
    ///
    /// # Errors
    /// [`CudaError::UnsupportedDType`] for bf16 on sm_75.
    pub fn require_dtype(&self, dtype: DType) -> Result<(), CudaError> {
        if dtype == DType::Bf16 && !self.supports_bf16() {
            let (ordinal, name, capability) = (self.ordinal, self.name.clone(), self.capability);
            return Err(CudaError::UnsupportedDType { ordinal, name, capability, dtype });
        }
        Ok(())
    }
}

/// How one GPU reaches the memory of another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "link")]
pub enum PeerLink {
    /// It is the same GPU.
    Same,
    /// Directly.
    Direct {
        /// The driver's relative rank of the link; 0 is the fastest.
        performance_rank: i32,
        /// Whether atomics work over the link, as they do over NVLink and mostly do not over PCIe.
        native_atomics: bool,
    },
    /// Not: copies go through host memory.
    ThroughHost,
}
