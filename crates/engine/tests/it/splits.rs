//! One global batch, split in other ways: over other numbers of ranks, and over micro-batches.

use shardwise_device::DType;
use shardwise_plan::ZeroStage;

use crate::layers::Gradients;
use crate::runs::{Run, Trace};

const NUM_STEPS: usize = 20;

/// How far another split may lead, relative to the run that is not split.
struct Tolerance {
    losses: f64,
    /// Of the first gradient norm, when the weights are still the same.
    first_norm: f64,
    /// Of later ones, which amplify what the weights have drifted apart by the curvature.
    norms: f64,
}

/// Means over other groups of rows differ in the last places of f32 (6e-8 each); 20 steps of AdamW, which is sensitive where
/// gradients nearly cancel, make that ten times as much in the norms.
const F32: Tolerance = Tolerance { losses: 1e-6, first_norm: 2e-6, norms: 1e-5 };
/// Each rank and micro-batch rounds its own gradient to 8 bits (4e-3) before they are added: another split rounds other
/// numbers, and all of them where it is not by a power of two.
const BF16: Tolerance = Tolerance { losses: 1e-2, first_norm: 1e-2, norms: 2e-1 };

/// Likewise, to 11 bits (5e-4).
const F16: Tolerance = Tolerance { losses: 2e-3, first_norm: 2e-3, norms: 5e-2 };

fn check(found: &Trace, expected: &Trace, tolerance: &Tolerance, what: &str) {
    let worst = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| ((a - b) / b).abs()).fold(0.0, f64::max);
    let losses = worst(&found.losses, &expected.losses);
    let first_norm = worst(&found.norms[..1], &expected.norms[..1]);
    let norms = worst(&found.norms, &expected.norms);
    assert!(losses <= tolerance.losses, "losses differ by {losses:.1e}: {what}");
    assert!(first_norm <= tolerance.first_norm, "first gradient norms differ by {first_norm:.1e}: {what}");
    assert!(norms <= tolerance.norms, "gradient norms differ by {norms:.1e}: {what}");
}

#[test]
fn ranks_and_micro_batches_share_the_work_and_not_the_numbers() {
    for (compute, tolerance) in [(DType::F32, F32), (DType::Bf16, BF16), (DType::F16, F16)] {
        let run = |world, accum, stage| {
            let run = Run { accum, gradients: Gradients::Always, ..Run::new(world, stage, compute) };
            run.trace(0..NUM_STEPS)
        };
        let whole = run(1, 1, ZeroStage::Zero);
        for (world, accum) in [(1, 2), (1, 3), (2, 1), (2, 3), (3, 1), (4, 1), (4, 3)] {
            for stage in [ZeroStage::Zero, ZeroStage::Three] {
                let what = format!("{world} ranks, {accum} micro-batches, stage {stage}, {compute}");
                check(&run(world, accum, stage), &whole, &tolerance, &what);
            }
        }
    }
}

/// What is dropped from a row does not depend on who has it: were it otherwise, losses would differ in the first place.
#[test]
fn dropout_does_not_depend_on_the_split() {
    for (compute, tolerance) in [(DType::F32, F32), (DType::Bf16, BF16), (DType::F16, F16)] {
        let run = |world, accum, stage, dropout| {
            let run = Run { accum, dropout, gradients: Gradients::Always, ..Run::new(world, stage, compute) };
            run.trace(0..NUM_STEPS)
        };
        let whole = run(1, 1, ZeroStage::Zero, 0.25);
        assert!(whole.differs(&run(1, 1, ZeroStage::Zero, 0.0)), "something is dropped");
        for (world, accum) in [(1, 3), (2, 1), (2, 3), (4, 1)] {
            for stage in [ZeroStage::Zero, ZeroStage::Three] {
                let what = format!("{world} ranks, {accum} micro-batches, stage {stage}, {compute}");
                check(&run(world, accum, stage, 0.25), &whole, &tolerance, &what);
            }
        }
    }
}
