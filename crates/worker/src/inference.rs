//! A trained model from its folder, on one rank, to be asked and not to be trained.

use std::path::Path;

use shardwise_comm::solo;
use shardwise_data::Tokenizer;
use shardwise_engine::{Engine, EngineOptions};
use shardwise_models::{HfSource, read_config};
use shardwise_plan::ZeroStage;
use shardwise_plan::zoo::ModelConfig;
use shardwise_zero::{AdamOptions, Optimizer, ZeroOptions};

use crate::failure::Failure;

/// A model and its tokenizer, in fp32.
pub struct Trained {
    pub config: ModelConfig,
    pub tokenizer: Tokenizer,
    pub engine: Engine,
}

impl Trained {
    /// Loads a folder with `config.json`, weights and `tokenizer.json`.
    pub fn load(dir: &Path) -> Result<Self, Failure> {
        let (config, _) = read_config(dir).map_err(Failure::configuration)?;
        let tokenizer = Tokenizer::load(dir.join("tokenizer.json")).map_err(Failure::configuration)?;
        let mut source = HfSource::open(dir, &config.layers()).map_err(Failure::configuration)?;
        // Nothing is trained, so there are no gradients and no optimizer states.
        let zero = ZeroOptions::new(ZeroStage::Zero, Optimizer::AdamW(AdamOptions::default()));
        let options = EngineOptions { frozen: vec!["*".into()], ..EngineOptions::new(zero) };
        let engine = Engine::new(shardwise_models::build(&config)?, options, solo(), &mut source)?;
        Ok(Trained { config, tokenizer, engine })
    }
}
