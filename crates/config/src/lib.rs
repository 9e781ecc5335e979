//! The run file and the DeepSpeed configuration, read into one checked [`RunConfig`].
//!
//! ```text
//! run.json | run.toml ─┐
//! ds_config.json ──────┼─► tree of values ─► key tables ─► RunConfig + Effective
//! --set a.b=c ─────────┘    (with lines)      (check)       (assemble)
//! ```
//!
//! Nothing is taken in silence: a key is used, or accepted with a note that says why it changes nothing, or
//! refused by name. A key that no table knows is an error. Every value of the outcome can say where it came
//! from. This crate reads files but no environment, and DeepSpeed's key names do not leave it.

mod assemble;
mod batch;
mod check;
mod effective;
mod error;
mod inputs;
mod json;
mod keys;
mod load;
mod overrides;
mod planning;
mod run_config;
mod schedule;
mod schema;
#[cfg(test)]
mod tests;
mod toml_file;
mod value;

pub use effective::{Effective, EffectiveValue, Note, NoteKind};
pub use error::{ConfigError, ConfigErrors};
pub use load::Loaded;
pub use planning::ModelDescription;
pub use run_config::*;
pub use schedule::{LrSchedule, MomentumCycle, Rise, WarmupCurve};
pub use shardwise_plan::pipeline::{ScheduleKind, StageCut};
pub use shardwise_plan::zoo::SequenceParallel;
pub use shardwise_plan::{
    ActivationPolicy, ActivationRules, Collectives, NamePattern, Offload as OffloadConfig, OffloadTo,
    Overlap, ZeroStage,
};
pub use value::{Origin, SourceFile};
