//! From a configuration to the plan of its run: the model's description, and the numbers that the plan takes.
//!
//! Of a model's folder only `config.json` is read, and of the data nothing.

use std::path::Path;
use std::sync::Arc;

use serde_json::Value;
use shardwise_plan::run::{RunPlan, RunShape, RunShapeError};
use shardwise_plan::zoo::{self, ModelConfigError};
use shardwise_plan::{Cuda, Overlap};

use crate::error::{ConfigError, ConfigErrors};
use crate::run_config::{CommOverlap, DataSource, Device, ModelSource, RunConfig, TokenizerSource};
use crate::value::{Origin, SourceFile};

/// A model as described, not yet built.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelDescription {
    /// What the description means.
    pub config: zoo::ModelConfig,
    /// All that it says: the content of a `config.json`.
    pub json: Value,
}

impl RunConfig {
    /// Plans the run: units, memory and traffic. `num_cores` of the host decide, where the run file does not, how many
    /// threads a rank has and whether communication overlaps.
    ///
    /// # Errors
    /// The first problem of the model's description, or of what is asked of it.
    pub fn plan(&self, num_cores: usize) -> Result<RunPlan, ConfigErrors> {
        let tokenizer_vocab = match &self.data.source {
            DataSource::Text { tokenizer: TokenizerSource::TrainBpe { vocab_size }, .. } => Some(*vocab_size),
            _ => None,
        };
        let model = self.describe_model(tokenizer_vocab)?.config;
        RunPlan::new(self.shape(model, num_cores)?).map_err(misfit)
    }

    /// What a plan and an engine take of the configuration, checked against the model: whether its parameters divide among the
    /// tensor-parallel ranks and its layers among the pipeline stages, whether samples fit its positions and patterns its names.
    ///
    /// # Errors
    /// What the model cannot do.
    pub fn shape(&self, model: zoo::ModelConfig, num_cores: usize) -> Result<RunShape, ConfigErrors> {
        let parallel = &self.parallel;
        let shape = RunShape {
            model,
            mesh: parallel.mesh(),
            device: match self.device {
                Device::Cpu => shardwise_plan::Device::Cpu,
                Device::Cuda => shardwise_plan::Device::Cuda(Cuda {
                    offload: self.zero.offload,
                    collectives: self.cuda.collectives(),
                }),
            },
            schedule: (parallel.pipeline > 1).then_some(parallel.schedule),
            stage_cut: parallel.stage_cut.clone(),
            sequence: parallel.sequence,
            stage: self.zero.stage,
            compute_bytes: self.precision.float_type().size_bytes(),
            precision: self.precision.name(),
            optimizer_bytes: self.optimizer.num_states() * self.optimizer_state_dtype.size_bytes(),
            grad_bytes: self.reduction.accumulation.size_bytes(),
            activations: self.activations.to_rules(),
            head_chunk_rows: self.activations.head_chunk_tokens,
            micro_batch: self.batch.micro_batch,
            seq_len: self.data.seq_len,
            grad_accum_steps: self.batch.grad_accum_steps,
            overlap: self.overlap(num_cores, self.threads(None, num_cores)),
            frozen: self.train.frozen.clone(),
            no_decay: self.train.no_decay.clone(),
            grouped: self.train.groups.iter().flat_map(|group| &group.patterns).cloned().collect(),
        };
        shape.check().map_err(misfit)?;
        Ok(shape)
    }

    /// Reads the model's description, and checks it against a tokenizer of `tokenizer_vocab` tokens if the run has one. That
    /// tokenizer decides the size of the vocabulary where `model.config` does not.
    ///
    /// # Errors
    /// A `config.json` that cannot be read, or describes no model of ours, or one with too few tokens.
    pub fn describe_model(&self, tokenizer_vocab: Option<usize>) -> Result<ModelDescription, ConfigErrors> {
        self.read_model(tokenizer_vocab).map_err(|error| ConfigErrors::new(vec![error]))
    }

    fn read_model(&self, tokenizer_vocab: Option<usize>) -> Result<ModelDescription, ConfigError> {
        let (place, json) = match &self.model.source {
            ModelSource::Path(folder) => {
                let path = folder.join("config.json");
                (path.display().to_string(), read_json(&path)?)
            }
            ModelSource::Config(keys) => {
                let mut keys = keys.clone();
                if let (None | Some(Value::Null), Some(tokens)) = (keys.get("vocab_size"), tokenizer_vocab) {
                    keys.insert("vocab_size".into(), tokens.into());
                }
                ("model.config".to_owned(), Value::Object(keys))
            }
        };
        let config =
            zoo::ModelConfig::from_json(&json).map_err(|source| ConfigError::Model { place, source })?;
        let vocab_size = config.vocab_size();
        match tokenizer_vocab {
            Some(tokens) if tokens > vocab_size => Err(ConfigError::TokenizerTooLarge { tokens, vocab_size }),
            _ => Ok(ModelDescription { config, json }),
        }
    }

    /// Where collectives run on a host of `num_cores`. Left to the engine: on CPU, where a collective is copying, on a side thread if
    /// each rank has a core for one beside its `threads`; beside a GPU always, for there nobody else computes.
    pub fn overlap(&self, num_cores: usize, threads: usize) -> Overlap {
        let num_ranks = self.parallel.world_size;
        match self.zero.overlap_comm {
            CommOverlap::Blocking => Overlap::Inline,
            CommOverlap::Overlapped => Overlap::SideThread,
            CommOverlap::Automatic if self.device == Device::Cuda && self.parallel.data > 1 => {
                Overlap::SideThread
            }
            CommOverlap::Automatic if self.parallel.data > 1 && num_cores >= num_ranks * (threads + 1) => {
                Overlap::SideThread
            }
            CommOverlap::Automatic => Overlap::Inline,
        }
    }
}

fn misfit(error: RunShapeError) -> ConfigErrors {
    ConfigErrors::new(vec![error.into()])
}

fn read_json(path: &Path) -> Result<Value, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
        at: None,
        path: path.to_path_buf(),
        source,
    })?;
    serde_json::from_str(&text).map_err(|error| {
        let file = Arc::new(SourceFile { name: path.display().to_string(), root: "" });
        let at = Origin::Line { file, line: error.line() as u32 };
        let text = error.to_string();
        let message = text.split(" at line ").next().unwrap_or(&text).to_owned();
        ConfigError::Syntax { at, column: error.column(), message, hint: None }
    })
}

impl ConfigError {
    /// How to mend a description of a model.
    pub(crate) fn model_hint(error: &ModelConfigError) -> Option<String> {
        match error {
            ModelConfigError::Missing { key: "vocab_size" } => Some(
                "set `model.config.vocab_size` to the number of the tokenizer's tokens, or have the run train one with \
                 `data.tokenizer.train_bpe`"
                    .to_owned(),
            ),
            _ => None,
        }
    }

    /// How to mend what is asked of a model.
    pub(crate) fn shape_hint(error: &RunShapeError) -> Option<String> {
        match error {
            RunShapeError::TooLong { .. } => {
                Some("shorten the samples, or raise the model's number of positions".to_owned())
            }
            RunShapeError::Split(_) => Some("choose another `parallel.tensor`".to_owned()),
            RunShapeError::Stages { .. } => Some(
                "lower `parallel.pipeline` or the chunks of `parallel.schedule`, or cut by another measure with `parallel.stages`"
                    .to_owned(),
            ),
            RunShapeError::Schedule(_) => {
                Some("raise `deepspeed.gradient_accumulation_steps`, or change `parallel.schedule`".to_owned())
            }
            RunShapeError::Tokens { tensor, .. } => {
                Some(format!("make it a multiple of `{tensor}`, or leave `parallel.sequence` out"))
            }
            RunShapeError::PatternMatchesNothing { .. } => Some(
                "`*` stands for any run of characters; `shardwise plan --json` shows all names".to_owned(),
            ),
            _ => None,
        }
    }
}
