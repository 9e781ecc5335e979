//! Sixteen bits: each mesh rounds in other places, and none of them goes another way.

use shardwise_device::DType;
use shardwise_plan::ZeroStage;
use shardwise_plan::zoo::SequenceParallel;

use crate::equality::{Tolerance, check};
use crate::runs::{Run, gpt2, llama};

/// Each tensor rank rounds its part of a sum over features to 8 bits (4e-3) before the parts are added, and each data-parallel rank its
/// gradient. AdamW goes full steps by signs at first: where a gradient is nothing but rounding, as that of the keys' biases is, a
/// weight may be twice its own size away. All together they are not.
const BF16: Tolerance =
    Tolerance { losses: 2e-3, first_norm: 3e-3, norms: 3e-2, weights: 2.0, all_weights: 2e-2, logits: 5e-2 };
/// Likewise, to 11 bits (5e-4).
const F16: Tolerance =
    Tolerance { losses: 4e-4, first_norm: 5e-4, norms: 6e-3, weights: 2.0, all_weights: 6e-3, logits: 2e-2 };
const NUM_STEPS: usize = 3;

#[test]
fn meshes_in_16_bits_train_as_one_rank_does() {
    use SequenceParallel::{Off, On};
    for model in [llama(), gpt2()] {
        for (compute, tolerance) in [(DType::Bf16, BF16), (DType::F16, F16)] {
            let alone = Run::new(&model, [1, 1, 1], ZeroStage::Zero, compute).steps(NUM_STEPS).trace();
            assert!(alone.outcomes.iter().all(|outcome| outcome.is_applied()), "{:?}", alone.outcomes);
            let few = [ZeroStage::One, ZeroStage::Two];
            for (mesh, sequence, stages) in [
                ([2, 2, 2], Off, &ZeroStage::ALL[..]),
                ([2, 1, 2], On, &ZeroStage::ALL[..]),
                ([4, 1, 1], Off, &few[..1]),
                ([1, 1, 4], On, &few[1..]),
            ] {
                for &stage in stages {
                    let run = Run::new(&model, mesh, stage, compute).steps(NUM_STEPS);
                    let what = format!("{} {mesh:?} stage {stage} {compute}", model["model_type"]);
                    check(&Run { sequence, ..run }.trace(), &alone, tolerance, &what);
                }
            }
        }
    }
}
