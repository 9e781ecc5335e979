//! What a caller chooses.

use shardwise_device::DType;
use shardwise_kernels::Threads;
pub use shardwise_plan::Overlap;
use shardwise_plan::ZeroStage;

use crate::ZeroError;

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

impl ZeroOptions {
    /// # Errors
    /// [`ZeroError::WrongOption`] for what would train nothing, or something else, in silence.
    pub(crate) fn check(&self) -> Result<(), ZeroError> {
        let wrong = |option, got: String, expected| Err(ZeroError::WrongOption { option, got, expected });
        if !matches!(self.compute, DType::F32 | DType::Bf16) {
            return wrong("compute", self.compute.to_string(), "`f32` or `bf16`");
        }
        if self.grad_accum_steps == 0 {
            return wrong("grad_accum_steps", "0".to_owned(), "at least `1`");
        }
        match self.clip_grad_norm {
            Some(max) if max.is_nan() || max <= 0.0 => {
                wrong("clip_grad_norm", max.to_string(), "a positive number, or none")
            }
            _ => Ok(()),
        }
    }
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
