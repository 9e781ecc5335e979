//! LAMB: Adam with one trust ratio for each parameter tensor.
//!
//! ```text
//! pass 1   g = grad * grad_scale
//!          m = beta1 * m + (1 - beta1) * g
//!          v = beta2 * v + (1 - beta2) * g * g
//!          u = m / (sqrt(v) + eps) + weight_decay * p          |p|^2 and |u|^2, in f64
//! exchange                                                     the norms of whole tensors
//! pass 2   p = p - lr * correction * clamp(|p| / |u|, min_coeff, max_coeff) * u
//! ```
//!
//! The second pass computes `u` anew from the moments: keeping it would cost a third state.

use half::{bf16, f16};

use super::pass::Copy16;
use super::{BiasCorrection, ComputeCopy};
use crate::Threads;
use crate::isa::{Isa, Kernel};
use crate::norm::BLOCK_NUMEL;
use crate::parallel::{Split, for_each_piece};
use crate::simd::{SUM_LANES, Scalar, Simd};

/// What one step is told. States: `exp_avg`, `exp_avg_sq`.
///
/// # Source
/// Large Batch Optimization for Deep Learning (arXiv:1904.00962), with the details of DeepSpeed's FusedLamb: the bias
/// correction is a factor of the rate, `eps` is added to the uncorrected root, and the ratio is clamped, and 1 where a norm is 0.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Lamb {
    /// Learning rate of this step.
    pub lr: f64,
    /// Decay of the mean of gradients.
    pub beta1: f64,
    /// Decay of the mean of squared gradients.
    pub beta2: f64,
    /// Added to the denominator.
    pub eps: f64,
    /// Decay, before the trust ratio.
    pub weight_decay: f64,
    /// The trust ratio is at most this.
    pub max_coeff: f64,
    /// The trust ratio is at least this.
    pub min_coeff: f64,
    /// Whether the means are corrected for having begun at zero.
    pub bias_correction: BiasCorrection,
    /// The number of this step, from 1.
    pub step: u64,
}

/// Squared norms of a parameter and of its update, or of parts of both.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct SquaredNorms {
    /// Of the parameter.
    pub param: f64,
    /// Of the update.
    pub update: f64,
}

impl SquaredNorms {
    /// Of its bytes.
    pub const NUM_BYTES: usize = 16;

    /// As a table of norms has them.
    pub fn to_bytes(self) -> [u8; Self::NUM_BYTES] {
        let mut bytes = [0; Self::NUM_BYTES];
        bytes[..8].copy_from_slice(&self.param.to_ne_bytes());
        bytes[8..].copy_from_slice(&self.update.to_ne_bytes());
        bytes
    }

    /// The norms of which these are the bytes.
    pub fn from_bytes(bytes: [u8; Self::NUM_BYTES]) -> Self {
        let [b0, b1, b2, b3, b4, b5, b6, b7, rest @ ..] = bytes;
        let param = f64::from_ne_bytes([b0, b1, b2, b3, b4, b5, b6, b7]);
        SquaredNorms { param, update: f64::from_ne_bytes(rest) }
    }
}

impl std::ops::AddAssign for SquaredNorms {
    fn add_assign(&mut self, more: Self) {
        self.param += more.param;
        self.update += more.update;
    }
}

impl Lamb {
    /// The first pass: moves the moments and returns the squared norms of this part.
    ///
    /// # Panics
    /// If slices differ in length.
    pub fn moments_on(
        &self,
        threads: Threads,
        grad_scale: f32,
        grad: &[f32],
        master: &[f32],
        exp_avg: &mut [f32],
        exp_avg_sq: &mut [f32],
    ) -> SquaredNorms {
        self.moments_with(Isa::best(), threads, grad_scale, grad, master, [exp_avg, exp_avg_sq])
    }

    pub(super) fn moments_with(
        &self,
        isa: Isa,
        threads: Threads,
        grad_scale: f32,
        grad: &[f32],
        master: &[f32],
        [exp_avg, exp_avg_sq]: [&mut [f32]; 2],
    ) -> SquaredNorms {
        let numel = grad.len();
        let lengths = [master.len(), exp_avg.len(), exp_avg_sq.len()];
        assert_eq!(lengths, [numel; 3], "parameters and moments against gradients");
        let mut norms = vec![SquaredNorms::default(); numel.div_ceil(BLOCK_NUMEL)];
        let factors = self.factors(grad_scale);
        let work = Blocks { grad, master, exp_avg, exp_avg_sq, norms: &mut norms };
        for_each_piece(threads, work, |piece| {
            let blocks = piece.grad.chunks(BLOCK_NUMEL).zip(piece.master.chunks(BLOCK_NUMEL));
            let moments = piece.exp_avg.chunks_mut(BLOCK_NUMEL).zip(piece.exp_avg_sq.chunks_mut(BLOCK_NUMEL));
            for (((grad, master), (exp_avg, exp_avg_sq)), norms) in blocks.zip(moments).zip(piece.norms) {
                *norms = isa.run(Moments { factors, grad, master, exp_avg, exp_avg_sq });
            }
        });
        norms.into_iter().fold(SquaredNorms::default(), |mut sum, block| {
            sum += block;
            sum
        })
    }

    /// The second pass: moves a part of a parameter whose norms, as a whole, are `norms`.
    ///
    /// # Panics
    /// If slices differ in length, or if `step` is 0.
    pub fn apply_on(
        &self,
        threads: Threads,
        norms: SquaredNorms,
        master: &mut [f32],
        exp_avg: &[f32],
        exp_avg_sq: &[f32],
        compute: ComputeCopy<'_>,
    ) {
        self.apply_with(Isa::best(), threads, norms, master, [exp_avg, exp_avg_sq], compute);
    }

    pub(super) fn apply_with(
        &self,
        isa: Isa,
        threads: Threads,
        norms: SquaredNorms,
        master: &mut [f32],
        [exp_avg, exp_avg_sq]: [&[f32]; 2],
        compute: ComputeCopy<'_>,
    ) {
        let numel = master.len();
        let lengths = [exp_avg.len(), exp_avg_sq.len(), compute.numel().unwrap_or(numel)];
        assert_eq!(lengths, [numel; 3], "moments and compute copy against parameters");
        let minus_rate = (-self.rate() * self.trust_ratio(norms)) as f32;
        let factors = self.factors(1.0);
        let work = ((master, CopySplit(compute, numel)), (exp_avg, exp_avg_sq));
        for_each_piece(threads, work, |((master, copy), (exp_avg, exp_avg_sq))| match copy.0 {
            ComputeCopy::None => {
                isa.run(Apply { factors, minus_rate, master, exp_avg, exp_avg_sq, compute: () })
            }
            ComputeCopy::Bf16(compute) => {
                let compute: &mut [bf16] = compute;
                isa.run(Apply { factors, minus_rate, master, exp_avg, exp_avg_sq, compute })
            }
            ComputeCopy::F16(compute) => {
                let compute: &mut [f16] = compute;
                isa.run(Apply { factors, minus_rate, master, exp_avg, exp_avg_sq, compute })
            }
        });
    }

    /// The learning rate with the bias correction.
    pub(crate) fn rate(&self) -> f64 {
        let correction = |beta| self.bias_correction.of(beta, self.step);
        self.lr * correction(self.beta2).sqrt() / correction(self.beta1)
    }

    /// How far a parameter may go, for its size.
    pub fn trust_ratio(&self, norms: SquaredNorms) -> f64 {
        if norms.param == 0.0 || norms.update == 0.0 {
            return 1.0;
        }
        (norms.param.sqrt() / norms.update.sqrt()).min(self.max_coeff).max(self.min_coeff)
    }

    pub(crate) fn factors(&self, grad_scale: f32) -> Factors {
        Factors {
            grad_scale,
            beta1: self.beta1 as f32,
            one_minus_beta1: (1.0 - self.beta1) as f32,
            beta2: self.beta2 as f32,
            one_minus_beta2: (1.0 - self.beta2) as f32,
            eps: self.eps as f32,
            weight_decay: self.weight_decay as f32,
        }
    }
}

/// Of both passes. `cuda/lamb.cu` reads the same structure.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Factors {
    grad_scale: f32,
    beta1: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    eps: f32,
    weight_decay: f32,
}

impl Factors {
    #[inline(always)]
    fn moments<S: Simd>(self, simd: S, grad: S::Vector, m: S::Vector, v: S::Vector) -> [S::Vector; 2] {
        let splat = |x| simd.splat(x);
        let g = simd.mul(grad, splat(self.grad_scale));
        [
            simd.mul_add(splat(self.one_minus_beta1), g, simd.mul(splat(self.beta1), m)),
            simd.mul_add(simd.mul(splat(self.one_minus_beta2), g), g, simd.mul(splat(self.beta2), v)),
        ]
    }

    #[inline(always)]
    fn update<S: Simd>(self, simd: S, param: S::Vector, m: S::Vector, v: S::Vector) -> S::Vector {
        let denom = simd.add(simd.sqrt(v), simd.splat(self.eps));
        simd.mul_add(simd.splat(self.weight_decay), param, simd.div(m, denom))
    }
}

/// The work of the first pass, and a place for the norms of each block of it.
struct Blocks<'a> {
    grad: &'a [f32],
    master: &'a [f32],
    exp_avg: &'a mut [f32],
    exp_avg_sq: &'a mut [f32],
    norms: &'a mut [SquaredNorms],
}

impl Split for Blocks<'_> {
    fn numel(&self) -> usize {
        self.grad.len()
    }
    fn split_at(self, at: usize) -> (Self, Self) {
        let (grad, master) = (self.grad.split_at(at), self.master.split_at(at));
        let (m, v) = (self.exp_avg.split_at_mut(at), self.exp_avg_sq.split_at_mut(at));
        let norms = self.norms.split_at_mut(at / BLOCK_NUMEL);
        (
            Blocks { grad: grad.0, master: master.0, exp_avg: m.0, exp_avg_sq: v.0, norms: norms.0 },
            Blocks { grad: grad.1, master: master.1, exp_avg: m.1, exp_avg_sq: v.1, norms: norms.1 },
        )
    }
}

/// The first pass over one block. Its sums are added as [`crate::norm`] adds.
struct Moments<'a> {
    factors: Factors,
    grad: &'a [f32],
    master: &'a [f32],
    exp_avg: &'a mut [f32],
    exp_avg_sq: &'a mut [f32],
}

impl Moments<'_> {
    /// Moves the moments at `at` and writes the updates to `updates`.
    ///
    /// # Safety
    /// `at..at + S::LANES` lies inside every slice, and `updates` is valid for writes of as many elements.
    #[inline(always)]
    unsafe fn update<S: Simd>(&mut self, simd: S, at: usize, updates: *mut f32) {
        // SAFETY: in range by the caller's promise.
        unsafe {
            let (exp_avg, exp_avg_sq) =
                (self.exp_avg.as_mut_ptr().add(at), self.exp_avg_sq.as_mut_ptr().add(at));
            let grad = simd.load(self.grad.as_ptr().add(at));
            let [m, v] = self.factors.moments(simd, grad, simd.load(exp_avg), simd.load(exp_avg_sq));
            let param = simd.load(self.master.as_ptr().add(at));
            simd.store(exp_avg, m);
            simd.store(exp_avg_sq, v);
            simd.store(updates, self.factors.update(simd, param, m, v));
        }
    }
}

impl Kernel for Moments<'_> {
    type Output = SquaredNorms;

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) -> SquaredNorms {
        let numel = self.grad.len();
        assert!(self.master.len() == numel && self.exp_avg.len() == numel && self.exp_avg_sq.len() == numel);
        const { assert!(SUM_LANES.is_multiple_of(S::LANES)) };
        let whole = numel - numel % SUM_LANES;
        let (mut params, mut updates) = (simd.zero_sums(), simd.zero_sums());
        let mut row = [0f32; SUM_LANES];
        for at in (0..whole).step_by(SUM_LANES) {
            for from in (0..SUM_LANES).step_by(S::LANES) {
                // SAFETY: `at + SUM_LANES <= whole <= numel`, and `row` holds `SUM_LANES` elements.
                unsafe { self.update(simd, at + from, row.as_mut_ptr().add(from)) }
            }
            // SAFETY: as above.
            unsafe {
                params = simd.add_squares(params, self.master.as_ptr().add(at));
                updates = simd.add_squares(updates, row.as_ptr());
            }
        }
        let (mut params, mut updates) = (simd.sums(params), simd.sums(updates));
        for (j, at) in (whole..numel).enumerate() {
            // SAFETY: `at < numel`, `j < SUM_LANES`, and a scalar is one lane.
            unsafe { self.update(Scalar, at, row.as_mut_ptr().add(j)) }
            params[j] += f64::from(self.master[at]) * f64::from(self.master[at]);
            updates[j] += f64::from(row[j]) * f64::from(row[j]);
        }
        SquaredNorms { param: pairwise(params), update: pairwise(updates) }
    }
}

fn pairwise(mut sums: [f64; SUM_LANES]) -> f64 {
    let mut width = SUM_LANES;
    while width > 1 {
        width /= 2;
        for j in 0..width {
            sums[j] += sums[j + width];
        }
    }
    sums[0]
}

/// A copy that can be cut, with its number of elements even where there is none.
struct CopySplit<'a>(ComputeCopy<'a>, usize);

impl Split for CopySplit<'_> {
    fn numel(&self) -> usize {
        self.1
    }
    fn split_at(self, at: usize) -> (Self, Self) {
        let (low, high) = self.0.split_at(at);
        (CopySplit(low, at), CopySplit(high, self.1 - at))
    }
}

/// The second pass over one piece.
struct Apply<'a, C> {
    factors: Factors,
    minus_rate: f32,
    master: &'a mut [f32],
    exp_avg: &'a [f32],
    exp_avg_sq: &'a [f32],
    compute: C,
}

impl<C: Copy16> Apply<'_, C> {
    /// # Safety
    /// `at..at + S::LANES` lies inside every slice.
    #[inline(always)]
    unsafe fn update<S: Simd>(&mut self, simd: S, at: usize) {
        // SAFETY: in range by the caller's promise; a copy that is stored through the cache asks for no alignment.
        unsafe {
            let param = simd.load(self.master.as_ptr().add(at));
            let (m, v) =
                (simd.load(self.exp_avg.as_ptr().add(at)), simd.load(self.exp_avg_sq.as_ptr().add(at)));
            let update = self.factors.update(simd, param, m, v);
            let param = simd.mul_add(simd.splat(self.minus_rate), update, param);
            simd.store(self.master.as_mut_ptr().add(at), param);
            self.compute.store(simd, at, param);
        }
    }
}

impl<C: Copy16> Kernel for Apply<'_, C> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let numel = self.master.len();
        assert!(self.exp_avg.len() == numel && self.exp_avg_sq.len() == numel);
        assert!(self.compute.numel_or(numel) == numel);
        let whole = numel - numel % S::LANES;
        for at in (0..whole).step_by(S::LANES) {
            // SAFETY: `at + LANES <= whole <= numel`, the length of every slice (asserted).
            unsafe { self.update(simd, at) }
        }
        for at in whole..numel {
            // SAFETY: `at < numel`, and a scalar is one lane.
            unsafe { self.update(Scalar, at) }
        }
    }
}
