//! How a step ended, and what state weighs.

/// Whether a step changed the parameters; the same on every rank.
#[derive(Debug, Clone, PartialEq)]
pub enum StepOutcome {
    /// Parameters, moments and the step counter moved.
    Applied,
    /// Nothing moved.
    Skipped {
        /// Why.
        reason: SkipReason,
    },
    /// Nothing moved, and another step would not either: the caller saves what it wants and ends. No rank has given up,
    /// so collectives work as before.
    Diverged {
        /// Why, for the run to end with.
        error: Divergence,
    },
}

impl StepOutcome {
    /// Whether parameters moved.
    pub fn is_applied(&self) -> bool {
        *self == StepOutcome::Applied
    }
}

/// Why a step was skipped.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SkipReason {
    /// The gradient is infinite or not a number somewhere.
    #[error("the gradient is not finite, first that of `{param}` in layer `{unit}`")]
    NonFiniteGradient {
        /// The layer of the first parameter, in the order of the model, with such an element on any rank.
        unit: String,
        /// The parameter.
        param: String,
    },
}

/// Why training cannot go on.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Divergence {
    /// Dynamic loss scale.
    #[error(
        "{reason}, and the loss scale is at its minimum, `{scale}`; \
         the last of the steps so far that changed the weights is step `{last_applied_step}`"
    )]
    LossScaleAtMinimum {
        /// Whose gradient it was.
        reason: SkipReason,
        /// The scale.
        scale: f64,
        /// Counted from 1 with skipped ones; 0 if there was none.
        last_applied_step: u64,
    },
    /// Static loss scale, or none.
    #[error(
        "{reason}, and `{num_skipped}` steps in a row were skipped; \
         the last of the steps so far that changed the weights is step `{last_applied_step}`"
    )]
    TooManySkips {
        /// Whose gradient it was, this time.
        reason: SkipReason,
        /// Steps in a row, this one included.
        num_skipped: u64,
        /// Counted from 1 with skipped ones; 0 if there was none.
        last_applied_step: u64,
    },
}

/// What a step did.
#[derive(Debug, Clone, PartialEq)]
pub struct StepReport {
    /// Whether it was applied.
    pub outcome: StepOutcome,
    /// Global L2 norm of the mean gradient (of the ranks' sum, if that is asked for), without the loss scale and before
    /// clipping.
    pub grad_norm: f64,
    /// The loss scale of this step's gradients; none if no scaling was asked for.
    pub loss_scale: Option<f64>,
    /// Steps skipped so far, this one included.
    pub num_skipped: u64,
    /// The caller's scalars, summed over the ranks of the world in rank order.
    pub sums: Vec<f64>,
}

/// Bytes of model state that one rank holds, by kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StateBytes {
    /// Compute copies of the parameters (in fp32 these are the master weights).
    pub params: usize,
    /// fp32 master weights, where they are apart from the compute copy.
    pub master_params: usize,
    /// Optimizer states.
    pub optimizer: usize,
    /// Gradients, in fp32 unless another type is asked for.
    pub grads: usize,
}

impl StateBytes {
    /// All of it.
    pub fn total(&self) -> usize {
        self.params + self.master_params + self.optimizer + self.grads
    }
}
