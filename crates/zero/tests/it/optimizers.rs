//! Every optimizer on every stage: the reference, and bit for bit the other stages.

use shardwise_device::DType;
use shardwise_kernels::Threads;
use shardwise_plan::ZeroStage;
use shardwise_plan::pattern::NamePattern;
use shardwise_zero::{
    AdagradOptions, AdamOptions, BiasCorrection, Direction, LambOptions, LionOptions, MuonOptions, Optimizer,
    Overlap, ParamGroup, SgdOptions, StatePrecision, Zero, ZeroOptions,
};

use crate::harness::{ADAM, Model, Trace, common, fill, options, trace, train_step, unchanged, weights};
use crate::reference::Reference;

const SGD: SgdOptions =
    SgdOptions { momentum: 0.9, dampening: 0.3, direction: Direction::Momentum, weight_decay: 0.1 };
const ADAGRAD: AdagradOptions =
    AdagradOptions { lr_decay: 0.1, initial_accumulator_value: 0.1, eps: 1e-10, weight_decay: 0.1 };
const LION: LionOptions = LionOptions { beta1: 0.9, beta2: 0.99, weight_decay: 0.1 };
const LAMB: LambOptions = LambOptions {
    beta1: 0.9,
    beta2: 0.99,
    eps: 1e-6,
    weight_decay: 0.1,
    max_coeff: 10.0,
    min_coeff: 0.01,
    bias_correction: BiasCorrection::On,
};

fn muon() -> MuonOptions {
    MuonOptions {
        momentum: 0.95,
        direction: Direction::Nesterov,
        num_newton_schulz_steps: 5,
        weight_decay: 0.1,
        adamw: ADAM,
        adamw_lr_scale: 0.3,
        adamw_for: vec![NamePattern::new("unit2.*")],
    }
}

/// All of them, with how far a weight below 4 may be from the reference after three steps of 0.01.
pub fn all() -> Vec<(Optimizer, f32)> {
    let nesterov = SgdOptions { direction: Direction::Nesterov, dampening: 0.0, ..SGD };
    let uncorrected = AdamOptions { bias_correction: BiasCorrection::Off, ..ADAM };
    vec![
        // A few units in the last place: the arithmetic is f32 here and f64 there.
        (Optimizer::AdamW(ADAM), 1.5e-6),
        (Optimizer::Adam(uncorrected), 1.5e-6),
        (Optimizer::Sgd(SGD), 1.5e-6),
        (Optimizer::Sgd(nesterov), 1.5e-6),
        (Optimizer::Sgd(SgdOptions { momentum: 0.0, ..SGD }), 1.5e-6),
        (Optimizer::Adagrad(ADAGRAD), 1.5e-6),
        (Optimizer::Lion(LION), 1.5e-6),
        (Optimizer::Lamb(LAMB), 1.5e-6),
        // Rounding errors along singular vectors of nearly no length grow about 500-fold: 6e-8 * 500 of steps of 0.01.
        (Optimizer::Muon(muon()), 3e-6),
    ]
}

/// Matrices of both forms, straddling shards, and vectors, in units of which one is frozen.
fn model() -> Model {
    Model { frozen: vec![1], ..Model::new(&[&[8 * 13, 11, 8 * 40], &[20], &[8 * 9, 3], &[8 * 3], &[5, 70]]) }
}

#[test]
fn every_optimizer_is_its_reference_on_every_stage_and_the_stages_agree() {
    for (optimizer, tolerance) in all() {
        for world in [1, 2, 3] {
            for compute in [DType::F32, DType::Bf16] {
                let of = |stage, overlap, threads| {
                    let options = ZeroOptions {
                        optimizer: optimizer.clone(),
                        clip_grad_norm: Some(0.5),
                        overlap,
                        threads: Threads::new(threads).unwrap(),
                        ..options(stage, compute)
                    };
                    let run = |zero: &mut Zero| trace(zero, &[0, 1, 2], 1, &unchanged);
                    (common(model().run(world, &options, run)), options)
                };
                let (zero, options) = of(ZeroStage::Zero, Overlap::Inline, 1);
                check(&options, world, &zero, tolerance);
                for (stage, overlap) in [
                    (ZeroStage::One, Overlap::Inline),
                    (ZeroStage::Two, Overlap::SideThread),
                    (ZeroStage::Three, Overlap::Inline),
                    (ZeroStage::Three, Overlap::SideThread),
                ] {
                    let what = format!("{optimizer:?}, {compute}, {world} ranks, stage {stage}, {overlap:?}");
                    assert!(of(stage, overlap, 2).0 == zero, "{what}");
                }
            }
        }
    }
}

fn check(options: &ZeroOptions, world: usize, found: &Trace, tolerance: f32) {
    let layouts = model().layouts(world);
    let mut reference = Reference::new(&layouts, world, options);
    for step in 0..3 {
        reference.step(step);
    }
    let mut num_moved = 0;
    for ((name, values), (expected_name, expected)) in found.weights.iter().zip(reference.weights()) {
        assert_eq!(name, expected_name);
        let layout = layouts.iter().find(|layout| name.starts_with(&layout.name)).unwrap();
        let slot = layout.slots.iter().find(|slot| slot.param.name == *name).unwrap();
        let mut first = vec![0.0; values.len()];
        fill(&slot.param, 0..first.len(), &mut first).unwrap();
        for (i, (value, expected)) in values.iter().zip(expected).enumerate() {
            if layout.trainable {
                let what = format!("{:?}, {} of {world} ranks", options.optimizer, options.compute);
                assert!(
                    (value - expected).abs() <= tolerance,
                    "{what}: {name}[{i}] {value}, expected {expected}"
                );
            }
            num_moved += usize::from(*value != first[i]);
        }
    }
    let trained: usize = layouts.iter().filter(|layout| layout.trainable).map(|layout| layout.numel()).sum();
    assert!(num_moved >= trained, "{num_moved} of {trained} elements moved");
}

#[test]
fn the_first_group_that_names_a_parameter_says_its_rate_and_decay() {
    let group = |pattern: &str, lr_scale, weight_decay| ParamGroup {
        patterns: vec![NamePattern::new("nothing"), NamePattern::new(pattern)],
        lr_scale,
        weight_decay,
    };
    let groups = vec![
        group("unit0.0.weight", 0.0, None),
        group("*.bias", 2.0, Some(0.0)),
        group("unit0.*", 0.5, Some(0.3)),
    ];
    for (optimizer, tolerance) in all() {
        for stage in [ZeroStage::Zero, ZeroStage::Three] {
            let options = ZeroOptions {
                optimizer: optimizer.clone(),
                groups: groups.clone(),
                ..options(stage, DType::F32)
            };
            let ranks = model().run(2, &options, |zero| {
                let before = weights(zero);
                (0..3).for_each(|step| drop(train_step(zero, step, 1, &unchanged)));
                (before, weights(zero))
            });
            let (before, after) = &ranks[0];
            assert_eq!(before[0], after[0], "a rate of zero moves nothing");
            let layouts = model().layouts(2);
            let mut reference = Reference::new(&layouts, 2, &options);
            for step in 0..3 {
                reference.step(step);
            }
            for ((name, values), (_, expected)) in after.iter().zip(reference.weights()) {
                let near = values.iter().zip(expected).all(|(x, y)| (x - y).abs() <= 2.0 * tolerance);
                assert!(near || name.starts_with("unit1"), "{optimizer:?}, {name}, stage {stage}");
            }
        }
    }
}

/// Half the memory, the same bits on every stage, and near fp32.
#[test]
fn states_in_bf16_agree_over_stages_and_stay_near_those_in_fp32() {
    for (optimizer, _) in all().into_iter().take(7) {
        let with = |stage, states| {
            let options = ZeroOptions { optimizer: optimizer.clone(), states, ..options(stage, DType::Bf16) };
            let ranks = model().run(3, &options, |zero| {
                (trace(zero, &[0, 1, 2], 1, &unchanged), zero.state_bytes().optimizer)
            });
            let bytes = ranks[0].1;
            (common(ranks.into_iter().map(|rank| rank.0).collect()), bytes)
        };
        let narrow = StatePrecision::Bf16 { seed: 5 };
        let (zero, bytes) = with(ZeroStage::Zero, narrow);
        for stage in [ZeroStage::One, ZeroStage::Two, ZeroStage::Three] {
            assert!(with(stage, narrow).0 == zero, "{optimizer:?}, stage {stage}");
        }
        let (wide, wide_bytes) = with(ZeroStage::Zero, StatePrecision::F32);
        assert_eq!(2 * bytes, wide_bytes);
        // A sign does not show how its argument was rounded.
        let hides = bytes == 0 || matches!(optimizer, Optimizer::Lion(_));
        assert_eq!(wide.weights == zero.weights, hides, "{optimizer:?}");
        for ((name, wide), (_, narrow)) in wide.weights.iter().zip(&zero.weights) {
            let apart = wide.iter().zip(narrow).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            // Three steps of about 0.01, or 0.1 without bias correction, with eight bits each.
            assert!(apart <= 0.02, "{optimizer:?}, {name}: {apart}");
        }
        let other = with(ZeroStage::Zero, StatePrecision::Bf16 { seed: 6 }).0;
        assert_eq!(other.weights == zero.weights, hides, "{optimizer:?}: the seed shows");
    }
}

fn refused(options: ZeroOptions) -> String {
    let model = Model::new(&[&[8]]);
    let zero = Zero::new(model.layouts(1), options, shardwise_comm::solo(), &mut fill);
    zero.err().expect("an error").to_string()
}

#[test]
fn hyperparameters_out_of_range_are_named() {
    let with = |optimizer| refused(ZeroOptions { optimizer, ..options(ZeroStage::Zero, DType::F32) });
    for (optimizer, expected) in [
        (
            Optimizer::AdamW(AdamOptions { beta1: 1.0, ..ADAM }),
            "`optimizer.beta1` is `1`, expected at least `0` and below `1`, in `f32`",
        ),
        (
            Optimizer::Adam(AdamOptions { beta2: f64::NAN, ..ADAM }),
            "`optimizer.beta2` is `NaN`, expected at least `0` and below `1`, in `f32`",
        ),
        (
            Optimizer::AdamW(AdamOptions { eps: 0.0, ..ADAM }),
            "`optimizer.eps` is `0`, expected a positive number in the range of `f32`",
        ),
        (
            Optimizer::Sgd(SgdOptions { weight_decay: -0.1, ..SGD }),
            "`optimizer.weight_decay` is `-0.1`, expected a number, `0` or more",
        ),
        (
            Optimizer::Sgd(SgdOptions { direction: Direction::Nesterov, ..SGD }),
            "`optimizer.direction` is `nesterov`, expected `momentum`, unless there is momentum and no dampening",
        ),
        (
            Optimizer::Adagrad(AdagradOptions { lr_decay: f64::INFINITY, ..ADAGRAD }),
            "`optimizer.lr_decay` is `inf`, expected a number, `0` or more",
        ),
        (
            Optimizer::Lion(LionOptions { beta2: -0.5, ..LION }),
            "`optimizer.beta2` is `-0.5`, expected at least `0` and below `1`, in `f32`",
        ),
        (
            Optimizer::Lamb(LambOptions { max_coeff: 0.001, ..LAMB }),
            "`optimizer.max_coeff` is `0.001`, expected a number, at least `min_coeff`",
        ),
        (
            Optimizer::Muon(MuonOptions { num_newton_schulz_steps: 0, ..muon() }),
            "`optimizer.num_newton_schulz_steps` is `0`, expected `1` to `99`",
        ),
    ] {
        assert_eq!(with(optimizer), expected);
    }
    let group = ParamGroup { patterns: vec![], lr_scale: f64::NAN, weight_decay: None };
    let good = options(ZeroStage::Zero, DType::F32);
    assert_eq!(
        refused(ZeroOptions { groups: vec![group], ..good.clone() }),
        "`groups.lr_scale` is `NaN`, expected a number, `0` or more"
    );
    for optimizer in [Optimizer::Lamb(LAMB), Optimizer::Muon(muon())] {
        let states = StatePrecision::Bf16 { seed: 1 };
        assert_eq!(
            refused(ZeroOptions { optimizer, states, ..good.clone() }),
            "`states` is `bf16`, expected `f32` for this optimizer"
        );
    }
}

#[test]
fn a_learning_rate_that_is_none_moves_nothing() {
    let options = options(ZeroStage::Two, DType::F32);
    model().run(2, &options, |zero| {
        train_step(zero, 0, 1, &unchanged);
        let before = weights(zero);
        for (lr, text) in [(f64::NAN, "NaN"), (f64::INFINITY, "inf"), (-0.1, "-0.1")] {
            let error = zero.step(lr, &[]).unwrap_err().to_string();
            assert_eq!(error, format!("`lr` is `{text}`, expected a number, `0` or more"));
        }
        assert_eq!((weights(zero), zero.num_steps()), (before, 1));
        train_step(zero, 1, 1, &unchanged);
    });
}

/// A schedule moves the momentum: the steps after that are the formula's with the new one, bias correction included.
#[test]
fn the_momentum_of_the_steps_to_come_can_be_set() {
    let plain = SgdOptions { momentum: 0.0, ..SGD };
    for (optimizer, moves) in [
        (Optimizer::AdamW(ADAM), true),
        (Optimizer::Adam(ADAM), true),
        (Optimizer::Sgd(SGD), true),
        (Optimizer::Sgd(plain), false),
    ] {
        for stage in [ZeroStage::Zero, ZeroStage::Three] {
            let options = ZeroOptions { optimizer: optimizer.clone(), ..options(stage, DType::F32) };
            let after = |momentum: Option<f64>| {
                common(model().run(2, &options, |zero| {
                    (0..2).for_each(|step| drop(train_step(zero, step, 1, &unchanged)));
                    momentum.into_iter().for_each(|momentum| zero.set_momentum(momentum).unwrap());
                    trace(zero, &[2, 3], 1, &unchanged)
                }))
            };
            let (kept, set) = (after(None).weights, after(Some(0.5)).weights);
            assert_eq!(kept != set, moves, "{optimizer:?}, stage {stage}");
            let layouts = model().layouts(2);
            let mut reference = Reference::new(&layouts, 2, &options);
            for step in 0..4 {
                if step == 2 && moves {
                    reference.set_momentum(0.5);
                }
                reference.step(step);
            }
            for ((name, values), (_, expected)) in set.iter().zip(reference.weights()) {
                let near = values.iter().zip(expected).all(|(x, y)| (x - y).abs() <= 2e-6);
                assert!(near, "{optimizer:?}, {name}, stage {stage}");
            }
        }
    }
    model().run(1, &options(ZeroStage::One, DType::F32), |zero| {
        for (momentum, text) in [(1.0, "1"), (-0.1, "-0.1"), (f64::NAN, "NaN")] {
            let error = zero.set_momentum(momentum).unwrap_err().to_string();
            assert_eq!(error, format!("`momentum` is `{text}`, expected at least `0` and below `1`"));
        }
    });
}
