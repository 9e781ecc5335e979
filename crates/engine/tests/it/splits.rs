//! One global batch, split in other ways: over other numbers of ranks, and over micro-batches.

use shardwise_device::DType;
use shardwise_plan::ZeroStage;

use crate::layers::Gradients;
use crate::runs::{Run, Trace};

const NUM_STEPS: usize = 20;

/// Of losses, in fp32: means over other groups of rows differ in the last places of f32 (6e-8), and 20 steps of AdamW,
/// which is sensitive where gradients nearly cancel, make that some hundred times as much.
const LOSS_F32: f64 = 1e-5;
/// Of gradient norms, in fp32: they amplify differences between weights by the curvature.
const NORM_F32: f64 = 1e-4;
/// In bf16 each rank rounds its own gradient to 8 bits before they are added: another split rounds other numbers.
const LOSS_BF16: f64 = 1e-2;
/// As above.
const NORM_BF16: f64 = 5e-2;

fn check(found: &Trace, expected: &Trace, loss: f64, norm: f64, what: &str) {
    let worst = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| ((a - b) / b).abs()).fold(0.0, f64::max);
    let (losses, norms) = (worst(&found.losses, &expected.losses), worst(&found.norms, &expected.norms));
    assert!(losses <= loss, "losses differ by {losses:.1e}: {what}");
    assert!(norms <= norm, "gradient norms differ by {norms:.1e}: {what}");
}

#[test]
fn ranks_and_micro_batches_share_the_work_and_not_the_numbers() {
    for (compute, loss, norm) in [(DType::F32, LOSS_F32, NORM_F32), (DType::Bf16, LOSS_BF16, NORM_BF16)] {
        let run = |world, accum, stage| {
            let run = Run { accum, gradients: Gradients::Always, ..Run::new(world, stage, compute) };
            run.trace(0..NUM_STEPS)
        };
        let whole = run(1, 1, ZeroStage::Zero);
        for (world, accum) in [(1, 2), (1, 3), (2, 1), (2, 3), (3, 1), (4, 1), (4, 3)] {
            for stage in [ZeroStage::Zero, ZeroStage::Three] {
                let what = format!("{world} ranks, {accum} micro-batches, stage {stage}, {compute}");
                check(&run(world, accum, stage), &whole, loss, norm, &what);
            }
        }
    }
}
