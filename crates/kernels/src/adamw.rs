//! AdamW in one pass over the state.
//!
//! A step reads the gradient and the fp32 state once and writes the state and its 16-bit copy once: 28 bytes an
//! element and 2 for the copy. Unscaling and clipping ride along as one factor on the gradient. At that traffic
//! the memory is the limit, so nothing here is cleverer than it must be.
//!
//! For each element, with `t` counted from 1:
//!
//! ```text
//! g = grad * grad_scale
//! m = beta1 * m + (1 - beta1) * g
//! v = beta2 * v + (1 - beta2) * g * g
//! p = p * (1 - lr * weight_decay) - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
//! ```
//!
//! The factors are computed once in `f64` and rounded to `f32`. Every instruction set and every number of threads
//! gives the same bits.

mod pass;

use half::{bf16, f16};

use crate::Threads;
use crate::isa::Isa;
use crate::parallel::{Split, for_each_piece};
use pass::{Pass, Streamed};

/// What one step is told.
///
/// # Source
/// Decoupled Weight Decay Regularization (arXiv:1711.05101), algorithm 2; the order of operations and the place of
/// `eps` are those of PyTorch's `torch.optim.AdamW`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Learning rate of this step.
    pub lr: f32,
    /// Decay of the mean of gradients.
    pub beta1: f32,
    /// Decay of the mean of squared gradients.
    pub beta2: f32,
    /// Added to the denominator, after the bias correction.
    pub eps: f32,
    /// Decoupled weight decay; each step takes `lr * weight_decay` of the parameter.
    pub weight_decay: f32,
    /// The number of this step, from 1.
    pub step: u64,
}

/// Where the 16-bit copy of the new parameters goes.
#[derive(Debug)]
pub enum ComputeCopy<'a> {
    /// The model computes in fp32: no copy.
    None,
    /// Rounded to bf16.
    Bf16(&'a mut [bf16]),
    /// Rounded to f16; what is too large becomes infinite.
    F16(&'a mut [f16]),
}

/// Takes one step on the caller's thread.
///
/// # Shapes
/// All slices have the same length.
/// # Panics
/// If they do not, or if `hyper.step` is 0.
pub fn step(
    hyper: &AdamW,
    grad_scale: f32,
    grad: &[f32],
    master: &mut [f32],
    exp_avg: &mut [f32],
    exp_avg_sq: &mut [f32],
    compute: ComputeCopy<'_>,
) {
    step_on(Threads::ONE, hyper, grad_scale, State { grad, master, exp_avg, exp_avg_sq, compute });
}

/// The slices of one step, all of the same length.
#[derive(Debug)]
pub struct State<'a> {
    /// Gradient, read.
    pub grad: &'a [f32],
    /// Parameters, updated.
    pub master: &'a mut [f32],
    /// First moment, updated.
    pub exp_avg: &'a mut [f32],
    /// Second moment, updated.
    pub exp_avg_sq: &'a mut [f32],
    /// 16-bit copy of the parameters, written.
    pub compute: ComputeCopy<'a>,
}

/// Takes one step on several threads; the result is that of [`step`], bit for bit.
///
/// # Panics
/// As [`step`].
pub fn step_on(threads: Threads, hyper: &AdamW, grad_scale: f32, state: State<'_>) {
    let store = Store::of_step(state.grad.len());
    step_with(Isa::best(), threads, store, hyper, grad_scale, state);
}

/// How the 16-bit copy is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Store {
    /// Into the cache.
    Cached,
    /// Past the cache.
    Streamed,
}

impl Store {
    /// Steps of at least this many elements move 30 MB and more: their copy would not stay in the cache.
    const STREAM_NUMEL: usize = 1 << 20;

    fn of_step(numel: usize) -> Self {
        if numel < Self::STREAM_NUMEL { Store::Cached } else { Store::Streamed }
    }
}

fn step_with(isa: Isa, threads: Threads, store: Store, hyper: &AdamW, grad_scale: f32, state: State<'_>) {
    state.check();
    let factors = Factors::new(hyper, grad_scale);
    for_each_piece(threads, state, |piece| {
        let State { grad, master, exp_avg, exp_avg_sq, compute } = piece;
        let pass = Pass { factors, grad, master, exp_avg, exp_avg_sq, compute: () };
        match (compute, store) {
            (ComputeCopy::None, _) => isa.run(pass),
            (ComputeCopy::Bf16(copy), Store::Cached) => isa.run(pass.writing(copy)),
            (ComputeCopy::Bf16(copy), Store::Streamed) => isa.run(pass.writing(Streamed(copy))),
            (ComputeCopy::F16(copy), Store::Cached) => isa.run(pass.writing(copy)),
            (ComputeCopy::F16(copy), Store::Streamed) => isa.run(pass.writing(Streamed(copy))),
        }
    });
}

impl ComputeCopy<'_> {
    fn numel(&self) -> Option<usize> {
        match self {
            ComputeCopy::None => None,
            ComputeCopy::Bf16(copy) => Some(copy.len()),
            ComputeCopy::F16(copy) => Some(copy.len()),
        }
    }

    fn split_at(self, at: usize) -> (Self, Self) {
        match self {
            ComputeCopy::None => (ComputeCopy::None, ComputeCopy::None),
            ComputeCopy::Bf16(copy) => {
                let (low, high) = copy.split_at_mut(at);
                (ComputeCopy::Bf16(low), ComputeCopy::Bf16(high))
            }
            ComputeCopy::F16(copy) => {
                let (low, high) = copy.split_at_mut(at);
                (ComputeCopy::F16(low), ComputeCopy::F16(high))
            }
        }
    }
}

impl State<'_> {
    fn check(&self) {
        let numel = self.grad.len();
        assert_eq!(self.master.len(), numel, "master parameters against gradients");
        assert_eq!(self.exp_avg.len(), numel, "first moments against gradients");
        assert_eq!(self.exp_avg_sq.len(), numel, "second moments against gradients");
        assert_eq!(self.compute.numel().unwrap_or(numel), numel, "compute copy against gradients");
    }
}

impl Split for State<'_> {
    fn numel(&self) -> usize {
        self.grad.len()
    }

    fn split_at(self, at: usize) -> (Self, Self) {
        let grad = self.grad.split_at(at);
        let master = self.master.split_at_mut(at);
        let exp_avg = self.exp_avg.split_at_mut(at);
        let exp_avg_sq = self.exp_avg_sq.split_at_mut(at);
        let compute = self.compute.split_at(at);
        (
            State {
                grad: grad.0,
                master: master.0,
                exp_avg: exp_avg.0,
                exp_avg_sq: exp_avg_sq.0,
                compute: compute.0,
            },
            State {
                grad: grad.1,
                master: master.1,
                exp_avg: exp_avg.1,
                exp_avg_sq: exp_avg_sq.1,
                compute: compute.1,
            },
        )
    }
}

/// The step's scalars, rounded to what the lanes compute with.
#[derive(Debug, Clone, Copy)]
struct Factors {
    grad_scale: f32,
    beta1: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    /// `1 / sqrt(1 - beta2^t)`
    denom_scale: f32,
    eps: f32,
    /// `1 - lr * weight_decay`
    decay: f32,
    /// `-lr / (1 - beta1^t)`
    minus_step_size: f32,
}

impl Factors {
    fn new(hyper: &AdamW, grad_scale: f32) -> Self {
        assert!(hyper.step > 0, "optimizer steps are counted from 1");
        let (lr, weight_decay) = (f64::from(hyper.lr), f64::from(hyper.weight_decay));
        let (beta1, beta2) = (f64::from(hyper.beta1), f64::from(hyper.beta2));
        let bias_correction1 = 1.0 - power(beta1, hyper.step);
        let bias_correction2 = 1.0 - power(beta2, hyper.step);
        Factors {
            grad_scale,
            beta1: hyper.beta1,
            one_minus_beta1: (1.0 - beta1) as f32,
            beta2: hyper.beta2,
            one_minus_beta2: (1.0 - beta2) as f32,
            denom_scale: (1.0 / bias_correction2.sqrt()) as f32,
            eps: hyper.eps,
            decay: (1.0 - lr * weight_decay) as f32,
            minus_step_size: (-lr / bias_correction1) as f32,
        }
    }
}

/// `base^exponent` by squaring: unlike the library's `powi` and `powf`, the same bits on every machine.
fn power(mut base: f64, mut exponent: u64) -> f64 {
    let mut product = 1.0;
    while exponent > 0 {
        if exponent & 1 == 1 {
            product *= base;
        }
        base *= base;
        exponent >>= 1;
    }
    product
}

#[cfg(test)]
mod tests;
