//! Dropout of whole models: where `config.json` says, while they learn, and the same however a run is laid out.

use serde_json::{Value, json};
use shardwise_comm::thread;
use shardwise_device::DType;
use shardwise_engine::{Batch, Engine, EngineError, EngineOptions, RandomInit};
use shardwise_models::build;
use shardwise_plan::zoo::ModelConfig;
use shardwise_plan::{ActivationPolicy, ActivationRules, ZeroStage};
use shardwise_torch::{Tensor, set_num_threads};

use crate::fixture::options;

const NUM_STEPS: u64 = 3;
const GLOBAL_ROWS: i64 = 4;
const SEQ: i64 = 9;
const VOCAB: i64 = 31;

fn gpt2(resid: f64, embd: f64, attn: f64) -> Value {
    json!({"model_type": "gpt2", "vocab_size": VOCAB, "n_positions": 16, "n_embd": 24, "n_layer": 2, "n_head": 3,
           "resid_pdrop": resid, "embd_pdrop": embd, "attn_pdrop": attn})
}

fn llama(attention: f64) -> Value {
    json!({"model_type": "llama", "vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 40,
           "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "attention_dropout": attention})
}

/// Rows of the run's endless line: the next token follows from the last.
fn batch(first_row: i64, rows: i64) -> Batch {
    let tokens =
        (first_row..first_row + rows).flat_map(|row| (0..SEQ).map(move |t| (row * 17 + t * t * 5) % VOCAB));
    let input = Tensor::from_slice(&tokens.collect::<Vec<_>>()).view([rows, SEQ]);
    let target = (&input * 3 + 1).remainder(VOCAB);
    Batch { input, target, first_row: first_row as u64 }
}

/// Losses of training on `world` ranks, each of them asked for the same batch in the end, and the final weights.
fn train(config: &Value, options: &EngineOptions, world: usize) -> (Vec<f64>, f64, Vec<Vec<f32>>) {
    let config = ModelConfig::from_json(config).unwrap();
    let mut ranks = thread::run(world, |group| {
        set_num_threads(1);
        let rank = group.group_rank() as i64;
        let layers = build(&config).unwrap();
        let mut engine = Engine::new(layers, options.clone(), group, &mut RandomInit { seed: 1 }).unwrap();
        let micro_batches = world as i64 * options.zero.grad_accum_steps as i64;
        let rows = GLOBAL_ROWS / micro_batches;
        let train = |step: u64| {
            let first = |microbatch: usize| {
                step as i64 * GLOBAL_ROWS + (microbatch as i64 * world as i64 + rank) * rows
            };
            engine.train_step(1e-2, |microbatch| Ok(batch(first(microbatch), rows))).unwrap().loss
        };
        let losses = (0..NUM_STEPS).map(train).collect();
        let asked = batch(1000, 2);
        let asked = engine.evaluate(&asked.input, &asked.target).unwrap();
        let mut weights = Vec::new();
        engine
            .for_each_param::<EngineError>(|_, values| {
                weights.push(values.to_vec());
                Ok(())
            })
            .unwrap();
        (losses, asked, weights)
    });
    ranks.remove(0)
}

#[test]
fn every_rate_is_honoured_while_learning_and_only_then() {
    let plain = options(ZeroStage::Zero, DType::F32);
    for (off, on) in [
        (gpt2(0.0, 0.0, 0.0), [gpt2(0.2, 0.0, 0.0), gpt2(0.0, 0.2, 0.0), gpt2(0.0, 0.0, 0.2)].to_vec()),
        (llama(0.0), vec![llama(0.2)]),
    ] {
        let still = |config: &Value| {
            let config = ModelConfig::from_json(config).unwrap();
            let group = shardwise_comm::solo();
            let layers = build(&config).unwrap();
            let mut engine = Engine::new(layers, plain.clone(), group, &mut RandomInit { seed: 1 }).unwrap();
            let asked = batch(0, GLOBAL_ROWS);
            engine.evaluate(&asked.input, &asked.target).unwrap()
        };
        let (losses, ..) = train(&off, &plain, 1);
        let asked = still(&off);
        assert!((losses[0] - asked).abs() < 1e-6, "without dropout learning and asking see the same");
        for config in on {
            let (dropped, ..) = train(&config, &plain, 1);
            assert!((dropped[0] - losses[0]).abs() > 1e-4, "{config}: {dropped:?}");
            assert!((dropped[0] / losses[0] - 1.0).abs() < 0.2, "{config}: the scale is kept: {dropped:?}");
            assert_eq!(still(&config), asked, "{config}");
        }
    }
}

#[test]
fn recomputed_runs_with_dropout_have_the_bits_of_the_kept_run() {
    for config in [gpt2(0.1, 0.1, 0.1), llama(0.1)] {
        for compute in [DType::F32, DType::Bf16] {
            let run = |stage, policy| {
                let options =
                    EngineOptions { activations: ActivationRules::all(policy), ..options(stage, compute) };
                train(&config, &options, 2)
            };
            let kept = run(ZeroStage::Zero, ActivationPolicy::Keep);
            for stage in [ZeroStage::Zero, ZeroStage::Three] {
                for policy in [ActivationPolicy::Keep, ActivationPolicy::Recompute, ActivationPolicy::Offload]
                {
                    assert!(run(stage, policy) == kept, "{config}, {compute}, stage {stage}, {policy:?}");
                }
            }
        }
    }
}

/// Means over other groups of rows differ in the last places of f32; another mask would differ in the second place.
#[test]
fn four_rows_of_one_rank_lose_what_two_rows_of_two_lose() {
    const TOLERANCE: f64 = 1e-5;
    for config in [gpt2(0.1, 0.1, 0.1), llama(0.1)] {
        let run = |world, accum| {
            let mut options = options(ZeroStage::Two, DType::F32);
            options.zero.grad_accum_steps = accum;
            train(&config, &options, world).0
        };
        let whole = run(1, 1);
        for (world, accum) in [(2, 1), (1, 2), (2, 2), (4, 1)] {
            for (found, expected) in run(world, accum).iter().zip(&whole) {
                let gap = (found / expected - 1.0).abs();
                assert!(gap < TOLERANCE, "{config}, {world} ranks, {accum} micro-batches: {gap:.1e}");
            }
        }
    }
}
