//! Which layout of many ranks fits their memory, and which is fastest?
//!
//! A [`Job`] says what a step computes, a [`Cluster`] on what. [`search`] tries every mesh of the ranks with every stage of ZeRO,
//! schedule, size of micro-batch and choice of recomputation: the global batch, and so what is learned, is the same in all. A
//! layout gets an [`Estimate`] of its memory, traffic and time; those that fit come fastest first, the others by how much is
//! missing.
//!
//! Memory and traffic are counted as for the plan of a run ([`crate::share`]), on the fullest pipeline stage and on the busiest
//! one. Time is what follows from the rates that the cluster is given:
//!
//! | part of a step | time |
//! |---|---|
//! | computation | operations of the slowest stage over the flop rate; forward, gradients of inputs, gradients of weights take equally long |
//! | tensor axis | beside nothing: the next layer needs the sum |
//! | pipeline axis | the bubble, and the messages that fill and drain the pipeline |
//! | data axis | what does not pass beside computation: with stages 0 and 1 beside the last backward pass, with 2 and 3 beside all |
//!
//! Nothing is known of kernels, so a flop rate should be one that was attained. The optimizer's own time is left out.

mod cost;
mod search;
#[cfg(test)]
mod tests;

use serde::Serialize;

pub use search::{Ruled, Search, search};

use crate::memory::{HeadChunks, StateWidths};
use crate::pipeline::{ScheduleKind, StageCut};
pub use crate::traffic::AxisTraffic;
use crate::zoo::{GroupedQueries, ModelConfig, SequenceParallel};
use crate::{Bytes, Device, Mesh, NamePattern, Overlap, ZeroStage};

/// The ranks and what they can do.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Cluster {
    /// Ranks, one for each device.
    pub num_ranks: usize,
    /// Neighbouring ranks that share a host.
    pub ranks_per_host: usize,
    /// Memory of a device.
    pub device_memory: Bytes,
    /// What of it is not for the plan to give: runtime, libraries, the allocator's waste.
    pub reserved: Bytes,
    /// Floating-point operations that a rank does in a second.
    pub flops: f64,
    /// Bytes that a rank sends to other hosts in a second.
    pub link: f64,
    /// Bytes that a rank sends within its host in a second.
    pub host_link: f64,
}

/// What a step is to compute, and what the planner may choose from.
#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    /// The model.
    pub model: ModelConfig,
    /// Tokens of one sample.
    pub seq_len: usize,
    /// Samples of a step, over all ranks.
    pub global_batch: usize,
    /// A size of micro-batch to try besides the powers of two.
    pub micro_batch: usize,
    /// Bytes of an element of the type that layers compute in: 2 or 4.
    pub compute_bytes: usize,
    /// Where ranks compute, and what they offload.
    pub device: Device,
    /// What attention holds of keys and values that queries share.
    pub grouped_queries: GroupedQueries,
    /// Rows whose scores a head holds at a time.
    pub head_chunks: HeadChunks,
    /// Bytes of an element of each kind of state.
    pub widths: StateWidths,
    /// Parameters that are not trained.
    pub frozen: Vec<NamePattern>,
    /// Whether collectives of the data axis run beside the computation.
    pub overlap: Overlap,
    /// Whether tensor-parallel ranks split the tokens between linear layers.
    pub sequence: SequenceParallel,
    /// How layers are cut into pipeline stages.
    pub cut: StageCut,
    /// Schedules to try where there is a pipeline.
    pub schedules: Vec<ScheduleKind>,
    /// The pipeline degree, if it is given.
    pub pipeline: Option<usize>,
    /// The tensor degree, if it is given.
    pub tensor: Option<usize>,
    /// The stage of ZeRO, if it is given.
    pub stage: Option<ZeroStage>,
}

/// What of a layer's activations waits for its backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Recompute {
    /// All that the backward pass reads.
    Off,
    /// The layer's input; its forward pass runs again, but for the model's last layer.
    Layers,
}

/// One way to lay out the job.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Layout {
    /// The axes.
    pub mesh: Mesh,
    /// How much of the state is sharded over the data axis.
    pub stage: ZeroStage,
    /// How the pipeline is filled; `None` without a pipeline.
    pub schedule: Option<ScheduleKind>,
    /// Samples of a micro-batch.
    pub micro_batch: usize,
    /// Micro-batches of a replica in a step.
    pub num_microbatches: usize,
    /// What waits for the backward pass.
    pub recompute: Recompute,
}

/// Bytes of one rank, by kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct RankMemory {
    /// Compute copy of the parameters.
    pub parameters: Bytes,
    /// Gradients, as they are summed.
    pub gradients: Bytes,
    /// Master weights and moments.
    pub optimizer: Bytes,
    /// What waits for the backward pass, at the fullest moment.
    pub activations: Bytes,
    /// Gathered parameters, reductions and messages under way, gradients and temporaries of the running layer, and what is reserved.
    pub buffers: Bytes,
}

impl RankMemory {
    /// All of it.
    pub fn total(&self) -> Bytes {
        self.kinds().into_iter().map(|(_, bytes)| bytes).sum()
    }

    /// Each kind with its name.
    pub fn kinds(&self) -> [(&'static str, Bytes); 5] {
        [
            ("parameters", self.parameters),
            ("gradients", self.gradients),
            ("optimizer", self.optimizer),
            ("activations", self.activations),
            ("buffers", self.buffers),
        ]
    }

    /// The largest kind.
    pub fn largest(&self) -> (&'static str, Bytes) {
        self.kinds().into_iter().max_by_key(|&(_, bytes)| bytes).expect("there are five kinds")
    }
}

/// What a layout is expected to be like.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Estimate {
    /// The layout.
    pub layout: Layout,
    /// Memory of a rank of the fullest stage.
    pub memory: RankMemory,
    /// The pipeline stage that is the fullest.
    pub fullest_stage: usize,
    /// What is missing; 0 if it fits.
    pub excess: Bytes,
    /// What the busiest rank sends along each axis.
    pub traffic: AxisTraffic,
    /// Idle time of all stages as a part of the pipeline's time, where stages differ too.
    pub bubble: f64,
    /// Seconds of a step.
    pub step_s: f64,
}

impl Estimate {
    /// Whether it fits the device.
    pub fn fits(&self) -> bool {
        self.excess == Bytes(0)
    }
}
