//! Equal bits on one mesh, whatever is sharded, whatever runs beside what, whatever of the activations is kept.
//!
//! The stages that add micro-batches first (0, 1) are equal, and so are those that add ranks first (2, 3); with one micro-batch all
//! four are.

use shardwise_device::DType;
use shardwise_plan::zoo::SequenceParallel;
use shardwise_plan::{ActivationPolicy, ZeroStage};
use shardwise_zero::Overlap;

use crate::runs::{Run, SCHEDULES, dropping_gpt2, dropping_llama, gpt2, llama};

const NUM_STEPS: usize = 2;

fn check(mesh: [usize; 3], compute: DType, accum: usize, sequence: SequenceParallel) {
    // Llama shares key-value heads where there are more than 2 tensor ranks, GPT-2 ties its table over stages.
    for model in [llama(), gpt2()] {
        let run = |stage, overlap| {
            let run = Run::new(&model, mesh, stage, compute).steps(NUM_STEPS);
            Run { accum, sequence, overlap, clip: Some(0.5), ..run }.trace()
        };
        let boundary = run(ZeroStage::Zero, Overlap::Inline);
        assert!(boundary.outcomes.iter().all(|outcome| outcome.is_applied()));
        let each = if accum == 1 { boundary.clone() } else { run(ZeroStage::Two, Overlap::Inline) };
        for (stage, overlap) in [
            (ZeroStage::One, Overlap::SideThread),
            (ZeroStage::Two, Overlap::SideThread),
            (ZeroStage::Three, Overlap::Inline),
            (ZeroStage::Three, Overlap::SideThread),
        ] {
            let expected = if stage.shards_gradients() { &each } else { &boundary };
            let name = &model["model_type"];
            let what =
                format!("{name} {mesh:?}, stage {stage}, {overlap:?}, {compute}, {accum}, {sequence:?}");
            run(stage, overlap).assert_same_bits(expected, &what);
        }
    }
}

#[test]
fn stages_give_the_same_bits_with_micro_batches() {
    for compute in [DType::F32, DType::Bf16] {
        for mesh in [[2, 2, 2], [2, 2, 1], [1, 2, 2]] {
            check(mesh, compute, 4, SequenceParallel::Off);
        }
    }
    check([4, 2, 1], DType::Bf16, 4, SequenceParallel::Off);
}

#[test]
fn stages_give_the_same_bits_with_sequence_parallelism() {
    check([2, 2, 2], DType::Bf16, 4, SequenceParallel::On);
    check([1, 2, 2], DType::F32, 4, SequenceParallel::On);
    check([1, 2, 4], DType::Bf16, 2, SequenceParallel::On);
}

#[test]
fn all_stages_give_the_same_bits_with_one_micro_batch() {
    for compute in [DType::F32, DType::Bf16] {
        check([1, 2, 2], compute, 1, SequenceParallel::Off);
        check([1, 2, 2], compute, 1, SequenceParallel::On);
        check([2, 2, 1], compute, 1, SequenceParallel::Off);
    }
}

/// Random numbers are drawn a second time, collectives within layers run a second time.
#[test]
fn recomputed_and_offloaded_activations_give_the_same_bits() {
    for (i, (mesh, model, sequence)) in [
        ([2, 1, 2], dropping_gpt2(), SequenceParallel::On),
        ([2, 1, 2], dropping_llama(), SequenceParallel::Off),
        ([2, 2, 1], dropping_gpt2(), SequenceParallel::Off),
    ]
    .into_iter()
    .enumerate()
    {
        for schedule in SCHEDULES {
            let (stage, compute) = [(ZeroStage::Three, DType::F32), (ZeroStage::One, DType::Bf16)][i % 2];
            let run = |activations| {
                let run = Run::new(&model, mesh, stage, compute).steps(2);
                Run { schedule, sequence, activations, ..run }.trace()
            };
            let kept = run(ActivationPolicy::Keep);
            for policy in [ActivationPolicy::Recompute, ActivationPolicy::Offload] {
                let what = format!("{} {mesh:?} {schedule} {policy:?}", model["model_type"]);
                run(policy).assert_same_bits(&kept, &what);
            }
        }
    }
}
