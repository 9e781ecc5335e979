//! The checked configuration of a run, in the project's own terms.
//!
//! What comes out of [`RunConfig::load`] needs no further checks of its own: values are in range, fit together, and
//! mean what their types say. The rest of the project reads these fields and no file.

use std::path::PathBuf;

use serde::Serialize;
use shardwise_plan::{NamePattern, ZeroStage};

use crate::schedule::LrSchedule;

/// Everything a run needs to know.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RunConfig {
    /// The model.
    pub model: ModelConfig,
    /// What it is trained on.
    pub data: DataConfig,
    /// Optimizer steps to train.
    pub steps: u64,
    /// The seed of everything random that has no seed of its own.
    pub seed: u64,
    /// Where it computes.
    pub device: Device,
    /// Threads of each rank; `None` shares the cores of the host evenly.
    pub threads_per_rank: Option<usize>,
    /// How the ranks divide the work.
    pub parallel: ParallelConfig,
    /// Batch sizes, which multiply out.
    pub batch: BatchConfig,
    /// The number format of the computation.
    pub precision: Precision,
    /// The optimizer.
    pub optimizer: Optimizer,
    /// The learning rate.
    pub lr_schedule: LrSchedule,
    /// Gradients are scaled down to this global norm; `None` leaves them.
    pub clip_grad_norm: Option<f64>,
    /// How model state is sharded.
    pub zero: ZeroConfig,
    /// Which parameters are treated apart.
    pub train: TrainConfig,
    /// What is shown while training.
    pub report: ReportConfig,
}

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

/// Where the run computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Device {
    /// The host's processors.
    Cpu,
}

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
    /// Seconds after which a rank that stays silent in a collective is reported.
    pub deadline_s: f64,
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

/// The number format that layers compute in. Master weights, moments and gradient sums are fp32 in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// 32-bit floats.
    Fp32,
    /// 16-bit brain floats.
    Bf16,
}

impl Precision {
    /// The name used in configurations and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Precision::Fp32 => "fp32",
            Precision::Bf16 => "bf16",
        }
    }
}

/// The optimizer and its constants. The learning rate is [`RunConfig::lr_schedule`]'s alone.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "type")]
pub enum Optimizer {
    /// Adam with decoupled weight decay.
    AdamW(AdamWConfig),
}

/// The constants of AdamW; bias correction is always on.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct AdamWConfig {
    /// Decay rates of the first and second moment.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

/// How model state is sharded over the data-parallel ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct ZeroConfig {
    /// What is sharded.
    pub stage: ZeroStage,
    /// Whether communication runs beside computation.
    pub overlap_comm: CommOverlap,
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

/// Parameters treated apart, by name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TrainConfig {
    /// Parameters without weight decay.
    pub no_decay: Vec<NamePattern>,
    /// Parameters that are not trained.
    pub frozen: Vec<NamePattern>,
}

/// What is shown while training.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct ReportConfig {
    /// Steps between two printed lines; `None` leaves it to the terminal at hand.
    pub steps_per_print: Option<u64>,
}
