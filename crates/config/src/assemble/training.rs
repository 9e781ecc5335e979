//! Batch sizes and ZeRO.

use shardwise_plan::ZeroStage;

use super::lookup::{Assembler, Found, set, switch, whole};
use crate::batch::{Solved, Triple, Unsolved};
use crate::check::{BATCH_KEYS, Setting};
use crate::effective::Source;
use crate::error::ConfigError;
use crate::run_config::*;

impl Assembler<'_> {
    /// Batch sizes for this number of data-parallel ranks; `None` where that is not known.
    pub fn batch(&mut self, num_replicas: Option<usize>) -> Option<BatchConfig> {
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
        let solved = Triple { global, micro, accum }.solve(num_replicas? as u64);
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

    pub fn zero(&mut self, device: Option<Device>, num_replicas: Option<usize>) -> Option<ZeroConfig> {
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
        let offload = self.offload(device, stage.value, num_replicas)?;
        Some(ZeroConfig {
            stage: self.keep("zero.stage", stage),
            overlap_comm: self.keep("zero.overlap_comm", overlap),
            offload,
        })
    }
}
