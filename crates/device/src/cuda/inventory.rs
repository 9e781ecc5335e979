//! What GPUs a machine has, for `shardwise doctor`.

use std::fmt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{CudaError, Driver, DriverVersion, GpuInfo, PeerLink};

/// The driver, the GPUs and how they reach each other. Also of a machine that has none.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Inventory {
    /// The newest CUDA that the driver supports.
    pub driver: Option<DriverVersion>,
    /// Why there is no driver to use, or no GPU.
    pub missing: Option<String>,
    /// In the driver's order.
    pub gpus: Vec<GpuReport>,
    /// `links[from][to]`.
    pub links: Vec<Vec<PeerLink>>,
}

/// One GPU, and whether it can be used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuReport {
    /// What the driver says about it.
    #[serde(flatten)]
    pub info: GpuInfo,
    /// Whether it computes in bf16.
    pub bf16: bool,
    /// Memory that nobody has, found by opening it.
    pub free_bytes: Option<usize>,
    /// Why it cannot be used.
    pub problem: Option<String>,
}

impl Inventory {
    /// Loads the driver, from `path` or where it usually is, and looks at every GPU. Opens each for a moment, as only
    /// that shows that it can be, and how much of its memory is free.
    pub fn take(path: Option<&Path>) -> Inventory {
        match Driver::load(path) {
            Ok(driver) => Inventory::of(&driver),
            Err(error) => {
                let driver = match &error {
                    CudaError::DriverTooOld { got: version, .. } | CudaError::NoGpus { version } => {
                        Some(*version)
                    }
                    CudaError::MissingSymbol { version, .. } => *version,
                    _ => None,
                };
                Inventory { driver, missing: Some(error.to_string()), ..Inventory::default() }
            }
        }
    }

    fn of(driver: &std::sync::Arc<Driver>) -> Inventory {
        let mut inventory = Inventory { driver: Some(driver.version()), ..Inventory::default() };
        let mut look = || {
            for ordinal in 0..driver.num_gpus() as u32 {
                let info = driver.gpu_info(ordinal)?;
                let free = driver.open(ordinal).and_then(|gpu| gpu.memory_info());
                let (free_bytes, problem) = match free {
                    Ok(memory) => (Some(memory.free_bytes), None),
                    Err(error) => (None, Some(error.to_string())),
                };
                inventory.gpus.push(GpuReport { bf16: info.supports_bf16(), info, free_bytes, problem });
            }
            let all = 0..driver.num_gpus() as u32;
            for from in all.clone() {
                let row = all.clone().map(|to| driver.peer_link(from, to)).collect::<Result<_, _>>()?;
                inventory.links.push(row);
            }
            Ok::<(), CudaError>(())
        };
        let looked = look();
        inventory.missing = looked.err().map(|error| error.to_string());
        inventory
    }
}

/// For people:
///
/// ```text
/// driver  CUDA 13.0
/// gpu 0   NVIDIA H100 80GB HBM3, sm_90, 79.1 of 79.6 GiB free, 132 SMs, 0000:0F:00.0
///         to 1: direct, atomics (rank 0)
/// ```
impl fmt::Display for Inventory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.driver {
            Some(version) => writeln!(f, "driver  CUDA {version}")?,
            None => writeln!(f, "driver  none")?,
        }
        for gpu in &self.gpus {
            let GpuReport { info, bf16, free_bytes, problem } = gpu;
            write!(f, "gpu {:<3} {}, {}, ", info.ordinal, info.name, info.capability)?;
            match free_bytes {
                Some(free) => write!(f, "{:.1} of {:.1} GiB free", gib(*free), gib(info.total_bytes))?,
                None => write!(f, "{:.1} GiB", gib(info.total_bytes))?,
            }
            write!(f, ", {} SMs, {}", info.num_multiprocessors, info.pci_bus_id)?;
            writeln!(f, "{}", if *bf16 { "" } else { ", no bf16: use fp16" })?;
            if let Some(problem) = problem {
                writeln!(f, "        cannot be used: {problem}")?;
            }
            for (to, link) in self.links.get(info.ordinal as usize).into_iter().flatten().enumerate() {
                match link {
                    PeerLink::Same => {}
                    PeerLink::Direct { performance_rank, native_atomics } => {
                        let atomics = if *native_atomics { ", atomics" } else { "" };
                        writeln!(f, "        to {to}: direct{atomics} (rank {performance_rank})")?;
                    }
                    PeerLink::ThroughHost => writeln!(f, "        to {to}: through host memory")?,
                }
            }
        }
        match &self.missing {
            Some(missing) => writeln!(f, "missing {missing}"),
            None => Ok(()),
        }
    }
}

fn gib(bytes: usize) -> f64 {
    bytes as f64 / (1u64 << 30) as f64
}
