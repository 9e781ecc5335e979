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

use half::{bf16, f16};

use crate::Threads;
use crate::isa::{Isa, Kernel};
use crate::parallel::{Split, for_each_piece};
use crate::simd::{Float16, Scalar, Simd};

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
    step_with(Isa::best(), threads, hyper, grad_scale, state);
}

/// Steps of at least this many elements move 30 MB and more: their 16-bit copy would not stay in the cache.
const STREAM_NUMEL: usize = 1 << 20;

fn step_with(isa: Isa, threads: Threads, hyper: &AdamW, grad_scale: f32, state: State<'_>) {
    state.check();
    let stream = state.grad.len() >= STREAM_NUMEL;
    let factors = Factors::new(hyper, grad_scale);
    for_each_piece(threads, state, |piece| {
        let State { grad, master, exp_avg, exp_avg_sq, compute } = piece;
        let pass = Pass { factors, grad, master, exp_avg, exp_avg_sq, compute: () };
        match compute {
            ComputeCopy::None => isa.run(pass),
            ComputeCopy::Bf16(copy) if stream => isa.run(pass.writing(Streamed(copy))),
            ComputeCopy::Bf16(copy) => isa.run(pass.writing(copy)),
            ComputeCopy::F16(copy) if stream => isa.run(pass.writing(Streamed(copy))),
            ComputeCopy::F16(copy) => isa.run(pass.writing(copy)),
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

/// Writes the 16-bit copy, or does not.
trait Copy16 {
    fn numel_or(&self, numel: usize) -> usize;
    /// How many elements to write one by one before `lanes` at a time.
    fn head_numel(&self, lanes: usize) -> usize;
    /// # Safety
    /// `at..at + S::LANES` lies inside the copy, and `at` is [`Self::head_numel`] and a multiple of lanes, unless
    /// it is one lane.
    unsafe fn store<S: Simd>(&mut self, simd: S, at: usize, x: S::Vector);
    fn finish<S: Simd>(&mut self, _: S) {}
}

impl Copy16 for () {
    fn numel_or(&self, numel: usize) -> usize {
        numel
    }
    fn head_numel(&self, _: usize) -> usize {
        0
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(&mut self, _: S, _: usize, _: S::Vector) {}
}

impl<T: Float16> Copy16 for &mut [T] {
    fn numel_or(&self, _: usize) -> usize {
        self.len()
    }
    fn head_numel(&self, _: usize) -> usize {
        0
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(&mut self, simd: S, at: usize, x: S::Vector) {
        // SAFETY: in range by the caller's promise.
        unsafe { T::store(simd, self.as_mut_ptr().add(at), x) }
    }
}

/// Stores past the cache. The other arrays are read before they are written, so only the copy gains: its lines
/// need not be read first, which is a ninth of all reads.
struct Streamed<'a, T>(&'a mut [T]);

impl<T: Float16> Copy16 for Streamed<'_, T> {
    fn numel_or(&self, _: usize) -> usize {
        self.0.len()
    }
    fn head_numel(&self, lanes: usize) -> usize {
        let alignment = lanes * size_of::<T>();
        let past = self.0.as_ptr().addr() % alignment;
        (alignment - past) % alignment / size_of::<T>()
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(&mut self, simd: S, at: usize, x: S::Vector) {
        // SAFETY: in range by the caller's promise, and aligned after the head.
        unsafe { simd.stream16(self.0.as_mut_ptr().add(at).cast(), T::round(simd, x)) }
    }
    #[inline(always)]
    fn finish<S: Simd>(&mut self, simd: S) {
        simd.fence();
    }
}

struct Pass<'a, C> {
    factors: Factors,
    grad: &'a [f32],
    master: &'a mut [f32],
    exp_avg: &'a mut [f32],
    exp_avg_sq: &'a mut [f32],
    compute: C,
}

impl<'a> Pass<'a, ()> {
    fn writing<C>(self, compute: C) -> Pass<'a, C> {
        let Pass { factors, grad, master, exp_avg, exp_avg_sq, compute: () } = self;
        Pass { factors, grad, master, exp_avg, exp_avg_sq, compute }
    }
}

impl<C: Copy16> Kernel for Pass<'_, C> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let numel = self.grad.len();
        assert!(self.master.len() == numel && self.exp_avg.len() == numel);
        assert!(self.exp_avg_sq.len() == numel && self.compute.numel_or(numel) == numel);
        let head = self.compute.head_numel(S::LANES).min(numel);
        let whole = numel - (numel - head) % S::LANES;
        let factors = Lanes::new(simd, self.factors);
        for at in (head..whole).step_by(S::LANES) {
            // SAFETY: `at + LANES <= whole <= numel`, the length of every slice (asserted), beginning at the head.
            unsafe { self.update(simd, &factors, at) }
        }
        let factors = Lanes::new(Scalar, self.factors);
        for at in (0..head).chain(whole..numel) {
            // SAFETY: `at < numel`, and a scalar is one lane.
            unsafe { self.update(Scalar, &factors, at) }
        }
        self.compute.finish(simd);
    }
}

/// [`Factors`] in every lane.
struct Lanes<V> {
    grad_scale: V,
    beta1: V,
    one_minus_beta1: V,
    beta2: V,
    one_minus_beta2: V,
    denom_scale: V,
    eps: V,
    decay: V,
    minus_step_size: V,
}

impl<V> Lanes<V> {
    #[inline(always)]
    fn new<S: Simd<Vector = V>>(simd: S, factors: Factors) -> Self {
        Lanes {
            grad_scale: simd.splat(factors.grad_scale),
            beta1: simd.splat(factors.beta1),
            one_minus_beta1: simd.splat(factors.one_minus_beta1),
            beta2: simd.splat(factors.beta2),
            one_minus_beta2: simd.splat(factors.one_minus_beta2),
            denom_scale: simd.splat(factors.denom_scale),
            eps: simd.splat(factors.eps),
            decay: simd.splat(factors.decay),
            minus_step_size: simd.splat(factors.minus_step_size),
        }
    }
}

impl<C: Copy16> Pass<'_, C> {
    /// The whole algorithm, for the lanes at `at`.
    ///
    /// # Safety
    /// `at..at + S::LANES` lies inside every slice, and `at` is as [`Copy16::store`] asks.
    #[inline(always)]
    unsafe fn update<S: Simd>(&mut self, simd: S, k: &Lanes<S::Vector>, at: usize) {
        // SAFETY: in range by the caller's promise.
        let (g, m, v, p) = unsafe {
            (
                simd.load(self.grad.as_ptr().add(at)),
                simd.load(self.exp_avg.as_ptr().add(at)),
                simd.load(self.exp_avg_sq.as_ptr().add(at)),
                simd.load(self.master.as_ptr().add(at)),
            )
        };
        let g = simd.mul(g, k.grad_scale);
        let m = simd.mul_add(k.one_minus_beta1, g, simd.mul(k.beta1, m));
        let v = simd.mul_add(simd.mul(k.one_minus_beta2, g), g, simd.mul(k.beta2, v));
        let denom = simd.mul_add(simd.sqrt(v), k.denom_scale, k.eps);
        let p = simd.mul_add(k.minus_step_size, simd.div(m, denom), simd.mul(p, k.decay));
        // SAFETY: as above.
        unsafe {
            simd.store(self.exp_avg.as_mut_ptr().add(at), m);
            simd.store(self.exp_avg_sq.as_mut_ptr().add(at), v);
            simd.store(self.master.as_mut_ptr().add(at), p);
            self.compute.store(simd, at, p);
        }
    }
}

#[cfg(test)]
mod tests;
