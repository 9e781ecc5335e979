//! A real step needs the memory and sends the elements that the plan says, and the ZeRO paper.

use shardwise_comm::thread;
use shardwise_device::DType;
use shardwise_engine::{Engine, Layer};
use shardwise_plan::ZeroStage;
use shardwise_plan::memory::{ModelState, StateWidths};
use shardwise_plan::traffic::Traffic;
use shardwise_zero::Overlap;

use crate::layers::{Dense, Embedding, Flatten, Gradients, Head};
use crate::runs::{LR, Run, engine};

/// Every pass exchanges two numbers of eight bytes: the sum of squares, and the loss.
const SCALAR_BYTES: usize = 16;

/// How often a micro-batch gathers each unit in stage 3: for forward and backward of each layer that uses it.
fn num_gathers(engine: &Engine) -> Vec<usize> {
    let uses = |name: &str| {
        let layers = engine.specs().iter();
        2 * layers.filter(|layer| layer.params.iter().any(|param| param.name == name)).count()
    };
    engine.zero().layouts().map(|layout| uses(&layout.slots[0].param.name)).collect()
}

/// Elements that each rank sends in one step of `layers`, planned and measured.
fn sent(run: &Run, layers: impl Fn() -> Vec<Box<dyn Layer>> + Sync) -> (Traffic, Vec<u64>, Vec<u64>) {
    let ranks = thread::run(run.world, |group| {
        let rank = group.group_rank();
        let mut engine = engine(layers(), run.options(), group).unwrap();
        let gathers = num_gathers(&engine);
        let layouts: Vec<_> = engine.zero().layouts().cloned().collect();
        let planned =
            Traffic::new(&layouts, run.stage, run.accum, run.compute.size_bytes(), |unit| gathers[unit]);
        // An empty exchange ends what is under way before it.
        engine.zero().exchange(&[]).unwrap();
        let before = engine.zero().group().ledger();
        engine.train_step(LR, |microbatch| Ok(run.batch(rank, 0, microbatch))).unwrap();
        engine.zero().exchange(&[]).unwrap();
        let sent = engine.zero().group().ledger().since(&before).total();
        (planned, sent.sent_numel, sent.sent_bytes)
    });
    let planned = ranks[0].0;
    (planned, ranks.iter().map(|rank| rank.1).collect(), ranks.iter().map(|rank| rank.2).collect())
}

/// With a tied parameter, frozen ones, accumulation and a side thread: as planned, to the element.
#[test]
fn a_step_sends_what_the_plan_says() {
    for stage in ZeroStage::ALL {
        for world in [1, 2, 4] {
            for (accum, overlap, compute) in [
                (1, Overlap::Inline, DType::Bf16),
                (3, Overlap::Inline, DType::F32),
                (3, Overlap::SideThread, DType::Bf16),
            ] {
                let frozen = vec!["mid.weight".to_owned()];
                let run = Run { accum, overlap, frozen, ..Run::new(world, stage, compute) };
                let (planned, elements, bytes) = sent(&run, || crate::layers::model(Gradients::Always));
                let scalars = SCALAR_BYTES * (world - 1);
                let what = format!("stage {stage}, {world} ranks, accum {accum}, {overlap:?}, {compute}");
                assert!(elements.iter().all(|&sent| sent == (planned.elements + scalars) as u64), "{what}");
                assert!(bytes.iter().all(|&sent| sent == planned.bytes.0 + scalars as u64), "{what}");
            }
        }
    }
}

/// Large against gaps, padding and scalars, and without a tied parameter, which the paper does not count.
fn large() -> Vec<Box<dyn Layer>> {
    vec![
        Box::new(Flatten),
        Box::new(Dense { name: "up", inputs: 3, outputs: 301 }),
        Box::new(Dense { name: "mid", inputs: 301, outputs: 299 }),
        Box::new(Dense { name: "down", inputs: 299, outputs: 1 }),
        Box::new(Mean),
    ]
}

/// The input's numbers as floats of the compute type come from the batch; the loss is the mean of squares.
struct Mean;

impl Layer for Mean {
    fn spec(&self) -> shardwise_plan::LayerSpec {
        shardwise_plan::LayerSpec { name: "mean".into(), params: vec![] }
    }

    fn forward(
        &self,
        _: &shardwise_engine::Context<'_>,
        _: &shardwise_engine::Params<'_>,
        x: &shardwise_torch::Tensor,
    ) -> Result<shardwise_torch::Tensor, shardwise_engine::EngineError> {
        Ok(x.f_mul(x)?.f_mean(shardwise_torch::Kind::Float)?)
    }
}

fn large_batch() -> shardwise_engine::Batch {
    let input = shardwise_torch::Tensor::from_slice(&[0.5f32, -1.0, 2.0, 1.0, 0.0, -0.25]).view([2, 3]);
    let input = input.to_kind(shardwise_torch::Kind::BFloat16);
    shardwise_engine::Batch { target: input.shallow_clone(), input, first_row: 0 }
}

/// Ψ parameters, N ranks, no accumulation: 2Ψ, 2Ψ, 2Ψ, 3Ψ, times (N-1)/N, within 2%. And the memory of `zero`'s own table:
/// 2 bytes of compute copy, 4 of gradient (2 where there is nothing to sum), 12 of master weight and moments, of which the stage splits what
/// it says.
#[test]
fn a_step_costs_what_the_paper_says() {
    for n in [1, 2, 4, 8] {
        for (stage, times) in ZeroStage::ALL.into_iter().zip([2.0, 2.0, 2.0, 3.0]) {
            let run = Run { no_decay: vec![], ..Run::new(n, stage, DType::Bf16) };
            let psi = (4 * 301 + 302 * 299 + 300 + 3 * 5) as f64;
            thread::run(n, |group| {
                let mut engine = engine(large(), run.options(), group).unwrap();
                let before = engine.zero().group().ledger();
                engine.train_step(LR, |_| Ok(large_batch())).unwrap();
                let sent = engine.zero().group().ledger().since(&before).total().sent_numel as f64;
                let expected = times * psi * (n - 1) as f64 / n as f64;
                assert!(
                    (sent - expected).abs() <= 0.02 * expected,
                    "stage {stage}, {n} ranks: {sent}, {expected}"
                );

                let bytes = engine.zero().state_bytes();
                let (grad, widths) = (if n == 1 { 2.0 } else { 4.0 }, StateWidths::adamw(2).of_run(n, 1));
                let n = n as f64;
                let expected = psi
                    * match stage {
                        ZeroStage::Zero => 2.0 + grad + 12.0,
                        ZeroStage::One | ZeroStage::Two => 2.0 + (grad + 12.0) / n,
                        ZeroStage::Three => (2.0 + grad + 12.0) / n,
                    };
                let found = bytes.total() as f64;
                assert!(
                    (found - expected).abs() <= 0.02 * expected,
                    "stage {stage}, {n} ranks: {found}, {expected}"
                );
                let layouts: Vec<_> = engine.zero().layouts().cloned().collect();
                let planned = ModelState::new(&layouts, stage, 1, widths);
                assert_eq!(bytes.total() as u64, planned.total().0);
            });
        }
    }
}

/// Small models are no exception to the plan of memory.
#[test]
fn state_is_what_the_plan_says() {
    for stage in ZeroStage::ALL {
        for (world, accum, compute) in [(2, 1, DType::F32), (3, 3, DType::Bf16), (4, 3, DType::F32)] {
            let frozen = vec!["down.*".to_owned()];
            let run = Run { accum, frozen, ..Run::new(world, stage, compute) };
            thread::run(world, |group| {
                let engine = engine(
                    vec![
                        Box::new(Embedding),
                        Box::new(Flatten),
                        Box::new(Dense { name: "down", inputs: 7, outputs: 7 }),
                        Box::new(Head),
                    ],
                    run.options(),
                    group,
                )
                .unwrap();
                let layouts: Vec<_> = engine.zero().layouts().cloned().collect();
                let widths = StateWidths::adamw(compute.size_bytes());
                let planned = ModelState::new(&layouts, stage, accum, widths);
                let found = engine.zero().state_bytes();
                assert_eq!(found.params as u64, planned.params.0);
                assert_eq!(found.master_params as u64, planned.master_params.0);
                assert_eq!(found.optimizer as u64, planned.optimizer.0);
                assert_eq!(found.grads as u64, planned.grads.0);
            });
        }
    }
}
