//! What a caller chooses.

use std::sync::Arc;

use shardwise_device::DType;
use shardwise_kernels::Threads;
use shardwise_kernels::processor::GpuProcessor;
pub use shardwise_plan::Overlap;
use shardwise_plan::ZeroStage;

use crate::{
    DynamicLossScale, LossScaling, Offload, Optimizer, ParamGroup, Predivide, ReductionOptions, Tier,
    ZeroError,
};

/// Options of [`crate::Zero`].
#[derive(Debug, Clone)]
pub struct ZeroOptions {
    /// How much is sharded.
    pub stage: ZeroStage,
    /// Element type of the compute copy and of the gradients given to `reduce`: `F32`, `Bf16` or `F16`.
    pub compute: DType,
    /// Micro-batches in a step.
    pub grad_accum_steps: usize,
    /// Clips gradients to this global norm.
    pub clip_grad_norm: Option<f64>,
    /// The optimizer.
    pub optimizer: Optimizer,
    /// Parameters with another learning rate or weight decay; the first group that names a parameter counts.
    pub groups: Vec<ParamGroup>,
    /// What optimizer states are kept in.
    pub states: StatePrecision,
    /// Whether collectives run beside the computation.
    pub overlap: Overlap,
    /// Threads of the host, for arithmetic on buffers.
    pub threads: Threads,
    /// The GPU that has the model, if it is not the host; its stream is the one on which the model computes.
    pub gpu: Option<Arc<GpuProcessor>>,
    /// What is kept on the host all the same.
    pub offload: Offload,
    /// The loss scale, for `F16`; without one it is 1.
    pub loss_scaling: Option<LossScaling>,
    /// What becomes of a step whose gradient is not finite.
    pub on_non_finite: OnNonFinite,
    /// How gradients are summed over micro-batches and ranks.
    pub reduction: ReductionOptions,
}

/// What becomes of a step whose gradient is not finite.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnNonFinite {
    /// It is skipped; that many in a row end the training. Under a dynamic loss scale there is no such number: skips in
    /// a row end at the smallest scale.
    Skip {
        /// Skipped steps in a row that end the training.
        max_consecutive: u64,
    },
    /// It is applied like any other, and the weights take the infinities (`check_grad_overflow: false`).
    Apply,
}

impl Default for OnNonFinite {
    fn default() -> Self {
        OnNonFinite::Skip { max_consecutive: 10 }
    }
}

impl ZeroOptions {
    /// Training in fp32 on one thread, without accumulation or clipping; the fields say what else there is.
    pub fn new(stage: ZeroStage, optimizer: Optimizer) -> Self {
        ZeroOptions {
            stage,
            compute: DType::F32,
            grad_accum_steps: 1,
            clip_grad_norm: None,
            optimizer,
            groups: Vec::new(),
            states: StatePrecision::F32,
            overlap: Overlap::Inline,
            threads: Threads::ONE,
            gpu: None,
            offload: Offload::default(),
            loss_scaling: None,
            on_non_finite: OnNonFinite::default(),
            reduction: ReductionOptions::default(),
        }
    }

    /// # Errors
    /// [`ZeroError::WrongOption`] for what would train nothing, or something else, in silence.
    pub(crate) fn check(&self) -> Result<(), ZeroError> {
        let wrong = |option, got: String, expected| Err(ZeroError::WrongOption { option, got, expected });
        let floats = "`f32`, `bf16` or `f16`";
        if self.compute == DType::U8 {
            return wrong("compute", self.compute.to_string(), floats);
        }
        if self.grad_accum_steps == 0 {
            return wrong("grad_accum_steps", "0".to_owned(), "at least `1`");
        }
        match self.clip_grad_norm {
            Some(max) if max.is_nan() || max <= 0.0 => {
                return wrong("clip_grad_norm", max.to_string(), "a positive number, or none");
            }
            _ => {}
        }
        match self.on_non_finite {
            OnNonFinite::Skip { max_consecutive: 0 } => {
                return wrong("on_non_finite.max_consecutive", "0".to_owned(), "at least `1`");
            }
            OnNonFinite::Apply if self.compute == DType::F16 => {
                return wrong("on_non_finite", "apply".to_owned(), "`skip`: a step in `f16` may overflow");
            }
            _ => {}
        }
        let ReductionOptions { accumulation_dtype, communication_dtype, predivide, .. } = self.reduction;
        if accumulation_dtype == DType::U8 {
            return wrong("accumulation_dtype", accumulation_dtype.to_string(), floats);
        }
        if communication_dtype == Some(DType::U8) {
            return wrong("communication_dtype", DType::U8.to_string(), "`f32`, `bf16`, `f16` or none");
        }
        if let Predivide::By(divisor) = predivide
            && !(divisor > 0.0 && ((1.0 / divisor) as f32).is_normal())
        {
            return wrong("predivide", divisor.to_string(), "a positive number in the range of `f32`");
        }
        self.optimizer.check()?;
        self.groups.iter().try_for_each(ParamGroup::check)?;
        let is_element_wise = !matches!(self.optimizer, Optimizer::Lamb(_) | Optimizer::Muon(_));
        if self.states != StatePrecision::F32 && !is_element_wise {
            return wrong("states", "bf16".to_owned(), "`f32` for this optimizer");
        }
        self.check_tiers()?;
        self.check_loss_scaling()
    }

    fn check_tiers(&self) -> Result<(), ZeroError> {
        let wrong = |option, got: &str, expected| {
            Err(ZeroError::WrongOption { option, got: got.to_owned(), expected })
        };
        let Offload { optimizer, params } = self.offload;
        if params == Tier::Host && !self.stage.shards_parameters() {
            return wrong("offload.params", "host", "`device`, unless `stage` is 3");
        }
        let is_muon = matches!(self.optimizer, Optimizer::Muon(_));
        if self.gpu.is_some() && is_muon && optimizer == Tier::Device {
            let expected = "`host` for Muon, whose matrix products have no kernels for GPUs: offload the optimizer, \
                            in stage 1 or above where there are several ranks";
            return wrong("offload.optimizer", "device", expected);
        }
        Ok(())
    }

    fn check_loss_scaling(&self) -> Result<(), ZeroError> {
        let wrong = |option, got: String, expected| Err(ZeroError::WrongOption { option, got, expected });
        let Some(scaling) = self.loss_scaling else { return Ok(()) };
        let is_positive = |x: f64| x > 0.0 && x.is_finite();
        if self.compute != DType::F16 {
            return wrong("loss_scaling", format!("{scaling:?}"), "none, unless `compute` is `f16`");
        }
        match scaling {
            LossScaling::Static(scale) if !is_positive(scale) => {
                wrong("loss_scaling.scale", scale.to_string(), "a positive number")
            }
            LossScaling::Static(_) => Ok(()),
            LossScaling::Dynamic(DynamicLossScale { window: 0, .. }) => {
                wrong("loss_scaling.window", "0".to_owned(), "at least `1`")
            }
            LossScaling::Dynamic(DynamicLossScale { hysteresis: 0, .. }) => {
                wrong("loss_scaling.hysteresis", "0".to_owned(), "at least `1`")
            }
            LossScaling::Dynamic(DynamicLossScale { initial_power, .. }) if initial_power > 127 => {
                wrong("loss_scaling.initial_power", initial_power.to_string(), "at most `127`")
            }
            LossScaling::Dynamic(DynamicLossScale { min_scale, initial_power, .. })
                if !is_positive(min_scale) || min_scale > f64::from(initial_power).exp2() =>
            {
                let expected = "a positive number, at most the first scale";
                wrong("loss_scaling.min_scale", min_scale.to_string(), expected)
            }
            LossScaling::Dynamic(_) => Ok(()),
        }
    }
}

/// What optimizer states are kept in. They are computed in fp32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StatePrecision {
    /// As they are computed.
    F32,
    /// Half the memory. Rounded at random, by a pure function of the seed, parameter, element and step. Not for LAMB and Muon.
    Bf16 {
        /// Of the random numbers.
        seed: u64,
    },
}
