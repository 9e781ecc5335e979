//! Where a run computes, and how it uses GPUs.

use serde::Serialize;
use shardwise_plan::Collectives;

/// Where the run computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Device {
    /// The host's processors.
    Cpu,
    /// NVIDIA's GPUs, one for each rank unless they share.
    Cuda,
}

/// How ranks use GPUs. Means nothing on CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct CudaConfig {
    /// What carries collectives; not NCCL where ranks share.
    pub collectives: Collectives,
    /// Whether ranks may share a GPU.
    pub sharing: GpuSharing,
    /// The most bytes of a GPU's memory that a rank may use; `None` leaves it at what there is.
    pub memory_limit: Option<u64>,
    /// Whether operations give the same bits each time they run.
    pub determinism: Determinism,
}

/// Whether operations on a GPU give the same bits each time they run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Determinism {
    /// The fastest form of each: some of libtorch's add in an order of chance.
    #[default]
    Off,
    /// A form that adds in one order.
    On,
}

/// Whether ranks may share a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum GpuSharing {
    /// Each rank has one to itself.
    Exclusive,
    /// Ranks of a host take its GPUs in turn. Their collectives go through host memory.
    Shared,
}

impl CudaConfig {
    /// What carries collectives: the host, where ranks may share a GPU.
    pub fn collectives(&self) -> Collectives {
        match self.sharing {
            GpuSharing::Shared => Collectives::Host,
            GpuSharing::Exclusive => self.collectives,
        }
    }
}
