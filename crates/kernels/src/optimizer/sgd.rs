//! Stochastic gradient descent, with and without momentum.
//!
//! ```text
//! g = grad * grad_scale + weight_decay * p
//! b = momentum * b + (1 - dampening) * g            (the first step: b = g)
//! p = p - lr * b                                    (Nesterov: p - lr * (g + momentum * b))
//! ```

use super::{Rule, Tensors, apply_on};
use crate::Threads;
use crate::simd::Simd;

/// What one step is told. States: `momentum_buffer`, or none without momentum.
///
/// # Source
/// The arithmetic is that of PyTorch's `torch.optim.SGD`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sgd {
    /// Learning rate of this step.
    pub lr: f64,
    /// How much of the last direction is kept.
    pub momentum: f64,
    /// How much of the gradient is left out of the direction, from the second step on.
    pub dampening: f64,
    /// Added to the gradient, times the parameter.
    pub weight_decay: f64,
    /// Which way the parameter goes.
    pub direction: Direction,
    /// The number of this step, from 1.
    pub step: u64,
}

/// Where momentum leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Along the momentum.
    Momentum,
    /// Along the gradient and the momentum that will be: one step ahead.
    Nesterov,
}

impl Sgd {
    /// Takes one step with momentum on several threads.
    ///
    /// # Panics
    /// If slices differ in length, or if `step` is 0.
    pub fn step_on(&self, threads: Threads, grad_scale: f32, tensors: Tensors<'_, 1>) {
        match self.direction {
            Direction::Momentum => apply_on(threads, self.factors(grad_scale), tensors),
            Direction::Nesterov => apply_on(threads, Nesterov(self.factors(grad_scale)), tensors),
        }
    }

    /// Takes one step without momentum, whatever `momentum` is.
    ///
    /// # Panics
    /// As [`Sgd::step_on`].
    pub fn plain_step_on(&self, threads: Threads, grad_scale: f32, tensors: Tensors<'_, 0>) {
        apply_on(threads, Plain(self.factors(grad_scale)), tensors);
    }

    pub(crate) fn factors(&self, grad_scale: f32) -> Factors {
        assert!(self.step > 0, "optimizer steps are counted from 1");
        // The buffer is zero before the first step, so its share needs no special case.
        let dampening = if self.step == 1 { 0.0 } else { self.dampening };
        Factors {
            grad_scale,
            weight_decay: self.weight_decay as f32,
            momentum: self.momentum as f32,
            share: (1.0 - dampening) as f32,
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
    weight_decay: f32,
    momentum: f32,
    /// `1 - dampening`
    share: f32,
    minus_lr: f32,
}

impl Factors {
    #[inline(always)]
    fn decayed<S: Simd>(self, simd: S, grad: S::Vector, param: S::Vector) -> S::Vector {
        let grad = simd.mul(grad, simd.splat(self.grad_scale));
        simd.mul_add(simd.splat(self.weight_decay), param, grad)
    }

    #[inline(always)]
    fn directed<S: Simd>(self, simd: S, grad: S::Vector, buffer: S::Vector) -> S::Vector {
        simd.mul_add(simd.splat(self.share), grad, simd.mul(simd.splat(self.momentum), buffer))
    }

    #[inline(always)]
    fn moved<S: Simd>(self, simd: S, param: S::Vector, direction: S::Vector) -> S::Vector {
        simd.mul_add(simd.splat(self.minus_lr), direction, param)
    }
}

impl Rule<1> for Factors {
    #[inline(always)]
    fn update<S: Simd>(
        self,
        simd: S,
        grad: S::Vector,
        param: S::Vector,
        [buffer]: [S::Vector; 1],
    ) -> (S::Vector, [S::Vector; 1]) {
        let buffer = self.directed(simd, self.decayed(simd, grad, param), buffer);
        (self.moved(simd, param, buffer), [buffer])
    }
}

/// Looks one step ahead.
#[derive(Debug, Clone, Copy)]
pub(super) struct Nesterov(pub Factors);

impl Rule<1> for Nesterov {
    #[inline(always)]
    fn update<S: Simd>(
        self,
        simd: S,
        grad: S::Vector,
        param: S::Vector,
        [buffer]: [S::Vector; 1],
    ) -> (S::Vector, [S::Vector; 1]) {
        let grad = self.0.decayed(simd, grad, param);
        let buffer = self.0.directed(simd, grad, buffer);
        let ahead = simd.mul_add(simd.splat(self.0.momentum), buffer, grad);
        (self.0.moved(simd, param, ahead), [buffer])
    }
}

/// Without momentum there is nothing to remember.
#[derive(Debug, Clone, Copy)]
pub(super) struct Plain(pub Factors);

impl Rule<0> for Plain {
    #[inline(always)]
    fn update<S: Simd>(
        self,
        simd: S,
        grad: S::Vector,
        param: S::Vector,
        _: [S::Vector; 0],
    ) -> (S::Vector, [S::Vector; 0]) {
        (self.0.moved(simd, param, self.0.decayed(simd, grad, param)), [])
    }
}
