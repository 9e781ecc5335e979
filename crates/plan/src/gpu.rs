//! What a run on GPUs decides that concerns memory: what is offloaded, and how ranks talk.

use serde::Serialize;

use crate::ZeroStage;

/// Where ranks compute.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Device {
    /// On the host's processors, in its memory.
    #[default]
    Cpu,
    /// On a GPU each.
    Cuda(Cuda),
}

/// How a rank with a GPU goes about it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Cuda {
    /// What is kept on the host.
    pub offload: Offload,
    /// What carries collectives.
    pub collectives: Collectives,
}

/// Where a kind of model state is kept on a rank with a GPU.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum OffloadTo {
    /// Nowhere: it is in the GPU's memory, with the rest of the model.
    #[default]
    Device,
    /// In pinned host memory.
    Host,
}

/// What a rank with a GPU keeps on the host.
///
/// # Source
/// ZeRO-Offload (arXiv:2101.06840).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Offload {
    /// Master weights, optimizer states and the gradient that a step reads; the host computes the step.
    pub optimizer: OffloadTo,
    /// The compute copy of parameters, of which a layer's is copied up when it is used; in stage 3.
    pub params: OffloadTo,
}

/// What carries collectives between GPUs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Collectives {
    /// NCCL where it is there and ranks have GPUs of their own, else the host.
    #[default]
    Auto,
    /// NCCL.
    Nccl,
    /// Pinned memory, and the host's own collectives.
    Host,
}

impl Offload {
    /// Nothing is on the host.
    pub const NOTHING: Offload = Offload { optimizer: OffloadTo::Device, params: OffloadTo::Device };
    /// The optimizer is.
    pub const OPTIMIZER: Offload = Offload { optimizer: OffloadTo::Host, params: OffloadTo::Device };
    /// All model state is.
    pub const ALL: Offload = Offload { optimizer: OffloadTo::Host, params: OffloadTo::Host };

    /// What of it there is in a stage of ZeRO with so many data-parallel ranks: parameters are kept elsewhere where they are gathered,
    /// and the host steps no more of the model than others leave to it.
    pub fn in_stage(self, stage: ZeroStage, num_replicas: usize) -> Offload {
        let kept = |to: OffloadTo, can: bool| if can { to } else { OffloadTo::Device };
        Offload {
            optimizer: kept(self.optimizer, stage.shards_optimizer() || num_replicas == 1),
            params: kept(self.params, stage.shards_parameters()),
        }
    }

    /// In words: `nothing`, `optimizer`, ..
    pub fn describe(self) -> &'static str {
        match (self.optimizer, self.params) {
            (OffloadTo::Device, OffloadTo::Device) => "nothing",
            (OffloadTo::Host, OffloadTo::Device) => "optimizer",
            (OffloadTo::Device, OffloadTo::Host) => "parameters",
            (OffloadTo::Host, OffloadTo::Host) => "optimizer and parameters",
        }
    }
}

impl Device {
    /// What is kept on the host beside a GPU.
    pub fn offload(self) -> Offload {
        match self {
            Device::Cpu => Offload::NOTHING,
            Device::Cuda(cuda) => cuda.offload,
        }
    }
}
