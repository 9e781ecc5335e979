//! The parts of a [`crate::RunConfig`] that a DeepSpeed configuration decides: batch, precision, optimizer, learning
//! rate and ZeRO.

use shardwise_plan::ZeroStage;

use super::lookup::{Assembler, Found, set, switch, whole, word};
use crate::batch::{Solved, Triple, Unsolved};
use crate::check::{BATCH_KEYS, Setting};
use crate::effective::{NoteKind, Source};
use crate::error::ConfigError;
use crate::keys::deepspeed::{OTHER_OPTIMIZERS, OTHER_SCHEDULERS};
use crate::run_config::*;
use crate::schedule::{LrSchedule, WarmupCurve};
use crate::schema::Fate;
use crate::value::{Data, Value};

impl Assembler<'_> {
    pub fn batch(&mut self) -> Option<BatchConfig> {
        if BATCH_KEYS.iter().any(|key| self.is_bad(key)) {
            return None;
        }
        const ACCUM: usize = 2;
        let settings = BATCH_KEYS.map(|key| self.setting(key));
        // `auto` is worked out like a size that is not set, as long as the others leave no choice.
        let is_auto = |setting: &Option<Setting>| {
            setting.as_ref().is_some_and(|setting| setting.value.text() == Some("auto"))
        };
        let [global, micro, accum] =
            settings.each_ref().map(|setting| setting.as_ref().and_then(|setting| whole(&setting.value)));
        let known = [global, micro, accum].iter().flatten().count();
        let by_convention = is_auto(&settings[ACCUM]) && known < 2;
        if by_convention || (known == 0 && settings.iter().any(is_auto)) {
            for (setting, key) in settings.iter().zip(BATCH_KEYS).filter(|(setting, _)| is_auto(setting)) {
                let at = setting.as_ref().map(|setting| setting.value.at.clone())?;
                let hint = "set two of the three batch sizes; the third follows".to_string();
                self.checked.errors.push(ConfigError::Auto { key: at.key(key), at, hint });
            }
            return None;
        }
        let solved = Triple { global, micro, accum }.solve(self.world_size as u64);
        let Solved { global, micro, accum } = match solved {
            Ok(solved) => solved,
            Err(unsolved) => {
                self.unsolved(unsolved, &settings);
                return None;
            }
        };
        let names = [
            ("batch.global_batch_size", "`micro_batch` x `grad_accum_steps` x data-parallel ranks"),
            ("batch.micro_batch", "`global_batch_size` / (`grad_accum_steps` x data-parallel ranks)"),
            ("batch.grad_accum_steps", "`global_batch_size` / (`micro_batch` x data-parallel ranks)"),
        ];
        for (i, (name, formula)) in names.into_iter().enumerate() {
            let source = match &settings[i] {
                Some(setting) if whole(&setting.value).is_some() => set(setting),
                _ if i == ACCUM && known < 2 => Source::Default,
                _ => Source::Derived(formula.to_string()),
            };
            self.sources.insert(name.to_string(), source);
        }
        Some(BatchConfig {
            global_batch_size: global as usize,
            micro_batch: micro as usize,
            grad_accum_steps: accum as usize,
        })
    }

    fn unsolved(&mut self, unsolved: Unsolved, settings: &[Option<Setting>; 3]) {
        let group = || self.setting("deepspeed").map(|setting| setting.value.at);
        let at = settings.iter().flatten().next().map(|setting| setting.value.at.clone()).or_else(group);
        // Without a DeepSpeed configuration, that is what is missing.
        if let Some(at) = at {
            self.conflict(at, unsolved.to_string(), &unsolved.hint());
        }
    }

    pub fn precision(&mut self) -> Option<Precision> {
        // Looked up past `bad`: that `fp16` is refused does not make the two agree.
        let switched_on = |key: &str| {
            self.checked.set.get(key).filter(|setting| switch(&setting.value) == Some(true)).cloned()
        };
        let (fp16, bf16) = (switched_on("deepspeed.fp16.enabled"), switched_on("deepspeed.bf16.enabled"));
        if let (Some(fp16), Some(bf16)) = (fp16, bf16) {
            self.both(&bf16, &fp16, "a run computes in one precision");
        }
        let bf16 = self.get("deepspeed.bf16.enabled", switch)?;
        let value = if bf16.value { Precision::Bf16 } else { Precision::Fp32 };
        let found = Found { value, source: bf16.source };
        let precision = self.keep("precision", found);
        let other = "what is computed in the run's precision is also stored and sent in it";
        for key in ["deepspeed.data_types.param_dtype", "deepspeed.communication_data_type"] {
            let Some(setting) = self.setting(key) else { continue };
            if word(&setting.value).as_deref() == Some(precision.name()) {
                self.note(&setting, NoteKind::AsAlways, other);
                continue;
            }
            self.checked.errors.push(ConfigError::NotSupported {
                at: setting.value.at.clone(),
                key: setting.value.at.key(&setting.key),
                value: Some(setting.value.to_string()),
                hint: format!("leave it out: the run's precision is `{}`, and {other}", precision.name()),
            });
        }
        Some(precision)
    }

    pub fn optimizer(&mut self) -> Option<Optimizer> {
        let kind = self.setting("deepspeed.optimizer.type")?;
        let name = kind.value.text()?.to_string();
        if !self.is_supported(&kind, &["AdamW", "Adam"], OTHER_OPTIMIZERS) {
            return None;
        }
        self.strangers("deepspeed.optimizer.params", &name);
        if name.eq_ignore_ascii_case("Adam") {
            self.note(
                &kind,
                NoteKind::AsAlways,
                "its weight decay is decoupled, as DeepSpeed's `Adam` has it",
            );
        }
        let torch_adam = self.get("deepspeed.optimizer.params.torch_adam", switch)?;
        if let Some(setting) = self.setting("deepspeed.optimizer.params.torch_adam") {
            self.note(&setting, NoteKind::NoEffect, "there is one implementation of AdamW here");
        }
        let betas = self.get("deepspeed.optimizer.params.betas", |value| match &value.data {
            Data::List(items) => Some([items.first()?.number()?, items.get(1)?.number()?]),
            _ => None,
        });
        let eps = self.get("deepspeed.optimizer.params.eps", Value::number);
        let decay = match self.setting("deepspeed.optimizer.params.weight_decay") {
            Some(_) => self.get("deepspeed.optimizer.params.weight_decay", Value::number),
            // DeepSpeed passes on to another class, whose default is another.
            None if torch_adam.value => Some(Found {
                value: 0.01,
                source: Source::Derived("`torch_adam`, the default of `torch.optim.AdamW`".to_string()),
            }),
            None => Some(Found { value: 0.0, source: Source::Default }),
        };
        self.keep_set("optimizer.type", &kind);
        Some(Optimizer::AdamW(AdamWConfig {
            betas: self.keep("optimizer.betas", betas?),
            eps: self.keep("optimizer.eps", eps?),
            weight_decay: self.keep("optimizer.weight_decay", decay?),
        }))
    }

    pub fn lr_schedule(&mut self) -> Option<LrSchedule> {
        let lr = self.get("deepspeed.optimizer.params.lr", Value::number);
        if self.setting("deepspeed.scheduler").is_none() {
            self.sources.insert("lr_schedule.type".to_string(), Source::Default);
            return Some(LrSchedule::Constant { lr: self.keep("lr_schedule.lr", lr?) });
        }
        let kind = self.setting("deepspeed.scheduler.type")?;
        if !self.is_supported(&kind, &["WarmupLR"], OTHER_SCHEDULERS) {
            return None;
        }
        self.strangers("deepspeed.scheduler.params", "WarmupLR");
        let min_lr = self.get("deepspeed.scheduler.params.warmup_min_lr", Value::number);
        let max_lr = match self.get("deepspeed.scheduler.params.warmup_max_lr", Value::number) {
            Some(max_lr) => {
                if let Some(setting) = self.setting("deepspeed.optimizer.params.lr") {
                    self.note(&setting, NoteKind::NoEffect, "the scheduler's `warmup_max_lr` sets the rate");
                }
                Some(max_lr)
            }
            None if self.is_bad("deepspeed.scheduler.params.warmup_max_lr") => None,
            None => lr,
        };
        let num_steps = self.get("deepspeed.scheduler.params.warmup_num_steps", whole);
        let curve = self.get("deepspeed.scheduler.params.warmup_type", |value| match word(value)?.as_str() {
            "linear" => Some(WarmupCurve::Linear),
            "log" => Some(WarmupCurve::Log),
            _ => None,
        });
        self.keep_set("lr_schedule.type", &kind);
        Some(LrSchedule::Warmup {
            min_lr: self.keep("lr_schedule.min_lr", min_lr?),
            max_lr: self.keep("lr_schedule.max_lr", max_lr?),
            num_steps: self.keep("lr_schedule.num_steps", num_steps?),
            curve: self.keep("lr_schedule.curve", curve?),
        })
    }

    pub fn zero(&mut self) -> Option<ZeroConfig> {
        let stage = self.get("deepspeed.zero_optimization.stage", |value| {
            ZeroStage::try_from(u8::try_from(value.whole()?).ok()?).ok()
        })?;
        let overlap = self.optional("deepspeed.zero_optimization.overlap_comm", switch)?;
        let overlap = Found {
            value: match overlap.value {
                None => CommOverlap::Automatic,
                Some(false) => CommOverlap::Blocking,
                Some(true) => CommOverlap::Overlapped,
            },
            source: overlap.source,
        };
        Some(ZeroConfig {
            stage: self.keep("zero.stage", stage),
            overlap_comm: self.keep("zero.overlap_comm", overlap),
        })
    }

    /// Whether the named optimizer or scheduler is one of ours; if not, says so.
    fn is_supported(&mut self, kind: &Setting, ours: &[&str], others: &[&str]) -> bool {
        let name = kind.value.text().unwrap_or_default();
        let known = |names: &[&str]| names.iter().any(|known| known.eq_ignore_ascii_case(name));
        if known(ours) {
            return true;
        }
        let (at, key) = (kind.value.at.clone(), kind.value.at.key(&kind.key));
        let expected = ours.iter().map(|name| format!("`\"{name}\"`")).collect::<Vec<_>>().join(" or ");
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
    fn strangers(&mut self, group: &str, owner: &str) {
        let prefix = format!("{group}.");
        let mut found = Vec::new();
        for (path, setting) in self.checked.set.iter().filter(|(path, _)| path.starts_with(&prefix)) {
            if let Some(Fate::BelongsTo(other)) = self.checked.schema.key(path).map(|key| key.fate) {
                let (at, key) = (setting.value.at.clone(), setting.value.at.key(&setting.key));
                found.push((at, format!("`{key}` is a parameter of {other}, not of {owner}")));
            }
        }
        for (at, message) in found {
            self.conflict(at, message, "leave it out");
        }
    }
}
