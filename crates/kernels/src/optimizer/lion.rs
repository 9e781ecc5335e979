//! Lion: the sign of a mean.
//!
//! ```text
//! g = grad * grad_scale
//! u = sign(beta1 * m + (1 - beta1) * g)             (zero has the sign zero, so padding stays as it is)
//! p = p * (1 - lr * weight_decay) - lr * u
//! m = beta2 * m + (1 - beta2) * g
//! ```

use super::{Rule, Tensors, apply_on};
use crate::Threads;
use crate::simd::Simd;

/// What one step is told. States: `exp_avg`.
///
/// # Source
/// Symbolic Discovery of Optimization Algorithms (arXiv:2302.06675), program 1. DeepSpeed's kernel takes the sign of zero for
/// minus one; ours is the paper's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Lion {
    /// Learning rate of this step.
    pub lr: f64,
    /// The mean's share in the direction.
    pub beta1: f64,
    /// Decay of the mean.
    pub beta2: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

impl Lion {
    /// Takes one step on several threads.
    ///
    /// # Panics
    /// If slices differ in length.
    pub fn step_on(&self, threads: Threads, grad_scale: f32, tensors: Tensors<'_, 1>) {
        apply_on(threads, self.factors(grad_scale), tensors);
    }

    pub(crate) fn factors(&self, grad_scale: f32) -> Factors {
        Factors {
            grad_scale,
            beta1: self.beta1 as f32,
            one_minus_beta1: (1.0 - self.beta1) as f32,
            beta2: self.beta2 as f32,
            one_minus_beta2: (1.0 - self.beta2) as f32,
            decay: (1.0 - self.lr * self.weight_decay) as f32,
            minus_lr: -self.lr as f32,
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
    beta1: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    decay: f32,
    minus_lr: f32,
}

impl Rule<1> for Factors {
    #[inline(always)]
    fn update<S: Simd>(
        self,
        simd: S,
        grad: S::Vector,
        param: S::Vector,
        [mean]: [S::Vector; 1],
    ) -> (S::Vector, [S::Vector; 1]) {
        let splat = |x| simd.splat(x);
        let g = simd.mul(grad, splat(self.grad_scale));
        let direction = simd.mul_add(splat(self.one_minus_beta1), g, simd.mul(splat(self.beta1), mean));
        let param =
            simd.mul_add(splat(self.minus_lr), sign(simd, direction), simd.mul(param, splat(self.decay)));
        (param, [simd.mul_add(splat(self.one_minus_beta2), g, simd.mul(splat(self.beta2), mean))])
    }
}

/// -1, 0 or 1; NaN stays NaN.
#[inline(always)]
fn sign<S: Simd>(simd: S, x: S::Vector) -> S::Vector {
    // Twice, as the smallest subnormal number is further from 1 than the range is wide.
    let huge = simd.splat(f32::MAX);
    let x = simd.mul(simd.mul(x, huge), huge);
    // In this order of operands NaN passes.
    simd.max(simd.splat(-1.0), simd.min(simd.splat(1.0), x))
}
