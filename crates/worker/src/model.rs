//! The run's model: its description, its layers, and the engine over them.

use serde_json::Value;
use shardwise_comm::Group;
use shardwise_config::{CommOverlap, ModelSource, Optimizer, Precision, RunConfig};
use shardwise_device::DType;
use shardwise_engine::{Engine, EngineOptions, ParamSource, RandomInit};
use shardwise_kernels::Threads;
use shardwise_models::{HfSource, read_config};
use shardwise_plan::ZeroStage;
use shardwise_plan::zoo::ModelConfig;
use shardwise_zero::{AdamWOptions, Overlap, ZeroOptions};

use crate::failure::Failure;

/// A model as described, not yet built.
pub struct Model {
    pub config: ModelConfig,
    /// The whole `config.json`, to be written beside the trained weights.
    pub json: Value,
}

impl Model {
    /// Reads the model's description and checks it against the data.
    pub fn describe(run: &RunConfig, tokenizer_vocab: Option<usize>) -> Result<Self, Failure> {
        let model = match &run.model.source {
            ModelSource::Path(dir) => {
                let (config, json) = read_config(dir).map_err(Failure::configuration)?;
                Model { config, json }
            }
            ModelSource::Config(keys) => {
                let mut json = Value::Object(keys.clone());
                // A tokenizer trained by this run decides how many tokens there are, if the run file does not.
                if let (None, Some(vocab_size)) = (keys.get("vocab_size"), tokenizer_vocab) {
                    json["vocab_size"] = vocab_size.into();
                }
                let config = ModelConfig::from_json(&json).map_err(|error| {
                    Failure::configuration(anyhow::Error::new(error).context("`model.config`"))
                })?;
                Model { config, json }
            }
        };
        let (vocab_size, max_positions) = (model.config.vocab_size(), model.config.max_positions());
        if let Some(tokens) = tokenizer_vocab.filter(|&tokens| tokens > vocab_size) {
            return Err(Failure::usage(
                format!("the tokenizer has `{tokens}` tokens, the model's `vocab_size` is `{vocab_size}`"),
                "use the model's own tokenizer, or a smaller vocabulary",
            ));
        }
        if run.data.seq_len > max_positions {
            return Err(Failure::usage(
                format!(
                    "`data.seq_len` is `{}`, the model has `{max_positions}` positions",
                    run.data.seq_len
                ),
                "shorten the samples, or raise the model's number of positions",
            ));
        }
        Ok(model)
    }

    /// Builds this rank's part of it.
    pub fn build(&self, run: &RunConfig, group: Group, threads: Threads) -> Result<Engine, Failure> {
        let layers = shardwise_models::build(&self.config)?;
        let mut random = RandomInit { seed: run.model.init_seed };
        let mut files;
        let source: &mut dyn ParamSource = match &run.model.source {
            ModelSource::Path(dir) if has_weights(dir) => {
                files = HfSource::open(dir, &self.config.layers())?;
                &mut files
            }
            _ => &mut random,
        };
        Ok(Engine::new(layers, options(run, threads), group, source)?)
    }
}

/// Whether a folder holds weights; a folder with `config.json` alone describes a model to be born.
fn has_weights(dir: &std::path::Path) -> bool {
    let is_weights = |name: &str| name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json");
    std::fs::read_dir(dir)
        .is_ok_and(|entries| entries.flatten().any(|entry| is_weights(&entry.file_name().to_string_lossy())))
}

fn options(run: &RunConfig, threads: Threads) -> EngineOptions {
    let Optimizer::AdamW(adamw) = &run.optimizer;
    let names = |patterns: &[shardwise_config::NamePattern]| {
        patterns.iter().map(|pattern| pattern.as_str().to_owned()).collect()
    };
    EngineOptions {
        zero: ZeroOptions {
            stage: ZeroStage::ALL[usize::from(run.zero.stage.number())],
            compute: match run.precision {
                Precision::Fp32 => DType::F32,
                Precision::Bf16 => DType::Bf16,
            },
            grad_accum_steps: run.batch.grad_accum_steps,
            clip_grad_norm: run.clip_grad_norm,
            adamw: AdamWOptions {
                beta1: adamw.betas[0],
                beta2: adamw.betas[1],
                eps: adamw.eps,
                weight_decay: adamw.weight_decay,
            },
            no_decay: names(&run.train.no_decay),
            overlap: match run.zero.overlap_comm {
                CommOverlap::Blocking => Overlap::Inline,
                CommOverlap::Overlapped => Overlap::SideThread,
                CommOverlap::Automatic if has_spare_cores(run, threads) => Overlap::SideThread,
                CommOverlap::Automatic => Overlap::Inline,
            },
            threads,
        },
        frozen: names(&run.train.frozen),
    }
}

/// Whether each rank has a core for a second thread that copies while the others compute.
fn has_spare_cores(run: &RunConfig, threads: Threads) -> bool {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    run.parallel.world_size > 1 && cores >= run.parallel.world_size * (threads.get() + 1)
}
