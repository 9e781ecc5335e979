//! What a step does, and what it leaves alone.

use shardwise_device::DType;
use shardwise_plan::ZeroStage;
use shardwise_zero::{SkipReason, StepOutcome, ZeroOptions};

use crate::harness::{
    Model, Trace, biases_without_decay, common, options, reduce, trace, train_step, unchanged, weights,
};

fn model() -> Model {
    Model { frozen: vec![1], ..Model::new(&[&[37, 11], &[20], &[130, 3, 64]]) }
}

/// A step that is skipped leaves no trace: not in the weights, the moments, the step counter or the gradients.
#[test]
fn one_bad_number_on_one_rank_skips_the_step_everywhere() {
    for stage in ZeroStage::ALL {
        for (compute, accum) in [(DType::F32, 1), (DType::F16, 1), (DType::F32, 3), (DType::Bf16, 3)] {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let options = ZeroOptions { grad_accum_steps: accum, ..options(stage, compute) };
                let spoil = |rank: usize, values: &mut Vec<f32>| {
                    if let (1, Some(last)) = (rank, values.last_mut()) {
                        *last = bad;
                    }
                };
                let traces = model().run(3, &options, |zero| {
                    train_step(zero, 0, accum, &unchanged);
                    let (before, num_steps) = (weights(zero), zero.num_steps());
                    let report = train_step(zero, 1, accum, &spoil);
                    // Every gradient of that rank is bad: the first parameter is named, whoever has its shard.
                    let (unit, param) = ("unit0".to_owned(), "unit0.0.weight".to_owned());
                    let reason = SkipReason::NonFiniteGradient { unit, param };
                    let skipped = StepOutcome::Skipped { reason };
                    assert_eq!(report.outcome, skipped, "stage {stage}, {compute}, {bad}");
                    assert_eq!((report.loss_scale, report.num_skipped), (None, 1));
                    assert!(!report.grad_norm.is_finite());
                    assert_eq!(report.sums, [3.0], "what is summed on the way is told all the same");
                    assert_eq!((weights(zero), zero.num_steps()), (before, num_steps));
                    trace(zero, &[2, 3], accum, &unchanged)
                });
                let without: Vec<Trace> = model().run(3, &options, |zero| {
                    train_step(zero, 0, accum, &unchanged);
                    trace(zero, &[2, 3], accum, &unchanged)
                });
                assert_eq!(common(traces), common(without), "stage {stage}, {compute}, {bad}");
            }
        }
    }
}

/// Units of which a rank has no gradient at all, where others have some: the ranks still make the same calls.
#[test]
fn a_rank_without_any_gradient_of_a_unit_joins_in() {
    for compute in [DType::F32, DType::Bf16] {
        let traces = ZeroStage::ALL.map(|stage| {
            let per_rank = model().run(3, &options(stage, compute), |zero| {
                for unit in 0..3 {
                    if zero.group().group_rank() == 1 {
                        let none = vec![None; zero.layout(unit).slots.len()];
                        zero.reduce(unit, 0, &none).unwrap();
                    } else {
                        reduce(zero, unit, 0, 0, &unchanged);
                    }
                }
                let report = zero.step(0.01, &[]).unwrap();
                (report.grad_norm.to_bits(), weights(zero))
            });
            assert!(per_rank.iter().all(|other| *other == per_rank[0]));
            per_rank.into_iter().next().unwrap()
        });
        assert!(f64::from_bits(traces[0].0) > 0.0);
        assert!(traces.iter().all(|other| *other == traces[0]), "{compute}");
    }
}

/// Without decay a parameter without gradients stays as it is; with decay it shrinks by exactly that much.
#[test]
fn no_decay_exempts_the_parameters_it_names_and_no_others() {
    let model = Model::new(&[&[50, 50, 50]]);
    for stage in ZeroStage::ALL {
        let options = ZeroOptions { groups: biases_without_decay(), ..options(stage, DType::F32) };
        model.run(2, &options, |zero| {
            let before = weights(zero);
            zero.reduce(0, 0, &[None, None, None]).unwrap();
            zero.step(0.5, &[]).unwrap();
            for ((name, before), (_, after)) in before.iter().zip(weights(zero)) {
                // 1 - lr * decay, as the update computes it.
                let factor = if name.ends_with("bias") { 1.0 } else { (1.0 - 0.5 * 0.1f64) as f32 };
                let expected: Vec<_> = before.iter().map(|x| x * factor).collect();
                assert_eq!(after, expected, "{name}, stage {stage}");
            }
        });
    }
}

/// The first step of AdamW moves every element by the rate, whatever the gradient's size, but what `eps` allows; clipping
/// shows in the norm that is left for the next moments. So: a limit far above changes no bit, one below does.
#[test]
fn clipping_bites_only_above_the_limit() {
    for stage in ZeroStage::ALL {
        let with = |clip_grad_norm: Option<f64>| {
            let options = ZeroOptions { clip_grad_norm, ..options(stage, DType::F32) };
            common(model().run(2, &options, |zero| trace(zero, &[0, 1, 2], 1, &unchanged)))
        };
        let (off, high, low) = (with(None), with(Some(1e9)), with(Some(1e-3)));
        assert_eq!(off, high, "stage {stage}");
        assert_eq!(off.norms, low.norms, "norms are told before clipping");
        assert_ne!(off.weights, low.weights, "stage {stage}");
    }
}
