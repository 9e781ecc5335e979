//! The checked configuration of a run, in the project's own terms.
//!
//! What comes out of [`RunConfig::load`] needs no further checks of its own: values are in range, fit together, and
//! mean what their types say. The rest of the project reads these fields and no file.

mod cuda;
mod inputs;
mod numerics;
mod optimizer;
mod parallel;
mod saving;

use serde::Serialize;
use shardwise_plan::{ActivationPolicy, ActivationRules, NamePattern, Offload, ZeroStage};

pub use cuda::*;
pub use inputs::*;
pub use numerics::*;
pub use optimizer::*;
pub use parallel::*;
pub use saving::*;

use crate::schedule::LrSchedule;

/// Everything a run needs to know.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RunConfig {
    /// The model.
    pub model: ModelConfig,
    /// What it is trained on.
    pub data: DataConfig,
    /// What it is measured on besides, if anything.
    pub eval: Option<EvalConfig>,
    /// Optimizer steps to train.
    pub steps: u64,
    /// The seed of everything random that has no seed of its own.
    pub seed: u64,
    /// Where it computes.
    pub device: Device,
    /// How it uses GPUs, if it computes on some.
    pub cuda: CudaConfig,
    /// Threads of each rank; `None` shares the cores of the host evenly.
    pub threads_per_rank: Option<usize>,
    /// How the ranks divide the work.
    pub parallel: ParallelConfig,
    /// Batch sizes, which multiply out.
    pub batch: BatchConfig,
    /// The number format of the computation.
    pub precision: Precision,
    /// How the gradient of the loss is scaled; `Some` exactly if the precision is fp16.
    pub loss_scaling: Option<LossScaling>,
    /// What a step with a gradient that is not finite does.
    pub non_finite_grads: NonFiniteGrads,
    /// How gradients are accumulated and reduced over ranks.
    pub reduction: ReductionConfig,
    /// The optimizer.
    pub optimizer: Optimizer,
    /// The type in which the optimizer keeps its states.
    pub optimizer_state_dtype: FloatType,
    /// The learning rate.
    pub lr_schedule: LrSchedule,
    /// Gradients are scaled down to this global norm; `None` leaves them.
    pub clip_grad_norm: Option<f64>,
    /// How model state is sharded.
    pub zero: ZeroConfig,
    /// What layers hold between forward and backward.
    pub activations: ActivationConfig,
    /// Which parameters are treated apart, and when to give up.
    pub train: TrainConfig,
    /// When and how the state of the run is saved.
    pub checkpoint: CheckpointConfig,
    /// What is shown while training.
    pub report: ReportConfig,
    /// Which steps leave a trace of what ran when; `None` for none.
    pub trace: Option<TraceConfig>,
}

/// Batch sizes in samples: `global_batch_size = micro_batch * grad_accum_steps * data-parallel ranks`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct BatchConfig {
    /// Samples of one optimizer step over all ranks.
    pub global_batch_size: usize,
    /// Samples of one forward pass of one rank.
    pub micro_batch: usize,
    /// Forward passes of one optimizer step.
    pub grad_accum_steps: usize,
}

/// How model state is sharded over the data-parallel ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct ZeroConfig {
    /// What is sharded.
    pub stage: ZeroStage,
    /// Whether communication runs beside computation.
    pub overlap_comm: CommOverlap,
    /// What ranks with GPUs keep in host memory; nothing on CPU, where all is there.
    pub offload: Offload,
}

/// Whether communication runs beside computation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum CommOverlap {
    /// The engine decides.
    Automatic,
    /// Computation waits for every collective.
    Blocking,
    /// Collectives run while the next layer computes.
    Overlapped,
}

/// What layers hold between their forward and their backward pass.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ActivationConfig {
    /// What holds for layers that no rule names.
    pub policy: ActivationPolicy,
    /// Exceptions; the first that matches holds.
    pub rules: Vec<ActivationRule>,
    /// Tokens whose logits the head holds at a time; `None` leaves it to the head.
    pub head_chunk_tokens: Option<usize>,
}

/// A policy for the layers of some names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ActivationRule {
    /// Layer names, such as `model.layers.1*`.
    #[serde(rename = "match")]
    pub patterns: Vec<NamePattern>,
    /// What holds for them.
    pub policy: ActivationPolicy,
}

impl ActivationConfig {
    /// The policies as a plan and an engine take them.
    pub fn to_rules(&self) -> ActivationRules {
        let rules = self
            .rules
            .iter()
            .flat_map(|rule| rule.patterns.iter().map(|pattern| (pattern.clone(), rule.policy)));
        ActivationRules { default: self.policy, rules: rules.collect() }
    }
}

/// Parameters treated apart, by name, and when to give up.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TrainConfig {
    /// Parameters without weight decay, unless their group says otherwise.
    pub no_decay: Vec<NamePattern>,
    /// Parameters that are not trained.
    pub frozen: Vec<NamePattern>,
    /// Parameters with a learning rate or weight decay of their own; the first group that matches holds.
    pub groups: Vec<ParamGroup>,
    /// So many steps skipped in a row end the run. `None` under a dynamic loss scale, where skips end at the minimum scale, and
    /// where no step is skipped.
    pub max_consecutive_skips: Option<u64>,
}

/// Parameters with a learning rate or weight decay of their own.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ParamGroup {
    /// Names of parameters.
    #[serde(rename = "match")]
    pub patterns: Vec<NamePattern>,
    /// The learning rate, in units of the schedule's.
    pub lr_scale: f64,
    /// The weight decay, if not the optimizer's.
    pub weight_decay: Option<f64>,
}

/// How the optimizer treats one parameter.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ParamSettings {
    /// The group in [`TrainConfig::groups`], if one matches.
    pub group: Option<usize>,
    /// The learning rate, in units of the schedule's.
    pub lr_scale: f64,
    /// The weight decay.
    pub weight_decay: f64,
}

impl RunConfig {
    /// How the optimizer treats the parameter called `name`: its group's word goes before `no_decay`, and that before the
    /// optimizer's.
    pub fn param_settings(&self, name: &str) -> ParamSettings {
        let fits = |patterns: &[NamePattern]| patterns.iter().any(|pattern| pattern.matches(name));
        let group = self.train.groups.iter().position(|group| fits(&group.patterns));
        let own = group.map(|index| &self.train.groups[index]);
        let plain = if fits(&self.train.no_decay) { 0.0 } else { self.optimizer.weight_decay() };
        ParamSettings {
            group,
            lr_scale: own.map_or(1.0, |group| group.lr_scale),
            weight_decay: own.and_then(|group| group.weight_decay).unwrap_or(plain),
        }
    }

    /// Threads of each rank: the run file's number, or else the launcher's, or else an even share of `num_cores`; at least one.
    pub fn threads(&self, launcher: Option<usize>, num_cores: usize) -> usize {
        let share = || num_cores / self.parallel.world_size;
        self.threads_per_rank.or(launcher).unwrap_or_else(share).max(1)
    }
}

/// What is shown while training.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct ReportConfig {
    /// Steps between two printed lines; `None` leaves it to the terminal at hand.
    pub steps_per_print: Option<u64>,
}

/// Which steps leave a trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct TraceConfig {
    /// The first one, from 1; not after the run's last.
    pub first_step: u64,
    /// How many.
    pub num_steps: u64,
}
