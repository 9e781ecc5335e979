//! What a step does on a mesh when something is wrong in one place of it, or held fast there.

use shardwise_engine::{Engine, TrainReport};
use shardwise_plan::pipeline::ScheduleKind;
use shardwise_plan::{Coordinates, ZeroStage};
use shardwise_zero::{Direction, Optimizer, Overlap, SgdOptions, SkipReason, StepOutcome};

use crate::runs::weights;
use crate::stack::{Mishap, StackRun, Told, on_mesh};

/// A parameter's name and values.
type Values = (String, Vec<f32>);

/// Reports of each step, and all weights before the first and after each.
fn train(
    run: &StackRun,
    steps: &[usize],
    spoilt: impl Fn(Coordinates, usize) -> bool + Sync,
) -> Vec<(Vec<TrainReport>, Vec<Vec<Values>>)> {
    on_mesh(run.mesh, |ranks| {
        let at = ranks.at();
        let told = Told::default();
        let mut engine = run.engine(ranks, &told);
        let sorted = |engine: &mut Engine| {
            let mut all = weights(engine);
            all.sort_by(|a, b| a.0.cmp(&b.0));
            all
        };
        let mut all = vec![sorted(&mut engine)];
        let mut reports = Vec::new();
        for &step in steps {
            let mishap = spoilt(at, step).then_some(("pair.3", Mishap::Gradient));
            *told.lock().unwrap() = mishap;
            let batch = |microbatch| Ok(run.batch(at.data, step, microbatch));
            reports.push(engine.train_step(run.lr, batch).unwrap());
            all.push(sorted(&mut engine));
        }
        (reports, all)
    })
}

/// One rank of the middle stage, the second of its tensor group, has one gradient that is not a number: all skip the step, say why
/// in the same words, and go on as if it had not been.
#[test]
fn a_gradient_spoilt_on_one_rank_skips_the_step_on_all() {
    for (mesh, schedule) in [
        ([3, 1, 2], ScheduleKind::OneForwardOneBackward),
        ([3, 2, 1], ScheduleKind::GPipe),
        ([3, 2, 2], ScheduleKind::ZeroBubble),
        ([1, 2, 2], ScheduleKind::OneForwardOneBackward),
        ([2, 1, 1], ScheduleKind::Interleaved { num_chunks: 2 }),
    ] {
        for stage in ZeroStage::ALL {
            let overlap = if stage.shards_parameters() { Overlap::SideThread } else { Overlap::Inline };
            let run = StackRun { schedule, overlap, ..StackRun::new(mesh, stage) };
            let what = format!("{mesh:?}, stage {stage}, {schedule}");
            let ends = train(&run, &[0, 1, 2], |at, step| {
                // Of the ranks with the layer: the last of its data group and of its tensor group.
                step == 1 && [at.data + 1, at.tensor + 1] == mesh[1..]
            });
            let without = train(&run, &[0, 2], |_, _| false);
            for ((reports, all), (good, good_all)) in ends.iter().zip(&without) {
                // As texts: a norm that is not a number is not equal to itself.
                assert_eq!(format!("{reports:?}"), format!("{:?}", ends[0].0), "{what}");
                let (unit, param) = ("pair.3".to_owned(), "pair.3.up".to_owned());
                let reason = SkipReason::NonFiniteGradient { unit, param };
                assert_eq!(reports[1].step.outcome, StepOutcome::Skipped { reason }, "{what}");
                assert!(reports[1].loss.is_finite() && reports[1].step.grad_norm.is_nan(), "{what}");
                assert!(all[2] == all[1] && all[1] != all[0], "{what}");
                for (found, expected) in [(&reports[0], &good[0]), (&reports[2], &good[1])] {
                    assert_eq!(found.step.outcome, StepOutcome::Applied, "{what}");
                    assert_eq!((found.loss, found.step.grad_norm), (expected.loss, expected.step.grad_norm));
                }
                assert!(all[3] == good_all[2] && all[3] != all[2], "{what}");
            }
        }
    }
}

/// What is frozen keeps its bits and everything else moves, wherever the frozen layers are: a whole stage in front, to which no gradient
/// goes back, one in the middle, through which gradients go, the last one.
#[test]
fn frozen_stages_keep_their_bits() {
    for frozen in [vec!["pair.0.*", "pair.1.*", "pair.2.*"], vec!["pair.3.*"], vec!["pair.4.*", "pair.5.*"]] {
        let names: Vec<String> = frozen.iter().map(|&name| name.to_owned()).collect();
        let alone = StackRun { frozen: names.clone(), accum: 8, ..StackRun::new([1, 1, 1], ZeroStage::Zero) };
        let alone = train(&alone, &[0, 1], |_, _| false).remove(0);
        for (mesh, schedule) in [
            ([3, 1, 1], ScheduleKind::OneForwardOneBackward),
            ([3, 1, 2], ScheduleKind::ZeroBubble),
            ([2, 2, 1], ScheduleKind::GPipe),
            ([2, 1, 1], ScheduleKind::Interleaved { num_chunks: 2 }),
            ([1, 1, 1], ScheduleKind::Interleaved { num_chunks: 3 }),
        ] {
            for stage in [ZeroStage::Zero, ZeroStage::Three] {
                let run = StackRun {
                    frozen: names.clone(),
                    schedule,
                    accum: 8 / mesh[1],
                    ..StackRun::new(mesh, stage)
                };
                let what = format!("{frozen:?}, {mesh:?}, stage {stage}, {schedule}");
                let (reports, all) = train(&run, &[0, 1], |_, _| false).remove(0);
                for ((before, after), (name, expected)) in all[0].iter().zip(&all[2]).zip(&alone.1[2]) {
                    let is_frozen = frozen.iter().any(|pattern| name.starts_with(&pattern[..7]));
                    assert_eq!((&before.0, &after.0), (name, name));
                    assert_eq!(before.1 == after.1, is_frozen, "`{name}`, {what}");
                    let gap = after.1.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                    assert!(gap < 1e-4, "`{name}` is {gap:.1e} away from the run of one rank: {what}");
                }
                for (found, expected) in reports.iter().zip(&alone.0) {
                    assert!((found.loss / expected.loss - 1.0).abs() < 1e-5, "{what}");
                    assert!((found.step.grad_norm / expected.step.grad_norm - 1.0).abs() < 1e-5, "{what}");
                }
            }
        }
    }
}

/// The told norm is that before clipping; the step has the length that the limit says, over all ranks together.
#[test]
fn clipping_bites_on_every_mesh_alike() {
    let clipped = |mesh: [usize; 3], stage| {
        let clip = Some(0.02);
        // Steps as long as the gradient: AdamW's hardly depend on it.
        let sgd =
            SgdOptions { momentum: 0.0, dampening: 0.0, direction: Direction::Momentum, weight_decay: 0.0 };
        let run = StackRun { clip, accum: 8 / mesh[1], ..StackRun::new(mesh, stage) };
        let run = StackRun { optimizer: Optimizer::Sgd(sgd), lr: 1.0, ..run };
        train(&run, &[0, 1, 2], |_, _| false).remove(0)
    };
    let alone = clipped([1, 1, 1], ZeroStage::Zero);
    assert!(alone.0.iter().all(|report| report.step.grad_norm > 0.04), "{:?}", alone.0);
    let moved = alone.1[0].iter().zip(&alone.1[1]).flat_map(|(before, after)| before.1.iter().zip(&after.1));
    let length = moved.map(|(before, after)| f64::from(after - before).powi(2)).sum::<f64>().sqrt();
    assert!((length / 0.02 - 1.0).abs() < 1e-3, "a step of {length}");
    for mesh in [[2, 1, 1], [1, 1, 2], [3, 1, 2], [2, 2, 2]] {
        for stage in ZeroStage::ALL {
            let (reports, all) = clipped(mesh, stage);
            for (found, expected) in reports.iter().zip(&alone.0) {
                let ratio = found.step.grad_norm / expected.step.grad_norm;
                assert!((ratio - 1.0).abs() < 1e-5, "norms are {ratio} apart: {mesh:?}, stage {stage}");
            }
            for ((name, found), (_, expected)) in all[3].iter().zip(&alone.1[3]) {
                let gap = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(gap < 1e-6, "`{name}` is {gap:.1e} away: {mesh:?}, stage {stage}");
            }
        }
    }
}
