//! Precision, loss scaling and the reduction of gradients.

use super::lookup::{Assembler, Found, derived, set, switch, whole, word};
use crate::effective::{NoteKind, Source};
use crate::run_config::*;
use crate::value::Value;

const FP16_OFF: &str = "`fp16` is off";
const BF16_OFF: &str = "`bf16` is off";

impl Assembler<'_> {
    pub fn precision(&mut self) -> Option<Precision> {
        let (fp16, bf16) =
            (self.asked_for("deepspeed.fp16.enabled"), self.asked_for("deepspeed.bf16.enabled"));
        if let (Some(fp16), Some(bf16)) = (fp16, bf16) {
            self.both(&bf16, &fp16, "a run computes in one precision");
            return None;
        }
        let fp16 = self.get("deepspeed.fp16.enabled", switch)?;
        let bf16 = self.get("deepspeed.bf16.enabled", switch)?;
        let found = match (fp16.value, bf16.value) {
            (true, _) => Found { value: Precision::Fp16, source: fp16.source },
            (_, true) => Found { value: Precision::Bf16, source: bf16.source },
            _ => Found { value: Precision::Fp32, source: bf16.source },
        };
        let precision = self.keep("precision", found);
        if let Some(setting) = self.setting("deepspeed.data_types.param_dtype") {
            let what = "what is computed in the run's precision is also stored in it";
            if word(&setting.value).as_deref() == Some(precision.name()) {
                self.note(&setting, NoteKind::AsAlways, what);
            } else {
                let hint = format!("leave it out: the run's precision is `{}`, and {what}", precision.name());
                self.not_supported(&setting, &hint);
            }
        }
        Some(precision)
    }

    /// The outer option is `None` where something is wrong.
    pub fn loss_scaling(&mut self, precision: Option<Precision>) -> Option<Option<LossScaling>> {
        const DYNAMIC: [&str; 5] = [
            "deepspeed.fp16.initial_scale_power",
            "deepspeed.fp16.loss_scale_window",
            "deepspeed.fp16.hysteresis",
            "deepspeed.fp16.consecutive_hysteresis",
            "deepspeed.fp16.min_loss_scale",
        ];
        if precision? != Precision::Fp16 {
            for key in ["deepspeed.fp16.loss_scale"].into_iter().chain(DYNAMIC) {
                self.no_effect(key, FP16_OFF);
            }
            self.sources.insert("loss_scaling".to_string(), derived("`precision`"));
            return Some(None);
        }
        let scale = self.get("deepspeed.fp16.loss_scale", Value::number)?;
        self.sources.insert("loss_scaling.type".to_string(), scale.source.clone());
        if scale.value > 0.0 {
            for key in DYNAMIC {
                self.no_effect(key, "`fp16.loss_scale` fixes the scale");
            }
            return Some(Some(LossScaling::Static { scale: self.keep("loss_scaling.scale", scale) }));
        }
        let initial_power = self.get(DYNAMIC[0], whole);
        let window = self.get(DYNAMIC[1], whole);
        let hysteresis = self.get(DYNAMIC[2], whole);
        let consecutive = self.get(DYNAMIC[3], switch);
        let min_scale = self.get(DYNAMIC[4], Value::number)?;
        let initial_power = initial_power?;
        let initial = 2f64.powi(initial_power.value as i32);
        if min_scale.value > initial {
            let keys = [DYNAMIC[4], DYNAMIC[0]];
            if let Some(setting) = keys.into_iter().find_map(|key| self.setting(key)) {
                let message = format!(
                    "`fp16.min_loss_scale` is `{}`, above the first scale, 2^{} = `{initial}`",
                    min_scale.value, initial_power.value
                );
                self.conflict(setting.value.at, message, "raise `fp16.initial_scale_power`");
            }
            return None;
        }
        let refill = consecutive.map(|found| Found {
            value: if found.value { HysteresisRefill::EveryGoodStep } else { HysteresisRefill::OnGrowth },
            source: found.source,
        });
        Some(Some(LossScaling::Dynamic(DynamicLossScale {
            initial_power: self.keep("loss_scaling.initial_power", initial_power) as u32,
            window: self.keep("loss_scaling.window", window?),
            hysteresis: self.keep("loss_scaling.hysteresis", hysteresis?),
            refill: self.keep("loss_scaling.refill", refill?),
            min_scale: self.keep("loss_scaling.min_scale", min_scale),
        })))
    }

    pub fn non_finite_grads(&mut self, precision: Option<Precision>) -> Option<NonFiniteGrads> {
        const CHECK: &str = "deepspeed.bf16.check_grad_overflow";
        let found = if precision? == Precision::Bf16 {
            let check = self.get(CHECK, switch)?;
            let value = if check.value { NonFiniteGrads::Skip } else { NonFiniteGrads::Apply };
            Found { value, source: check.source }
        } else {
            self.no_effect(CHECK, BF16_OFF);
            Found { value: NonFiniteGrads::Skip, source: Source::Default }
        };
        Some(self.keep("non_finite_grads", found))
    }

    pub fn reduction(&mut self, precision: Option<Precision>) -> Option<ReductionConfig> {
        let accumulation = self.get_or("deepspeed.data_types.grad_accum_dtype", float, FloatType::Fp32);
        let communication = self.optional("deepspeed.communication_data_type", float);
        let op = self.get("deepspeed.gradient_allreduce_op", |value| match word(value)?.as_str() {
            "mean" => Some(ReduceOp::Mean),
            "sum" => Some(ReduceOp::Sum),
            _ => None,
        })?;
        let scaling = self.grad_scaling(op.value);
        let accumulation = accumulation?;
        let precision = precision?;
        if accumulation.value != FloatType::Fp32 && accumulation.value != precision.float_type() {
            if let Some(setting) = self.setting("deepspeed.data_types.grad_accum_dtype") {
                let hint = format!(
                    "set it to `\"fp32\"` or leave it out; the run's precision, `\"{}\"`, is possible too",
                    precision.name()
                );
                self.not_supported(&setting, &hint);
            }
            return None;
        }
        let scaling = scaling?;
        let source = scaling.source.clone();
        self.sources.insert("reduction.scaling.factor".to_string(), source);
        Some(ReductionConfig {
            accumulation: self.keep("reduction.accumulation", accumulation),
            communication: self.keep("reduction.communication", communication?),
            op: self.keep("reduction.op", op),
            scaling: self.keep("reduction.scaling.type", scaling),
        })
    }

    /// Division before the sum, after it, or in part. DeepSpeed lets one of two conflicting wishes pass unheard.
    fn grad_scaling(&mut self, op: ReduceOp) -> Option<Found<GradScaling>> {
        const PRESCALE: &str = "deepspeed.prescale_gradients";
        const PREDIVIDE: &str = "deepspeed.gradient_predivide_factor";
        let factor = self.get(PREDIVIDE, Value::number)?;
        self.get(PRESCALE, switch)?;
        let before = self.asked_for(PRESCALE);
        let split = self.setting(PREDIVIDE).filter(|_| factor.value != 1.0);
        if let (Some(before), Some(split)) = (&before, &split) {
            self.both(before, split, "gradients are divided either at once or in two parts");
            return None;
        }
        if let (ReduceOp::Sum, Some(setting)) = (op, before.as_ref().or(split.as_ref())) {
            let (at, key) = (setting.value.at.clone(), setting.value.at.key(&setting.key));
            let message =
                format!("`{key}` is set, but `gradient_allreduce_op` is `sum`, which divides nothing");
            self.conflict(at, message, "leave it out");
            return None;
        }
        Some(match (before, split) {
            (Some(setting), _) => Found { value: GradScaling::Before, source: set(&setting) },
            (_, Some(setting)) => {
                Found { value: GradScaling::Split { factor: factor.value }, source: set(&setting) }
            }
            _ => Found { value: GradScaling::After, source: factor.source },
        })
    }
}

/// A floating-point type by its name.
pub(super) fn float(value: &Value) -> Option<FloatType> {
    match word(value)?.as_str() {
        "fp32" => Some(FloatType::Fp32),
        "bf16" => Some(FloatType::Bf16),
        "fp16" => Some(FloatType::Fp16),
        _ => None,
    }
}
