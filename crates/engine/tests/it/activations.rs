//! What becomes of activations between forward and backward changes neither a bit nor what is sent.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use shardwise_comm::{solo, thread};
use shardwise_device::DType;
use shardwise_engine::{Batch, Context, EngineError, Layer, Params};
use shardwise_plan::{ActivationPolicy, ActivationRules, LayerSpec, NamePattern, ZeroStage};
use shardwise_torch::Tensor;
use shardwise_zero::Overlap;

use crate::layers::{Gradients, dropping_model, model};
use crate::runs::{LR, Run, engine, options};

/// All recomputed, all offloaded, and a mixture in which neighbours differ.
fn rules() -> [ActivationRules; 3] {
    use ActivationPolicy::{Keep, Offload, Recompute};
    let rule = |pattern: &str, policy| (NamePattern::new(pattern), policy);
    let mixed = ActivationRules {
        default: Keep,
        rules: vec![rule("block", Recompute), rule("*ed*", Offload), rule("m*", Offload)],
    };
    [ActivationRules::all(Recompute), ActivationRules::all(Offload), mixed]
}

fn check(run: &Run) {
    const NUM_STEPS: usize = 6;
    let kept = run.trace(0..NUM_STEPS);
    for activations in rules() {
        let what = format!("{run:?}, {activations:?}");
        Run { activations, ..run.clone() }.trace(0..NUM_STEPS).assert_same_bits(&kept, &what);
    }
}

#[test]
fn recomputed_and_offloaded_runs_give_the_bits_of_the_kept_run() {
    for compute in [DType::F32, DType::Bf16] {
        for stage in ZeroStage::ALL {
            for (world, accum, overlap, dropout) in [
                (1, 1, Overlap::Inline, 0.0),
                (2, 1, Overlap::SideThread, 0.3),
                (3, 3, Overlap::Inline, 0.3),
                (2, 3, Overlap::SideThread, 0.0),
            ] {
                check(&Run { accum, overlap, dropout, ..Run::new(world, stage, compute) });
            }
        }
    }
}

#[test]
fn so_they_do_with_frozen_layers() {
    for frozen in [vec!["embedding.*", "up.*"], vec!["block.*", "*.bias"], vec!["*"]] {
        let frozen: Vec<String> = frozen.into_iter().map(String::from).collect();
        for stage in [ZeroStage::One, ZeroStage::Three] {
            let run = Run { frozen: frozen.clone(), no_decay: vec![], ..Run::new(2, stage, DType::F32) };
            check(&run);
        }
    }
}

/// A layer that counts how often it runs.
struct Counted {
    layer: Box<dyn Layer>,
    calls: Arc<AtomicUsize>,
}

impl Layer for Counted {
    fn spec(&self) -> LayerSpec {
        self.layer.spec()
    }

    fn forward(&self, context: &Context<'_>, params: &Params<'_>, x: &Tensor) -> Result<Tensor, EngineError> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        self.layer.forward(context, params, x)
    }
}

#[test]
fn all_but_the_last_layer_run_a_second_time() {
    for policy in [ActivationPolicy::Keep, ActivationPolicy::Recompute, ActivationPolicy::Offload] {
        let mut counts = Vec::new();
        let layers = model(Gradients::Always).into_iter().map(|layer| {
            let calls = Arc::<AtomicUsize>::default();
            counts.push(calls.clone());
            Box::new(Counted { layer, calls }) as Box<dyn Layer>
        });
        let layers: Vec<_> = layers.collect();
        let mut options = options(ZeroStage::Three, DType::F32);
        options.activations = ActivationRules::all(policy);
        let mut engine = engine(layers, options, solo()).unwrap();
        let run = Run::new(1, ZeroStage::Three, DType::F32);
        engine.train_step(LR, |microbatch| Ok(run.batch(0, 0, microbatch))).unwrap();
        let counts: Vec<_> = counts.iter().map(|calls| calls.load(Ordering::Relaxed)).collect();
        let (last, others) = counts.split_last().unwrap();
        assert_eq!(*last, 1, "{policy:?}");
        let expected = if policy == ActivationPolicy::Keep { 1 } else { 2 };
        assert!(others.iter().all(|count| *count == expected), "{policy:?}: {counts:?}");
    }
}

/// Recomputation happens while the layer is whole for its backward: nothing more is gathered.
#[test]
fn recomputation_sends_nothing_more() {
    let sent = |activations: ActivationRules| {
        let run = Run { activations, accum: 2, ..Run::new(3, ZeroStage::Three, DType::Bf16) };
        thread::run(run.world, |group| {
            let rank = group.group_rank();
            let mut engine = run.engine(group);
            engine.train_step(LR, |microbatch| Ok(run.batch(rank, 0, microbatch))).unwrap();
            engine.zero().exchange(&[]).unwrap();
            let total = engine.zero().group().ledger().total();
            (total.num_calls, total.sent_bytes)
        })
    };
    let kept = sent(ActivationRules::default());
    for rules in rules() {
        assert_eq!(sent(rules), kept);
    }
}

/// What is dropped depends on the seed and on where a row stands in the run, and nothing is dropped from a model that is asked.
#[test]
fn dropout_is_for_training_and_follows_seed_and_place() {
    let loss = |seed, first_row, rate| {
        let mut options = options(ZeroStage::Zero, DType::F32);
        options.seed = seed;
        let mut engine = engine(dropping_model(Gradients::Always, rate), options, solo()).unwrap();
        let run = Run::new(1, ZeroStage::Zero, DType::F32);
        let batch = || Batch { first_row, ..run.batch(0, 0, 0) };
        let asked = engine.evaluate(&batch().input, &batch().target).unwrap();
        (engine.train_step(0.0, |_| Ok(batch())).unwrap().loss, asked)
    };
    let (first, asked) = loss(1, 0, 0.5);
    assert_eq!(loss(1, 0, 0.5), (first, asked));
    for (seed, first_row, rate) in [(2, 0, 0.5), (1, 36, 0.5), (1, 0, 0.1), (1, 0, 0.0)] {
        let (other, asked_other) = loss(seed, first_row, rate);
        assert_eq!(asked_other, asked, "nothing is dropped");
        assert_ne!(other, first, "seed {seed}, row {first_row}, rate {rate}");
    }
    assert!((loss(1, 0, 0.0).0 - asked).abs() < 1e-12);
}
