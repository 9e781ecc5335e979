//! What a run reads: the model it starts from and the data it learns from.

use std::path::PathBuf;

use serde::Serialize;

/// The model and where its first weights come from.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ModelConfig {
    /// The model's description.
    #[serde(flatten)]
    pub source: ModelSource,
    /// The seed of random initial weights, where none are loaded.
    pub init_seed: u64,
}

/// Where a model is described.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ModelSource {
    /// A Hugging Face folder: `config.json` and, if there, `*.safetensors`.
    Path(PathBuf),
    /// The keys of a `config.json`, inline.
    Config(serde_json::Map<String, serde_json::Value>),
}

/// What the model is trained on.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DataConfig {
    /// Tokens, or text and a tokenizer.
    #[serde(flatten)]
    pub source: DataSource,
    /// Tokens of one sample.
    pub seq_len: usize,
    /// The order in which samples are read.
    pub order: SampleOrder,
    /// The seed of the shuffle.
    pub seed: u64,
}

/// Where tokens come from.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub enum DataSource {
    /// A file of little-endian token ids.
    Tokens {
        /// The file.
        tokens: PathBuf,
        /// The width of one id.
        dtype: TokenDType,
    },
    /// Text files, turned into tokens once.
    Text {
        /// Files and glob patterns, as configured; [`crate::Loaded::text_files`] expands them.
        text: Vec<PathBuf>,
        /// What turns text into tokens.
        tokenizer: TokenizerSource,
    },
}

/// The width of a token id in a token file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum TokenDType {
    /// Two bytes.
    U16,
    /// Four bytes.
    U32,
}

/// What turns text into tokens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum TokenizerSource {
    /// A byte-pair encoding trained on the run's own text.
    TrainBpe {
        /// Tokens in the vocabulary.
        vocab_size: usize,
    },
    /// A `tokenizer.json`.
    #[serde(untagged)]
    File(PathBuf),
}

/// The order in which samples are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SampleOrder {
    /// A seeded shuffle over the whole data.
    Shuffled,
    /// As they stand in the file.
    Sequential,
}

/// How well the model does on text that it does not learn from.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct EvalConfig {
    /// The held-out data.
    #[serde(flatten)]
    pub source: EvalSource,
    /// Steps between two evaluations; `None` evaluates before the first step and after the last only.
    pub every: Option<u64>,
    /// At most so many tokens from the start of the data; `None` takes all.
    pub max_tokens: Option<u64>,
}

/// Where held-out tokens come from.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum EvalSource {
    /// A text file, for a run that reads text: the run's tokenizer turns it into tokens.
    Text(PathBuf),
    /// A token file, for a run that reads tokens, with ids of the same width.
    Tokens(PathBuf),
}
