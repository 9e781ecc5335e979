//! The plain form of what `zero` does: data-parallel AdamW on whole arrays, every rank's gradient in one place.
//!
//! Sums of gradients are part of the contract, so they are done in f32 in the promised order; everything after
//! them is done in f64 and rounded to what is kept.

use shardwise_plan::{ParamSpec, UnitLayout};
use shardwise_zero::ZeroOptions;

use crate::harness::{self, LR};

struct Param {
    spec: ParamSpec,
    trainable: bool,
    weight: Vec<f32>,
    exp_avg: Vec<f32>,
    exp_avg_sq: Vec<f32>,
}

pub struct Reference {
    world: usize,
    options: ZeroOptions,
    params: Vec<Param>,
    num_steps: i32,
}

fn add(sum: &mut [f32], more: &[f32]) {
    sum.iter_mut().zip(more).for_each(|(sum, more)| *sum += more);
}

impl Reference {
    pub fn new(layouts: &[UnitLayout], world: usize, options: &ZeroOptions) -> Self {
        let slots =
            layouts.iter().flat_map(|layout| layout.slots.iter().map(|slot| (&slot.param, layout.trainable)));
        let params = slots.map(|(spec, trainable)| {
            let mut weight = vec![0.0; spec.numel()];
            harness::fill(spec, 0..spec.numel(), &mut weight).unwrap();
            let zeros = vec![0.0; spec.numel()];
            Param { spec: spec.clone(), trainable, weight, exp_avg: zeros.clone(), exp_avg_sq: zeros }
        });
        Reference { world, options: options.clone(), params: params.collect(), num_steps: 0 }
    }

    /// One parameter's gradient, summed over ranks and micro-batches in the order that the stage demands.
    fn summed_gradient(&self, param: &ParamSpec, step: usize) -> Vec<f32> {
        let (accum, zeros) = (self.options.grad_accum_steps, vec![0f32; param.numel()]);
        let of = |microbatch, rank| {
            let values = harness::gradient(param, self.options.compute, [step, microbatch, rank]);
            values.unwrap_or_else(|| zeros.clone())
        };
        // Stages 2 and 3 add ranks first, stages 0 and 1 micro-batches.
        let ranks_first = self.options.stage.shards_gradients();
        let (outer, inner) = if ranks_first { (accum, self.world) } else { (self.world, accum) };
        let one = |i, j| if ranks_first { of(i, j) } else { of(j, i) };
        let sums = (0..outer).map(|i| {
            let mut sum = one(i, 0);
            (1..inner).for_each(|j| add(&mut sum, &one(i, j)));
            sum
        });
        sums.reduce(|mut sum, more| {
            add(&mut sum, &more);
            sum
        })
        .expect("at least one rank and micro-batch")
    }

    /// Takes a step and returns the gradient norm.
    pub fn step(&mut self, step: usize) -> f64 {
        let grads: Vec<_> = self.params.iter().map(|param| self.summed_gradient(&param.spec, step)).collect();
        let trained = || self.params.iter().zip(&grads).filter(|(param, _)| param.trainable);
        let squares: f64 = trained().flat_map(|(_, grad)| grad).map(|&g| f64::from(g) * f64::from(g)).sum();
        let mean = 1.0 / (self.world * self.options.grad_accum_steps) as f64;
        let norm = squares.sqrt() * mean;
        let clip = self.options.clip_grad_norm.map_or(1.0, |max| (max / (norm + 1e-6)).min(1.0));
        self.num_steps += 1;
        let h = self.options.adamw;
        let correct = |beta: f64| 1.0 - beta.powi(self.num_steps);
        for (param, grad) in self.params.iter_mut().zip(&grads).filter(|(param, _)| param.trainable) {
            let exempt = self.options.no_decay.iter().any(|suffix| param.spec.name.ends_with(&suffix[1..]));
            let decay = if exempt { 0.0 } else { h.weight_decay };
            for (i, &g) in grad.iter().enumerate() {
                let g = f64::from(g) * mean * clip;
                let m = h.beta1 * f64::from(param.exp_avg[i]) + (1.0 - h.beta1) * g;
                let v = h.beta2 * f64::from(param.exp_avg_sq[i]) + (1.0 - h.beta2) * g * g;
                let update = m / correct(h.beta1) / ((v / correct(h.beta2)).sqrt() + h.eps);
                let weight = f64::from(param.weight[i]) * (1.0 - LR * decay) - LR * update;
                (param.exp_avg[i], param.exp_avg_sq[i], param.weight[i]) =
                    (m as f32, v as f32, weight as f32);
            }
        }
        norm
    }

    pub fn weights(&self) -> impl Iterator<Item = (&str, &[f32])> {
        self.params.iter().map(|param| (param.spec.name.as_str(), param.weight.as_slice()))
    }
}
