//! Llama and GPT-2 as lists of layers, with Hugging Face files in and out.
//!
//! A family is two things: its shapes (`shardwise_plan::zoo`, which no tensor is needed for) and its forward pass, here.
//! [`build`] turns the one into the other. [`HfSource`] fills parameters from a Hugging Face folder, each rank reading
//! its own elements; [`save_hf`] writes one.

mod embedding;
mod error;
mod gpt2;
mod head;
mod hf;
mod llama;

pub use error::ModelError;
pub use hf::{HfSource, read_config, save_hf};

use shardwise_engine::Layer;
use shardwise_plan::zoo::ModelConfig;

/// The layers of a model, in the order they run.
///
/// # Errors
/// What libtorch says of tables that layers share.
pub fn build(config: &ModelConfig) -> Result<Vec<Box<dyn Layer>>, ModelError> {
    match config {
        ModelConfig::Llama(config) => llama::layers(config),
        ModelConfig::Gpt2(config) => Ok(gpt2::layers(config)),
    }
}
