//! The learning rate: a scheduler of DeepSpeed's, or the run file's `lr_schedule`, or a constant.

use super::lookup::{Assembler, Found, derived, switch, whole, word};
use super::optimizer::proper_name;
use crate::check::Setting;
use crate::effective::{NoteKind, Source};
use crate::keys::optimizer::{OTHER_SCHEDULERS, SCHEDULERS};
use crate::schedule::{LrSchedule, MomentumCycle, Rise, WarmupCurve};
use crate::value::Value;

const SCHEDULER: &str = "deepspeed.scheduler.type";

/// The path of a scheduler's parameter.
fn param(name: &str) -> String {
    format!("deepspeed.scheduler.params.{name}")
}

impl Assembler<'_> {
    /// The scheduler by its proper name, if it is one of ours.
    fn scheduler_name(&self) -> Option<&'static str> {
        proper_name(self.setting(SCHEDULER)?.value.text()?, SCHEDULERS)
    }

    /// The scheduler's parameter that sets the rate, where it is not the optimizer's `lr`.
    pub fn scheduler_rate(&self) -> Option<&'static str> {
        match self.scheduler_name()? {
            "WarmupLR" => self.setting(&param("warmup_max_lr")).map(|_| "warmup_max_lr"),
            "WarmupDecayLR" => Some("warmup_max_lr"),
            "OneCycle" => Some("cycle_max_lr"),
            "LRRangeTest" => Some("lr_range_test_min_lr"),
            _ => None,
        }
    }

    /// `num_steps` is the length of the run, if it is known.
    pub fn lr_schedule(&mut self, num_steps: Option<u64>) -> Option<LrSchedule> {
        let (ours, theirs) = (self.setting("lr_schedule"), self.setting("deepspeed.scheduler"));
        if let (Some(ours), Some(theirs)) = (&ours, &theirs) {
            self.both(ours, theirs, "a run has one schedule");
            return None;
        }
        if ours.is_some() {
            return self.own_schedule(num_steps);
        }
        if theirs.is_none() {
            let lr = self.optimizer_lr()?;
            self.sources.insert("lr_schedule.type".to_string(), Source::Default);
            return Some(LrSchedule::Constant { lr: self.keep("lr_schedule.lr", lr) });
        }
        let kind = self.setting(SCHEDULER)?;
        if !self.is_supported(&kind, SCHEDULERS, OTHER_SCHEDULERS) {
            return None;
        }
        let name = self.scheduler_name()?;
        self.strangers("deepspeed.scheduler.params", name);
        if let Some(key) = self.scheduler_rate() {
            let lr = "deepspeed.optimizer.params.lr";
            for path in [lr, "deepspeed.optimizer.params.muon_lr"] {
                self.no_effect(path, &format!("the scheduler's `{key}` sets the rate"));
            }
        }
        self.keep_set("lr_schedule.type", &kind);
        match name {
            "WarmupLR" | "WarmupDecayLR" => self.warmup(name),
            "WarmupCosineLR" => self.warmup_cosine(),
            "OneCycle" => self.one_cycle(&kind, num_steps),
            _ => self.range_test(),
        }
    }

    /// The schedules of the run file, which are those of `transformers`.
    fn own_schedule(&mut self, num_steps: Option<u64>) -> Option<LrSchedule> {
        let kind = self.setting("lr_schedule.type")?;
        let lr = self.optimizer_lr();
        let warmup_steps = self.get("lr_schedule.warmup_steps", whole)?;
        let min_lr = self.get("lr_schedule.min_lr", Value::number);
        let total_steps = self.optional("lr_schedule.total_steps", whole)?;
        let lr = lr?;
        let is_cosine = match word(&kind.value)?.as_str() {
            "constant" => {
                for key in ["total_steps", "min_lr"] {
                    self.only_with(&format!("lr_schedule.{key}"), "a schedule that falls");
                }
                self.keep_set("lr_schedule.type", &kind);
                let lr = self.keep("lr_schedule.lr", lr);
                let warmup_steps = self.keep("lr_schedule.warmup_steps", warmup_steps);
                return Some(LrSchedule::ConstantWithWarmup { lr, warmup_steps });
            }
            name => name == "cosine",
        };
        let total_steps = match total_steps.value {
            Some(value) => Found { value, source: total_steps.source },
            None => Found { value: num_steps?, source: derived("`steps`") },
        };
        let min_lr = min_lr?;
        if let Some(setting) = self.setting("lr_schedule.warmup_steps")
            && warmup_steps.value > total_steps.value
        {
            let (warmup, total) = (warmup_steps.value, total_steps.value);
            let message =
                format!("`lr_schedule.warmup_steps` is `{warmup}`, the whole schedule has `{total}` steps");
            self.conflict(
                setting.value.at,
                message,
                "shorten the warm-up, or raise `lr_schedule.total_steps`",
            );
            return None;
        }
        if let Some(setting) = self.setting("lr_schedule.min_lr")
            && min_lr.value > lr.value
        {
            let message =
                format!("`lr_schedule.min_lr` is `{}`, above the rate, `{}`", min_lr.value, lr.value);
            self.conflict(setting.value.at, message, "lower it, or raise `deepspeed.optimizer.params.lr`");
            return None;
        }
        self.keep_set("lr_schedule.type", &kind);
        let lr = self.keep("lr_schedule.lr", lr);
        let min_lr = self.keep("lr_schedule.min_lr", min_lr);
        let warmup_steps = self.keep("lr_schedule.warmup_steps", warmup_steps);
        let total_steps = self.keep("lr_schedule.total_steps", total_steps);
        Some(if is_cosine {
            LrSchedule::Cosine { lr, min_lr, warmup_steps, total_steps }
        } else {
            LrSchedule::Linear { lr, min_lr, warmup_steps, total_steps }
        })
    }

    fn warmup(&mut self, name: &str) -> Option<LrSchedule> {
        let min_lr = self.get_or(&param("warmup_min_lr"), Value::number, 0.0);
        let max_lr = self.optional(&param("warmup_max_lr"), Value::number);
        let num_steps = self.get_or(&param("warmup_num_steps"), whole, 1000);
        let curve = self.warmup_curve();
        let total_steps = if name == "WarmupDecayLR" {
            self.total_steps()?
        } else {
            Found { value: 0, source: Source::Default }
        };
        let (min_lr, num_steps) = (min_lr?, num_steps?);
        let max_lr = match max_lr? {
            Found { value: Some(value), source } => Found { value, source },
            _ if name == "WarmupDecayLR" => {
                let reason = "the rate rises to 0.001, DeepSpeed's default for `WarmupDecayLR`, whatever the \
                              optimizer's `lr`";
                self.default_note(&param("warmup_max_lr"), 0.001.into(), reason);
                Found { value: 0.001, source: Source::Default }
            }
            _ => {
                self.one_rate_for_muon(&min_lr);
                self.optimizer_lr()?
            }
        };
        let min_lr = self.keep("lr_schedule.min_lr", min_lr);
        let max_lr = self.keep("lr_schedule.max_lr", max_lr);
        let num_steps = self.keep("lr_schedule.num_steps", num_steps);
        let curve = self.keep("lr_schedule.curve", curve?);
        if name == "WarmupLR" {
            return Some(LrSchedule::Warmup { min_lr, max_lr, num_steps, curve });
        }
        self.remark_on_length(num_steps, &total_steps);
        let total_steps = self.keep("lr_schedule.total_steps", total_steps);
        Some(LrSchedule::WarmupDecay { min_lr, max_lr, num_steps, total_steps, curve })
    }

    /// Muon's two rates move in proportion, which a lowest rate of both would break.
    fn one_rate_for_muon(&mut self, min_lr: &Found<f64>) {
        let split =
            ["muon_lr", "adam_lr"].map(|key| self.setting(&format!("deepspeed.optimizer.params.{key}")));
        if let (Some(setting), true) = (split.into_iter().flatten().next(), min_lr.value > 0.0) {
            let (at, key) = (setting.value.at.clone(), setting.value.at.key(&setting.key));
            let message = format!("`{key}` is set, but `warmup_min_lr` is one rate for both halves of Muon");
            self.conflict(at, message, "leave `warmup_min_lr` out: the warm-up starts at 0");
        }
    }

    fn warmup_cosine(&mut self) -> Option<LrSchedule> {
        let lr = self.optimizer_lr();
        let warmup_min_ratio = self.get_or(&param("warmup_min_ratio"), Value::number, 0.0);
        let cos_min_ratio = self.get_or(&param("cos_min_ratio"), Value::number, 1e-4);
        let num_steps = self.get_or(&param("warmup_num_steps"), whole, 1000);
        let curve = self.warmup_curve();
        let total_steps = self.total_steps();
        let (num_steps, total_steps) = (num_steps?, total_steps?);
        self.remark_on_length(num_steps.value, &total_steps);
        Some(LrSchedule::WarmupCosine {
            lr: self.keep("lr_schedule.lr", lr?),
            warmup_min_ratio: self.keep("lr_schedule.warmup_min_ratio", warmup_min_ratio?),
            cos_min_ratio: self.keep("lr_schedule.cos_min_ratio", cos_min_ratio?),
            num_steps: self.keep("lr_schedule.num_steps", num_steps),
            total_steps: self.keep("lr_schedule.total_steps", total_steps),
            curve: self.keep("lr_schedule.curve", curve?),
        })
    }

    fn warmup_curve(&mut self) -> Option<Found<WarmupCurve>> {
        let found = self.optional(&param("warmup_type"), |value| match word(value)?.as_str() {
            "linear" => Some(WarmupCurve::Linear),
            "log" => Some(WarmupCurve::Log),
            _ => None,
        })?;
        if found.value.is_none() {
            let reason = "the rate warms up with the logarithm of the step, which is DeepSpeed's default";
            self.default_note(&param("warmup_type"), "log".into(), reason);
        }
        Some(Found { value: found.value.unwrap_or(WarmupCurve::Log), source: found.source })
    }

    fn total_steps(&mut self) -> Option<Found<u64>> {
        let hint = "the number of optimizer steps until the rate is at its end, usually `steps`";
        self.needs("deepspeed.scheduler", &param("total_num_steps"), hint);
        self.get(&param("total_num_steps"), whole)
    }

    /// DeepSpeed warns of this, too.
    fn remark_on_length(&mut self, num_steps: u64, total_steps: &Found<u64>) {
        if let Some(setting) = self.setting(&param("total_num_steps"))
            && total_steps.value < num_steps.max(2)
        {
            let reason = format!(
                "the warm-up takes {} steps, so that the rate is at its end right after it",
                num_steps.max(2)
            );
            self.note(&setting, NoteKind::Remark, &reason);
        }
    }

    fn one_cycle(&mut self, kind: &Setting, num_steps: Option<u64>) -> Option<LrSchedule> {
        for key in ["cycle_min_lr", "cycle_max_lr"] {
            self.needs("deepspeed.scheduler", &param(key), "a cycle has two ends");
        }
        let min_lr = self.get(&param("cycle_min_lr"), Value::number);
        let max_lr = self.get(&param("cycle_max_lr"), Value::number);
        let first_steps = self.get_or(&param("cycle_first_step_size"), whole, 2000);
        let second_steps = self.optional(&param("cycle_second_step_size"), whole);
        let first_stairs = self.get_or(&param("cycle_first_stair_count"), whole, 0);
        let second_stairs = self.optional(&param("cycle_second_stair_count"), whole);
        let lr_decay = self.get_or(&param("decay_lr_rate"), Value::number, 0.0);
        let decay_steps = self.get_or(&param("decay_step_size"), whole, 0);
        let momentum = self.momentum_cycle()?;
        let (first_steps, first_stairs) = (first_steps?, first_stairs?);
        // The second half is like the first unless it has numbers of its own.
        let or_first = |own: Found<Option<u64>>, first: &Found<u64>, key: &str| match own.value {
            Some(value) => Found { value, source: own.source },
            None => Found { value: first.value, source: derived(&format!("`{key}`")) },
        };
        let second_steps = or_first(second_steps?, &first_steps, "first_steps");
        let second_stairs = or_first(second_stairs?, &first_stairs, "first_stairs");
        let schedule = LrSchedule::OneCycle {
            min_lr: self.keep("lr_schedule.min_lr", min_lr?),
            max_lr: self.keep("lr_schedule.max_lr", max_lr?),
            first_steps: self.keep("lr_schedule.first_steps", first_steps),
            second_steps: self.keep("lr_schedule.second_steps", second_steps),
            first_stairs: self.keep("lr_schedule.first_stairs", first_stairs),
            second_stairs: self.keep("lr_schedule.second_stairs", second_stairs),
            lr_decay: self.keep("lr_schedule.lr_decay", lr_decay?),
            decay_steps: self.keep("lr_schedule.decay_steps", decay_steps?),
            momentum,
        };
        // After the cycle it only grows.
        if let Some(last) =
            schedule.momentum(num_steps?.saturating_sub(1)).filter(|momentum| *momentum >= 1.0)
        {
            let at = self
                .setting(&param("decay_mom_rate"))
                .map_or(kind.value.at.clone(), |setting| setting.value.at);
            let message =
                format!("the momentum would grow to `{last}` by the last step, and it has to stay below 1");
            self.conflict(at, message, "lower `decay_mom_rate`, or raise `decay_step_size`");
            return None;
        }
        Some(schedule)
    }

    /// The momentum's cycle; the inner option is `None` where it is not cycled.
    fn momentum_cycle(&mut self) -> Option<Option<MomentumCycle>> {
        let keys = ["cycle_min_mom", "cycle_max_mom", "decay_mom_rate"].map(param);
        let cycles = self.cycles_momentum()?;
        if !cycles.value {
            for key in &keys {
                self.no_effect(key, "the momentum is not cycled");
            }
            self.sources.insert("lr_schedule.momentum".to_string(), cycles.source);
            return Some(None);
        }
        let min = self.get_or(&keys[0], Value::number, 0.8);
        let max = self.get_or(&keys[1], Value::number, 0.9);
        let decay = self.get_or(&keys[2], Value::number, 0.0);
        Some(Some(MomentumCycle {
            min: self.keep("lr_schedule.momentum.min", min?),
            max: self.keep("lr_schedule.momentum.max", max?),
            decay: self.keep("lr_schedule.momentum.decay", decay?),
        }))
    }

    /// Whether the schedule moves the momentum. Unless asked to, DeepSpeed does so where the optimizer has betas.
    pub fn cycles_momentum(&mut self) -> Option<Found<bool>> {
        if self.scheduler_name() != Some("OneCycle") {
            return Some(Found { value: false, source: Source::Default });
        }
        let asked = self.optional(&param("cycle_momentum"), switch)?;
        let optimizer = self.optimizer_name()?;
        let has_betas = matches!(optimizer, "AdamW" | "Adam" | "Lion" | "Lamb");
        match asked.value {
            None if has_betas => Some(Found { value: true, source: Source::Default }),
            None => {
                Some(Found { value: false, source: derived(&format!("`{optimizer}`, which has no betas")) })
            }
            Some(false) => Some(Found { value: false, source: asked.source }),
            Some(true) if has_betas || optimizer == "SGD" => {
                Some(Found { value: true, source: asked.source })
            }
            Some(true) => {
                let at = self.setting(&param("cycle_momentum"))?.value.at;
                let key = at.key(&param("cycle_momentum"));
                let message =
                    format!("`{key}` is set, but `{optimizer}` has no momentum that a schedule could move");
                self.conflict(at, message, "set it to `false` or leave it out");
                None
            }
        }
    }

    fn range_test(&mut self) -> Option<LrSchedule> {
        let min_lr = self.get_or(&param("lr_range_test_min_lr"), Value::number, 1e-3);
        let step_size = self.get_or(&param("lr_range_test_step_size"), whole, 2000);
        let step_rate = self.get_or(&param("lr_range_test_step_rate"), Value::number, 1.0);
        let stairs = self.get_or(&param("lr_range_test_staircase"), switch, false)?;
        let rise = if stairs.value { Rise::Staircase } else { Rise::Continuous };
        Some(LrSchedule::RangeTest {
            min_lr: self.keep("lr_schedule.min_lr", min_lr?),
            step_size: self.keep("lr_schedule.step_size", step_size?),
            step_rate: self.keep("lr_schedule.step_rate", step_rate?),
            rise: self.keep("lr_schedule.rise", Found { value: rise, source: stairs.source }),
        })
    }
}
