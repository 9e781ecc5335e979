//! What layers hold, which parameters are treated apart, what is saved, measured and traced.

use shardwise_plan::{ActivationPolicy, NamePattern};

use super::lookup::{Assembler, Found, derived, set, switch, whole, word};
use crate::effective::{NoteKind, Source};
use crate::inputs::InputKind;
use crate::run_config::*;
use crate::schedule::LrSchedule;
use crate::value::{Data, Value};

/// Steps skipped in a row that a run puts up with.
const MAX_SKIPS: u64 = 20;

impl Assembler<'_> {
    /// DeepSpeed's block says how checkpointing works where the model's code calls for it. Here no code does: layers are
    /// checkpointable as they are, so the block calls for it once one of its settings only makes sense with it.
    pub fn activations(&mut self, device: Option<Device>) -> Option<ActivationConfig> {
        const OURS: &str = "activations.policy";
        const THEIRS: [(&str, ActivationPolicy, &str); 3] = [
            (
                "deepspeed.activation_checkpointing.cpu_checkpointing",
                ActivationPolicy::Offload,
                "the input of every layer waits in host memory, and backward runs the layer again",
            ),
            (
                "deepspeed.activation_checkpointing.partition_activations",
                ActivationPolicy::Recompute,
                "backward runs every layer again from its input, which tensor-parallel ranks split where `parallel.sequence` is on",
            ),
            (
                "deepspeed.activation_checkpointing.number_checkpoints",
                ActivationPolicy::Recompute,
                "backward runs every layer again from its input; the number sizes a buffer that is not needed here",
            ),
        ];
        let mut found = self.get(OURS, policy)?;
        let mut deciding = self.setting(OURS);
        let mut usable = true;
        for (key, policy, remark) in THEIRS {
            usable &= !self.is_bad(key);
            let Some(setting) = self.asked_for(key) else { continue };
            if let Some(ours) = self.setting(OURS) {
                self.both(&ours, &setting, "each says what layers hold");
                return None;
            }
            self.note(&setting, NoteKind::Remark, remark);
            if found.source == Source::Default {
                found = Found { value: policy, source: set(&setting) };
                deciding = Some(setting);
            } else {
                self.sources.insert("activations.policy".to_string(), set(&setting));
            }
        }
        let rules = self.rules();
        let chunk = self.optional("activations.head_chunk_tokens", whole)?;
        let rules = rules?;
        if found.value != ActivationPolicy::Offload {
            let offloads = rules.value.iter().any(|rule| rule.policy == ActivationPolicy::Offload);
            deciding = if offloads { self.setting("activations.rules") } else { None };
        }
        if let (Some(setting), Some(Device::Cpu)) = (deciding, device) {
            let reason = "on `cpu` host memory is where the inputs of layers are anyway: offload saves what recompute saves";
            self.note(&setting, NoteKind::Remark, reason);
        }
        usable.then(|| ActivationConfig {
            policy: self.keep("activations.policy", found),
            rules: self.keep("activations.rules", rules),
            head_chunk_tokens: self.keep("activations.head_chunk_tokens", chunk).map(|n| n as usize),
        })
    }

    fn rules(&mut self) -> Option<Found<Vec<ActivationRule>>> {
        self.groups("activations.rules", |this, path| {
            let patterns = this.get(&format!("{path}.match"), patterns)?.value;
            let policy = this.get(&format!("{path}.policy"), policy)?.value;
            Some(ActivationRule { patterns, policy })
        })
    }

    pub fn train(
        &mut self,
        lr_schedule: Option<&LrSchedule>,
        loss_scaling: Option<LossScaling>,
        non_finite: Option<NonFiniteGrads>,
    ) -> Option<TrainConfig> {
        let no_decay = self.get("train.no_decay", patterns);
        let frozen = self.get("train.frozen", patterns);
        let groups = self.groups("train.groups", |this, path| this.param_group(path, lr_schedule));
        let skips = self.max_skips(loss_scaling, non_finite?);
        Some(TrainConfig {
            no_decay: self.keep("train.no_decay", no_decay?),
            frozen: self.keep("train.frozen", frozen?),
            groups: self.keep("train.groups", groups?),
            max_consecutive_skips: self.keep("train.max_consecutive_skips", skips?),
        })
    }

    /// How many steps may be skipped in a row, where nothing else limits it.
    fn max_skips(
        &mut self,
        loss_scaling: Option<LossScaling>,
        non_finite: NonFiniteGrads,
    ) -> Option<Found<Option<u64>>> {
        const KEY: &str = "train.max_consecutive_skips";
        let skips = self.optional(KEY, whole)?;
        let (why, source) = match (loss_scaling, non_finite) {
            (Some(LossScaling::Dynamic(_)), _) => (
                "skips end at the minimum of a dynamic loss scale",
                "the minimum of the loss scale, which is the limit",
            ),
            (_, NonFiniteGrads::Apply) => {
                ("`bf16.check_grad_overflow` is off, so no step is skipped", "`non_finite_grads`")
            }
            _ => return Some(Found { value: skips.value.or(Some(MAX_SKIPS)), source: skips.source }),
        };
        if let Some(setting) = self.setting(KEY) {
            self.conflict(setting.value.at, format!("`{KEY}` is set, but {why}"), "leave it out");
            return None;
        }
        Some(Found { value: None, source: derived(source) })
    }

    fn param_group(&mut self, path: &str, lr_schedule: Option<&LrSchedule>) -> Option<ParamGroup> {
        let [lr_key, scale_key, decay_key] =
            ["lr", "lr_scale", "weight_decay"].map(|name| format!("{path}.{name}"));
        let patterns = self.get(&format!("{path}.match"), patterns);
        let lr = self.optional(&lr_key, Value::number)?.value;
        let scale = self.optional(&scale_key, Value::number)?.value;
        let weight_decay = self.optional(&decay_key, Value::number)?.value;
        let own = [&lr_key, &scale_key, &decay_key].map(|key| self.setting(key));
        let lr_scale = match (own, lr) {
            ([Some(lr), Some(scale), _], _) => {
                self.both(&lr, &scale, "each sets the group's rate");
                return None;
            }
            ([None, None, None], _) => {
                let at = self.setting(path)?.value.at;
                self.conflict(
                    at,
                    format!("`{path}` changes nothing"),
                    "set `lr`, `lr_scale` or `weight_decay`",
                );
                return None;
            }
            ([Some(setting), ..], Some(lr)) => {
                let peak = lr_schedule?.peak_lr();
                let ratio = if lr == peak { 1.0 } else { lr / peak };
                if !ratio.is_finite() {
                    let message = format!(
                        "`{lr_key}` is `{lr}`, but the schedule's rate is `{peak}`, to which it is in proportion"
                    );
                    self.conflict(
                        setting.value.at,
                        message,
                        "raise the rate, or freeze the other parameters with `train.frozen`",
                    );
                    return None;
                }
                ratio
            }
            _ => scale.unwrap_or(1.0),
        };
        Some(ParamGroup { patterns: patterns?.value, lr_scale, weight_decay })
    }

    /// The members of a list of groups, each read at its own path.
    fn groups<T>(
        &mut self,
        path: &str,
        mut read: impl FnMut(&mut Self, &str) -> Option<T>,
    ) -> Option<Found<Vec<T>>> {
        let count = self.get(path, |value| match &value.data {
            Data::List(items) => Some(items.len()),
            _ => None,
        })?;
        // All are read, so that all problems are shown.
        let members: Vec<Option<T>> = (0..count.value).map(|i| read(self, &format!("{path}[{i}]"))).collect();
        Some(Found { value: members.into_iter().collect::<Option<_>>()?, source: count.source })
    }

    pub fn checkpoint(&mut self) -> Option<CheckpointConfig> {
        let every = self.optional("checkpoint.every", whole);
        let keep = self.optional("checkpoint.keep", whole);
        let writing = self.get("checkpoint.async", |value| match switch(value)? {
            true => Some(CheckpointWriting::Background),
            false => Some(CheckpointWriting::Blocking),
        });
        let on_failure = self.get("checkpoint.on_failure", |value| match word(value)?.as_str() {
            "stop" => Some(OnSaveFailure::Stop),
            "continue" => Some(OnSaveFailure::Continue),
            _ => None,
        });
        if let Some(Found { value: None, .. }) = every {
            for key in ["checkpoint.keep", "checkpoint.async"] {
                self.no_effect(key, "`checkpoint.every` is not set, so nothing is saved on the way");
            }
        }
        Some(CheckpointConfig {
            every: self.keep("checkpoint.every", every?),
            keep: self.keep("checkpoint.keep", keep?),
            writing: self.keep("checkpoint.writing", writing?),
            on_failure: self.keep("checkpoint.on_failure", on_failure?),
        })
    }

    /// The outer option is `None` where something is wrong.
    pub fn trace(&mut self, steps: Option<u64>) -> Option<Option<TraceConfig>> {
        const FIRST: &str = "trace.first_step";
        const NUM: &str = "trace.num_steps";
        let (first, num) = (self.optional(FIRST, whole), self.get(NUM, whole));
        let (first, num) = (first?, num?);
        let Some(first_step) = first.value else {
            self.no_effect(NUM, "`trace.first_step` is not set, so no step is traced");
            self.sources.insert("trace".to_string(), Source::Default);
            return Some(None);
        };
        let steps = steps?;
        if first_step > steps {
            let at = self.setting(FIRST)?.value.at;
            let message = format!("`{FIRST}` is `{first_step}`, but the run ends with step `{steps}`");
            self.conflict(at, message, "choose an earlier one, or leave `trace` out");
        } else if num.value > steps - first_step + 1
            && let Some(setting) = self.setting(NUM)
        {
            self.note(&setting, NoteKind::Remark, &format!("the trace ends with the run, at step {steps}"));
        }
        self.sources.insert(FIRST.to_string(), first.source);
        Some(Some(TraceConfig { first_step, num_steps: self.keep(NUM, num) }))
    }

    /// The outer option is `None` where something is wrong.
    pub fn eval(&mut self) -> Option<Option<EvalConfig>> {
        if self.is_bad("eval") {
            return None;
        }
        if self.setting("eval").is_none() {
            self.sources.insert("eval".to_string(), Source::Default);
            return Some(None);
        }
        let every = self.optional("eval.every", whole);
        let max_tokens = self.optional("eval.max_tokens", whole);
        let (text, tokens) = (self.setting("eval.text"), self.setting("eval.tokens"));
        let (key, data, setting) = match (text, tokens) {
            (Some(text), Some(tokens)) => {
                self.both(&text, &tokens, "a run is measured on one of the two");
                return None;
            }
            (Some(text), None) => ("eval.text", "data.text", text),
            (None, Some(tokens)) => ("eval.tokens", "data.tokens", tokens),
            (None, None) => {
                self.neither("eval", "eval.text", "or name a token file as `eval.tokens`");
                return None;
            }
        };
        let other = if data == "data.text" { "data.tokens" } else { "data.text" };
        if self.setting(other).is_some() && self.setting(data).is_none() {
            let message = format!("`{key}` is set, but the run reads `{other}`");
            let hint = "held-out data has the form of the run's own";
            self.conflict(setting.value.at.clone(), message, hint);
            return None;
        }
        let path = self.input(&setting, &setting.value, InputKind::File)?;
        self.keep_set(key, &setting);
        let source = if key == "eval.text" { EvalSource::Text(path) } else { EvalSource::Tokens(path) };
        Some(Some(EvalConfig {
            source,
            every: self.keep("eval.every", every?),
            max_tokens: self.keep("eval.max_tokens", max_tokens?),
        }))
    }
}

/// One pattern, or a list of them.
fn patterns(value: &Value) -> Option<Vec<NamePattern>> {
    match &value.data {
        Data::List(items) => items.iter().map(|item| item.text().map(NamePattern::new)).collect(),
        _ => Some(vec![NamePattern::new(value.text()?)]),
    }
}

fn policy(value: &Value) -> Option<ActivationPolicy> {
    match word(value)?.as_str() {
        "keep" => Some(ActivationPolicy::Keep),
        "recompute" => Some(ActivationPolicy::Recompute),
        "offload" => Some(ActivationPolicy::Offload),
        _ => None,
    }
}
