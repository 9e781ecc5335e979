//! When and how the state of a run is saved.

use serde::Serialize;

/// When and how the state of a run is saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct CheckpointConfig {
    /// Steps between two checkpoints; `None` saves none on the way.
    pub every: Option<u64>,
    /// The newest so many are kept; `None` keeps all.
    pub keep: Option<u64>,
    /// Who waits for the disk (`checkpoint.async`).
    pub writing: CheckpointWriting,
    /// What a failed save means for the run.
    pub on_failure: OnSaveFailure,
}

/// Who waits for the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum CheckpointWriting {
    /// Training waits until the checkpoint is complete.
    Blocking,
    /// Training waits for a copy in memory, which is written behind the next steps.
    Background,
}

/// What a failed save means for the run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum OnSaveFailure {
    /// The run ends with the error.
    Stop,
    /// The failure is reported, and the run goes on.
    Continue,
}
