//! DeepSpeed configurations as people have them.

use super::*;
use crate::{NoteKind, OffloadConfig, Optimizer, Precision, ZeroStage};

/// The shape that a Trainer fills in: everything that depends on the model or the arguments is `auto`.
const ZERO3_AUTO: &str = r#"{
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16,
             "hysteresis": 2, "min_loss_scale": 1},
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}
    },
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}
    },
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "none", "pin_memory": true},
        "offload_param": {"device": "none", "pin_memory": true},
        "overlap_comm": true,
        "contiguous_gradients": true,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": true
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": false
}"#;

const AUTOS: &[&str] = &[
    "bf16.enabled",
    "fp16.enabled",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer.params.betas",
    "optimizer.params.eps",
    "optimizer.params.lr",
    "optimizer.params.weight_decay",
    "scheduler.params.warmup_max_lr",
    "scheduler.params.warmup_min_lr",
    "scheduler.params.warmup_num_steps",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.stage3_param_persistence_threshold",
    "zero_optimization.stage3_prefetch_bucket_size",
];

#[test]
fn a_template_with_autos_names_each_of_them_and_nothing_else() {
    let files = Files::new(&[("run.json", &run_with("\"ds.json\"")), ("ds.json", ZERO3_AUTO)]);
    let says = files.load("run.json", &[], 2).unwrap_err();
    let errors = says.lines().filter(|line| line.starts_with("error: "));
    let mut keys: Vec<&str> = errors
        .map(|line| {
            assert!(line.ends_with("is `\"auto\"`, and nothing fills in `auto` here"), "{line}");
            line.split('`').nth(1).unwrap()
        })
        .collect();
    keys.sort_unstable();
    assert_eq!(keys, AUTOS);
}

#[test]
fn the_template_filled_in_loads() {
    let values = [
        (r#""fp16": {"enabled": "auto""#, r#""fp16": {"enabled": false"#),
        (r#""bf16": {"enabled": "auto""#, r#""bf16": {"enabled": true"#),
        (r#""lr": "auto""#, r#""lr": 3e-4"#),
        (r#""betas": "auto""#, r#""betas": [0.9, 0.95]"#),
        (r#""eps": "auto""#, r#""eps": 1e-8"#),
        (r#""weight_decay": "auto""#, r#""weight_decay": 0.1"#),
        (r#""warmup_min_lr": "auto""#, r#""warmup_min_lr": 0"#),
        (r#""warmup_max_lr": "auto""#, r#""warmup_max_lr": 3e-4"#),
        (r#""warmup_num_steps": "auto""#, r#""warmup_num_steps": 100"#),
        (r#""reduce_bucket_size": "auto""#, r#""reduce_bucket_size": 16777216"#),
        (r#""stage3_prefetch_bucket_size": "auto""#, r#""stage3_prefetch_bucket_size": 5e7"#),
        (r#""stage3_param_persistence_threshold": "auto""#, r#""stage3_param_persistence_threshold": 40960"#),
        (r#""gradient_accumulation_steps": "auto""#, r#""gradient_accumulation_steps": 4"#),
        (r#""gradient_clipping": "auto""#, r#""gradient_clipping": 0.5"#),
        (r#""train_batch_size": "auto","#, ""),
        (r#""train_micro_batch_size_per_gpu": "auto""#, r#""train_micro_batch_size_per_gpu": 2"#),
    ];
    let mut text = ZERO3_AUTO.to_string();
    for (from, to) in values {
        assert!(text.contains(from), "{from}");
        text = text.replace(from, to);
    }
    let files = Files::new(&[("run.json", &run_with("\"ds.json\"")), ("ds.json", &text)]);
    let loaded = files.load("run.json", &[], 2).unwrap();
    let config = &loaded.config;
    assert_eq!(config.zero.stage, ZeroStage::Three);
    assert_eq!(config.precision, Precision::Bf16);
    assert_eq!(config.batch.global_batch_size, 16);
    assert_eq!(config.clip_grad_norm, Some(0.5));
    // What has no effect is said, not swallowed.
    let noted = |kind: NoteKind| -> Vec<&str> {
        let notes = loaded.effective().notes().iter().filter(|note| note.kind == kind);
        notes.map(|note| note.key.as_str()).collect()
    };
    for key in [
        "fp16.hysteresis",
        "zero_optimization.sub_group_size",
        "zero_optimization.reduce_bucket_size",
        "zero_optimization.stage3_max_live_parameters",
        "zero_optimization.offload_param.pin_memory",
        "wall_clock_breakdown",
    ] {
        assert!(noted(NoteKind::NoEffect).contains(&key), "{key}");
    }
    assert_eq!(noted(NoteKind::AsAlways), ["zero_optimization.contiguous_gradients"]);
    assert_eq!(noted(NoteKind::Default), ["scheduler.params.warmup_type"]);
}

/// ZeRO-Offload as its tutorials have it, old form and new.
#[test]
fn offload_templates_load_on_cuda() {
    let new = r#", "fp16": {"enabled": true}, "zero_optimization": {"stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": true, "buffer_count": 4, "fast_init": false},
        "offload_param": {"device": "cpu", "pin_memory": true, "buffer_count": 5, "buffer_size": 1e8, "max_in_cpu": 1e9}}"#;
    let loaded = load(&run_with(&deepspeed(new)), &["device=cuda"], 4).unwrap();
    assert_eq!(loaded.config.zero.offload, OffloadConfig::ALL);
    assert_eq!(loaded.effective().notes().iter().filter(|note| note.kind == NoteKind::NoEffect).count(), 7);
    let old = r#", "fp16": {"enabled": true}, "zero_optimization": {"stage": 2, "cpu_offload": true}"#;
    let config = load(&run_with(&deepspeed(old)), &["device=cuda"], 4).unwrap().config;
    assert_eq!(config.zero.offload, OffloadConfig::OPTIMIZER);
}

#[test]
fn a_hand_written_configuration_with_comments_loads() {
    let text = r#"
# hjson-like
{
  // sizes
  train_batch_size: 16,
  "zero_optimization": {
    "stage": 2.0,
    "allgather_partitions": true,
    "allgather_bucket_size": 5e8, /* DeepSpeed's
                                     default */
    "overlap_comm": true,
    "reduce_scatter": true,
    "reduce_bucket_size": 5e+08,
    "contiguous_gradients": true,
    "round_robin_gradients": true,
  },
  "zero_allow_untested_optimizer": true,
  "optimizer": {"type": "adam", "params": {"lr": 1E-3, "adam_w_mode": true, "bias_correction": true}},
  "tensorboard": {"enabled": true, "output_path": "logs/", "job_name": "run"},
  "activation_checkpointing": {"partition_activations": false, "cpu_checkpointing": false, "profile": false},
  "aio": {"block_size": 262144, "queue_depth": 32, "single_submit": false, "overlap_events": true},
  "data_types": {"grad_accum_dtype": "fp32"},
  "flops_profiler": {"enabled": false, "profile_step": 1, "module_depth": -1, "output_file": null},
  "checkpoint": {"tag_validation": "Warn"},
}
"#;
    let config = load(&run_with(text), &[], 4).unwrap().config;
    assert_eq!(config.zero.stage, ZeroStage::Two);
    assert_eq!((config.batch.micro_batch, config.batch.grad_accum_steps), (4, 1));
    assert!(matches!(config.optimizer, Optimizer::AdamW(_)));
}

#[test]
fn torch_adam_brings_the_weight_decay_of_torch() {
    let decay = |params: &str| {
        let text = format!(
            r#"{{"train_batch_size": 1, "optimizer": {{"type": "AdamW", "params": {{"torch_adam": true{params}}}}}}}"#
        );
        let Optimizer::AdamW(adamw) = load(&run_with(&text), &[], 1).unwrap().config.optimizer else {
            panic!("AdamW")
        };
        adamw.weight_decay
    };
    assert_eq!(decay(""), 0.01);
    assert_eq!(decay(r#", "weight_decay": 0.1"#), 0.1);
}
