//! The run's model: its description, its layers, and the engine over them.

use serde_json::Value;
use shardwise_config::{ModelDescription, ModelSource, RunConfig};
use shardwise_engine::{Engine, ParamSource, RandomInit, Ranks};
use shardwise_kernels::Threads;
use shardwise_models::HfSource;
use shardwise_plan::zoo::ModelConfig;

use crate::failure::Failure;
use crate::gpu::RankGpu;
use crate::options;
use crate::resume::{Blank, Resumed};

/// A model as described, not yet built.
pub struct Model {
    pub config: ModelConfig,
    /// The whole `config.json`, to be written beside the trained weights.
    pub json: Value,
}

impl Model {
    /// Reads the model's description and checks it against the run.
    pub fn describe(run: &RunConfig, tokenizer_vocab: Option<usize>) -> Result<Self, Failure> {
        let description = run.describe_model(tokenizer_vocab).map_err(Failure::configuration)?;
        let ModelDescription { config, json } = description;
        run.shape(config.clone(), num_cores()).map_err(Failure::configuration)?;
        Ok(Model { config, json })
    }

    /// Builds this rank's part of it, with the weights that the run starts from, or those of a checkpoint.
    pub fn build(
        &self,
        run: &RunConfig,
        ranks: Ranks,
        threads: Threads,
        gpu: Option<&RankGpu>,
        resumed: Option<&Resumed>,
    ) -> Result<Engine, Failure> {
        let layers = shardwise_models::build(&self.config)?;
        let mut random = RandomInit { seed: run.model.init_seed };
        let mut files;
        let source: &mut dyn ParamSource = match &run.model.source {
            _ if resumed.is_some() => &mut Blank,
            ModelSource::Path(dir) if has_weights(dir) => {
                files = HfSource::open(dir, &self.config.layers()).map_err(Failure::configuration)?;
                &mut files
            }
            _ => &mut random,
        };
        let options = options::engine_options(run, &self.config, threads, gpu)?;
        let mut engine = Engine::new(layers, options, ranks, source)?;
        if let Some(resumed) = resumed {
            resumed.load(&mut engine)?;
        }
        Ok(engine)
    }
}

/// Whether a folder holds weights; a folder with `config.json` alone describes a model to be born.
fn has_weights(dir: &std::path::Path) -> bool {
    let is_weights = |name: &str| name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json");
    std::fs::read_dir(dir)
        .is_ok_and(|entries| entries.flatten().any(|entry| is_weights(&entry.file_name().to_string_lossy())))
}

pub fn num_cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}
