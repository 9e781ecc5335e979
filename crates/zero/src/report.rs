//! How a step ended, and what state weighs.

use std::fmt;

/// Whether a step changed the parameters; the same on every rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StepOutcome {
    /// Parameters, moments and the step counter moved.
    Applied,
    /// Nothing moved.
    Skipped {
        /// Why.
        reason: SkipReason,
    },
}

/// Why a step was skipped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SkipReason {
    /// The global gradient norm is infinite or not a number.
    NonFiniteGradient,
}

impl fmt::Display for SkipReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SkipReason::NonFiniteGradient => f.write_str("the gradient is not finite"),
        }
    }
}

/// What a step did.
#[derive(Debug, Clone, PartialEq)]
pub struct StepReport {
    /// Whether it was applied.
    pub outcome: StepOutcome,
    /// Global L2 norm of the mean gradient, before clipping.
    pub grad_norm: f64,
    /// The caller's scalars, summed over the ranks in rank order.
    pub sums: Vec<f64>,
}

/// Bytes of model state that one rank holds, by kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StateBytes {
    /// Compute copies of the parameters (in fp32 these are the master weights).
    pub params: usize,
    /// fp32 master weights, where they are apart from the compute copy.
    pub master_params: usize,
    /// First and second moments.
    pub optimizer: usize,
    /// fp32 gradients.
    pub grads: usize,
}

impl StateBytes {
    /// All of it.
    pub fn total(&self) -> usize {
        self.params + self.master_params + self.optimizer + self.grads
    }
}
