//! The number formats of a run, and what guards their limits: loss scaling, and how gradients are summed.

use serde::Serialize;

/// A floating-point type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FloatType {
    /// 32-bit floats.
    Fp32,
    /// 16-bit brain floats.
    Bf16,
    /// 16-bit IEEE floats.
    Fp16,
}

impl FloatType {
    /// The name used in configurations and reports.
    pub const fn name(self) -> &'static str {
        match self {
            FloatType::Fp32 => "fp32",
            FloatType::Bf16 => "bf16",
            FloatType::Fp16 => "fp16",
        }
    }

    /// Bytes of one element.
    pub const fn size_bytes(self) -> usize {
        match self {
            FloatType::Fp32 => 4,
            FloatType::Bf16 | FloatType::Fp16 => 2,
        }
    }
}

/// The number format that layers compute in. Master weights are fp32 in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// 32-bit floats.
    Fp32,
    /// 16-bit brain floats.
    Bf16,
    /// 16-bit IEEE floats, with a scaled loss.
    Fp16,
}

impl Precision {
    /// The type of the compute copy.
    pub const fn float_type(self) -> FloatType {
        match self {
            Precision::Fp32 => FloatType::Fp32,
            Precision::Bf16 => FloatType::Bf16,
            Precision::Fp16 => FloatType::Fp16,
        }
    }

    /// The name used in configurations and reports.
    pub const fn name(self) -> &'static str {
        self.float_type().name()
    }
}

/// How the gradient of the loss is scaled, so that small gradients do not vanish in fp16.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum LossScaling {
    /// The same scale at every step.
    Static {
        /// The scale; above 0.
        scale: f64,
    },
    /// A scale that is halved when a gradient overflows, and doubled after a while without.
    Dynamic(DynamicLossScale),
}

/// The constants of dynamic loss scaling. The scale moves by factors of 2.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct DynamicLossScale {
    /// The first scale is 2 to this power.
    pub initial_power: u32,
    /// Steps without overflow after which the scale is doubled.
    pub window: u64,
    /// Overflows until the scale is halved: all but the last are let pass.
    pub hysteresis: u64,
    /// When the overflows to be let pass are counted anew.
    pub refill: HysteresisRefill,
    /// The scale never falls below this; an overflow there ends the run.
    pub min_scale: f64,
}

/// When [`DynamicLossScale::hysteresis`] is filled up again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum HysteresisRefill {
    /// When the scale is doubled.
    OnGrowth,
    /// At every step without overflow, so that only overflows in a row count (`consecutive_hysteresis`).
    EveryGoodStep,
}

/// What a step with a gradient that is not finite does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum NonFiniteGrads {
    /// It is skipped on all ranks, and said to be.
    Skip,
    /// It is applied as it is (`bf16.check_grad_overflow` off).
    Apply,
}

/// How gradients are accumulated over micro-batches and reduced over ranks.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct ReductionConfig {
    /// The type in which gradients are accumulated: fp32, or the run's precision.
    pub accumulation: FloatType,
    /// The type in which gradients travel between ranks. `None`: as they are, in the run's precision out of a layer, in the
    /// type of accumulation once accumulated. Sums are fp32 in any case.
    pub communication: Option<FloatType>,
    /// What becomes of the ranks' gradients.
    pub op: ReduceOp,
    /// Where the division of a mean takes place.
    pub scaling: GradScaling,
}

/// What becomes of the ranks' gradients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ReduceOp {
    /// Their mean.
    Mean,
    /// Their sum. Over micro-batches it is the mean all the same.
    Sum,
}

/// Where a sum over `n` ranks is divided by `n`. In exact arithmetic it is all one; it matters where gradients travel in fp16.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum GradScaling {
    /// The sum is divided by `n`.
    After,
    /// Each rank divides by `n` before it sends (`prescale_gradients`).
    Before,
    /// Each rank divides by `factor` before it sends, and the sum is divided by `n / factor` (`gradient_predivide_factor`).
    Split {
        /// Above 0, and not 1.
        factor: f64,
    },
}
