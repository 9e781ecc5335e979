//! Runs of the small model, and all that they leave behind.

use shardwise_comm::{Group, thread};
use shardwise_device::DType;
use shardwise_engine::{Batch, BoxError, Engine, EngineError, EngineOptions, Layer, RandomInit};
use shardwise_plan::pattern::NamePattern;
use shardwise_plan::{ActivationRules, ZeroStage};
use shardwise_torch::{Tensor, set_num_threads};
use shardwise_zero::{
    AdamOptions, BiasCorrection, LossScaling, Optimizer, Overlap, ParamGroup, StepOutcome, ZeroOptions,
};

use crate::layers::{Gradients, VOCAB, dropping_model, model};

pub const LR: f64 = 0.01;
/// Divides by 1, 2, 3 and 4 ranks, and again by 3 micro-batches.
pub const GLOBAL_ROWS: usize = 36;
const SEQ: usize = 3;

/// One way to train the small model.
#[derive(Debug, Clone)]
pub struct Run {
    pub world: usize,
    pub stage: ZeroStage,
    pub compute: DType,
    pub accum: usize,
    pub overlap: Overlap,
    pub clip: Option<f64>,
    pub no_decay: Vec<String>,
    pub frozen: Vec<String>,
    pub gradients: Gradients,
    pub activations: ActivationRules,
    /// Share of elements that layers drop.
    pub dropout: f64,
}

impl Run {
    pub fn new(world: usize, stage: ZeroStage, compute: DType) -> Self {
        Run {
            world,
            stage,
            compute,
            accum: 1,
            overlap: Overlap::Inline,
            clip: None,
            no_decay: vec!["*.bias".into()],
            frozen: vec![],
            gradients: Gradients::Sometimes,
            activations: ActivationRules::default(),
            dropout: 0.0,
        }
    }

    pub fn options(&self) -> EngineOptions {
        let mut options = options(self.stage, self.compute);
        options.zero.grad_accum_steps = self.accum;
        options.zero.overlap = self.overlap;
        options.zero.clip_grad_norm = self.clip;
        options.zero.groups = vec![no_decay(&self.no_decay)];
        options.frozen = self.frozen.clone();
        options.activations = self.activations.clone();
        options
    }

    pub fn engine(&self, group: Group) -> Engine {
        let layers = if self.dropout > 0.0 {
            dropping_model(self.gradients, self.dropout)
        } else {
            model(self.gradients)
        };
        engine(layers, self.options(), group).unwrap()
    }

    /// This rank's micro-batch: global batches are the same rows however they are split.
    pub fn batch(&self, rank: usize, step: usize, microbatch: usize) -> Batch {
        let rows = GLOBAL_ROWS / (self.world * self.accum);
        batch(step * GLOBAL_ROWS + (microbatch * self.world + rank) * rows, rows)
    }

    /// Trains for `steps`, given by their batches' numbers, on all ranks, which must end alike.
    pub fn trace(&self, steps: impl IntoIterator<Item = usize> + Clone + Sync) -> Trace {
        let traces = thread::run(self.world, |group| {
            let rank = group.group_rank();
            let mut engine = self.engine(group);
            let mut trace = Trace::default();
            for step in steps.clone() {
                let report =
                    engine.train_step(LR, |microbatch| Ok(self.batch(rank, step, microbatch))).unwrap();
                trace.losses.push(report.loss);
                trace.norms.push(report.step.grad_norm);
                trace.outcomes.push(report.step.outcome);
            }
            trace.weights = weights(&mut engine);
            let num_units = engine.zero().layouts().len();
            let copies = (0..num_units).map(|unit| engine.zero_mut().compute_bytes(unit).unwrap());
            trace.copies = copies.collect();
            trace
        });
        let mut traces = traces.into_iter();
        let first = traces.next().unwrap();
        traces.for_each(|other| other.assert_same_bits(&first, "another rank"));
        first
    }
}

/// Losses, norms, outcomes, and the final parameters: master weights by name and compute copies by unit.
#[derive(Debug, Clone, Default)]
pub struct Trace {
    pub losses: Vec<f64>,
    pub norms: Vec<f64>,
    pub outcomes: Vec<StepOutcome>,
    pub weights: Vec<(String, Vec<f32>)>,
    pub copies: Vec<Vec<u8>>,
}

impl Trace {
    pub fn assert_same_bits(&self, other: &Trace, what: &str) {
        let bits = |values: &[f64]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&self.losses), bits(&other.losses), "losses, {what}");
        assert_eq!(bits(&self.norms), bits(&other.norms), "gradient norms, {what}");
        assert_eq!(self.outcomes, other.outcomes, "outcomes, {what}");
        assert_eq!(self.weights.len(), other.weights.len());
        for ((name, values), (other_name, others)) in self.weights.iter().zip(&other.weights) {
            assert_eq!((name, values.len()), (other_name, others.len()));
            let same = values.iter().zip(others).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "weights of `{name}`, {what}");
        }
        assert!(self.copies == other.copies, "compute copies, {what}");
    }

    /// Whether any weight differs.
    pub fn differs(&self, other: &Trace) -> bool {
        self.weights != other.weights
    }
}

/// Parameters without weight decay, by patterns.
pub fn no_decay(patterns: &[String]) -> ParamGroup {
    ParamGroup::no_decay(patterns.iter().map(NamePattern::new).collect())
}

pub fn options(stage: ZeroStage, compute: DType) -> EngineOptions {
    let zero = ZeroOptions {
        compute,
        loss_scaling: (compute == DType::F16).then_some(LossScaling::Static(1024.0)),
        ..ZeroOptions::new(
            stage,
            Optimizer::AdamW(AdamOptions {
                beta1: 0.9,
                beta2: 0.99,
                eps: 1e-8,
                weight_decay: 0.1,
                bias_correction: BiasCorrection::On,
            }),
        )
    };
    EngineOptions { seed: 5, ..EngineOptions::new(zero) }
}

pub fn engine(
    layers: Vec<Box<dyn Layer>>,
    options: EngineOptions,
    group: Group,
) -> Result<Engine, EngineError> {
    set_num_threads(1);
    Engine::new(layers, options, group, &mut RandomInit { seed: 3 })
}

/// All parameters, whole, in fp32.
pub fn weights(engine: &mut Engine) -> Vec<(String, Vec<f32>)> {
    let mut all = Vec::new();
    engine
        .for_each_param::<EngineError>(|param, values| {
            all.push((param.name.clone(), values.to_vec()));
            Ok(())
        })
        .unwrap();
    all
}

fn token(sample: usize, position: usize) -> i64 {
    let x = (sample * 31 + position).wrapping_mul(0x9e37_79b9_7f4a_7c15_u64 as usize);
    (x >> 40) as i64 % (VOCAB as i64 - 1) // never the bad one
}

/// Samples `first..first + rows` of an endless data set in which the next token follows from the last.
pub fn batch(first: usize, rows: usize) -> Batch {
    let tokens = |shift: usize| -> Tensor {
        let tokens = (first..first + rows).flat_map(|sample| (0..SEQ).map(move |t| token(sample, t + shift)));
        Tensor::from_slice(&tokens.collect::<Vec<_>>()).view([rows as i64, SEQ as i64])
    };
    let target = (tokens(0) * 3 + 1).remainder(VOCAB as i64 - 1);
    Batch { input: tokens(0), target, first_row: first as u64 }
}

/// An error and all its causes.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let causes = std::iter::successors(Some(error), |&error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// As a batch closure's result.
pub fn given(batch: Batch) -> Result<Batch, BoxError> {
    Ok(batch)
}
