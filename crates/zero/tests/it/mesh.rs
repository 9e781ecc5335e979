//! State on meshes of pipeline, data and tensor ranks: held against one rank that has everything and sees every sample.

use shardwise_comm::solo;
use shardwise_device::DType;
use shardwise_plan::ZeroStage;
use shardwise_plan::mesh::{Axis, Mesh};
use shardwise_zero::{
    BiasCorrection, Divergence, Groups, LambOptions, LossScaling, MuonOptions, OnNonFinite, Optimizer,
    Overlap, Placement, ReductionOptions, SkipReason, StatePrecision, StepOutcome, Zero, ZeroOptions,
};

use crate::harness::{ADAM, LR, Model, biases_without_decay, fill, options, weights};
use crate::mesh_harness::{
    Numbers, Rank, TABLE, Use, Whole, apart, layers, mesh, run, spec, trained, trained_on_one, unspoilt,
};

/// Weights are below 4 and move by about 0.01 in each of a few steps; two orders of f32 sums differ in their last places,
/// which Adam enlarges where a sum nearly vanishes.
const ROUGH_TOLERANCE: f32 = 1e-4;

const STAGES_AND_LANES: [(ZeroStage, Overlap); 8] = [
    (ZeroStage::Zero, Overlap::Inline),
    (ZeroStage::Zero, Overlap::SideThread),
    (ZeroStage::One, Overlap::Inline),
    (ZeroStage::One, Overlap::SideThread),
    (ZeroStage::Two, Overlap::Inline),
    (ZeroStage::Two, Overlap::SideThread),
    (ZeroStage::Three, Overlap::Inline),
    (ZeroStage::Three, Overlap::SideThread),
];

fn with(stage: ZeroStage, overlap: Overlap, compute: DType, grad_accum_steps: usize) -> ZeroOptions {
    ZeroOptions { overlap, grad_accum_steps, groups: biases_without_decay(), ..options(stage, compute) }
}

/// All sums are exact here, so every bit is that of one rank: norms that count an element twice or not at all, a tied gradient
/// that misses a use, a replica that drifts, all show. The clipping makes every weight depend on the norm.
#[test]
fn norms_and_weights_of_every_mesh_are_those_of_one_rank() {
    for mesh in [
        mesh(1, 1, 2),
        mesh(1, 1, 4),
        mesh(2, 1, 1),
        mesh(1, 2, 2),
        mesh(2, 2, 1),
        mesh(2, 1, 2),
        mesh(2, 2, 2),
        mesh(4, 1, 1),
    ] {
        for (compute, accum) in [(DType::F32, 1), (DType::F32, 2), (DType::Bf16, 2), (DType::F16, 1)] {
            let mut expected: Option<Whole> = None;
            for (stage, overlap) in STAGES_AND_LANES {
                let options = ZeroOptions {
                    clip_grad_norm: Some(0.5),
                    loss_scaling: (compute == DType::F16).then_some(LossScaling::Static(64.0)),
                    ..with(stage, overlap, compute, accum)
                };
                let expected =
                    expected.get_or_insert_with(|| trained_on_one(mesh, &options, Numbers::Exact, 2));
                assert!(expected.norms.iter().all(|norm| *norm > 0.5), "the clipping bites");
                let found = trained(mesh, &options, Numbers::Exact, 2);
                assert_eq!(found, *expected, "{mesh:?}, {compute}, stage {stage}, {overlap:?}, {accum}");
            }
        }
    }
}

/// The table's gradients of two stages, kept in 16 bits.
#[test]
fn tied_gradients_are_summed_in_the_type_they_are_kept_in() {
    for accumulation_dtype in [DType::Bf16, DType::F16] {
        for (stage, overlap) in STAGES_AND_LANES {
            let reduction = ReductionOptions { accumulation_dtype, ..ReductionOptions::default() };
            let options = ZeroOptions { reduction, ..with(stage, overlap, DType::Bf16, 2) };
            let mesh = mesh(2, 2, 1);
            let (found, one) = (
                trained(mesh, &options, Numbers::Exact, 2),
                trained_on_one(mesh, &options, Numbers::Exact, 2),
            );
            assert_eq!(found, one, "{accumulation_dtype}, stage {stage}, {overlap:?}");
        }
    }
}

#[test]
fn on_a_fixed_mesh_stages_agree_as_they_do_without_one() {
    for (mesh, compute) in [(mesh(2, 2, 2), DType::F32), (mesh(1, 2, 2), DType::Bf16)] {
        for accum in [1, 2] {
            let of = |stage, overlap| trained(mesh, &with(stage, overlap, compute, accum), Numbers::Rough, 3);
            let all = STAGES_AND_LANES.map(|(stage, overlap)| of(stage, overlap));
            for ((stage, overlap), found) in STAGES_AND_LANES.into_iter().zip(&all) {
                let expected = if stage.shards_gradients() { &all[4] } else { &all[0] };
                assert!(found == expected, "{mesh:?}, stage {stage}, {overlap:?}, accum {accum}");
            }
            if compute == DType::F32 {
                assert_eq!(all[0] == all[4], accum == 1, "the order of sums shows");
                let one = trained_on_one(
                    mesh,
                    &with(ZeroStage::Zero, Overlap::Inline, compute, accum),
                    Numbers::Rough,
                    3,
                );
                for (found, expected) in all[4].norms.iter().zip(&one.norms) {
                    assert!((found - expected).abs() <= 1e-6 * expected, "{found}, expected {expected}");
                }
                assert!(apart(&all[4], &one) <= ROUGH_TOLERANCE, "{}", apart(&all[4], &one));
            }
        }
    }
}

/// States rounded at random: `whole` holds the ranks that have the same elements against each other. The table of nine tokens
/// gives tensor ranks units of different layouts, in which the positions are at different places.
#[test]
fn replicas_stay_bit_equal_when_states_are_rounded_at_random() {
    for mesh in [mesh(2, 1, 1), mesh(1, 1, 2), mesh(1, 2, 4), mesh(2, 2, 2)] {
        let of = |stage, states| {
            let options = ZeroOptions { states, ..with(stage, Overlap::Inline, DType::Bf16, 1) };
            trained(mesh, &options, Numbers::Rough, 5)
        };
        let rounded = ZeroStage::ALL.map(|stage| of(stage, StatePrecision::Bf16 { seed: 3 }));
        assert!(rounded.iter().all(|other| *other == rounded[0]), "{mesh:?}");
        assert!(rounded[0].weights != of(ZeroStage::Two, StatePrecision::F32).weights, "it is rounded");
    }
}

#[test]
fn every_element_is_spoken_for_once() {
    for mesh in [mesh(2, 2, 2), mesh(1, 1, 4), mesh(4, 1, 2)] {
        let spoken = run(mesh, &options(ZeroStage::One, DType::F32), Numbers::Exact, |rank| {
            let slots = rank.zero.layouts().flat_map(|layout| &layout.slots);
            let spoken = slots.filter(|slot| rank.zero.speaks_for(&slot.param.name));
            let numel: usize = spoken.map(|slot| slot.param.numel()).sum();
            let groups = rank.zero.groups();
            assert_eq!(groups.data.group_size(), mesh.degree(Axis::Data));
            assert_eq!(
                (groups.tensor.group_rank(), groups.world.group_size()),
                (rank.at.tensor, mesh.world_size())
            );
            if rank.at.data == 0 { numel } else { 0 }
        });
        let layers = layers();
        let all: usize = layers.iter().flat_map(|layer| &layer.params).map(|param| param.numel()).sum();
        assert_eq!(spoken.iter().sum::<usize>(), all - spec(&layers, TABLE).numel());
    }
}

/// The outcome that all ranks had.
fn common_outcome(
    mesh: Mesh,
    options: &ZeroOptions,
    spoil: &(dyn Fn(Use<'_>, &mut [f32]) + Sync),
) -> StepOutcome {
    let outcomes = run(mesh, options, Numbers::Rough, |rank: &mut Rank| {
        rank.train_step(0, &unspoilt);
        let before = weights(&mut rank.zero);
        let report = rank.train_step(1, spoil);
        assert_eq!((weights(&mut rank.zero), rank.zero.num_steps()), (before, 1), "nothing moved");
        assert!(!report.grad_norm.is_finite());
        assert!(rank.train_step(2, &unspoilt).outcome.is_applied(), "and all go on");
        report.outcome
    });
    assert!(outcomes.iter().all(|outcome| *outcome == outcomes[0]), "all ranks end alike: {outcomes:?}");
    outcomes.into_iter().next().unwrap()
}

/// A number that is not finite, on one tensor rank of one data rank of one stage: all ranks skip, and name the same parameter,
/// which most of them do not have.
#[test]
fn one_bad_number_on_one_rank_of_the_mesh_skips_the_step_everywhere() {
    let skipped = |unit: &str, param: &str| {
        let (unit, param) = (unit.to_owned(), param.to_owned());
        StepOutcome::Skipped { reason: SkipReason::NonFiniteGradient { unit, param } }
    };
    let bad = |layer: &'static str, param: &'static str, at: usize, value: f32| {
        move |used: Use<'_>, values: &mut [f32]| {
            if (used.layer, used.param, used.sample) == (layer, param, 1) {
                values[at] = value;
            }
        }
    };
    for (stage, overlap) in STAGES_AND_LANES {
        for accum in [1, 2] {
            let (mesh, options) = (mesh(2, 2, 2), with(stage, overlap, DType::F32, accum));
            // The last column is on the second tensor rank.
            let late = bad("block1", "block1.out", 7, f32::INFINITY);
            assert_eq!(
                common_outcome(mesh, &options, &late),
                skipped("block1", "block1.out"),
                "stage {stage}"
            );
            // The table's use in the head, on the last stage; its name is that of its first layer.
            let tied = bad("head", TABLE, 71, f32::NAN);
            assert_eq!(common_outcome(mesh, &options, &tied), skipped("embed", TABLE), "stage {stage}");
            // Stages keep the table in a unit after those of the layers, but it is the model's first parameter.
            let all = |used: Use<'_>, values: &mut [f32]| values[used.sample % 2] = f32::INFINITY;
            assert_eq!(common_outcome(mesh, &options, &all), skipped("embed", TABLE), "stage {stage}");
            let early = bad("block0", "block0.norm", 3, f32::NEG_INFINITY);
            let both = |used: Use<'_>, values: &mut [f32]| {
                late(used, values);
                early(used, values);
            };
            assert_eq!(
                common_outcome(mesh, &options, &both),
                skipped("block0", "block0.norm"),
                "stage {stage}"
            );
        }
    }
    let options = ZeroOptions {
        on_non_finite: OnNonFinite::Skip { max_consecutive: 1 },
        ..options(ZeroStage::Two, DType::F32)
    };
    let end = common_outcome(mesh(2, 1, 2), &options, &|used: Use<'_>, values: &mut [f32]| {
        if used.param == "head.norm" {
            values[0] = f32::NAN;
        }
    });
    let StepOutcome::Diverged { error: Divergence::TooManySkips { reason, .. } } = end else {
        panic!("{end:?}")
    };
    assert!(reason.to_string().contains("`head.norm` in layer `head`"));
}

/// Its norms are of whole parameters, so it needs the other tensor ranks' parts, each once.
#[test]
fn lamb_on_cut_parameters_is_lamb_on_whole_ones() {
    let lamb = LambOptions {
        beta1: 0.9,
        beta2: 0.99,
        eps: 1e-6,
        weight_decay: 0.1,
        max_coeff: 10.0,
        min_coeff: 0.01,
        bias_correction: BiasCorrection::On,
    };
    for mesh in [mesh(1, 1, 2), mesh(1, 1, 4), mesh(1, 2, 2), mesh(2, 2, 2)] {
        let of = |stage, overlap| ZeroOptions {
            optimizer: Optimizer::Lamb(lamb),
            ..with(stage, overlap, DType::F32, 1)
        };
        let all =
            STAGES_AND_LANES.map(|(stage, overlap)| trained(mesh, &of(stage, overlap), Numbers::Exact, 3));
        assert!(all.iter().all(|other| *other == all[0]), "{mesh:?}: stages agree bit for bit");
        let one = trained_on_one(mesh, &of(ZeroStage::Zero, Overlap::Inline), Numbers::Exact, 3);
        // Norms are summed in another order, in f64, and trust ratios rounded to f32: a unit in the last place of weights below 4.
        assert!(apart(&all[0], &one) <= 5e-7, "{mesh:?}: {}", apart(&all[0], &one));
        let adam =
            trained_on_one(mesh, &with(ZeroStage::Zero, Overlap::Inline, DType::F32, 1), Numbers::Exact, 3);
        assert!(apart(&adam, &one) > 1e-3, "and it is another optimizer");
    }
}

#[test]
fn muon_is_refused_where_matrices_are_cut() {
    let muon = MuonOptions {
        momentum: 0.95,
        direction: shardwise_zero::Direction::Momentum,
        num_newton_schulz_steps: 5,
        weight_decay: 0.0,
        adamw: ADAM,
        adamw_lr_scale: 1.0,
        adamw_for: vec![],
    };
    let options = ZeroOptions { optimizer: Optimizer::Muon(muon), ..options(ZeroStage::One, DType::F32) };
    shardwise_comm::thread::run(2, |world| {
        let error = Rank::new(mesh(1, 1, 2), &options, Numbers::Exact, world).err().unwrap().to_string();
        let expected = "`optimizer` is `muon`, expected `adamw`, `lamb` or another: tensor-parallel ranks have no whole \
                        matrices";
        assert_eq!(error, expected);
    });
    // Stages have whole ones.
    run(mesh(2, 2, 1), &options, Numbers::Exact, |rank| drop(rank.train(2)));
}

#[test]
fn a_catalogue_without_a_parameter_is_refused() {
    let catalogue = vec![("unit0".to_owned(), "unit0.0.weight".to_owned())];
    let placement = Placement { catalogue, ..Placement::default() };
    let (layouts, options) = (Model::new(&[&[8, 3]]).layouts(1), options(ZeroStage::One, DType::F32));
    let error = Zero::on_mesh(layouts, options, solo(), placement, &mut fill).err().unwrap().to_string();
    assert_eq!(error, "`catalogue` is `without unit0.1.bias`, expected every parameter of the model");
    // Of two stages each would make another one.
    shardwise_comm::thread::run(2, |world| {
        let (layouts, options) =
            (Model::new(&[&[8]]).layouts(1), crate::harness::options(ZeroStage::One, DType::F32));
        let groups = Groups { data: solo(), tensor: solo(), world };
        let error = Zero::new(layouts, options, groups, &mut fill).err().unwrap().to_string();
        assert_eq!(error, "`catalogue` is `empty`, expected every parameter of the model");
    });
}

#[test]
fn gradients_are_summed_over_stages_once_they_are_complete() {
    let options = with(ZeroStage::Two, Overlap::SideThread, DType::F32, 2);
    run(mesh(2, 2, 1), &options, Numbers::Exact, |rank| {
        let (table, Groups { data, .. }) = (rank.table().unwrap(), rank.zero.groups().clone());
        let stages = rank.stages().unwrap().clone();
        rank.reduce(0, 0, &unspoilt);
        let error = rank.zero.all_reduce_gradient(table, &stages).unwrap_err().to_string();
        assert_eq!(error, "unit `embed.table` has the gradients of `1` micro-batches, a step needs `2`");
        rank.reduce(0, 1, &unspoilt);
        let error = rank.zero.all_reduce_gradient(table, &data).unwrap_err().to_string();
        assert_eq!(error, "`group` is `Data`, expected a group of ranks with other uses of the parameters");
        rank.zero.all_reduce_gradient(table, &stages).unwrap();
        assert!(rank.zero.step(LR, &[]).unwrap().outcome.is_applied());
    });
}
