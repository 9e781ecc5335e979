//! What a step does and what it leaves alone.

use shardwise_comm::thread;
use shardwise_device::DType;
use shardwise_kernels::Threads;
use shardwise_plan::ZeroStage;
use shardwise_zero::{Overlap, StepOutcome};

use crate::layers::BAD_TOKEN;
use crate::runs::{LR, Run, weights};

/// A step that one rank's data spoils is skipped by all, and the run goes on as if it had not been.
#[test]
fn one_ranks_bad_data_skips_the_step_on_all() {
    for stage in ZeroStage::ALL {
        for (compute, accum, overlap) in [
            (DType::F32, 1, Overlap::Inline),
            (DType::Bf16, 1, Overlap::SideThread),
            (DType::F32, 3, Overlap::SideThread),
            (DType::Bf16, 3, Overlap::Inline),
        ] {
            let run = Run { accum, overlap, ..Run::new(3, stage, compute) };
            let traces = thread::run(run.world, |group| {
                let rank = group.group_rank();
                let mut engine = run.engine(group);
                let mut losses = Vec::new();
                for step in [0, 1, 2, 3] {
                    let is_bad = step == 1 && rank == 2;
                    let before = weights(&mut engine);
                    let num_steps = engine.zero().num_steps();
                    let batch = |microbatch| {
                        let mut batch = run.batch(rank, step, microbatch);
                        if is_bad && microbatch == 0 {
                            batch.input = batch.input.full_like(BAD_TOKEN);
                        }
                        Ok(batch)
                    };
                    let report = engine.train_step(LR, batch).unwrap();
                    if step == 1 {
                        let is_skipped = matches!(report.step.outcome, StepOutcome::Skipped { .. });
                        assert!(is_skipped, "rank {rank}, stage {stage}");
                        assert!(!report.step.grad_norm.is_finite() && !report.loss.is_finite());
                        assert_eq!(engine.zero().num_steps(), num_steps);
                        assert!(weights(&mut engine) == before, "nothing moved");
                    } else {
                        assert_eq!(report.step.outcome, StepOutcome::Applied);
                        losses.push(report.loss);
                        assert!(weights(&mut engine) != before);
                    }
                }
                (losses, weights(&mut engine))
            });
            let without = run.trace([0, 2, 3]);
            for (losses, weights) in traces {
                assert_eq!(losses, without.losses, "stage {stage}, {compute}, accum {accum}");
                assert!(weights == without.weights, "stage {stage}, {compute}, accum {accum}");
            }
        }
    }
}

#[test]
fn clipping_tells_the_norm_before_and_changes_what_follows() {
    let with = |clip| Run { clip, ..Run::new(2, ZeroStage::Two, DType::F32) }.trace(0..4);
    let (off, high, low) = (with(None), with(Some(1e6)), with(Some(0.05)));
    high.assert_same_bits(&off, "a limit that is never reached");
    assert_eq!(low.norms[0].to_bits(), off.norms[0].to_bits());
    assert!(low.norms.iter().all(|norm| *norm > 0.05), "{:?}", low.norms);
    assert!(low.differs(&off));
}

/// Decay moves nothing but what it applies to, in the first step, where gradients do not depend on it yet.
#[test]
fn no_decay_patterns_change_what_they_name() {
    for stage in ZeroStage::ALL {
        let with = |no_decay: &[&str]| {
            let no_decay = no_decay.iter().map(|pattern| (*pattern).to_owned()).collect();
            Run { no_decay, ..Run::new(3, stage, DType::F32) }.trace(0..1).weights
        };
        let (all, some) = (with(&[]), with(&["*.bias", "mid.un*", "embedding.weight"]));
        for ((name, decayed), (_, found)) in all.iter().zip(&some) {
            let exempt =
                name.ends_with(".bias") || ["mid.unused", "embedding.weight"].contains(&name.as_str());
            assert_eq!(decayed != found, exempt, "`{name}`, stage {stage}");
        }
    }
}

#[test]
fn frozen_parameters_keep_their_bits_and_have_no_state() {
    for stage in ZeroStage::ALL {
        for compute in [DType::F32, DType::Bf16] {
            let patterns = ["embedding.weight", "mid.*", "*.bias"].map(String::from).to_vec();
            let run = Run { frozen: patterns, no_decay: vec![], ..Run::new(3, stage, compute) };
            let all = Run { frozen: vec![], ..run.clone() };
            thread::run(run.world, |group| {
                let rank = group.group_rank();
                let mut engine = run.engine(group);
                let before = weights(&mut engine);
                for step in 0..3 {
                    engine.train_step(LR, |microbatch| Ok(run.batch(rank, step, microbatch))).unwrap();
                }
                for ((name, before), (_, after)) in before.iter().zip(weights(&mut engine)) {
                    let is_frozen =
                        name == "embedding.weight" || name.starts_with("mid.") || name.ends_with(".bias");
                    assert_eq!(before == &after, is_frozen, "`{name}`, stage {stage}, {compute}");
                }
                let state = engine.zero().state_bytes();
                let trainable: usize =
                    engine
                        .zero()
                        .layouts()
                        .filter(|layout| layout.trainable)
                        .map(|layout| {
                            if stage == ZeroStage::Zero { layout.padded_numel } else { layout.shard_numel() }
                        })
                        .sum();
                assert_eq!(state.optimizer, 8 * trainable);
                assert_eq!(state.grads, 4 * trainable);
                assert_eq!(state.master_params, if compute == DType::Bf16 { 4 * trainable } else { 0 });
            });
            let total =
                |run: &Run| thread::run(3, |group| run.engine(group).zero().state_bytes().total()).remove(0);
            assert!(total(&run) < total(&all));
        }
    }
}

/// Everything frozen is no error: it is an evaluation that says so.
#[test]
fn a_model_that_is_all_frozen_steps_in_place() {
    let run =
        Run { frozen: vec!["*".into()], no_decay: vec![], ..Run::new(2, ZeroStage::Three, DType::Bf16) };
    let trace = run.trace(0..2);
    assert_eq!(trace.norms, [0.0, 0.0]);
}

/// Units large enough to be cut into pieces for several threads.
#[test]
fn the_number_of_threads_does_not_show() {
    use crate::layers::{Dense, Embedding, Flatten, Head};
    use crate::runs::{engine, options};
    use shardwise_engine::Layer;

    for (stage, compute) in [(ZeroStage::Zero, DType::Bf16), (ZeroStage::Three, DType::F32)] {
        let train = |num_threads| {
            let run = Run::new(2, stage, compute);
            thread::run(2, |group| {
                let rank = group.group_rank();
                let layers: Vec<Box<dyn Layer>> = vec![
                    Box::new(Embedding),
                    Box::new(Flatten),
                    Box::new(Dense { name: "up", inputs: 7, outputs: 1500 }),
                    Box::new(Dense { name: "mid", inputs: 1500, outputs: 901 }),
                    Box::new(Dense { name: "down", inputs: 901, outputs: 7 }),
                    Box::new(Head),
                ];
                let mut options = options(stage, compute);
                options.zero.threads = Threads::new(num_threads).unwrap();
                let mut engine = engine(layers, options, group).unwrap();
                let step =
                    |step| engine.train_step(LR, |microbatch| Ok(run.batch(rank, step, microbatch))).unwrap();
                let reports: Vec<_> = (0..3).map(step).collect();
                (reports, weights(&mut engine))
            })
        };
        assert!(train(1) == train(3), "stage {stage}, {compute}");
    }
}
