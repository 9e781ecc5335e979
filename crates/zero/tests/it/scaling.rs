//! Loss scale, overflow and how gradients are sent: on every stage, with ranks that differ.

use shardwise_comm::Operation;
use shardwise_device::DType;
use shardwise_plan::ZeroStage;
use shardwise_zero::{
    Divergence, DynamicLossScale, GradientOp, LossScalerState, LossScaling, OnNonFinite, Overlap, Predivide,
    ReductionOptions, SkipReason, StepOutcome, StepReport, Zero, ZeroOptions,
};

use crate::harness::{
    At, Model, Trace, common, options, trace, train_step, train_step_changed, unchanged, weights,
};

fn model() -> Model {
    Model { frozen: vec![1], ..Model::new(&[&[37, 11], &[20], &[130, 3, 64]]) }
}

fn fp16(stage: ZeroStage, loss_scaling: LossScaling) -> ZeroOptions {
    ZeroOptions { loss_scaling: Some(loss_scaling), ..options(stage, DType::F16) }
}

fn dynamic(initial_power: u32, window: u64, hysteresis: u32) -> LossScaling {
    LossScaling::Dynamic(DynamicLossScale {
        initial_power,
        window,
        hysteresis,
        ..DynamicLossScale::default()
    })
}

/// Stages with and without accumulation, inline and beside.
fn ways() -> impl Iterator<Item = (ZeroStage, usize, Overlap)> {
    let ways =
        [(1, Overlap::Inline), (1, Overlap::SideThread), (3, Overlap::Inline), (3, Overlap::SideThread)];
    ZeroStage::ALL
        .into_iter()
        .flat_map(move |stage| ways.into_iter().map(move |(accum, overlap)| (stage, accum, overlap)))
}

/// Spoils one element of one parameter on one rank in one micro-batch.
fn spoil(rank: usize, (unit, slot): (usize, usize), bad: f32) -> impl Fn(At, &mut Option<Vec<f32>>, usize) {
    move |at, values, microbatch| {
        if (at.rank, at.unit, at.slot, at.microbatch) == (rank, unit, slot, microbatch) {
            // Not an element of the first shard, where the parameter has more than one.
            let numel = [[37, 11, 0], [20, 0, 0], [130, 3, 64]][unit][slot];
            values.get_or_insert_with(|| vec![0.5; numel])[numel - 1] = bad;
        }
    }
}

/// Takes the steps of `plan`, `.` for a clean one and `x` for one whose gradient rank 1 spoils in the second micro-batch (or
/// the only one), with an infinity of either sign or NaN. Returns the reports and the scaler after each.
fn play(zero: &mut Zero, accum: usize, plan: &str) -> Vec<(StepReport, LossScalerState)> {
    let mut num_bad = 0;
    let mut steps = Vec::new();
    for (step, kind) in plan.chars().enumerate() {
        let before = zero.num_steps();
        let report = if kind == 'x' {
            let bad = [f32::INFINITY, f32::NEG_INFINITY, f32::NAN][num_bad % 3];
            num_bad += 1;
            let state = (weights(zero), zero.compute_bytes(2).unwrap());
            let spoiled = spoil(1, (2, 2), bad);
            let report =
                train_step_changed(zero, step, accum, &|at, values| spoiled(at, values, (accum - 1) / 2));
            assert_eq!(
                (weights(zero), zero.compute_bytes(2).unwrap()),
                state,
                "a skipped step moves nothing"
            );
            report
        } else {
            train_step(zero, step, accum, &unchanged)
        };
        assert_eq!(zero.num_steps() - before, u64::from(report.outcome.is_applied()));
        steps.push((report, zero.loss_scaler_state()));
    }
    steps
}

/// Plays on two ranks in all stages and checks scales after each step, counts, and who is named.
#[track_caller]
fn check_sequence(loss_scaling: LossScaling, plan: &str, scales: &[f64]) {
    for (stage, accum, overlap) in ways() {
        let options = ZeroOptions { overlap, grad_accum_steps: accum, ..fp16(stage, loss_scaling) };
        let ranks = model().run(2, &options, |zero| (zero.loss_scale(), play(zero, accum, plan)));
        // As text: a NaN is what it is.
        assert_eq!(format!("{:?}", ranks[0]), format!("{:?}", ranks[1]), "all ranks end alike");
        let (mut scale, steps) = ranks.into_iter().next().unwrap();
        let mut num_skipped = 0;
        for (i, ((report, state), kind)) in steps.into_iter().zip(plan.chars()).enumerate() {
            let what = format!("stage {stage}, accum {accum}, {overlap:?}, step {i}");
            let expected = if kind == 'x' {
                let (unit, param) = ("unit2".to_owned(), "unit2.2.weight".to_owned());
                StepOutcome::Skipped { reason: SkipReason::NonFiniteGradient { unit, param } }
            } else {
                StepOutcome::Applied
            };
            num_skipped += u64::from(kind == 'x');
            assert_eq!(report.outcome, expected, "{what}");
            assert_eq!(report.grad_norm.is_finite(), kind == '.', "{what}");
            assert_eq!((report.loss_scale, report.num_skipped), (Some(scale), num_skipped), "{what}");
            assert_eq!((state.scale, state.iter), (scales[i], i as u64 + 1), "{what}");
            scale = state.scale;
        }
    }
}

#[test]
fn clean_steps_double_the_scale_each_window() {
    let scales = [256.0, 256.0, 512.0, 512.0, 1024.0, 1024.0, 2048.0];
    check_sequence(dynamic(8, 2, 2), ".......", &scales);
}

#[test]
fn overflows_halve_the_scale_to_the_minimum() {
    check_sequence(dynamic(8, 2, 1), "xxxxxxxx", &[128.0, 64.0, 32.0, 16.0, 8.0, 4.0, 2.0, 1.0]);
}

#[test]
fn some_overflows_among_clean_steps() {
    check_sequence(dynamic(8, 2, 1), "xx...x", &[128.0, 64.0, 64.0, 64.0, 128.0, 64.0]);
}

#[test]
fn the_first_overflow_of_a_window_is_free_under_hysteresis() {
    check_sequence(dynamic(8, 3, 2), "x.x.xx..", &[256.0, 256.0, 128.0, 128.0, 64.0, 32.0, 32.0, 32.0]);
}

#[test]
fn a_static_scale_skips_and_stays() {
    check_sequence(LossScaling::Static(96.0), ".xx.x", &[96.0; 5]);
}

/// Scales are powers of two, so the unscaled gradients are the same numbers: a run with skipped steps is the run without
/// them, whatever the scale does, and the scale itself does not show.
#[test]
fn neither_skipped_steps_nor_the_scale_leave_a_trace() {
    for (stage, accum, overlap) in ways() {
        let run = |loss_scaling, skips: bool| {
            let options = ZeroOptions { overlap, grad_accum_steps: accum, ..fp16(stage, loss_scaling) };
            common(model().run(2, &options, |zero| -> Trace {
                train_step(zero, 0, accum, &unchanged);
                if skips {
                    for bad in [f32::NAN, f32::INFINITY] {
                        let spoiled = spoil(0, (0, 0), bad);
                        let report =
                            train_step_changed(zero, 1, accum, &|at, values| spoiled(at, values, accum - 1));
                        assert!(!report.outcome.is_applied());
                    }
                }
                trace(zero, &[2, 3, 4], accum, &unchanged)
            }))
        };
        let expected = run(LossScaling::Static(1.0), false);
        for loss_scaling in [LossScaling::Static(1024.0), dynamic(10, 2, 1), dynamic(10, 1, 2)] {
            assert_eq!(run(loss_scaling, true), expected, "stage {stage}, accum {accum}, {loss_scaling:?}");
        }
    }
}

/// What the scale is for: a gradient of 1 times 65536 is no f16, times 32768 it is.
#[test]
fn a_scale_that_is_too_large_for_the_gradients_comes_down() {
    for stage in ZeroStage::ALL {
        for report in model().run(2, &fp16(stage, dynamic(17, 1000, 1)), |zero| {
            let ones = |_: usize, values: &mut Vec<f32>| values.fill(1.0);
            let scales = [0, 1, 2].map(|step| {
                let report = train_step(zero, step, 1, &ones);
                (report.loss_scale, report.outcome.is_applied())
            });
            assert_eq!(scales, [(Some(131072.0), false), (Some(65536.0), false), (Some(32768.0), true)]);
            train_step(zero, 3, 1, &|_, values| values.fill(2f32.powi(-30)))
        }) {
            // Below the smallest f16 (2^-24) without the scale. Each rank has some parameters without gradient.
            assert!(report.outcome.is_applied() && report.grad_norm > 0.0, "{report:?}");
        }
    }
}

/// Finite on each rank, and too large for f16 together: f32 sums hold it, f16 sums only if it is divided before.
#[test]
fn sums_overflow_only_where_they_are_kept_in_f16() {
    for (stage, accum, overlap) in ways() {
        let with = |accumulation_dtype, predivide| {
            let reduction = ReductionOptions { accumulation_dtype, predivide, ..ReductionOptions::default() };
            let scaled = fp16(stage, LossScaling::Static(1.0));
            let options = ZeroOptions { overlap, grad_accum_steps: accum, reduction, ..scaled };
            let large = |_: At, values: &mut Option<Vec<f32>>| {
                if let Some(values) = values {
                    values.fill(20_000.0);
                }
            };
            let ranks = model().run(4, &options, |zero| train_step_changed(zero, 0, accum, &large));
            assert!(ranks.iter().all(|report| *report == ranks[0]));
            ranks[0].outcome.is_applied()
        };
        assert!(with(DType::F32, Predivide::By(1.0)), "stage {stage}, accum {accum}");
        assert!(with(DType::Bf16, Predivide::By(1.0)), "stage {stage}, accum {accum}");
        assert!(!with(DType::F16, Predivide::By(1.0)), "stage {stage}, accum {accum}");
        assert!(with(DType::F16, Predivide::ByNumRanks), "stage {stage}, accum {accum}");
    }
}

/// The same for what is sent: sums of micro-batches in f32 that f16 cannot hold.
#[test]
fn predivision_saves_what_is_sent_in_f16() {
    for stage in ZeroStage::ALL {
        let norm = |predivide, value: f32| {
            let communication_dtype = Some(DType::F16);
            let reduction =
                ReductionOptions { communication_dtype, predivide, ..ReductionOptions::default() };
            let options = ZeroOptions { reduction, ..options(stage, DType::F32) };
            let large = |at: At, values: &mut Option<Vec<f32>>| {
                *values = (at.slot == 0).then(|| vec![value; [37, 20, 130][at.unit]]);
            };
            let frozen = Model { frozen: vec![1, 2], ..model() };
            frozen.run(2, &options, |zero| train_step_changed(zero, 0, 1, &large).grad_norm)[0]
        };
        assert!(!norm(Predivide::By(1.0), 80_000.0).is_finite(), "stage {stage}");
        let expected = 80_000.0 * 37f64.sqrt();
        let found = norm(Predivide::ByNumRanks, 80_000.0);
        assert!((found - expected).abs() <= 1e-9 * expected, "stage {stage}: {found}");
        let found = norm(Predivide::By(10.0), 80_000.0);
        assert!((found - expected).abs() <= 1e-6 * expected, "stage {stage}: {found}");
    }
}

/// A sum is the mean times the number of ranks, in the norm as in the update of an optimizer that feels it: with
/// clipping far above, AdamW does not.
#[test]
fn the_sum_over_ranks_is_not_divided() {
    for stage in ZeroStage::ALL {
        let with = |op, clip_grad_norm| {
            let reduction = ReductionOptions { op, ..ReductionOptions::default() };
            let options = ZeroOptions { reduction, clip_grad_norm, ..options(stage, DType::F32) };
            common(model().run(4, &options, |zero| trace(zero, &[0, 1, 2], 1, &unchanged)))
        };
        let (mean, sum) = (with(GradientOp::Mean, None), with(GradientOp::Sum, None));
        for (mean, sum) in mean.norms.iter().zip(&sum.norms) {
            assert_eq!(f64::from_bits(*sum), 4.0 * f64::from_bits(*mean));
        }
        assert_ne!(mean.weights, sum.weights, "`eps` shows");
        assert_eq!(with(GradientOp::Sum, Some(1e-3)).norms, sum.norms);
    }
}

#[test]
fn at_the_minimum_all_ranks_name_the_first_parameter_and_can_go_on_to_save() {
    for (stage, accum, overlap) in ways() {
        let rules = dynamic(1, 1000, 1);
        let options = ZeroOptions { overlap, grad_accum_steps: accum, ..fp16(stage, rules) };
        let errors = model().run(3, &options, |zero| {
            train_step(zero, 0, accum, &unchanged);
            train_step(zero, 1, accum, &unchanged);
            // Rank 2 spoils an early parameter, rank 0 a late one; the shards lie on other ranks again.
            let (late, early) = (spoil(0, (2, 0), f32::NAN), spoil(2, (0, 1), f32::INFINITY));
            let both = |at: At, values: &mut Option<Vec<f32>>| {
                late(at, values, 0);
                early(at, values, accum - 1);
            };
            let report = train_step_changed(zero, 2, accum, &both);
            let (unit, param) = ("unit0".to_owned(), "unit0.1.bias".to_owned());
            let reason = SkipReason::NonFiniteGradient { unit, param };
            assert_eq!(report.outcome, StepOutcome::Skipped { reason: reason.clone() });
            let before = weights(zero);
            let report = train_step_changed(zero, 3, accum, &both);
            let StepOutcome::Diverged { error } = report.outcome else { panic!("{report:?}") };
            assert_eq!((report.loss_scale, report.num_skipped, zero.num_steps()), (Some(1.0), 2, 2));
            assert_eq!(weights(zero), before, "nothing moved, and all can be saved");
            // Whoever goes on nevertheless may: with a clean step.
            assert!(train_step(zero, 4, accum, &unchanged).outcome.is_applied());
            assert_eq!(error, Divergence::LossScaleAtMinimum { reason, scale: 1.0, last_applied_step: 2 });
            error.to_string()
        });
        assert!(errors.iter().all(|error| *error == errors[0]));
        assert_eq!(
            errors[0],
            "the gradient is not finite, first that of `unit0.1.bias` in layer `unit0`, and the loss scale is at its \
             minimum, `1`; the last of the steps so far that changed the weights is step `2`"
        );
    }
}

#[test]
fn without_a_dynamic_scale_a_number_of_skips_in_a_row_is_the_end() {
    let static_scale = Some(LossScaling::Static(8.0));
    for stage in ZeroStage::ALL {
        for (compute, loss_scaling) in [(DType::Bf16, None), (DType::F32, None), (DType::F16, static_scale)] {
            let on_non_finite = OnNonFinite::Skip { max_consecutive: 3 };
            let options = ZeroOptions { on_non_finite, loss_scaling, ..options(stage, compute) };
            let ends = model().run(2, &options, |zero| {
                let steps = play(zero, 1, ".xx.xxx");
                assert!(
                    steps[..6]
                        .iter()
                        .all(|(report, _)| !matches!(report.outcome, StepOutcome::Diverged { .. }))
                );
                let report = steps.into_iter().next_back().unwrap().0;
                assert_eq!(report.num_skipped, 5);
                let StepOutcome::Diverged { error } = report.outcome else { panic!("{report:?}") };
                error
            });
            let (unit, param) = ("unit2".to_owned(), "unit2.2.weight".to_owned());
            let reason = SkipReason::NonFiniteGradient { unit, param };
            let expected = Divergence::TooManySkips { reason, num_skipped: 3, last_applied_step: 4 };
            assert!(ends.iter().all(|end| *end == expected), "stage {stage}, {compute}: {ends:?}");
        }
    }
}

#[test]
fn what_is_not_checked_is_applied_and_seen() {
    for stage in ZeroStage::ALL {
        for compute in [DType::Bf16, DType::F32] {
            let options = ZeroOptions { on_non_finite: OnNonFinite::Apply, ..options(stage, compute) };
            model().run(2, &options, |zero| {
                let spoiled = spoil(1, (2, 0), f32::NAN);
                let report = train_step_changed(zero, 0, 1, &|at, values| spoiled(at, values, 0));
                assert_eq!((report.outcome, report.num_skipped), (StepOutcome::Applied, 0));
                assert!(report.grad_norm.is_nan() && zero.num_steps() == 1);
                let all = weights(zero);
                let bad: Vec<_> = all.iter().filter(|(_, w)| w.iter().any(|x| !x.is_finite())).collect();
                assert_eq!((bad.len(), bad[0].0.as_str()), (1, "unit2.0.weight"), "stage {stage}");
            });
        }
    }
}

/// A scaler that was saved and restored goes on as the one that was not.
#[test]
fn the_scaler_is_saved_and_restored() {
    for stage in [ZeroStage::Zero, ZeroStage::Three] {
        let options = fp16(stage, dynamic(8, 2, 2));
        model().run(2, &options, |zero| {
            play(zero, 1, "..x");
            let saved = zero.loss_scaler_state();
            let later = play(zero, 1, "..xx.").pop().unwrap().1;
            assert_ne!(saved, later);
            zero.restore_loss_scaler(saved);
            assert_eq!((zero.loss_scale(), zero.loss_scaler_state()), (saved.scale, saved));
            assert_eq!(play(zero, 1, "..xx.").pop().unwrap().1, later);
        });
    }
}

/// Bytes of one element of a gradient as it is sent and as it is stored.
#[test]
fn gradients_are_sent_and_stored_in_the_types_asked_for() {
    let model = Model::new(&[&[1000, 7], &[640]]);
    for (stage, accum, overlap) in ways() {
        for (accumulation_dtype, communication_dtype) in [
            (DType::F32, None),
            (DType::Bf16, None),
            (DType::F32, Some(DType::F16)),
            (DType::F16, Some(DType::F32)),
            (DType::F16, Some(DType::F16)),
        ] {
            let reduction =
                ReductionOptions { accumulation_dtype, communication_dtype, ..ReductionOptions::default() };
            let options =
                ZeroOptions { overlap, grad_accum_steps: accum, reduction, ..options(stage, DType::Bf16) };
            let found = model.run(2, &options, |zero| {
                train_step(zero, 0, accum, &unchanged);
                zero.exchange(&[]).unwrap();
                let (before, born) = (zero.group().ledger(), zero.state_bytes());
                let allocations = zero.pool_stats().num_allocations;
                train_step(zero, 1, accum, &unchanged);
                zero.exchange(&[]).unwrap();
                assert_eq!(zero.state_bytes(), born);
                let (stats, sent) = (zero.pool_stats(), zero.group().ledger().since(&before));
                assert!(
                    stats.live_bytes == 0
                        && (overlap == Overlap::SideThread || stats.num_allocations == allocations)
                );
                let bytes = |operation| sent.of(operation).sent_bytes;
                let gradients = bytes(Operation::ReduceScatter) + bytes(Operation::AllReduce);
                (gradients, born.grads as u64)
            })[0];
            let shards: u64 = model.layouts(2).iter().map(|layout| layout.shard_numel() as u64).sum();
            let sums = accumulation_dtype.size_bytes() as u64;
            let accumulates_first = accum > 1 && !stage.shards_gradients();
            let own = if accumulates_first { sums } else { 2 };
            let wire = communication_dtype.map_or(own, |dtype| dtype.size_bytes() as u64);
            // Stage 0: an all-reduce counts both halves; what is cast first is reduce-scattered and then gathered.
            let times = match accumulates_first {
                true if stage == ZeroStage::Zero
                    && communication_dtype.is_none_or(|w| w == accumulation_dtype) =>
                {
                    2
                }
                true => 1,
                false => accum as u64,
            };
            let whole = stage == ZeroStage::Zero || accumulates_first;
            let kept = if whole { 2 * shards } else { shards };
            let what = format!("stage {stage}, accum {accum}, {overlap:?}, {reduction:?}");
            assert_eq!(found, (times * shards * wire, kept * sums), "{what}");
        }
    }
}
