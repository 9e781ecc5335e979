//! Adam and AdamW.
//!
//! For each element, with `t` counted from 1:
//!
//! ```text
//! g = grad * grad_scale                      (Adam: + weight_decay * p)
//! m = beta1 * m + (1 - beta1) * g
//! v = beta2 * v + (1 - beta2) * g * g
//! p = p * (1 - lr * weight_decay) - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
//!         └── AdamW ────────────┘
//! ```

use super::{Rule, Tensors, apply_on, power};
use crate::Threads;
use crate::simd::Simd;

/// What one step is told. States: `exp_avg`, `exp_avg_sq`.
///
/// # Source
/// Adam (arXiv:1412.6980) and Decoupled Weight Decay Regularization (arXiv:1711.05101), algorithm 2; the order of
/// operations and the place of `eps` are those of PyTorch's `torch.optim.Adam` and `AdamW`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Adam {
    /// Learning rate of this step.
    pub lr: f64,
    /// Decay of the mean of gradients.
    pub beta1: f64,
    /// Decay of the mean of squared gradients.
    pub beta2: f64,
    /// Added to the denominator, after the bias correction.
    pub eps: f64,
    /// How much weights decay.
    pub weight_decay: f64,
    /// Where the decay goes.
    pub decay: WeightDecay,
    /// Whether the means are corrected for having begun at zero.
    pub bias_correction: BiasCorrection,
    /// The number of this step, from 1.
    pub step: u64,
}

/// Where weight decay goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightDecay {
    /// AdamW: each step takes `lr * weight_decay` of the parameter.
    Decoupled,
    /// Adam: `weight_decay` of the parameter is added to the gradient.
    L2,
}

/// Whether means are corrected for having begun at zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BiasCorrection {
    /// As the papers do.
    On,
    /// Means are taken as they are.
    Off,
}

impl BiasCorrection {
    /// `1 - beta^step`, or 1.
    pub(super) fn of(self, beta: f64, step: u64) -> f64 {
        assert!(step > 0, "optimizer steps are counted from 1");
        match self {
            BiasCorrection::On => 1.0 - power(beta, step),
            BiasCorrection::Off => 1.0,
        }
    }
}

impl Adam {
    /// Takes one step on several threads.
    ///
    /// # Panics
    /// If slices differ in length, or if `step` is 0.
    pub fn step_on(&self, threads: Threads, grad_scale: f32, tensors: Tensors<'_, 2>) {
        match self.decay {
            WeightDecay::Decoupled => apply_on(threads, self.decoupled(grad_scale), tensors),
            WeightDecay::L2 => apply_on(threads, self.l2(grad_scale), tensors),
        }
    }

    pub(crate) fn decoupled(&self, grad_scale: f32) -> Factors {
        let bias_correction1 = self.bias_correction.of(self.beta1, self.step);
        let bias_correction2 = self.bias_correction.of(self.beta2, self.step);
        Factors {
            grad_scale,
            beta1: self.beta1 as f32,
            one_minus_beta1: (1.0 - self.beta1) as f32,
            beta2: self.beta2 as f32,
            one_minus_beta2: (1.0 - self.beta2) as f32,
            denom_scale: (1.0 / bias_correction2.sqrt()) as f32,
            eps: self.eps as f32,
            decay: (1.0 - self.lr * self.weight_decay) as f32,
            minus_step_size: (-self.lr / bias_correction1) as f32,
        }
    }

    pub(crate) fn l2(&self, grad_scale: f32) -> L2 {
        let undecayed = Adam { weight_decay: 0.0, ..*self };
        L2 { adam: undecayed.decoupled(grad_scale), weight_decay: self.weight_decay as f32 }
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
    /// `1 / sqrt(1 - beta2^t)`
    denom_scale: f32,
    eps: f32,
    /// `1 - lr * weight_decay`
    decay: f32,
    /// `-lr / (1 - beta1^t)`
    minus_step_size: f32,
}

impl Factors {
    /// The update with a gradient that is scaled already.
    #[inline(always)]
    fn scaled<S: Simd>(
        self,
        simd: S,
        g: S::Vector,
        p: S::Vector,
        [m, v]: [S::Vector; 2],
    ) -> (S::Vector, [S::Vector; 2]) {
        let splat = |x| simd.splat(x);
        let m = simd.mul_add(splat(self.one_minus_beta1), g, simd.mul(splat(self.beta1), m));
        let v = simd.mul_add(simd.mul(splat(self.one_minus_beta2), g), g, simd.mul(splat(self.beta2), v));
        let denom = simd.mul_add(simd.sqrt(v), splat(self.denom_scale), splat(self.eps));
        let p = simd.mul_add(splat(self.minus_step_size), simd.div(m, denom), simd.mul(p, splat(self.decay)));
        (p, [m, v])
    }
}

impl Rule<2> for Factors {
    #[inline(always)]
    fn update<S: Simd>(
        self,
        simd: S,
        grad: S::Vector,
        param: S::Vector,
        states: [S::Vector; 2],
    ) -> (S::Vector, [S::Vector; 2]) {
        self.scaled(simd, simd.mul(grad, simd.splat(self.grad_scale)), param, states)
    }
}

/// Adam as it was first: the decay goes through the moments.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct L2 {
    pub adam: Factors,
    pub weight_decay: f32,
}

impl Rule<2> for L2 {
    #[inline(always)]
    fn update<S: Simd>(
        self,
        simd: S,
        grad: S::Vector,
        param: S::Vector,
        states: [S::Vector; 2],
    ) -> (S::Vector, [S::Vector; 2]) {
        let grad = simd.mul(grad, simd.splat(self.adam.grad_scale));
        let grad = simd.mul_add(simd.splat(self.weight_decay), param, grad);
        self.adam.scaled(simd, grad, param, states)
    }
}
