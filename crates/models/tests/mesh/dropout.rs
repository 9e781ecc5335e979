//! What is dropped does not depend on the mesh.

use shardwise_device::DType;
use shardwise_plan::ZeroStage;
use shardwise_plan::pipeline::ScheduleKind;
use shardwise_plan::zoo::SequenceParallel;

use crate::equality::{F32, check};
use crate::runs::{Run, dropping_gpt2, dropping_llama, gpt2, llama};

/// Were one element dropped on one mesh and not on another, losses would differ in the third place.
#[test]
fn dropout_does_not_depend_on_the_mesh() {
    use SequenceParallel::{Off, On};
    for (model, plain) in [(dropping_gpt2(), gpt2()), (dropping_llama(), llama())] {
        let alone = Run::new(&model, [1, 1, 1], ZeroStage::Zero, DType::F32).steps(2).trace();
        let without = Run::new(&plain, [1, 1, 1], ZeroStage::Zero, DType::F32).steps(2).trace();
        let apart = (alone.losses[0] / without.losses[0] - 1.0).abs();
        assert!(apart > 1e-4, "something is dropped: {apart:.1e}");
        for (mesh, sequence, stage) in [
            ([1, 1, 2], Off, ZeroStage::Zero),
            ([1, 1, 2], On, ZeroStage::Three),
            ([1, 1, 4], Off, ZeroStage::Two),
            ([1, 1, 4], On, ZeroStage::One),
            ([2, 1, 1], Off, ZeroStage::Three),
            ([2, 1, 2], On, ZeroStage::Two),
            ([2, 2, 2], Off, ZeroStage::One),
            ([4, 2, 1], Off, ZeroStage::Three),
        ] {
            for accum in [2, 8] {
                let run = Run::new(&model, mesh, stage, DType::F32).steps(2);
                let schedule = if accum == 8 {
                    ScheduleKind::Interleaved { num_chunks: 2 }
                } else {
                    ScheduleKind::ZeroBubble
                };
                let run = Run { accum, sequence, schedule, ..run };
                let what = format!("{} {mesh:?} {sequence:?}, {accum} micro-batches", model["model_type"]);
                check(&run.trace(), &alone, F32, &what);
            }
        }
    }
}
