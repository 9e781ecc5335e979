//! Memory and traffic are those of the ZeRO paper.
//!
//! Bytes of model state per rank, for Ψ elements on N ranks. The paper counts 16-bit gradients, we keep them in fp32:
//! its `2 + 2 + 12` bytes are `2 + 4 + 12` here (compute copy; gradient; master weight and two moments), and in fp32, where the
//! compute copy is the master weight, `4 + 4 + 8`. With `p`, `g = 4` and `s` for the three terms:
//!
//! | stage | without accumulation | with accumulation |
//! |---|---|---|
//! | 0 | (p + g + s) Ψ | same |
//! | 1 | p Ψ + (g + s) Ψ / N: nothing needs the whole gradient | (p + g) Ψ + s Ψ / N |
//! | 2 | p Ψ + (g + s) Ψ / N | same |
//! | 3 | (p + g + s) Ψ / N | same |

use shardwise_device::DType;
use shardwise_plan::layout::ALIGNMENT;
use shardwise_plan::memory::{ModelState, PIECE, STAGING, StateWidths};
use shardwise_plan::traffic::Traffic;
use shardwise_plan::{Bytes, ZeroStage};
use shardwise_zero::{Overlap, StateBytes, ZeroOptions};

use crate::harness::{Model, options, train_step, unchanged};

/// Large against gaps and padding, which are less than 2%.
fn model() -> Model {
    Model::new(&[&[40_013, 77], &[129 * 31, 5], &[40_013]])
}

/// Elements of the parameters, and at most as many with gaps and padding.
fn numel(model: &Model, num_ranks: usize) -> (usize, usize) {
    let psi: usize = model.units.iter().flatten().sum();
    let num_params: usize = model.units.iter().map(Vec::len).sum();
    (psi, psi + ALIGNMENT * (num_params + num_ranks * model.units.len()))
}

fn table(stage: ZeroStage, compute: DType, accum: usize, n: usize, psi: usize) -> StateBytes {
    let (p, master) = if compute == DType::Bf16 { (2, 4) } else { (4, 0) };
    // The only gradient of the only rank needs no sum.
    let grad = if (n, accum) == (1, 1) { p } else { 4 };
    let whole_grads = stage == ZeroStage::Zero || stage == ZeroStage::One && accum > 1;
    let shard = psi.div_ceil(n);
    let split = |is_split: bool| if is_split { shard } else { psi };
    let s = split(stage >= ZeroStage::One);
    StateBytes {
        params: p * split(stage == ZeroStage::Three),
        master_params: master * s,
        optimizer: 8 * s,
        grads: grad * split(!whole_grads),
    }
}

#[test]
fn model_state_follows_the_table_of_the_paper() {
    for n in [1, 2, 4, 8] {
        let (psi, with_padding) = numel(&model(), n);
        assert!(with_padding as f64 <= 1.02 * psi as f64);
        for stage in ZeroStage::ALL {
            for compute in [DType::F32, DType::Bf16] {
                for accum in [1, 3] {
                    let options = ZeroOptions { grad_accum_steps: accum, ..options(stage, compute) };
                    let ranks = model().run(n, &options, |zero| {
                        let born = zero.state_bytes();
                        train_step(zero, 0, accum, &unchanged);
                        assert_eq!(zero.pool_stats().live_bytes, 0, "between steps nothing is gathered");
                        assert_eq!(zero.state_bytes(), born, "training needs no more state");
                        born
                    });
                    let least = table(stage, compute, accum, n, psi);
                    let most = table(stage, compute, accum, n, with_padding);
                    let widths = StateWidths::adamw(compute.size_bytes()).of_run(n, accum);
                    let planned = ModelState::new(&model().layouts(n), stage, accum, widths);
                    for found in ranks {
                        let what = format!("stage {stage}, {compute}, accum {accum}, {n} ranks: {found:?}");
                        assert!(least.params <= found.params && found.params <= most.params, "{what}");
                        let (a, b, c) = (least.master_params, found.master_params, most.master_params);
                        assert!(a <= b && b <= c, "{what}");
                        assert!(
                            least.optimizer <= found.optimizer && found.optimizer <= most.optimizer,
                            "{what}"
                        );
                        assert!(least.grads <= found.grads && found.grads <= most.grads, "{what}");
                        assert_eq!(Bytes(found.total() as u64), planned.total(), "{what}");
                    }
                }
            }
        }
    }
}

#[test]
fn frozen_units_have_parameters_and_no_other_state() {
    for stage in ZeroStage::ALL {
        for compute in [DType::F32, DType::Bf16] {
            let all = Model { frozen: vec![0, 1, 2], ..model() };
            let some = Model { frozen: vec![0], ..model() };
            let bytes =
                |model: &Model| model.run(2, &options(stage, compute), |zero| zero.state_bytes()).remove(0);
            let (all, some, none) = (bytes(&all), bytes(&some), bytes(&model()));
            assert_eq!(all.params, none.params);
            assert_eq!(all.total(), all.params);
            assert!(all.optimizer < some.optimizer && some.optimizer < none.optimizer);
        }
    }
}

#[test]
fn the_wire_carries_what_the_plan_says_and_the_paper_too() {
    for n in [1, 2, 4, 8] {
        for (stage, paper) in ZeroStage::ALL.into_iter().zip([2.0, 2.0, 2.0, 3.0]) {
            for (accum, overlap) in [(1, Overlap::Inline), (3, Overlap::Inline), (1, Overlap::SideThread)] {
                let options = ZeroOptions { grad_accum_steps: accum, overlap, ..options(stage, DType::Bf16) };
                let model = Model { frozen: if accum == 1 { vec![] } else { vec![1] }, ..model() };
                let ranks = model.run(n, &options, |zero| {
                    // An empty exchange ends what is under way before it.
                    zero.exchange(&[]).unwrap();
                    let before = zero.group().ledger();
                    train_step(zero, 0, accum, &unchanged);
                    zero.exchange(&[]).unwrap();
                    zero.group().ledger().since(&before).total()
                });
                let planned = Traffic::new(&model.layouts(n), stage, accum, 2, |_| 2);
                // The step's own exchange: the sum of squares and one scalar of the caller's, as bytes.
                let scalars = 2 * 8 * (n - 1) as u64;
                for sent in ranks {
                    let what = format!("stage {stage}, accum {accum}, {overlap:?}, {n} ranks");
                    assert_eq!(sent.sent_numel, planned.elements as u64 + scalars, "{what}");
                    assert_eq!(sent.sent_bytes, planned.bytes.0 + scalars, "{what}");
                    if accum == 1 {
                        let psi = numel(&model, n).0 as f64;
                        let expected = paper * psi * (n - 1) as f64 / n as f64;
                        assert!((sent.sent_numel as f64 - expected).abs() <= 0.02 * expected, "{what}");
                    }
                }
            }
        }
    }
}

/// What a step takes from the pool it gives back: later steps allocate nothing, and hold few buffers at a time.
#[test]
fn the_pool_is_in_a_steady_state_after_two_steps() {
    // Eight units of one size: what is held at a time must not grow with the number of units.
    let model = Model { units: vec![vec![5_000]; 8], frozen: vec![] };
    let unit_bytes = 4 * model.layouts(2)[0].padded_numel;
    for stage in ZeroStage::ALL {
        for overlap in [Overlap::Inline, Overlap::SideThread] {
            for accum in [1, 3] {
                let options = ZeroOptions { grad_accum_steps: accum, overlap, ..options(stage, DType::F32) };
                model.run(2, &options, |zero| {
                    (0..2).for_each(|step| drop(train_step(zero, step, accum, &unchanged)));
                    let second = zero.pool_stats();
                    (2..6).for_each(|step| drop(train_step(zero, step, accum, &unchanged)));
                    let sixth = zero.pool_stats();
                    let what = format!("stage {stage}, {overlap:?}, accum {accum}: {second:?}");
                    assert_eq!(second.num_allocations, sixth.num_allocations, "{what}");
                    // Inline: a gathered unit and a spare shard. Beside: two units gathered, three flat gradients and as many shards.
                    let limit = match overlap {
                        Overlap::Inline => 2 * unit_bytes,
                        Overlap::SideThread => 7 * unit_bytes,
                    };
                    assert!(sixth.peak_bytes <= limit, "{what}");
                });
            }
        }
    }
}

#[test]
fn the_plan_knows_how_much_ranks_show_each_other() {
    let slot_bytes = shardwise_comm::Options::default().slot_bytes as u64;
    assert_eq!(STAGING, Bytes(4 * slot_bytes));
    assert_eq!(PIECE, Bytes(shardwise_comm::staged::PIECE_BYTES as u64));
}
