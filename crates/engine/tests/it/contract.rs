//! Equal bits, whatever is sharded and whatever runs beside what.

use shardwise_device::DType;
use shardwise_plan::ZeroStage;
use shardwise_zero::{Overlap, StepOutcome};

use crate::runs::{Run, Trace};

const NUM_STEPS: usize = 20;

/// Between the stages that add micro-batches first (0, 1) and those that add ranks first (2, 3), relative to a loss or a norm.
/// Sums of at most twelve numbers in another order differ by a few units in the last place of f32 (6e-8 each), and 20 steps
/// of AdamW make some ten times as much of it.
const REDUCTION_ORDER_F32: f64 = 1e-5;
/// Sums of a few numbers of 8 bits are nearly always exact in f32, in any order. If one is not, a weight may cross a
/// rounding boundary, and then its compute copy moves by 2^-8 of itself.
const REDUCTION_ORDER_BF16: f64 = 1e-2;

/// Stages and places of collectives, except the first, which the others are held against.
fn others() -> impl Iterator<Item = (ZeroStage, Overlap)> {
    let all = [Overlap::Inline, Overlap::SideThread];
    ZeroStage::ALL.into_iter().flat_map(move |stage| all.map(|overlap| (stage, overlap))).skip(1)
}

fn check(compute: DType) {
    for world in 1..=4 {
        let run = |stage, overlap, accum, clip| {
            Run { overlap, accum, clip, ..Run::new(world, stage, compute) }.trace(0..NUM_STEPS)
        };
        let first = run(ZeroStage::Zero, Overlap::Inline, 1, Some(0.3));
        assert!(first.outcomes.iter().all(|outcome| *outcome == StepOutcome::Applied));
        assert!(first.losses[NUM_STEPS - 1] < 0.9 * first.losses[0], "it learns: {:?}", first.losses);
        assert!(first.norms.iter().any(|norm| *norm > 0.3), "clipping bites: {:?}", first.norms);
        for (stage, overlap) in others() {
            let what = format!("stage {stage}, {overlap:?}, {world} ranks, {compute}");
            run(stage, overlap, 1, Some(0.3)).assert_same_bits(&first, &what);
        }
        let boundary = run(ZeroStage::Zero, Overlap::Inline, 3, None);
        let each = run(ZeroStage::Two, Overlap::Inline, 3, None);
        for (stage, overlap) in others() {
            let expected = if stage.shards_gradients() { &each } else { &boundary };
            let what = format!("stage {stage}, {overlap:?}, {world} ranks, {compute}, accumulation");
            run(stage, overlap, 3, None).assert_same_bits(expected, &what);
        }
        let tolerance = if compute == DType::F32 { REDUCTION_ORDER_F32 } else { REDUCTION_ORDER_BF16 };
        assert_close(&boundary, &each, tolerance);
    }
}

fn assert_close(a: &Trace, b: &Trace, tolerance: f64) {
    for (a, b) in a.losses.iter().zip(&b.losses).chain(a.norms.iter().zip(&b.norms)) {
        assert!((a - b).abs() <= tolerance * a.abs(), "{a} and {b}");
    }
}

#[test]
fn all_stages_give_the_same_bits_in_fp32() {
    check(DType::F32);
}

#[test]
fn all_stages_give_the_same_bits_in_bf16() {
    check(DType::Bf16);
}

#[test]
fn all_stages_give_the_same_bits_in_fp16() {
    check(DType::F16);
}

/// Frozen parameters change which layers go backward, and what is prefetched for nothing.
#[test]
fn stages_agree_with_frozen_parameters() {
    for frozen in [vec!["embedding.*", "up.*"], vec!["mid.*", "*.bias"], vec!["down.weight", "head.*"]] {
        let frozen: Vec<String> = frozen.into_iter().map(String::from).collect();
        for compute in [DType::F32, DType::Bf16] {
            let run = |stage, overlap, accum| {
                let run = Run { overlap, accum, frozen: frozen.clone(), ..Run::new(2, stage, compute) };
                Run { no_decay: vec![], ..run }.trace(0..4)
            };
            for accum in [1, 2] {
                let boundary = run(ZeroStage::Zero, Overlap::Inline, accum);
                let each = run(ZeroStage::Two, Overlap::Inline, accum);
                for (stage, overlap) in others() {
                    let expected = if stage.shards_gradients() { &each } else { &boundary };
                    let what = format!("stage {stage}, {overlap:?}, {frozen:?}, {compute}, accum {accum}");
                    run(stage, overlap, accum).assert_same_bits(expected, &what);
                }
            }
        }
    }
}

/// Every rank and every stage begins with the same model, and asking it is the same as training it.
#[test]
fn birth_and_predictions_do_not_depend_on_the_layout() {
    use crate::runs::{batch, weights};
    use shardwise_comm::thread;
    use shardwise_torch::Kind;

    for compute in [DType::F32, DType::Bf16] {
        let ask = |world, stage, overlap| {
            let run = Run { overlap, ..Run::new(world, stage, compute) };
            thread::run(world, |group| {
                let mut engine = run.engine(group);
                let asked = batch(0, 4);
                let scores = engine.predict(&asked.input).unwrap();
                let loss = engine.evaluate(&asked.input, &asked.target).unwrap();
                let report = engine.train_step(0.0, |_| Ok(batch(0, 4))).unwrap();
                assert!(
                    (report.loss - loss).abs() < 1e-12,
                    "the same batch on every rank: {} {loss}",
                    report.loss
                );
                assert!(
                    engine.predict(&asked.input).unwrap().equal(&scores),
                    "a rate of zero changes nothing"
                );
                (
                    weights(&mut engine),
                    Vec::<f64>::try_from(scores.to_kind(Kind::Double).view(-1)).unwrap(),
                    loss,
                )
            })
        };
        let first = ask(1, ZeroStage::Zero, Overlap::Inline).remove(0);
        for world in 1..=4 {
            for (stage, overlap) in others() {
                for found in ask(world, stage, overlap) {
                    assert!(found == first, "stage {stage}, {overlap:?}, {world} ranks, {compute}");
                }
            }
        }
    }
}
