//! What layers hold during a step, against what the plan says: models of twelve layers at sequences of 1024 tokens, their
//! activations kept, recomputed, offloaded, or by rule.
//!
//! Measured is libtorch's memory, all that the plan counts as activations, gradients of layers and temporaries. A test of its
//! own, for the allocator is the process's.

// Helpers of tests may unwrap as tests may.
#![allow(clippy::unwrap_used)]

use std::fmt::Write as _;
use std::time::Instant;

use serde_json::{Value, json};
use shardwise_comm::solo;
use shardwise_device::DType;
use shardwise_engine::ops::multiplies;
use shardwise_engine::{Batch, Engine, EngineOptions, RandomInit};
use shardwise_models::build;
use shardwise_plan::pipeline::StageCut;
use shardwise_plan::run::{RunPlan, RunShape};
use shardwise_plan::zoo::{ModelConfig, SequenceParallel};
use shardwise_plan::{ActivationPolicy, ActivationRules, Mesh, NamePattern, Overlap, ZeroStage};
use shardwise_torch::{Device, Kind, Tensor, memory, set_num_threads};
use shardwise_zero::{AdamOptions, BiasCorrection, Optimizer, ZeroOptions};

/// Relative error that a prediction may have.
const TOLERANCE: f64 = 0.15;
const SEQ_LEN: usize = 1024;

/// What is computed in: bf16, but on a processor that multiplies it in f32. A plan does not count the copies.
fn narrow() -> DType {
    if multiplies(Kind::BFloat16) { DType::Bf16 } else { DType::F32 }
}

fn llama() -> Value {
    json!({"model_type": "llama", "vocab_size": 8192, "hidden_size": 384, "intermediate_size": 1056,
           "num_hidden_layers": 12, "num_attention_heads": 6})
}

/// Narrow, with many classes: the head's scores would be most of it all.
fn large_vocabulary() -> Value {
    json!({"model_type": "llama", "vocab_size": 32768, "hidden_size": 128, "intermediate_size": 352,
           "num_hidden_layers": 12, "num_attention_heads": 2})
}

fn gpt2(dropout: f64) -> Value {
    json!({"model_type": "gpt2", "vocab_size": 8192, "n_positions": SEQ_LEN, "n_embd": 384, "n_layer": 12, "n_head": 6,
           "resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout})
}

struct Case {
    what: &'static str,
    model: Value,
    micro_batch: usize,
    compute: DType,
    activations: ActivationRules,
}

/// MiB of libtorch's memory in one step, planned and measured, and the seconds it took.
fn measure(case: &Case) -> (f64, f64, f64) {
    let model = ModelConfig::from_json(&case.model).unwrap();
    let shape = RunShape {
        model: model.clone(),
        mesh: Mesh::new(1, 1, 1).unwrap(),
        device: shardwise_plan::Device::Cpu,
        schedule: None,
        stage_cut: StageCut::Parameters,
        sequence: SequenceParallel::Off,
        stage: ZeroStage::Zero,
        compute_bytes: case.compute.size_bytes(),
        precision: if case.compute == DType::F32 { "fp32" } else { "bf16" },
        optimizer_bytes: 8,
        grad_bytes: 4,
        micro_batch: case.micro_batch,
        seq_len: SEQ_LEN,
        grad_accum_steps: 1,
        overlap: Overlap::Inline,
        activations: case.activations.clone(),
        head_chunk_rows: None,
        frozen: vec![],
        no_decay: vec![],
        grouped: vec![],
    };
    let plan = RunPlan::new(shape).unwrap();
    let planned = plan.memory().activations + plan.memory().layer_grads + plan.memory().temporaries;

    let zero = ZeroOptions {
        compute: case.compute,
        ..ZeroOptions::new(
            ZeroStage::Zero,
            Optimizer::AdamW(AdamOptions {
                beta1: 0.9,
                beta2: 0.95,
                eps: 1e-8,
                weight_decay: 0.1,
                bias_correction: BiasCorrection::On,
            }),
        )
    };
    let activations = case.activations.clone();
    let options = EngineOptions { activations, seed: 1, ..EngineOptions::new(zero) };
    let mut engine =
        Engine::new(build(&model).unwrap(), options, solo(), &mut RandomInit { seed: 1 }).unwrap();
    let size = [case.micro_batch as i64, SEQ_LEN as i64];
    let tokens = || Tensor::randint(8192, size, (Kind::Int64, Device::Cpu));
    let before = memory::stats().live_bytes;
    memory::reset_peak();
    let start = Instant::now();
    engine.train_step(1e-3, |_| Ok(Batch { input: tokens(), target: tokens(), first_row: 0 })).unwrap();
    let seconds = start.elapsed().as_secs_f64();
    let measured = (memory::stats().peak_live_bytes - before) as f64 / (1u64 << 20) as f64;
    (planned.mib(), measured, seconds)
}

#[test]
fn peaks_of_twelve_layers_are_within_15_percent_of_the_plan() {
    use ActivationPolicy::{Keep, Offload, Recompute};
    set_num_threads(std::thread::available_parallelism().map_or(1, usize::from));
    memory::install();
    let case = |what, model, compute, activations| Case { what, model, micro_batch: 1, compute, activations };
    let half = ActivationRules {
        default: Keep,
        rules: (0..6).map(|i| (NamePattern::new(format!("model.layers.{i}")), Recompute)).collect(),
    };
    let cases = [
        case("llama, kept", llama(), narrow(), ActivationRules::all(Keep)),
        case("llama, half recomputed", llama(), narrow(), half),
        case("llama, recomputed", llama(), narrow(), ActivationRules::all(Recompute)),
        case("llama, offloaded", llama(), narrow(), ActivationRules::all(Offload)),
        case("llama fp32, recomputed", llama(), DType::F32, ActivationRules::all(Recompute)),
        Case {
            micro_batch: 4,
            ..case("llama, head in chunks", large_vocabulary(), narrow(), ActivationRules::all(Recompute))
        },
        case("gpt2, kept", gpt2(0.0), narrow(), ActivationRules::all(Keep)),
        case("gpt2, recomputed", gpt2(0.0), narrow(), ActivationRules::all(Recompute)),
        case("gpt2 with dropout, kept", gpt2(0.1), narrow(), ActivationRules::all(Keep)),
        case("gpt2 with dropout, recomputed", gpt2(0.1), narrow(), ActivationRules::all(Recompute)),
    ];
    let (mut table, mut worst, mut peaks) = (String::new(), 0f64, Vec::new());
    for case in &cases {
        let (planned, measured, seconds) = measure(case);
        let error = planned / measured - 1.0;
        worst = worst.max(error.abs());
        peaks.push(measured);
        if case.micro_batch > 1 {
            let scores = (4 * SEQ_LEN * 32768 * case.compute.size_bytes()) as f64 / (1u64 << 20) as f64;
            assert!(measured < 0.6 * scores, "{measured} MiB, all scores are {scores}");
        }
        let what = case.what;
        writeln!(
            table,
            "{what:30} planned {planned:6.0} MiB, measured {measured:6.0} ({:+5.1}%), {seconds:.2} s",
            100.0 * error
        )
        .unwrap();
    }
    println!("{table}");
    assert!(worst <= TOLERANCE, "off by more than {TOLERANCE}:\n{table}");
    assert!(peaks[1] < 0.75 * peaks[0] && peaks[2] < 0.45 * peaks[0], "recomputing saves memory:\n{table}");
}
