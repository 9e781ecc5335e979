//! DeepSpeed's keys for the optimizer and the learning rate.
//!
//! The defaults of parameters depend on the optimizer or scheduler they belong to, so they stand where those are assembled.

use super::*;
use Unset::{Remarkable, Required};

/// Names of optimizers that are supported.
pub(crate) const OPTIMIZERS: &[&str] = &["AdamW", "Adam", "SGD", "Adagrad", "Lion", "Lamb", "Muon"];
/// Names of optimizers that DeepSpeed configurations use and this version does not have.
pub(crate) const OTHER_OPTIMIZERS: &[&str] =
    &["MuAdam", "MuAdamW", "MuSGD", "OneBitAdam", "OneBitLamb", "ZeroOneAdam", "CPUAdam"];
/// Names of schedulers that are supported.
pub(crate) const SCHEDULERS: &[&str] =
    &["WarmupLR", "WarmupDecayLR", "WarmupCosineLR", "OneCycle", "LRRangeTest"];
/// Names of schedulers that DeepSpeed configurations use and this version does not have.
pub(crate) const OTHER_SCHEDULERS: &[&str] = &["CosineAnnealingLR", "LinearLR", "StepLR"];

const LEAN: &str = "it belongs to an implementation of Adam; there is one here, fused";
const ADAMS: &[&str] = &["AdamW", "Adam"];
const SGD: &[&str] = &["SGD"];
const ADAGRAD: &[&str] = &["Adagrad"];
const MUON: &[&str] = &["Muon"];
const LAMBS: &[&str] = &["Lamb", "OneBitLamb"];
const ONE_BIT_LAMB: &[&str] = &["OneBitLamb"];
const ONE_BIT: &[&str] = &["OneBitAdam", "OneBitLamb"];
const COMPRESSED: &[&str] = &["OneBitAdam", "ZeroOneAdam", "OneBitLamb"];
const ZERO_ONE: &[&str] = &["ZeroOneAdam"];

const WARMUPS: &[&str] = &["WarmupLR", "WarmupDecayLR", "WarmupCosineLR"];
const ONE_CYCLE: &[&str] = &["OneCycle"];
const RANGE_TEST: &[&str] = &["LRRangeTest"];
const COSINE: &[&str] = &["WarmupCosineLR"];

/// A decay rate, momentum or ratio.
const BELOW_ONE: Kind = Kind::Within(0.0, 1.0);

pub(crate) const KEYS: &[Key] = &[
    used("optimizer", Kind::Group, Required(r#"write {"type": "AdamW", "params": {"lr": 3e-4}}"#)),
    used(
        "optimizer.type",
        TEXT,
        Required("`\"AdamW\"`, `\"Adam\"`, `\"SGD\"`, `\"Adagrad\"`, `\"Lion\"`, `\"Lamb\"` or `\"Muon\"`"),
    ),
    no_effect("optimizer.legacy_fusion", BOOL, FALSE, LEAN),
    group("optimizer.params"),
    used("optimizer.params.lr", POSITIVE, NONE),
    used("optimizer.params.weight_decay", POSITIVE, NONE),
    belongs_to("optimizer.params.betas", Kind::Betas, &["AdamW", "Adam", "Lion", "Lamb", "Muon"]),
    belongs_to("optimizer.params.eps", POSITIVE, &["AdamW", "Adam", "Adagrad", "Lamb", "Muon"]),
    belongs_to("optimizer.params.adam_w_mode", BOOL, &["Adam", "AdamW", "Muon"]),
    belongs_to("optimizer.params.bias_correction", BOOL, &["AdamW", "Adam", "Lamb"]),
    belongs_to("optimizer.params.torch_adam", BOOL, ADAMS),
    off("optimizer.params.amsgrad", ""),
    off("optimizer.params.maximize", ""),
    used("optimizer.params.fp32_optimizer_states", BOOL, NONE),
    no_effect("optimizer.params.set_grad_none", BOOL, TRUE, LEAN),
    no_effect("optimizer.params.fused", BOOL, NONE, LEAN),
    no_effect("optimizer.params.foreach", BOOL, NONE, LEAN),
    no_effect("optimizer.params.capturable", BOOL, FALSE, LEAN),
    misplaced("optimizer.params.max_grad_norm", "set `gradient_clipping` instead"),
    belongs_to("optimizer.params.momentum", BELOW_ONE, &["SGD", "Muon"]),
    belongs_to("optimizer.params.nesterov", BOOL, SGD),
    belongs_to("optimizer.params.dampening", Kind::Between(0.0, 1.0), SGD),
    belongs_to("optimizer.params.lr_decay", POSITIVE, ADAGRAD),
    belongs_to("optimizer.params.initial_accumulator_value", POSITIVE, ADAGRAD),
    belongs_to("optimizer.params.muon_lr", POSITIVE, MUON),
    belongs_to("optimizer.params.adam_lr", POSITIVE, MUON),
    belongs_to("optimizer.params.ns_method", Kind::Choice(&["standard", "gram"]), MUON),
    belongs_to("optimizer.params.ns_steps", Kind::Int(1, 100), MUON),
    belongs_to("optimizer.params.per_head_muon", BOOL, MUON),
    belongs_to("optimizer.params.max_coeff", Kind::Above(0.0), LAMBS),
    belongs_to("optimizer.params.min_coeff", POSITIVE, LAMBS),
    belongs_to("optimizer.params.eps_inside_sqrt", BOOL, &["Lamb"]),
    belongs_to("optimizer.params.freeze_step", SIZE, ONE_BIT),
    belongs_to("optimizer.params.cuda_aware", BOOL, COMPRESSED),
    belongs_to("optimizer.params.comm_backend_name", TEXT, COMPRESSED),
    belongs_to("optimizer.params.exp_avg_mask", ANY, &["OneBitAdam"]),
    belongs_to("optimizer.params.var_freeze_step", SIZE, ZERO_ONE),
    belongs_to("optimizer.params.var_update_scaler", SIZE, ZERO_ONE),
    belongs_to("optimizer.params.local_step_scaler", SIZE, ZERO_ONE),
    belongs_to("optimizer.params.local_step_clipper", SIZE, ZERO_ONE),
    belongs_to("optimizer.params.coeff_beta", NUMBER, ONE_BIT_LAMB),
    belongs_to("optimizer.params.factor_max", NUMBER, ONE_BIT_LAMB),
    belongs_to("optimizer.params.factor_min", NUMBER, ONE_BIT_LAMB),
    belongs_to("optimizer.params.factor_threshold", NUMBER, ONE_BIT_LAMB),
    used(
        "gradient_clipping",
        POSITIVE,
        Remarkable(
            "1.0",
            "gradients are clipped to a norm of 1.0, as DeepSpeed 0.19 does; older versions did not clip (0 turns it off)",
        ),
    ),
    // Learning rate
    group("scheduler"),
    used(
        "scheduler.type",
        TEXT,
        Required(
            "`\"WarmupLR\"`, `\"WarmupDecayLR\"`, `\"WarmupCosineLR\"`, `\"OneCycle\"` or `\"LRRangeTest\"`; without \
             `scheduler` the rate is constant",
        ),
    ),
    group("scheduler.params"),
    belongs_to("scheduler.params.warmup_min_lr", POSITIVE, &["WarmupLR", "WarmupDecayLR"]),
    belongs_to("scheduler.params.warmup_max_lr", POSITIVE, &["WarmupLR", "WarmupDecayLR"]),
    belongs_to("scheduler.params.warmup_num_steps", COUNT, WARMUPS),
    belongs_to("scheduler.params.warmup_type", Kind::Choice(&["log", "linear"]), WARMUPS),
    always("scheduler.params.last_batch_iteration", INT, is("-1"), &["-1"], "a run starts at its first step"),
    belongs_to("scheduler.params.total_num_steps", COUNT, &["WarmupDecayLR", "WarmupCosineLR"]),
    belongs_to("scheduler.params.warmup_min_ratio", Kind::Between(0.0, 1.0), COSINE),
    belongs_to("scheduler.params.cos_min_ratio", Kind::Between(0.0, 1.0), COSINE),
    belongs_to("scheduler.params.lr_range_test_min_lr", POSITIVE, RANGE_TEST),
    belongs_to("scheduler.params.lr_range_test_step_size", COUNT, RANGE_TEST),
    belongs_to("scheduler.params.lr_range_test_step_rate", POSITIVE, RANGE_TEST),
    belongs_to("scheduler.params.lr_range_test_staircase", BOOL, RANGE_TEST),
    belongs_to("scheduler.params.cycle_min_lr", POSITIVE, ONE_CYCLE),
    belongs_to("scheduler.params.cycle_max_lr", POSITIVE, ONE_CYCLE),
    belongs_to("scheduler.params.decay_lr_rate", POSITIVE, ONE_CYCLE),
    belongs_to("scheduler.params.cycle_first_step_size", CYCLE_STEPS, ONE_CYCLE),
    belongs_to("scheduler.params.cycle_second_step_size", Kind::Int(0, u32::MAX as i64), ONE_CYCLE),
    belongs_to("scheduler.params.cycle_first_stair_count", SIZE, ONE_CYCLE),
    belongs_to("scheduler.params.cycle_second_stair_count", SIZE, ONE_CYCLE),
    belongs_to("scheduler.params.decay_step_size", SIZE, ONE_CYCLE),
    belongs_to("scheduler.params.cycle_momentum", BOOL, ONE_CYCLE),
    belongs_to("scheduler.params.cycle_min_mom", BELOW_ONE, ONE_CYCLE),
    belongs_to("scheduler.params.cycle_max_mom", BELOW_ONE, ONE_CYCLE),
    belongs_to("scheduler.params.decay_mom_rate", POSITIVE, ONE_CYCLE),
];

/// Half a cycle; two of them can be added.
const CYCLE_STEPS: Kind = Kind::Int(1, u32::MAX as i64);
