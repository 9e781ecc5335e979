//! Model families, as shapes.
//!
//! What a Hugging Face `config.json` says, checked, and the layers it describes. The forward pass of each family lives
//! with the tensors, in the `models` crate; here is what needs no tensor: names, shapes, births, and the sizes that the
//! memory plan asks for. A value in `config.json` that would change the arithmetic in a way the forward pass does not
//! follow is refused by name.

mod gpt2;
mod llama;
mod parallel;
mod reader;

pub use gpt2::Gpt2Config;
pub use llama::{LlamaConfig, RopeScaling};
pub use parallel::{GroupedQueries, Microbatch, SequenceParallel};

use serde::Serialize;
use serde_json::Value;

use crate::param::{Init, LayerSpec};

/// A model family with its hyperparameters.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "model_type", rename_all = "lowercase")]
pub enum ModelConfig {
    /// `LlamaForCausalLM`.
    Llama(LlamaConfig),
    /// `GPT2LMHeadModel`.
    Gpt2(Gpt2Config),
}

/// Why a `config.json` describes no model of ours.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ModelConfigError {
    /// No family of that name.
    #[error("`model_type` is `{got}`, expected `llama` or `gpt2`")]
    UnknownFamily {
        /// What the file says.
        got: String,
    },
    /// A key that is needed is missing.
    #[error("`{key}` is missing")]
    Missing {
        /// The key.
        key: &'static str,
    },
    /// A value of the wrong type or out of range.
    #[error("`{key}` is `{got}`, expected {expected}")]
    Invalid {
        /// The key.
        key: &'static str,
        /// What the file says.
        got: String,
        /// What would do.
        expected: String,
    },
    /// A value that the forward pass does not follow.
    #[error("`{key}` is `{got}`, which is not supported yet; {instead}")]
    Unsupported {
        /// The key.
        key: &'static str,
        /// What the file says.
        got: String,
        /// What is.
        instead: &'static str,
    },
}

impl ModelConfig {
    /// Reads the content of a `config.json`.
    ///
    /// # Errors
    /// [`ModelConfigError`], which names the key.
    pub fn from_json(json: &Value) -> Result<Self, ModelConfigError> {
        match json.get("model_type").and_then(Value::as_str) {
            Some("llama") => LlamaConfig::from_json(json).map(ModelConfig::Llama),
            Some("gpt2") => Gpt2Config::from_json(json).map(ModelConfig::Gpt2),
            Some(other) => Err(ModelConfigError::UnknownFamily { got: other.to_owned() }),
            None => Err(ModelConfigError::Missing { key: "model_type" }),
        }
    }

    /// The layers in the order they run: embedding, blocks, head.
    pub fn layers(&self) -> Vec<LayerSpec> {
        match self {
            ModelConfig::Llama(config) => config.layers(),
            ModelConfig::Gpt2(config) => config.layers(),
        }
    }

    /// Token ids are below this.
    pub fn vocab_size(&self) -> usize {
        match self {
            ModelConfig::Llama(config) => config.vocab_size,
            ModelConfig::Gpt2(config) => config.vocab_size,
        }
    }

    /// The longest sequence it was made for.
    pub fn max_positions(&self) -> usize {
        match self {
            ModelConfig::Llama(config) => config.max_position_embeddings,
            ModelConfig::Gpt2(config) => config.n_positions,
        }
    }

    /// Width of the activations between layers.
    pub fn hidden_size(&self) -> usize {
        match self {
            ModelConfig::Llama(config) => config.hidden_size,
            ModelConfig::Gpt2(config) => config.n_embd,
        }
    }

    /// The same model with another number of blocks.
    pub fn with_num_blocks(&self, num_blocks: usize) -> Self {
        let mut model = self.clone();
        match &mut model {
            ModelConfig::Llama(config) => config.num_hidden_layers = num_blocks,
            ModelConfig::Gpt2(config) => config.n_layer = num_blocks,
        }
        model
    }

    /// The family's name in `config.json`.
    pub fn family(&self) -> &'static str {
        match self {
            ModelConfig::Llama(_) => "llama",
            ModelConfig::Gpt2(_) => "gpt2",
        }
    }
}

/// The usual birth of a weight matrix.
const fn normal(std: f64) -> Init {
    Init::Normal { std: std as f32 }
}
