//! How the ranks divide the work.

use serde::Serialize;
use shardwise_plan::Mesh;
use shardwise_plan::pipeline::{ScheduleKind, StageCut};
use shardwise_plan::zoo::SequenceParallel;

/// How the ranks divide the work: `pipeline * data * tensor = world_size`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ParallelConfig {
    /// Number of ranks.
    pub world_size: usize,
    /// Data-parallel ranks.
    pub data: usize,
    /// Pipeline stages.
    pub pipeline: usize,
    /// Tensor-parallel ranks.
    pub tensor: usize,
    /// How the pipeline is filled, where there is one.
    #[serde(serialize_with = "as_text")]
    pub schedule: ScheduleKind,
    /// What is spread evenly over the pipeline stages.
    #[serde(serialize_with = "as_text")]
    pub stage_cut: StageCut,
    /// Whether tensor-parallel ranks split the tokens between linear layers.
    pub sequence: SequenceParallel,
    /// Seconds after which a rank that stays silent in a collective is reported.
    pub deadline_s: f64,
}

impl ParallelConfig {
    /// The ranks on their axes.
    ///
    /// # Panics
    /// If the degrees do not divide the ranks, which loading a configuration refuses.
    pub fn mesh(&self) -> Mesh {
        Mesh::new(self.world_size, self.pipeline, self.tensor)
            .expect("a loaded configuration has degrees that divide the ranks")
    }
}

/// Schedules and cuts are shown as the run file writes them.
fn as_text<S: serde::Serializer>(value: &impl std::fmt::Display, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}
