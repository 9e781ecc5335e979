//! What can go wrong with model files.

use std::path::PathBuf;

use shardwise_checkpoint::CheckpointError;
use shardwise_engine::EngineError;
use shardwise_plan::zoo::ModelConfigError;

/// Errors of models and their files.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// `config.json` cannot be read.
    #[error("could not read `{path}`")]
    ReadConfig {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// `config.json` is not JSON.
    #[error("`{path}` is not valid JSON")]
    ParseConfig {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
    /// `config.json` describes no model of ours.
    #[error("`{path}`: {source}")]
    Config {
        /// The file.
        path: PathBuf,
        /// Which key.
        source: ModelConfigError,
    },
    /// A file cannot be written.
    #[error("could not write `{path}`")]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A weight file.
    #[error(transparent)]
    Weights(#[from] CheckpointError),
    /// The engine.
    #[error(transparent)]
    Engine(#[from] EngineError),
}
