//! A trained model from its folder, on one rank, to be asked and not to be trained.

use std::path::Path;

use shardwise_comm::solo;
use shardwise_data::Tokenizer;
use shardwise_device::DType;
use shardwise_engine::{Engine, EngineOptions};
use shardwise_kernels::Threads;
use shardwise_models::{HfSource, read_config};
use shardwise_plan::ZeroStage;
use shardwise_plan::zoo::ModelConfig;
use shardwise_zero::{AdamOptions, BiasCorrection, Optimizer, Overlap, StatePrecision, ZeroOptions};

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
        let zero = ZeroOptions {
            stage: ZeroStage::Zero,
            compute: DType::F32,
            grad_accum_steps: 1,
            clip_grad_norm: None,
            optimizer: Optimizer::AdamW(AdamOptions {
                beta1: 0.9,
                beta2: 0.999,
                eps: 1e-8,
                weight_decay: 0.0,
                bias_correction: BiasCorrection::On,
            }),
            groups: Vec::new(),
            states: StatePrecision::F32,
            overlap: Overlap::Inline,
            threads: Threads::ONE,
            loss_scaling: None,
            on_non_finite: Default::default(),
            reduction: Default::default(),
        };
        // Nothing is trained, so there are no gradients and no optimizer states.
        let options = EngineOptions {
            zero,
            frozen: vec!["*".into()],
            activations: Default::default(),
            head_chunk_rows: None,
            seed: 0,
        };
        let engine = Engine::new(shardwise_models::build(&config)?, options, solo(), &mut source)?;
        Ok(Trained { config, tokenizer, engine })
    }
}
