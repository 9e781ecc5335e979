//! From the run's configuration to the engine's options, setting by setting.

use shardwise_config as config;
use shardwise_config::{NamePattern, RunConfig};
use shardwise_device::DType;
use shardwise_engine::{EngineOptions, PipelineOptions};
use shardwise_kernels::Threads;
use shardwise_plan::OffloadTo;
use shardwise_plan::pipeline::ScheduleKind;
use shardwise_plan::zoo::ModelConfig;
use shardwise_zero::{
    AdagradOptions, AdamOptions, BiasCorrection, Direction, DynamicLossScale, GradientOp, HysteresisRefill,
    LambOptions, LionOptions, LossScaling, MuonOptions, Offload, OnNonFinite, Optimizer, ParamGroup,
    Predivide, ReductionOptions, SgdOptions, StatePrecision, Tier, ZeroOptions,
};

use crate::failure::Failure;
use crate::gpu::RankGpu;
use crate::model::num_cores;

/// What the engine is told of this run and this model.
pub fn engine_options(
    run: &RunConfig,
    model: &ModelConfig,
    threads: Threads,
    gpu: Option<&RankGpu>,
) -> Result<EngineOptions, Failure> {
    Ok(EngineOptions {
        zero: ZeroOptions {
            stage: run.zero.stage,
            compute: dtype(run.precision.float_type()),
            grad_accum_steps: run.batch.grad_accum_steps,
            clip_grad_norm: run.clip_grad_norm,
            optimizer: optimizer(&run.optimizer)?,
            groups: groups(run, model),
            states: match run.optimizer_state_dtype {
                config::FloatType::Fp32 => StatePrecision::F32,
                _ => StatePrecision::Bf16 { seed: run.seed },
            },
            overlap: run.overlap(num_cores(), threads.get()),
            threads,
            gpu: gpu.map(|gpu| gpu.processor().clone()),
            offload: offload(run),
            loss_scaling: run.loss_scaling.map(loss_scaling).transpose()?,
            on_non_finite: match (run.non_finite_grads, run.train.max_consecutive_skips) {
                (config::NonFiniteGrads::Apply, _) => OnNonFinite::Apply,
                (config::NonFiniteGrads::Skip, Some(max_consecutive)) => {
                    OnNonFinite::Skip { max_consecutive }
                }
                (config::NonFiniteGrads::Skip, None) => OnNonFinite::default(),
            },
            reduction: reduction(&run.reduction),
        },
        frozen: run.train.frozen.iter().map(|pattern| pattern.as_str().to_owned()).collect(),
        activations: run.activations.to_rules(),
        head_chunk_rows: run.activations.head_chunk_tokens,
        seed: run.seed,
        pipeline: pipeline(run, model)?,
        sequence: run.parallel.sequence,
        device: gpu.map_or(shardwise_torch::Device::Cpu, RankGpu::device),
    })
}

fn pipeline(run: &RunConfig, model: &ModelConfig) -> Result<PipelineOptions, Failure> {
    let stages = run.shape(model.clone(), num_cores()).map_err(Failure::configuration)?.stages();
    // Without stages there is nothing to schedule.
    let schedule = match run.parallel.pipeline {
        1 => ScheduleKind::OneForwardOneBackward,
        _ => run.parallel.schedule,
    };
    Ok(PipelineOptions { schedule, stages: Some(stages.map_err(Failure::configuration)?) })
}

/// What is kept on the host beside a GPU. Without one, everything is there anyway.
fn offload(run: &RunConfig) -> Offload {
    let tier = |to: OffloadTo| match to {
        OffloadTo::Device => Tier::Device,
        OffloadTo::Host => Tier::Host,
    };
    Offload { optimizer: tier(run.zero.offload.optimizer), params: tier(run.zero.offload.params) }
}

pub fn dtype(float: config::FloatType) -> DType {
    match float {
        config::FloatType::Fp32 => DType::F32,
        config::FloatType::Bf16 => DType::Bf16,
        config::FloatType::Fp16 => DType::F16,
    }
}

fn reduction(reduction: &config::ReductionConfig) -> ReductionOptions {
    ReductionOptions {
        accumulation_dtype: dtype(reduction.accumulation),
        communication_dtype: reduction.communication.map(dtype),
        predivide: match reduction.scaling {
            config::GradScaling::After => Predivide::By(1.0),
            config::GradScaling::Before => Predivide::ByNumRanks,
            config::GradScaling::Split { factor } => Predivide::By(factor),
        },
        op: match reduction.op {
            config::ReduceOp::Mean => GradientOp::Mean,
            config::ReduceOp::Sum => GradientOp::Sum,
        },
    }
}

fn loss_scaling(scaling: config::LossScaling) -> Result<LossScaling, Failure> {
    Ok(match scaling {
        config::LossScaling::Static { scale } => LossScaling::Static(scale),
        config::LossScaling::Dynamic(dynamic) => LossScaling::Dynamic(DynamicLossScale {
            initial_power: dynamic.initial_power,
            window: dynamic.window,
            hysteresis: u32::try_from(dynamic.hysteresis).map_err(|_| {
                let message = format!("`fp16.hysteresis` is `{}`", dynamic.hysteresis);
                Failure::usage(message, format!("give at most {}", u32::MAX))
            })?,
            refill: match dynamic.refill {
                config::HysteresisRefill::OnGrowth => HysteresisRefill::WithWindow,
                config::HysteresisRefill::EveryGoodStep => HysteresisRefill::WithCleanStep,
            },
            min_scale: dynamic.min_scale,
        }),
    })
}

fn bias_correction(is_on: bool) -> BiasCorrection {
    if is_on { BiasCorrection::On } else { BiasCorrection::Off }
}

fn adam(adam: &config::AdamConfig) -> AdamOptions {
    AdamOptions {
        beta1: adam.betas[0],
        beta2: adam.betas[1],
        eps: adam.eps,
        weight_decay: adam.weight_decay,
        bias_correction: bias_correction(adam.bias_correction),
    }
}

fn optimizer(optimizer: &config::Optimizer) -> Result<Optimizer, Failure> {
    Ok(match optimizer {
        config::Optimizer::AdamW(options) => Optimizer::AdamW(adam(options)),
        config::Optimizer::Adam(options) => Optimizer::Adam(adam(options)),
        config::Optimizer::Sgd(sgd) => Optimizer::Sgd(SgdOptions {
            momentum: sgd.momentum,
            dampening: sgd.dampening,
            direction: if sgd.nesterov { Direction::Nesterov } else { Direction::Momentum },
            weight_decay: sgd.weight_decay,
        }),
        config::Optimizer::Adagrad(adagrad) => Optimizer::Adagrad(AdagradOptions {
            lr_decay: adagrad.lr_decay,
            initial_accumulator_value: 0.0,
            eps: adagrad.eps,
            weight_decay: adagrad.weight_decay,
        }),
        config::Optimizer::Lion(lion) => Optimizer::Lion(LionOptions {
            beta1: lion.betas[0],
            beta2: lion.betas[1],
            weight_decay: lion.weight_decay,
        }),
        config::Optimizer::Lamb(lamb) => Optimizer::Lamb(LambOptions {
            beta1: lamb.betas[0],
            beta2: lamb.betas[1],
            eps: lamb.eps,
            weight_decay: lamb.weight_decay,
            max_coeff: lamb.max_coeff,
            min_coeff: lamb.min_coeff,
            bias_correction: bias_correction(lamb.bias_correction),
        }),
        config::Optimizer::Muon(muon) => Optimizer::Muon(MuonOptions {
            momentum: muon.momentum,
            direction: Direction::Nesterov,
            num_newton_schulz_steps: muon.ns_steps,
            weight_decay: muon.weight_decay,
            adamw: AdamOptions {
                beta1: muon.adam_betas[0],
                beta2: muon.adam_betas[1],
                eps: muon.adam_eps,
                weight_decay: muon.weight_decay,
                bias_correction: BiasCorrection::On,
            },
            adamw_lr_scale: muon.adam_lr_scale,
            adamw_for: MuonOptions::not_hidden(),
        }),
        other => {
            return Err(Failure::configuration(anyhow::anyhow!("this optimizer cannot be run: {other:?}")));
        }
    })
}

/// The run's groups in their order, then those without decay. A group that leaves the decay open does not take it from
/// `no_decay`: parameters that both name come first, by their own names.
fn groups(run: &RunConfig, model: &ModelConfig) -> Vec<ParamGroup> {
    let layers = model.layers();
    let names = || layers.iter().flat_map(|layer| &layer.params).map(|param| param.name.as_str());
    let is_exempt = |name: &str| run.train.no_decay.iter().any(|pattern| pattern.matches(name));
    let mut groups = Vec::new();
    for (index, group) in run.train.groups.iter().enumerate() {
        if group.weight_decay.is_none() {
            let is_here = |name: &&str| run.param_settings(name).group == Some(index) && is_exempt(name);
            let patterns: Vec<_> = names().filter(is_here).map(NamePattern::new).collect();
            if !patterns.is_empty() {
                groups.push(ParamGroup { patterns, lr_scale: group.lr_scale, weight_decay: Some(0.0) });
            }
        }
        groups.push(ParamGroup {
            patterns: group.patterns.clone(),
            lr_scale: group.lr_scale,
            weight_decay: group.weight_decay,
        });
    }
    groups.push(ParamGroup::no_decay(run.train.no_decay.clone()));
    groups
}
