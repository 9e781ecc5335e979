//! What a caller chooses.

use shardwise_device::DType;
use shardwise_kernels::Threads;
use shardwise_plan::ZeroStage;

/// Options of [`crate::Zero`].
#[derive(Debug, Clone)]
pub struct ZeroOptions {
    /// How much is sharded.
    pub stage: ZeroStage,
    /// Element type of the compute copy and of the gradients given to `reduce`: `F32` or `Bf16`.
    pub compute: DType,
    /// Micro-batches in a step.
    pub grad_accum_steps: usize,
    /// Clips gradients to this global norm.
    pub clip_grad_norm: Option<f64>,
    /// The optimizer.
    pub adamw: AdamWOptions,
    /// Parameters without weight decay, as patterns in which `*` stands for any run of characters.
    pub no_decay: Vec<String>,
    /// Whether collectives run beside the computation.
    pub overlap: Overlap,
    /// Threads for arithmetic on buffers.
    pub threads: Threads,
}

/// Hyperparameters of AdamW.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWOptions {
    /// Decay of the mean of gradients.
    pub beta1: f64,
    /// Decay of the mean of squared gradients.
    pub beta2: f64,
    /// Added to the denominator.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

/// Where collectives of units run. The numbers are the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Overlap {
    /// In the caller's thread, when they are needed. Best where ranks have no core to spare: on CPU a collective is
    /// copying, and a second thread would only take the first one's time.
    Inline,
    /// On a side thread, started early: gathers of the next unit during this one's computation, reductions during the
    /// rest of the backward pass.
    SideThread,
}
