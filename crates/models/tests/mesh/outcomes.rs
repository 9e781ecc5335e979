//! Real models on meshes: how many micro-batches there are does not show, frozen parameters stay, a limit on the norm bites.

use shardwise_device::DType;
use shardwise_plan::pipeline::ScheduleKind;
use shardwise_plan::zoo::SequenceParallel;
use shardwise_plan::{NamePattern, ZeroStage};

use crate::equality::{F32, check};
use crate::runs::{GLOBAL_ROWS, Run, SCHEDULES, gpt2, llama};

/// A loss or a gradient that is scaled by the number of micro-batches, or of stages, would be off by a factor.
#[test]
fn the_number_of_micro_batches_does_not_show() {
    for model in [llama(), gpt2()] {
        let whole = Run { accum: 1, ..Run::new(&model, [1, 1, 1], ZeroStage::Zero, DType::F32).steps(2) };
        let whole = whole.trace();
        for (mesh, most) in [([2, 1, 1], GLOBAL_ROWS), ([4, 1, 1], GLOBAL_ROWS), ([2, 2, 2], GLOBAL_ROWS / 2)]
        {
            for (i, accum) in [1, 2, 8, most].into_iter().enumerate() {
                let schedules =
                    SCHEDULES.into_iter().filter(|kind| kind.num_chunks() == 1 || accum >= mesh[0]);
                let schedule = schedules.cycle().nth(i).unwrap();
                let stage = [ZeroStage::One, ZeroStage::Two][i % 2];
                let run = Run::new(&model, mesh, stage, DType::F32).steps(2);
                let what = format!("{} {mesh:?} stage {stage} {schedule} {accum}", model["model_type"]);
                check(&Run { accum, schedule, ..run }.trace(), &whole, F32, &what);
            }
        }
    }
}

/// A frozen table that two stages share, a frozen first stage, a frozen block, and all but a norm in the middle.
#[test]
fn frozen_parameters_stay_on_every_mesh() {
    let cases: [(_, &[&str]); 4] = [
        (gpt2(), &["*wte.weight"]),
        (gpt2(), &["*wte.weight", "*wpe.weight", "*h.0.*", "*h.1.*", "*h.2.*"]),
        (llama(), &["*layers.3.*"]),
        (
            llama(),
            &["*embed*", "*layers.0.*", "*layers.1.*", "*layers.2.*", "*mlp*", "*self_attn*", "lm_head*"],
        ),
    ];
    for (model, frozen) in cases {
        let is_frozen = |name: &str| frozen.iter().any(|&pattern| NamePattern::new(pattern).matches(name));
        let run = |mesh, stage| {
            let frozen = frozen.iter().map(|&pattern| pattern.to_owned()).collect();
            Run { frozen, ..Run::new(&model, mesh, stage, DType::F32).steps(2) }
        };
        let alone = run([1, 1, 1], ZeroStage::Zero).trace();
        let born = run([1, 1, 1], ZeroStage::Zero).steps(0).trace();
        for ((name, before), (_, after)) in born.weights.iter().zip(&alone.weights) {
            assert_eq!(before == after, is_frozen(name), "`{name}`, {frozen:?}");
        }
        for (i, mesh) in [[2, 1, 1], [4, 1, 1], [2, 1, 2], [2, 2, 2]].into_iter().enumerate() {
            for stage in [ZeroStage::One, ZeroStage::Three] {
                let schedule = SCHEDULES[(i + stage.shards_parameters() as usize) % SCHEDULES.len()];
                let what = format!("{frozen:?} {mesh:?} stage {stage} {schedule}");
                let found = Run { schedule, ..run(mesh, stage) }.trace();
                check(&found, &alone, F32, &what);
                for (name, after) in &found.weights {
                    let (_, before) = born.weights.iter().find(|(other, _)| other == name).unwrap();
                    assert_eq!(before == after, is_frozen(name), "`{name}`, {what}");
                }
            }
        }
    }
}

/// Matrices on the way to the gradients that are made at once, in a layer whose input wants none: each counts once.
#[test]
fn zero_bubble_counts_every_matrix_once_beside_frozen_norms() {
    for (model, frozen) in [
        (llama(), vec!["*embed*", "*input_layernorm*"]),
        (llama(), vec!["*embed*", "*layernorm*", "*_proj.bias"]),
        (gpt2(), vec!["*wte*", "*wpe*", "*ln_1*", "*bias"]),
    ] {
        let frozen: Vec<String> = frozen.into_iter().map(str::to_owned).collect();
        let run = |mesh, schedule| {
            let frozen = frozen.clone();
            Run { frozen, schedule, ..Run::new(&model, mesh, ZeroStage::One, DType::F32).steps(2) }
        };
        let alone = run([1, 1, 1], ScheduleKind::OneForwardOneBackward).trace();
        for mesh in [[1, 1, 1], [2, 1, 1], [2, 1, 2]] {
            let found = run(mesh, ScheduleKind::ZeroBubble).trace();
            check(&found, &alone, F32, &format!("{} {frozen:?} {mesh:?}", model["model_type"]));
        }
    }
}

/// With few tokens and many ranks the last ones have no part of the vocabulary, and take part in everything else.
#[test]
fn a_rank_without_tokens_keeps_step() {
    for mut model in [llama(), gpt2()] {
        // Two tokens a rank, then one, then none.
        model["vocab_size"] = 9.into();
        let alone = Run::new(&model, [1, 1, 1], ZeroStage::Zero, DType::F32).steps(2).trace();
        for sequence in [SequenceParallel::Off, SequenceParallel::On] {
            let run = Run::new(&model, [1, 1, 8], ZeroStage::One, DType::F32).steps(2);
            let what = format!("{} {sequence:?}", model["model_type"]);
            check(&Run { sequence, ..run }.trace(), &alone, F32, &what);
        }
    }
}

#[test]
fn clipped_meshes_train_as_one_clipped_rank_does() {
    for model in [llama(), gpt2()] {
        let run = |mesh, stage| Run { clip: Some(0.3), ..Run::new(&model, mesh, stage, DType::F32).steps(3) };
        let alone = run([1, 1, 1], ZeroStage::Zero).trace();
        assert!(alone.norms.iter().any(|norm| *norm > 0.4), "the limit bites: {:?}", alone.norms);
        for (mesh, sequence) in [
            ([2, 2, 2], SequenceParallel::Off),
            ([1, 2, 4], SequenceParallel::On),
            ([4, 1, 1], SequenceParallel::Off),
        ] {
            for stage in [ZeroStage::One, ZeroStage::Three] {
                let what = format!("{} {mesh:?} stage {stage} clipped", model["model_type"]);
                check(&Run { sequence, ..run(mesh, stage) }.trace(), &alone, F32, &what);
            }
        }
    }
}
