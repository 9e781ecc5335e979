//! The plain form of what `zero` does: data-parallel training on whole arrays, every rank's gradient in one place.
//!
//! Sums of gradients are part of the contract, so they are done in f32 in the promised order; everything after
//! them is done in f64 and rounded to what is kept. What is divided before it is sent is always divided here.

use shardwise_device::DType;
use shardwise_plan::{ParamSpec, UnitLayout};
use shardwise_zero::{GradientOp, LossScaling, Optimizer, Predivide, ZeroOptions};

use crate::algorithms;
use crate::harness::{self, LR, rounded};

struct Param {
    spec: ParamSpec,
    trainable: bool,
    weight: Vec<f32>,
    states: Vec<Vec<f32>>,
}

pub struct Reference {
    world: usize,
    options: ZeroOptions,
    params: Vec<Param>,
    num_steps: i32,
}

/// Adds, and rounds to `dtype`.
fn add(sum: &mut [f32], more: &[f32], dtype: DType) {
    sum.iter_mut().zip(more).for_each(|(sum, more)| *sum = rounded(*sum + more, dtype));
}

impl Reference {
    pub fn new(layouts: &[UnitLayout], world: usize, options: &ZeroOptions) -> Self {
        let slots =
            layouts.iter().flat_map(|layout| layout.slots.iter().map(|slot| (&slot.param, layout.trainable)));
        let params = slots.map(|(spec, trainable)| {
            let mut weight = vec![0.0; spec.numel()];
            harness::fill(spec, 0..spec.numel(), &mut weight).unwrap();
            let states = algorithms::first_states(&options.optimizer, spec);
            Param { spec: spec.clone(), trainable, weight, states }
        });
        Reference { world, options: options.clone(), params: params.collect(), num_steps: 0 }
    }

    fn scale(&self) -> f64 {
        match self.options.loss_scaling {
            Some(LossScaling::Static(scale)) => scale,
            Some(LossScaling::Dynamic(_)) => unreachable!("the reference has static scales only"),
            None => 1.0,
        }
    }

    /// What is multiplied with before sending.
    fn before(&self) -> f32 {
        let divisor = match self.options.reduction.predivide {
            _ if self.world == 1 => 1.0,
            Predivide::By(divisor) => divisor,
            Predivide::ByNumRanks => self.world as f64,
        };
        (1.0 / divisor) as f32
    }

    /// The ranks' `terms` of type `own`, as they are sent and added.
    fn over_ranks(&self, own: DType, terms: impl Iterator<Item = Vec<f32>>) -> Vec<f32> {
        let wire = match self.options.reduction.communication_dtype {
            Some(wire) if self.world > 1 => wire,
            _ => own,
        };
        let sent = |term: Vec<f32>| term.into_iter().map(|x| rounded(x * self.before(), wire)).collect();
        let added = |mut sum: Vec<f32>, more: Vec<f32>| {
            add(&mut sum, &more, DType::F32);
            sum
        };
        terms.map(sent).reduce(added).expect("at least one rank")
    }

    /// The micro-batches' `terms`, as they are stored and added.
    fn over_microbatches(&self, terms: impl Iterator<Item = Vec<f32>>) -> Vec<f32> {
        let sums = self.options.reduction.accumulation_dtype;
        let zeros = |term: &Vec<f32>| vec![0f32; term.len()];
        let mut total = None;
        for term in terms {
            add(total.get_or_insert_with(|| zeros(&term)), &term, sums);
        }
        total.expect("at least one micro-batch")
    }

    /// One parameter's gradient, summed over ranks and micro-batches in the order that the stage demands.
    fn summed_gradient(&self, param: &ParamSpec, step: usize) -> Vec<f32> {
        let (accum, compute) = (self.options.grad_accum_steps, self.options.compute);
        let of = |microbatch, rank| {
            let values = harness::gradient(param, compute, [step, microbatch, rank]);
            let values = values.unwrap_or_else(|| vec![0f32; param.numel()]);
            values.into_iter().map(|x| x * self.scale() as f32).collect()
        };
        if self.options.stage.shards_gradients() || accum == 1 {
            let ranks =
                |microbatch| self.over_ranks(compute, (0..self.world).map(|rank| of(microbatch, rank)));
            return self.over_microbatches((0..accum).map(ranks));
        }
        let sums = self.options.reduction.accumulation_dtype;
        let microbatches = |rank| self.over_microbatches((0..accum).map(|microbatch| of(microbatch, rank)));
        let total = self.over_ranks(sums, (0..self.world).map(microbatches));
        total.into_iter().map(|x| rounded(x, sums)).collect()
    }

    /// As `Zero::set_momentum`.
    pub fn set_momentum(&mut self, momentum: f64) {
        match &mut self.options.optimizer {
            Optimizer::AdamW(adam) | Optimizer::Adam(adam) => adam.beta1 = momentum,
            Optimizer::Sgd(sgd) => sgd.momentum = momentum,
            other => panic!("{other:?} is not asked for"),
        }
    }

    /// Takes a step and returns the gradient norm.
    pub fn step(&mut self, step: usize) -> f64 {
        let grads: Vec<_> = self.params.iter().map(|param| self.summed_gradient(&param.spec, step)).collect();
        let trained = || self.params.iter().zip(&grads).filter(|(param, _)| param.trainable);
        let squares: f64 = trained().flat_map(|(_, grad)| grad).map(|&g| f64::from(g) * f64::from(g)).sum();
        let num_averaged = match self.options.reduction.op {
            GradientOp::Mean => self.world * self.options.grad_accum_steps,
            GradientOp::Sum => self.options.grad_accum_steps,
        };
        let mean = 1.0 / num_averaged as f64 / f64::from(self.before()) / self.scale();
        let norm = squares.sqrt() * mean;
        let clip = self.options.clip_grad_norm.map_or(1.0, |max| (max / (norm + 1e-6)).min(1.0));
        self.num_steps += 1;
        for (param, grad) in self.params.iter_mut().zip(&grads).filter(|(param, _)| param.trainable) {
            let group = self.options.groups.iter().find(|group| group.matches(&param.spec.name));
            let grad: Vec<f64> = grad.iter().map(|&g| f64::from(g) * mean * clip).collect();
            algorithms::Step {
                optimizer: &self.options.optimizer,
                lr: LR * group.map_or(1.0, |group| group.lr_scale),
                decay: group.and_then(|group| group.weight_decay),
                step: self.num_steps,
            }
            .take(&param.spec, &grad, &mut param.weight, &mut param.states);
        }
        norm
    }

    pub fn weights(&self) -> impl Iterator<Item = (&str, &[f32])> {
        self.params.iter().map(|param| (param.spec.name.as_str(), param.weight.as_slice()))
    }
}
