//! The pass over memory: a few lanes of every array at a time.

use super::Factors;
use crate::isa::Kernel;
use crate::simd::{Float16, Scalar, Simd};

/// Writes the 16-bit copy, or does not.
pub(super) trait Copy16 {
    fn numel_or(&self, numel: usize) -> usize;
    /// How many elements to write one by one before `lanes` at a time.
    fn head_numel(&self, lanes: usize) -> usize;
    /// # Safety
    /// `at..at + S::LANES` lies inside the copy, and `at` lies a multiple of `S::LANES` past
    /// [`Self::head_numel`] of them.
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
pub(super) struct Streamed<'a, T>(pub &'a mut [T]);

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

/// One piece of a step.
pub(super) struct Pass<'a, C> {
    pub factors: Factors,
    pub grad: &'a [f32],
    pub master: &'a mut [f32],
    pub exp_avg: &'a mut [f32],
    pub exp_avg_sq: &'a mut [f32],
    pub compute: C,
}

impl<'a> Pass<'a, ()> {
    /// The same, writing a 16-bit copy.
    pub fn writing<C>(self, compute: C) -> Pass<'a, C> {
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
