//! What cannot be cut is refused in the same words, or as another rank's words, on every rank, and nobody waits.

use std::time::Duration;

use serde_json::{Value, json};
use shardwise_comm::{Options, thread};
use shardwise_device::DType;
use shardwise_engine::EngineError;
use shardwise_plan::ZeroStage;
use shardwise_plan::pipeline::ScheduleKind;
use shardwise_plan::zoo::SequenceParallel;

use crate::runs::{Run, gpt2, llama};

/// An error and all its causes.
fn chain(error: &EngineError) -> String {
    let causes = std::iter::successors(Some(error as &dyn std::error::Error), |&error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// The errors of all ranks, which build the model and train a step.
fn errors(run: &Run) -> Vec<String> {
    let options = Options { deadline: Duration::from_secs(10), ..Options::default() };
    thread::run_with(run.mesh().world_size(), options, |world| {
        let trained = run.try_engine(world).and_then(|mut engine| {
            let data = engine.ranks().at().data;
            engine.train_step(1e-3, |microbatch| Ok(run.batch(data, 0, microbatch)))
        });
        chain(&trained.unwrap_err())
    })
}

/// Every rank says `expected`, or that another one has said it.
fn check(run: &Run, expected: &str) {
    for (rank, error) in errors(run).into_iter().enumerate() {
        let own = error.split("gave up: ").last().unwrap();
        assert!(own.starts_with(expected), "rank {rank}: {error}, expected {expected}");
        assert!(!error.contains("stalled"), "rank {rank}: {error}");
    }
}

fn with(model: Value, mesh: [usize; 3]) -> Run {
    Run::new(&model, mesh, ZeroStage::Two, DType::F32)
}

#[test]
fn tensor_degrees_that_do_not_divide_are_refused_with_those_that_would() {
    let expected = "the `8` heads of `model.layers.0.self_attn.q_proj.weight` cannot be cut over `3` tensor-parallel ranks, \
                    expected one of `1`, `2`, `4`";
    check(&with(llama(), [1, 1, 3]), expected);
    // Also where the layer is on another stage: a stage that holds the table alone would have nothing to refuse.
    check(&with(llama(), [2, 1, 3]), expected);
    let mut narrow = llama();
    narrow["intermediate_size"] = json!(50);
    let expected = "the `50` features of `model.layers.0.mlp.gate_proj.weight` cannot be cut over `4` tensor-parallel ranks, \
                    expected one of `1`, `2`, `5`";
    check(&with(narrow, [1, 1, 4]), expected);
    let mut heads = llama();
    heads["num_attention_heads"] = json!(16);
    heads["num_key_value_heads"] = json!(4);
    heads["head_dim"] = json!(2);
    check(&with(heads, [1, 1, 6]), "the `16` heads of");
}

#[test]
fn sequences_that_ranks_cannot_share_are_refused() {
    let mut three_heads = gpt2();
    three_heads["n_embd"] = json!(36);
    three_heads["n_head"] = json!(3);
    let run = Run { sequence: SequenceParallel::On, ..with(three_heads, [2, 1, 3]) };
    let expected = "`8` tokens of a sample cannot be shared by `3` tensor-parallel ranks evenly, expected a multiple of `3`";
    for error in errors(&run) {
        assert!(error.contains("forward: ") && error.ends_with(expected), "{error}");
    }
}

#[test]
fn more_stages_than_layers_are_refused() {
    // Six blocks, an embedding, a head.
    check(&with(llama(), [9, 1, 1]), "`8` layers cannot be cut into `9` parts, expected 1 to 8");
    let run = Run { schedule: ScheduleKind::Interleaved { num_chunks: 3 }, ..with(gpt2(), [3, 1, 2]) };
    check(&run, "`8` layers cannot be cut into `9` parts, expected 1 to 8");
}

#[test]
fn interleaved_stages_without_enough_micro_batches_are_refused() {
    let run =
        Run { schedule: ScheduleKind::Interleaved { num_chunks: 2 }, accum: 2, ..with(gpt2(), [4, 1, 1]) };
    check(&run, "`2` micro-batches do not fill `4` interleaved stages, expected at least `4`");
}
