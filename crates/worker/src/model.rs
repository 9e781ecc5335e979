//! The run's model: its description, its layers, and the engine over them.

use serde_json::Value;
use shardwise_comm::Group;
use shardwise_config::{
    ActivationPolicy, FloatType, GradScaling, ModelDescription, ModelSource, NamePattern, NonFiniteGrads,
    Optimizer, Precision, ReduceOp, RunConfig,
};
use shardwise_device::DType;
use shardwise_engine::{Engine, EngineOptions, ParamSource, RandomInit};
use shardwise_kernels::Threads;
use shardwise_models::HfSource;
use shardwise_plan::zoo::ModelConfig;
use shardwise_zero::{AdamOptions, BiasCorrection, ParamGroup, StatePrecision, ZeroOptions};

use crate::failure::Failure;

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

    /// Builds this rank's part of it.
    pub fn build(&self, run: &RunConfig, group: Group, threads: Threads) -> Result<Engine, Failure> {
        let layers = shardwise_models::build(&self.config)?;
        let mut random = RandomInit { seed: run.model.init_seed };
        let mut files;
        let source: &mut dyn ParamSource = match &run.model.source {
            ModelSource::Path(dir) if has_weights(dir) => {
                files = HfSource::open(dir, &self.config.layers()).map_err(Failure::configuration)?;
                &mut files
            }
            _ => &mut random,
        };
        Ok(Engine::new(layers, options(run, threads)?, group, source)?)
    }
}

/// Whether a folder holds weights; a folder with `config.json` alone describes a model to be born.
fn has_weights(dir: &std::path::Path) -> bool {
    let is_weights = |name: &str| name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json");
    std::fs::read_dir(dir)
        .is_ok_and(|entries| entries.flatten().any(|entry| is_weights(&entry.file_name().to_string_lossy())))
}

fn options(run: &RunConfig, threads: Threads) -> Result<EngineOptions, Failure> {
    let Optimizer::AdamW(adamw) = &run.optimizer else { return Err(unfollowed("optimizer")) };
    if let Some(key) = first_unfollowed(run) {
        return Err(unfollowed(key));
    }
    let names =
        |patterns: &[NamePattern]| patterns.iter().map(|pattern| pattern.as_str().to_owned()).collect();
    Ok(EngineOptions {
        zero: ZeroOptions {
            stage: run.zero.stage,
            compute: match run.precision {
                Precision::Fp32 => DType::F32,
                Precision::Bf16 => DType::Bf16,
                Precision::Fp16 => return Err(unfollowed("precision")),
            },
            grad_accum_steps: run.batch.grad_accum_steps,
            clip_grad_norm: run.clip_grad_norm,
            optimizer: shardwise_zero::Optimizer::AdamW(AdamOptions {
                beta1: adamw.betas[0],
                beta2: adamw.betas[1],
                eps: adamw.eps,
                weight_decay: adamw.weight_decay,
                bias_correction: BiasCorrection::On,
            }),
            groups: vec![ParamGroup::no_decay(run.train.no_decay.clone())],
            states: StatePrecision::F32,
            overlap: run.overlap(num_cores(), threads.get()),
            threads,
            loss_scaling: None,
            on_non_finite: Default::default(),
            reduction: Default::default(),
        },
        frozen: names(&run.train.frozen),
        activations: Default::default(),
        seed: run.seed,
    })
}

/// A setting that the configuration knows and training does not follow yet, by its name in the effective configuration.
fn first_unfollowed(run: &RunConfig) -> Option<&'static str> {
    let reduction = &run.reduction;
    let activations = &run.activations;
    [
        (run.non_finite_grads != NonFiniteGrads::Skip, "non_finite_grads"),
        (reduction.accumulation != FloatType::Fp32, "reduction.accumulation"),
        (reduction.communication.is_some(), "reduction.communication"),
        (
            matches!(&run.optimizer, Optimizer::AdamW(adamw) if !adamw.bias_correction),
            "optimizer.bias_correction",
        ),
        (reduction.op != ReduceOp::Mean, "reduction.op"),
        (reduction.scaling != GradScaling::After, "reduction.scaling"),
        (run.optimizer_state_dtype != FloatType::Fp32, "optimizer_state_dtype"),
        (run.lr_schedule.momentum(0).is_some(), "lr_schedule.momentum"),
        (activations.policy != ActivationPolicy::Keep || !activations.rules.is_empty(), "activations"),
        (activations.head_chunk_tokens.is_some(), "activations.head_chunk_tokens"),
        (!run.train.groups.is_empty(), "train.groups"),
        (run.checkpoint.every.is_some(), "checkpoint.every"),
        (run.eval.is_some(), "eval"),
    ]
    .into_iter()
    .find_map(|(is_set, key)| is_set.then_some(key))
}

fn unfollowed(key: &str) -> Failure {
    Failure::configuration(anyhow::anyhow!("training does not follow `{key}` of this run yet"))
}

fn num_cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}
