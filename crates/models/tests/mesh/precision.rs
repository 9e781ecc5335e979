//! Sixteen bits: each mesh rounds in other places, and none of them goes another way.

use shardwise_device::DType;
use shardwise_plan::ZeroStage;
use shardwise_plan::zoo::SequenceParallel;

use crate::equality::{Tolerance, check};
use crate::runs::{Run, gpt2, llama};

/// Each tensor rank rounds its part of a sum over features to 8 bits (4e-3) before the parts are added, and each data-parallel rank its
/// gradient. A weight is kept in fp32, but a step of AdamW goes its full length, 3e-3, whichever way a gradient rounds that nearly
/// cancels: a few weights end some steps away.
const BF16: Tolerance = Tolerance { losses: 1e-2, first_norm: 1e-2, norms: 1e-1, weights: 0.5 };
/// Likewise, to 11 bits (5e-4).
const F16: Tolerance = Tolerance { losses: 2e-3, first_norm: 2e-3, norms: 2e-2, weights: 0.3 };

#[test]
fn meshes_in_16_bits_train_as_one_rank_does() {
    use SequenceParallel::{Off, On};
    for model in [llama(), gpt2()] {
        for (compute, tolerance) in [(DType::Bf16, BF16), (DType::F16, F16)] {
            let alone = Run::new(&model, [1, 1, 1], ZeroStage::Zero, compute).steps(5).trace();
            assert!(alone.outcomes.iter().all(|outcome| outcome.is_applied()), "{:?}", alone.outcomes);
            for (mesh, sequence) in [([2, 2, 2], Off), ([2, 1, 2], On), ([4, 1, 1], Off), ([1, 1, 4], On)] {
                for stage in ZeroStage::ALL {
                    let run = Run::new(&model, mesh, stage, compute).steps(5);
                    let what = format!("{} {mesh:?} stage {stage} {compute}", model["model_type"]);
                    check(&Run { sequence, ..run }.trace(), &alone, tolerance, &what);
                }
            }
        }
    }
}
