//! Adagrad.
//!
//! ```text
//! g = grad * grad_scale + weight_decay * p
//! s = s + g * g
//! p = p - lr / (1 + (t - 1) * lr_decay) * g / (sqrt(s) + eps)
//! ```

use super::{Rule, Tensors, apply_on};
use crate::Threads;
use crate::simd::Simd;

/// What one step is told. States: `sum`.
///
/// # Source
/// Duchi, Hazan, Singer, "Adaptive Subgradient Methods for Online Learning and Stochastic Optimization", JMLR 2011; the
/// arithmetic is that of PyTorch's `torch.optim.Adagrad`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Adagrad {
    /// Learning rate of this step.
    pub lr: f64,
    /// How fast the rate falls with the number of steps.
    pub lr_decay: f64,
    /// Added to the denominator.
    pub eps: f64,
    /// Added to the gradient, times the parameter.
    pub weight_decay: f64,
    /// The number of this step, from 1.
    pub step: u64,
}

impl Adagrad {
    /// Takes one step on several threads.
    ///
    /// # Panics
    /// If slices differ in length, or if `step` is 0.
    pub fn step_on(&self, threads: Threads, grad_scale: f32, tensors: Tensors<'_, 1>) {
        apply_on(threads, self.factors(grad_scale), tensors);
    }

    pub(crate) fn factors(&self, grad_scale: f32) -> Factors {
        assert!(self.step > 0, "optimizer steps are counted from 1");
        Factors {
            grad_scale,
            weight_decay: self.weight_decay as f32,
            eps: self.eps as f32,
            minus_lr: (-self.lr / (1.0 + (self.step - 1) as f64 * self.lr_decay)) as f32,
        }
    }
}

/// The step's scalars, rounded to what the lanes compute with.
///
/// `cuda/optimizer.cu` reads the same structure.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Factors {
    grad_scale: f32,
    weight_decay: f32,
    eps: f32,
    minus_lr: f32,
}

impl Rule<1> for Factors {
    #[inline(always)]
    fn update<S: Simd>(
        self,
        simd: S,
        grad: S::Vector,
        param: S::Vector,
        [sum]: [S::Vector; 1],
    ) -> (S::Vector, [S::Vector; 1]) {
        let grad = simd.mul(grad, simd.splat(self.grad_scale));
        let grad = simd.mul_add(simd.splat(self.weight_decay), param, grad);
        let sum = simd.mul_add(grad, grad, sum);
        let denom = simd.add(simd.sqrt(sum), simd.splat(self.eps));
        (simd.mul_add(simd.splat(self.minus_lr), simd.div(grad, denom), param), [sum])
    }
}
