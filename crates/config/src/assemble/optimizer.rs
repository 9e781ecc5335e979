//! The optimizer.
//!
//! Defaults are those of the class that DeepSpeed makes of the name.

use super::lookup::{Assembler, Found, derived, set, switch, whole, word};
use super::numerics::float;
use crate::check::Setting;
use crate::effective::{NoteKind, Source};
use crate::error::ConfigError;
use crate::keys::optimizer::{OPTIMIZERS, OTHER_OPTIMIZERS};
use crate::run_config::*;
use crate::schema::{Fate, one_of, quoted};
use crate::value::{Data, Value};

const LR: &str = "deepspeed.optimizer.params.lr";
const MUON_LR: &str = "deepspeed.optimizer.params.muon_lr";
const ADAM_LR: &str = "deepspeed.optimizer.params.adam_lr";
const BETAS: &str = "deepspeed.optimizer.params.betas";

/// The second beta that DeepSpeed sets when a schedule moves the first.
const CYCLED_BETA2: f64 = 0.99;

impl Assembler<'_> {
    /// The optimizer by its proper name, if it is one of ours.
    pub fn optimizer_name(&self) -> Option<&'static str> {
        let kind = self.setting("deepspeed.optimizer.type")?;
        proper_name(kind.value.text()?, OPTIMIZERS)
    }

    /// The rate that the optimizer itself asks for; Muon's own where there are two.
    pub fn optimizer_lr(&mut self) -> Option<Found<f64>> {
        let name = self.optimizer_name()?;
        if name == "Muon" && (self.setting(MUON_LR).is_some() || self.is_bad(MUON_LR)) {
            return self.get(MUON_LR, Value::number);
        }
        let default = match name {
            "Adagrad" => 1e-2,
            "Muon" => 0.02,
            _ => 1e-3,
        };
        self.get_or(LR, Value::number, default)
    }

    pub fn optimizer(&mut self) -> Option<Optimizer> {
        let kind = self.setting("deepspeed.optimizer.type")?;
        if !self.is_supported(&kind, OPTIMIZERS, OTHER_OPTIMIZERS) {
            return None;
        }
        let name = self.optimizer_name()?;
        self.strangers("deepspeed.optimizer.params", name);
        let optimizer = match name {
            "SGD" => Optimizer::Sgd(self.sgd()?),
            "Adagrad" => Optimizer::Adagrad(self.adagrad()?),
            "Lion" => Optimizer::Lion(self.lion()?),
            "Lamb" => Optimizer::Lamb(self.lamb()?),
            "Muon" => Optimizer::Muon(self.muon()?),
            _ => self.adam(&kind, name)?,
        };
        self.keep_set("optimizer.type", &kind);
        Some(optimizer)
    }

    fn adam(&mut self, kind: &Setting, name: &str) -> Option<Optimizer> {
        const MODE: &str = "deepspeed.optimizer.params.adam_w_mode";
        const CORRECTION: &str = "deepspeed.optimizer.params.bias_correction";
        const TORCH: &str = "deepspeed.optimizer.params.torch_adam";
        let decoupled = self.get_or(MODE, switch, true)?;
        let torch_adam = self.get_or(TORCH, switch, false)?;
        if name == "Adam" && decoupled.value {
            let why = "its weight decay is decoupled, as DeepSpeed's `Adam` has it (`adam_w_mode`)";
            self.note(kind, NoteKind::AsAlways, why);
        }
        if name == "AdamW" {
            self.no_effect(MODE, "the weight decay of `AdamW` is decoupled in any case");
        }
        self.no_effect(TORCH, "there is one implementation of Adam here");
        let correction = self.get_or(CORRECTION, switch, true);
        let is_adamw = name == "AdamW" || decoupled.value;
        let betas = self.betas([0.9, 0.999]);
        let eps = self.get_or("deepspeed.optimizer.params.eps", Value::number, 1e-8);
        let mut decay = self.weight_decay()?;
        // DeepSpeed passes on to another class, whose default is another.
        if torch_adam.value && is_adamw && decay.source == Source::Default {
            decay =
                Found { value: 0.01, source: derived("`torch_adam`, the default of `torch.optim.AdamW`") };
        }
        let config = AdamConfig {
            betas: self.keep("optimizer.betas", betas?),
            eps: self.keep("optimizer.eps", eps?),
            weight_decay: self.keep("optimizer.weight_decay", decay),
            bias_correction: self.keep("optimizer.bias_correction", correction?),
        };
        Some(if is_adamw { Optimizer::AdamW(config) } else { Optimizer::Adam(config) })
    }

    fn sgd(&mut self) -> Option<SgdConfig> {
        let momentum = self.get_or("deepspeed.optimizer.params.momentum", Value::number, 0.0);
        let dampening = self.get_or("deepspeed.optimizer.params.dampening", Value::number, 0.0);
        let nesterov = self.get_or("deepspeed.optimizer.params.nesterov", switch, false);
        let decay = self.weight_decay();
        let (momentum, dampening, nesterov) = (momentum?, dampening?, nesterov?);
        if let Some(setting) = self.asked_for("deepspeed.optimizer.params.nesterov")
            && (momentum.value == 0.0 || dampening.value != 0.0)
        {
            let message = format!(
                "`{}` needs a momentum above 0 and no dampening, got `{}` and `{}`",
                setting.value.at.key(&setting.key),
                momentum.value,
                dampening.value
            );
            self.conflict(
                setting.value.at,
                message,
                "set `momentum`, for example to 0.9, and leave `dampening` out",
            );
            return None;
        }
        Some(SgdConfig {
            momentum: self.keep("optimizer.momentum", momentum),
            dampening: self.keep("optimizer.dampening", dampening),
            nesterov: self.keep("optimizer.nesterov", nesterov),
            weight_decay: self.keep("optimizer.weight_decay", decay?),
        })
    }

    fn adagrad(&mut self) -> Option<AdagradConfig> {
        const START: &str = "deepspeed.optimizer.params.initial_accumulator_value";
        if let Some(setting) = self.setting(START) {
            if setting.value.number() == Some(0.0) {
                self.note(&setting, NoteKind::AsAlways, "the sum of squares starts at 0");
            } else {
                self.not_supported(&setting, "set it to `0` or leave it out");
            }
        }
        let eps = self.get_or("deepspeed.optimizer.params.eps", Value::number, 1e-10);
        let decay = self.weight_decay();
        let lr_decay = self.get_or("deepspeed.optimizer.params.lr_decay", Value::number, 0.0);
        Some(AdagradConfig {
            lr_decay: self.keep("optimizer.lr_decay", lr_decay?),
            eps: self.keep("optimizer.eps", eps?),
            weight_decay: self.keep("optimizer.weight_decay", decay?),
        })
    }

    fn lion(&mut self) -> Option<LionConfig> {
        let (betas, decay) = (self.betas([0.9, 0.999]), self.weight_decay());
        Some(LionConfig {
            betas: self.keep("optimizer.betas", betas?),
            weight_decay: self.keep("optimizer.weight_decay", decay?),
        })
    }

    fn lamb(&mut self) -> Option<LambConfig> {
        const MIN: &str = "deepspeed.optimizer.params.min_coeff";
        let betas = self.betas([0.9, 0.999]);
        let eps = self.get_or("deepspeed.optimizer.params.eps", Value::number, 1e-8);
        let decay = self.weight_decay();
        let max = self.get_or("deepspeed.optimizer.params.max_coeff", Value::number, 10.0);
        let min = self.get_or(MIN, Value::number, 0.01);
        let correction = self.get_or("deepspeed.optimizer.params.bias_correction", switch, true);
        self.always_off("deepspeed.optimizer.params.eps_inside_sqrt", "`eps` is added to the root");
        let (min, max) = (min?, max?);
        if min.value > max.value {
            let settings = [MIN, "deepspeed.optimizer.params.max_coeff"].map(|key| self.setting(key));
            if let Some(setting) = settings.into_iter().flatten().next() {
                let message = format!("`min_coeff` is `{}`, above `max_coeff`, `{}`", min.value, max.value);
                self.conflict(setting.value.at, message, "the trust ratio lies between the two");
            }
            return None;
        }
        Some(LambConfig {
            betas: self.keep("optimizer.betas", betas?),
            eps: self.keep("optimizer.eps", eps?),
            weight_decay: self.keep("optimizer.weight_decay", decay?),
            max_coeff: self.keep("optimizer.max_coeff", max),
            min_coeff: self.keep("optimizer.min_coeff", min),
            bias_correction: self.keep("optimizer.bias_correction", correction?),
        })
    }

    fn muon(&mut self) -> Option<MuonConfig> {
        const METHOD: &str = "deepspeed.optimizer.params.ns_method";
        const MODE: &str = "deepspeed.optimizer.params.adam_w_mode";
        if let Some(setting) = self.setting(METHOD) {
            if word(&setting.value).as_deref() == Some("gram") {
                let hint = "set it to `\"standard\"` or leave it out; in exact arithmetic the two are one";
                self.not_supported(&setting, hint);
            } else {
                self.note(&setting, NoteKind::AsAlways, "there is one Newton-Schulz iteration here");
            }
        }
        self.always_on(MODE, "the decay of Muon's AdamW half is decoupled");
        self.always_off("deepspeed.optimizer.params.per_head_muon", "a matrix is made orthogonal as a whole");
        let momentum = self.get_or("deepspeed.optimizer.params.momentum", Value::number, 0.95);
        let ns_steps = self.get_or("deepspeed.optimizer.params.ns_steps", whole, 5);
        let decay = self.weight_decay();
        let betas = self.betas([0.9, 0.95]);
        let eps = self.get_or("deepspeed.optimizer.params.eps", Value::number, 1e-10);
        let ratio = self.adam_lr_scale();
        Some(MuonConfig {
            momentum: self.keep("optimizer.momentum", momentum?),
            ns_steps: self.keep("optimizer.ns_steps", ns_steps?) as u32,
            weight_decay: self.keep("optimizer.weight_decay", decay?),
            adam_lr_scale: self.keep("optimizer.adam_lr_scale", ratio?),
            adam_betas: self.keep("optimizer.adam_betas", betas?),
            adam_eps: self.keep("optimizer.adam_eps", eps?),
        })
    }

    /// The rate of Muon's AdamW half in units of Muon's. A scheduler that sets rates sets both alike.
    fn adam_lr_scale(&mut self) -> Option<Found<f64>> {
        let adam = match self.setting(ADAM_LR) {
            Some(_) => self.get(ADAM_LR, Value::number),
            None => self.get_or(LR, Value::number, 3e-4),
        }?;
        let muon = self.optimizer_lr()?;
        if let Some(key) = self.scheduler_rate() {
            let reason = format!("the scheduler's `{key}` sets the rate");
            self.no_effect(ADAM_LR, &reason);
            return Some(Found {
                value: 1.0,
                source: derived(&format!("`{key}`, which is the rate of both")),
            });
        }
        let scale = if adam.value == muon.value { 1.0 } else { adam.value / muon.value };
        if !scale.is_finite() {
            let setting = [MUON_LR, LR].into_iter().find_map(|key| self.setting(key))?;
            let message = format!(
                "`{}` is `{}`, but the rate of the AdamW half is `{}`: the two move in proportion",
                setting.value.at.key(&setting.key),
                muon.value,
                adam.value
            );
            self.conflict(setting.value.at, message, "raise it, or set `adam_lr` to 0 as well");
            return None;
        }
        let source = match self.setting(ADAM_LR) {
            Some(setting) => set(&setting),
            None => derived("the rates of the two halves"),
        };
        Some(Found { value: scale, source })
    }

    fn weight_decay(&mut self) -> Option<Found<f64>> {
        self.get_or("deepspeed.optimizer.params.weight_decay", Value::number, 0.0)
    }

    /// The decay rates of moments. Where a schedule moves the first, DeepSpeed sets the second too.
    fn betas(&mut self, default: [f64; 2]) -> Option<Found<[f64; 2]>> {
        let pair = |value: &Value| match &value.data {
            Data::List(items) => Some([items.first()?.number()?, items.get(1)?.number()?]),
            _ => None,
        };
        let betas = self.get_or(BETAS, pair, default)?;
        // Muon's are its other half's, which no schedule moves.
        if self.optimizer_name()? == "Muon" || !self.cycles_momentum()?.value {
            return Some(betas);
        }
        self.no_effect(BETAS, "the scheduler's `cycle_momentum` moves the first and sets the second to 0.99");
        let source = derived("`cycle_momentum`, which moves the first and sets the second");
        Some(Found { value: [betas.value[0], CYCLED_BETA2], source })
    }

    /// The type of the optimizer's states: the run file's word, or what two keys of DeepSpeed say.
    pub fn optimizer_state_dtype(&mut self, precision: Option<Precision>) -> Option<FloatType> {
        const OURS: &str = "optimizer.state_dtype";
        const BF16: &str = "deepspeed.bf16.bf16_optimizer_states";
        const FP32: &str = "deepspeed.optimizer.params.fp32_optimizer_states";
        let ours = self.optional(OURS, float)?;
        let fp32 = self.optional(FP32, switch)?;
        self.get(BF16, switch)?;
        let precision = precision?;
        let mut wishes = Vec::new();
        if let (Some(setting), Some(dtype)) = (self.setting(OURS), ours.value) {
            wishes.push((setting, dtype));
        }
        if let Some(setting) = self.asked_for(BF16) {
            if precision == Precision::Bf16 {
                wishes.push((setting, FloatType::Bf16));
            } else {
                self.note(&setting, NoteKind::NoEffect, "`bf16` is off");
            }
        }
        if let (Some(setting), Some(is_fp32)) = (self.setting(FP32), fp32.value) {
            match (is_fp32, precision) {
                // Off, states have the type of the parameters.
                (true, _) | (false, Precision::Fp32) => wishes.push((setting, FloatType::Fp32)),
                (false, Precision::Bf16) => wishes.push((setting, FloatType::Bf16)),
                (false, Precision::Fp16) => {
                    self.not_supported(&setting, "set it to `true` or leave it out: states overflow in fp16");
                    return None;
                }
            }
        }
        if let Some(pair) = wishes.windows(2).find(|pair| pair[0].1 != pair[1].1) {
            let (first, second) = (pair[0].0.clone(), pair[1].0.clone());
            self.both(&first, &second, "they ask for different types of the optimizer's states");
            return None;
        }
        let found = match wishes.first() {
            Some((setting, dtype)) => Found { value: *dtype, source: set(setting) },
            None => Found { value: FloatType::Fp32, source: Source::Default },
        };
        Some(self.keep("optimizer_state_dtype", found))
    }

    /// A switch that cannot be turned off.
    fn always_on(&mut self, path: &str, why: &str) {
        self.only(path, true, why);
    }

    /// A switch that cannot be turned on.
    fn always_off(&mut self, path: &str, why: &str) {
        self.only(path, false, why);
    }

    fn only(&mut self, path: &str, on: bool, why: &str) {
        let Some(setting) = self.setting(path) else { return };
        if switch(&setting.value) == Some(on) {
            self.note(&setting, NoteKind::AsAlways, why);
        } else {
            self.not_supported(&setting, &format!("set it to `{on}` or leave it out; {why}"));
        }
    }

    /// Whether the named optimizer or scheduler is one of ours; if not, says so.
    pub fn is_supported(&mut self, kind: &Setting, ours: &[&'static str], others: &[&'static str]) -> bool {
        let name = kind.value.text().unwrap_or_default();
        let known = |names: &[&'static str]| proper_name(name, names).is_some();
        if known(ours) {
            return true;
        }
        let (at, key) = (kind.value.at.clone(), kind.value.at.key(&kind.key));
        let expected = one_of(&quoted(ours));
        let got = kind.value.to_string();
        self.checked.errors.push(if known(others) {
            ConfigError::NotSupported { at, key, value: Some(got), hint: format!("set it to {expected}") }
        } else {
            let likeness = |known: &&&str| strsim::normalized_damerau_levenshtein(name, known);
            let close = ours.iter().chain(others).max_by(|a, b| likeness(a).total_cmp(&likeness(b)));
            let close = close.filter(|known| likeness(known) >= 0.6);
            ConfigError::Invalid {
                at,
                key,
                got,
                expected,
                hint: close.map(|k| format!("did you mean `{k}`?")),
            }
        });
        false
    }

    /// Refuses parameters in `group` that belong to another optimizer or scheduler than `owner`.
    pub fn strangers(&mut self, group: &str, owner: &str) {
        let prefix = format!("{group}.");
        let mut found = Vec::new();
        for (path, setting) in self.checked.set.iter().filter(|(path, _)| path.starts_with(&prefix)) {
            if let Some(Fate::BelongsTo(owners)) = self.checked.schema.key(path).map(|key| key.fate)
                && !owners.contains(&owner)
            {
                let (at, key) = (setting.value.at.clone(), setting.value.at.key(&setting.key));
                let message = format!("`{key}` is a parameter of {}, not of {owner}", one_of(owners));
                found.push((at, message));
            }
        }
        for (at, message) in found {
            self.conflict(at, message, "leave it out");
        }
    }
}

/// A name as it is written in a list, in whatever case the user wrote it.
pub(super) fn proper_name(name: &str, names: &[&'static str]) -> Option<&'static str> {
    names.iter().copied().find(|known| known.eq_ignore_ascii_case(name))
}
