//! What is refused, and what an error leaves behind.

use std::collections::HashMap;
use std::sync::Mutex;

use shardwise_comm::{CommError, solo, thread};
use shardwise_device::{DType, Slice};
use shardwise_plan::ZeroStage;
use shardwise_zero::{
    DynamicLossScale, LossScaling, OnNonFinite, Overlap, Predivide, ReductionOptions, Zero, ZeroError,
    ZeroOptions,
};

use crate::harness::{Model, fill, options, reduce, train_step, unchanged, weights};

fn model() -> Model {
    Model::new(&[&[40, 3], &[70]])
}

fn refused(options: &ZeroOptions) -> String {
    Zero::new(model().layouts(1), options.clone(), solo(), &mut fill).err().expect("an error").to_string()
}

#[test]
fn options_that_cannot_be_honoured_are_named() {
    let good = options(ZeroStage::One, DType::F32);
    assert_eq!(
        refused(&ZeroOptions { grad_accum_steps: 0, ..good.clone() }),
        "`grad_accum_steps` is `0`, expected at least `1`"
    );
    for (clip, text) in [(0.0, "0"), (-1.0, "-1"), (f64::NAN, "NaN")] {
        let expected = format!("`clip_grad_norm` is `{text}`, expected a positive number, or none");
        assert_eq!(refused(&ZeroOptions { clip_grad_norm: Some(clip), ..good.clone() }), expected);
    }
    assert_eq!(
        refused(&ZeroOptions { compute: DType::U8, ..good.clone() }),
        "`compute` is `u8`, expected `f32`, `bf16` or `f16`"
    );
    let fp16 = ZeroOptions { compute: DType::F16, ..good.clone() };
    let never = OnNonFinite::Skip { max_consecutive: 0 };
    assert_eq!(
        refused(&ZeroOptions { on_non_finite: never, ..good.clone() }),
        "`on_non_finite.max_consecutive` is `0`, expected at least `1`"
    );
    assert_eq!(
        refused(&ZeroOptions { on_non_finite: OnNonFinite::Apply, ..fp16.clone() }),
        "`on_non_finite` is `apply`, expected `skip`: a step in `f16` may overflow"
    );
    let scaled = |loss_scaling| refused(&ZeroOptions { loss_scaling: Some(loss_scaling), ..fp16.clone() });
    let dynamic = |change: &dyn Fn(&mut DynamicLossScale)| {
        let mut rules = DynamicLossScale::default();
        change(&mut rules);
        scaled(LossScaling::Dynamic(rules))
    };
    let found = [
        scaled(LossScaling::Static(0.0)),
        scaled(LossScaling::Static(f64::INFINITY)),
        dynamic(&|rules| rules.window = 0),
        dynamic(&|rules| rules.hysteresis = 0),
        dynamic(&|rules| rules.initial_power = 128),
        dynamic(&|rules| rules.min_scale = 0.0),
        dynamic(&|rules| rules.min_scale = 65537.0),
    ];
    assert_eq!(
        found,
        [
            "`loss_scaling.scale` is `0`, expected a positive number",
            "`loss_scaling.scale` is `inf`, expected a positive number",
            "`loss_scaling.window` is `0`, expected at least `1`",
            "`loss_scaling.hysteresis` is `0`, expected at least `1`",
            "`loss_scaling.initial_power` is `128`, expected at most `127`",
            "`loss_scaling.min_scale` is `0`, expected a positive number, at most the first scale",
            "`loss_scaling.min_scale` is `65537`, expected a positive number, at most the first scale",
        ]
    );
    assert_eq!(
        refused(&ZeroOptions { loss_scaling: Some(LossScaling::Static(2.0)), ..good.clone() }),
        "`loss_scaling` is `Static(2.0)`, expected none, unless `compute` is `f16`"
    );
    let reduced = |change: &dyn Fn(&mut ReductionOptions)| {
        let mut options = good.clone();
        change(&mut options.reduction);
        refused(&options)
    };
    let found = [
        reduced(&|options| options.accumulation_dtype = DType::U8),
        reduced(&|options| options.communication_dtype = Some(DType::U8)),
        reduced(&|options| options.predivide = Predivide::By(-2.0)),
        reduced(&|options| options.predivide = Predivide::By(1e39)),
    ];
    assert_eq!(
        found,
        [
            "`accumulation_dtype` is `u8`, expected `f32`, `bf16` or `f16`",
            "`communication_dtype` is `u8`, expected `f32`, `bf16`, `f16` or none",
            "`predivide` is `-2`, expected a positive number in the range of `f32`",
            "`predivide` is `1000000000000000000000000000000000000000`, expected a positive number in the range of `f32`",
        ]
    );
}

#[test]
fn layouts_for_another_number_of_ranks_are_refused() {
    let options = options(ZeroStage::Two, DType::F32);
    let error = Zero::new(model().layouts(4), options, solo(), &mut fill).err().expect("an error");
    assert_eq!(error.to_string(), "unit `unit0` is laid out for `4` ranks, the group has `1`");
}

/// Births ask each element of whom it belongs to, and no more.
#[test]
fn every_rank_fills_what_it_keeps() {
    for stage in ZeroStage::ALL {
        let asked = Mutex::new(HashMap::<(String, usize), usize>::new());
        thread::run(3, |group| {
            let mut counting = |param: &_, range: std::ops::Range<usize>, out: &mut [f32]| {
                let param: &shardwise_plan::ParamSpec = param;
                let mut asked = asked.lock().unwrap();
                range.clone().for_each(|i| *asked.entry((param.name.clone(), i)).or_default() += 1);
                fill(param, range, out)
            };
            Zero::new(model().layouts(3), options(stage, DType::Bf16), group, &mut counting)
                .map(drop)
                .unwrap();
        });
        let asked = asked.into_inner().unwrap();
        let times = if stage == ZeroStage::Zero { 3 } else { 1 };
        assert_eq!(asked.len(), 113);
        assert!(asked.values().all(|&count| count == times), "stage {stage}");
    }
}

#[test]
fn a_source_that_fails_is_told_with_the_parameter() {
    let mut broken = |param: &shardwise_plan::ParamSpec, range, out: &mut [f32]| match param.name.as_str() {
        "unit1.0.weight" => Err("the disk is on fire".into()),
        _ => fill(param, range, out),
    };
    let options = options(ZeroStage::Zero, DType::F32);
    let error = Zero::new(model().layouts(1), options, solo(), &mut broken).err().expect("an error");
    assert_eq!(error.to_string(), "could not fill `unit1.0.weight`");
    assert_eq!(std::error::Error::source(&error).unwrap().to_string(), "the disk is on fire");
}

/// A gradient that is refused changes nothing: the right one can still come.
#[test]
fn gradients_of_the_wrong_form_are_refused_by_name() {
    for stage in ZeroStage::ALL {
        for accum in [1, 2] {
            let options = ZeroOptions { grad_accum_steps: accum, ..options(stage, DType::F32) };
            let mut zero = model().zero(&options, solo());
            let (short, long) = ([0f32; 2], [0f32; 40]);
            let error = zero.reduce(0, 0, &[Some(Slice::of(&long)), Some(Slice::of(&short))]).unwrap_err();
            assert_eq!(error.to_string(), "gradient of `unit0.1.bias` has `2` elements, expected `3`");
            let half = [half::bf16::ZERO; 40];
            let error = zero.reduce(0, 0, &[Some(Slice::of(&half)), None]).unwrap_err();
            assert_eq!(
                error.to_string(),
                "gradient of `unit0.0.weight` is `bf16`, expected the compute type `f32`"
            );
            train_step(&mut zero, 0, accum, &unchanged);
        }
    }
}

#[test]
fn micro_batches_come_once_and_in_order() {
    for stage in ZeroStage::ALL {
        let options = ZeroOptions { grad_accum_steps: 2, ..options(stage, DType::F32) };
        let mut zero = model().zero(&options, solo());
        let nothing = [None, None];
        let error = zero.reduce(0, 1, &nothing).unwrap_err().to_string();
        assert_eq!(error, "unit `unit0` is given the gradients of micro-batch `1`, expected micro-batch `0`");
        reduce(&mut zero, 0, 0, 0, &unchanged);
        let error = zero.reduce(0, 0, &nothing).unwrap_err();
        assert!(matches!(error, ZeroError::WrongMicroBatch { expected: 1, got: 0, .. }), "{error}");
        reduce(&mut zero, 0, 0, 1, &unchanged);
        let error = zero.reduce(0, 2, &nothing).unwrap_err();
        assert!(matches!(error, ZeroError::WrongMicroBatch { expected: 2, got: 2, .. }), "{error}");
        let before = weights(&mut zero);
        let error = zero.step(0.1, &[]).unwrap_err().to_string();
        assert_eq!(error, "unit `unit1` has the gradients of `0` micro-batches, a step needs `2`");
        assert_eq!(weights(&mut zero), before, "a step that is refused moves nothing");
    }
}

/// After a rank gave up, every call of the others is an error, never a panic, and names it.
#[test]
fn what_a_failed_collective_took_is_an_error() {
    for stage in ZeroStage::ALL {
        for overlap in [Overlap::Inline, Overlap::SideThread] {
            let options = ZeroOptions { overlap, ..options(stage, DType::F32) };
            model().run(2, &options, |zero| {
                train_step(zero, 0, 1, &unchanged);
                (0..2).for_each(|unit| drop(zero.compute_bytes(unit).unwrap())); // nothing is under way
                // Rank 1 may give up while rank 0 still wakes from this.
                let met = zero.exchange(&[1.0]);
                assert!(met.is_ok() || zero.group().group_rank() == 0);
                if zero.group().group_rank() == 1 {
                    return zero.group().poison("it rains");
                }
                let grads = [None, None];
                let outcome = zero.reduce(0, 0, &grads).and_then(|()| zero.step(0.1, &[]).map(drop));
                let error = outcome.unwrap_err();
                let ZeroError::Comm(CommError::GaveUp { rank: 1, reason }) = &error else {
                    panic!("{error}")
                };
                assert_eq!(reason, "it rains");
                for _ in 0..2 {
                    let outcomes = [
                        zero.step(0.1, &[]).map(drop),
                        zero.reduce(1, 0, &grads[..1]).and_then(|()| zero.step(0.1, &[]).map(drop)),
                    ];
                    assert!(outcomes.iter().all(Result::is_err), "stage {stage}, {overlap:?}: {outcomes:?}");
                    if stage.shards_parameters() {
                        assert!(zero.gather(0).is_err());
                    }
                }
                // A second time its memory is gone: still an error.
                if stage.shards_parameters() {
                    let error = zero.gather(0).unwrap_err().to_string();
                    assert_eq!(error, "the state of unit `unit0` was lost when an earlier collective failed");
                }
            });
        }
    }
}

/// One rank's visitor fails (a full disk): the others finish their visit, and all can train on.
#[test]
fn a_visitor_that_fails_on_one_rank_leaves_the_ranks_together() {
    for stage in ZeroStage::ALL {
        let traces = model().run(2, &options(stage, DType::Bf16), |zero| {
            train_step(zero, 0, 1, &unchanged);
            let is_first = zero.group().group_rank() == 0;
            let mut num_visited = 0;
            let outcome = zero.for_each_param::<Stop>(|_, _| {
                num_visited += 1;
                if is_first { Err(Stop::Mine) } else { Ok(()) }
            });
            assert_eq!(num_visited, if is_first { 1 } else { 3 });
            assert_eq!(outcome.is_err(), is_first);
            train_step(zero, 1, 1, &unchanged);
            weights(zero)
        });
        assert_eq!(traces[0], traces[1]);
    }
}

enum Stop {
    Mine,
    Zero,
}

impl From<ZeroError> for Stop {
    fn from(_: ZeroError) -> Self {
        Stop::Zero
    }
}
