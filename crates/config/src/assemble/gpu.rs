//! GPUs: how ranks use them, and what of the model's state is offloaded from them.
//!
//! On CPU none of it has anything to say: it is noted, and changes nothing.

use shardwise_plan::{Collectives, OffloadTo};

use super::lookup::{Assembler, Found, derived, set, switch, word};
use crate::check::Setting;
use crate::effective::{NoteKind, Source};
use crate::run_config::*;
use crate::{OffloadConfig, ZeroStage, schema};

const STAGE: &str = "deepspeed.zero_optimization.stage";
/// The key for the optimizer, and its old form.
const OPTIMIZER: [&str; 2] =
    ["deepspeed.zero_optimization.offload_optimizer.device", "deepspeed.zero_optimization.cpu_offload"];
/// The key for parameters, and its old forms.
const PARAMS: [&str; 3] = [
    "deepspeed.zero_optimization.offload_param.device",
    "deepspeed.zero_optimization.cpu_offload_param",
    "deepspeed.zero_optimization.cpu_offload_params",
];

impl Assembler<'_> {
    pub fn device(&mut self) -> Option<Found<Device>> {
        self.get("device", |value| match word(value)?.as_str() {
            "cpu" => Some(Device::Cpu),
            "cuda" => Some(Device::Cuda),
            _ => None,
        })
    }

    pub fn cuda(&mut self, device: Option<Device>) -> Option<CudaConfig> {
        const KEYS: [&str; 4] = ["cuda.collectives", "cuda.share", "cuda.memory_limit", "cuda.deterministic"];
        let [collectives_key, share_key, limit_key, deterministic_key] = KEYS;
        let collectives = self.get(collectives_key, |value| match word(value)?.as_str() {
            "auto" => Some(Collectives::Auto),
            "nccl" => Some(Collectives::Nccl),
            "host" => Some(Collectives::Host),
            _ => None,
        });
        let sharing = self.get(share_key, |value| {
            Some(if switch(value)? { GpuSharing::Shared } else { GpuSharing::Exclusive })
        });
        let memory_limit = self.optional(limit_key, schema::bytes);
        let determinism = self.get(deterministic_key, |value| {
            Some(if switch(value)? { Determinism::On } else { Determinism::Off })
        });
        if device? == Device::Cpu {
            KEYS.iter().for_each(|key| self.no_effect(key, "`device` is `cpu`, where it changes nothing"));
        } else if let (Some(Collectives::Nccl), Some(share)) =
            (collectives.as_ref().map(|found| found.value), self.asked_for(share_key))
        {
            let message = format!(
                "`{collectives_key}` is `nccl`, but `{share_key}` lets ranks share a GPU, and NCCL does not"
            );
            let hint =
                format!("leave `{collectives_key}` out: ranks that share a GPU talk through host memory");
            self.conflict(share.value.at, message, &hint);
        }
        Some(CudaConfig {
            collectives: self.keep("cuda.collectives", collectives?),
            sharing: self.keep("cuda.sharing", sharing?),
            memory_limit: self.keep("cuda.memory_limit", memory_limit?),
            determinism: self.keep("cuda.determinism", determinism?),
        })
    }

    /// What is kept on the host, where a run of `num_replicas` data-parallel ranks computes on `device`.
    pub fn offload(
        &mut self,
        device: Option<Device>,
        stage: ZeroStage,
        num_replicas: Option<usize>,
    ) -> Option<OffloadConfig> {
        let (optimizer, params) = (self.offload_to(&OPTIMIZER), self.offload_to(&PARAMS));
        let (mut optimizer, mut params) = (optimizer?, params?);
        let stage_key = self.key_here(STAGE);
        match device? {
            Device::Cpu => {
                for (found, setting) in [&mut optimizer, &mut params] {
                    let Some(setting) = setting else { continue };
                    self.note(setting, NoteKind::NoEffect, "model state is in host memory already");
                    *found = Found { value: OffloadTo::Device, source: derived("`device`") };
                }
            }
            Device::Cuda => {
                if let (Some(setting), false) = (&params.1, stage.shards_parameters()) {
                    let hint = format!(
                        "set `{stage_key}` to 3, where parameters are gathered for each use, or keep them on the GPU"
                    );
                    let message = format!("{}, but `{stage_key}` is `{stage}`", shown(setting));
                    self.conflict(setting.value.at.clone(), message, &hint);
                }
                if let (Some(setting), Some(num_replicas @ 2..), false) =
                    (&optimizer.1, num_replicas, stage.shards_optimizer())
                {
                    let message = format!(
                        "{}, but `{stage_key}` is `0`, in which each of `{num_replicas}` data-parallel ranks would step all of \
                         the model",
                        shown(setting)
                    );
                    self.conflict(
                        setting.value.at.clone(),
                        message,
                        &format!("set `{stage_key}` to 1, 2 or 3"),
                    );
                }
            }
        }
        Some(OffloadConfig {
            optimizer: self.keep("zero.offload.optimizer", optimizer.0),
            params: self.keep("zero.offload.params", params.0),
        })
    }

    /// What the first of `keys`, or an old form of it, says; with the setting that asks for the host, if one does.
    fn offload_to(&mut self, keys: &[&str]) -> Option<(Found<OffloadTo>, Option<Setting>)> {
        let (key, old_forms) = keys.split_first().expect("there is a key");
        if keys.iter().any(|key| self.is_bad(key)) {
            return None;
        }
        let found = self.get(key, |value| match word(value)?.as_str() {
            "none" => Some(OffloadTo::Device),
            "cpu" => Some(OffloadTo::Host),
            _ => None,
        })?;
        let now = self.setting(key);
        let Some(old) = old_forms.iter().find_map(|key| self.asked_for(key)) else {
            let asks = found.value == OffloadTo::Host;
            return Some((found, now.filter(|_| asks)));
        };
        if let Some(now) = now {
            self.both(&now, &old, "the one is the old form of the other");
            return None;
        }
        let group = key.rsplit('.').nth(1).unwrap_or(key);
        self.note(&old, NoteKind::Remark, &format!("the old form of `{group}.device` = `\"cpu\"`"));
        let source: Source = set(&old);
        Some((Found { value: OffloadTo::Host, source }, Some(old)))
    }

    /// Reports an optimizer that computes on the host only, where its state is on a GPU.
    pub fn suits_device(
        &mut self,
        device: Option<Device>,
        optimizer: Option<&Optimizer>,
        offload: Option<OffloadConfig>,
    ) {
        let (Some(Device::Cuda), Some(offload)) = (device, offload) else { return };
        if let Some(Optimizer::Muon(_)) = optimizer
            && offload.optimizer == OffloadTo::Device
            && let Some(setting) = self.setting("deepspeed.optimizer.type")
        {
            let name = self.optimizer_name().unwrap_or_default();
            let message =
                format!("`{name}` computes its steps on the host only, and its states would be on a GPU");
            let hint = "offload them with `zero_optimization.offload_optimizer.device` = `\"cpu\"`, or choose another optimizer";
            self.conflict(setting.value.at, message, hint);
        }
    }
}

/// A setting as messages begin with it.
fn shown(setting: &Setting) -> String {
    format!("`{}` is `{}`", setting.value.at.key(&setting.key), setting.value)
}
