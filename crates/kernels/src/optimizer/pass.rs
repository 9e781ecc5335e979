//! The pass over memory: a few lanes of every array at a time.

use super::Rule;
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
/// need not be read first, which is a ninth of all reads. Streaming those too makes a step half as slow again, and asking
/// for lines ahead of the loads slows it by a tenth: measured on an AMD Zen 4, with one thread and with two.
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

/// One piece of a step with fp32 states.
pub(super) struct Pass<'a, R, C, const K: usize> {
    pub rule: R,
    pub grad: &'a [f32],
    pub master: &'a mut [f32],
    pub states: [&'a mut [f32]; K],
    pub compute: C,
}

impl<'a, R, const K: usize> Pass<'a, R, (), K> {
    /// The same, writing a 16-bit copy.
    pub fn writing<C>(self, compute: C) -> Pass<'a, R, C, K> {
        let Pass { rule, grad, master, states, compute: () } = self;
        Pass { rule, grad, master, states, compute }
    }
}

impl<R: Rule<K>, C: Copy16, const K: usize> Kernel for Pass<'_, R, C, K> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let numel = self.grad.len();
        assert!(self.master.len() == numel && self.compute.numel_or(numel) == numel);
        assert!(self.states.iter().all(|state| state.len() == numel));
        let head = self.compute.head_numel(S::LANES).min(numel);
        let whole = numel - (numel - head) % S::LANES;
        for at in (head..whole).step_by(S::LANES) {
            // SAFETY: `at + LANES <= whole <= numel`, the length of every slice (asserted), beginning at the head.
            unsafe { self.update(simd, at) }
        }
        for at in (0..head).chain(whole..numel) {
            // SAFETY: `at < numel`, and a scalar is one lane.
            unsafe { self.update(Scalar, at) }
        }
        self.compute.finish(simd);
    }
}

impl<R: Rule<K>, C: Copy16, const K: usize> Pass<'_, R, C, K> {
    /// # Safety
    /// `at..at + S::LANES` lies inside every slice, and `at` is as [`Copy16::store`] asks.
    #[inline(always)]
    unsafe fn update<S: Simd>(&mut self, simd: S, at: usize) {
        let mut states = [simd.splat(0.0); K];
        for (lanes, state) in states.iter_mut().zip(&self.states) {
            // SAFETY: in range by the caller's promise.
            *lanes = unsafe { simd.load(state.as_ptr().add(at)) };
        }
        // SAFETY: as above.
        let (grad, param) =
            unsafe { (simd.load(self.grad.as_ptr().add(at)), simd.load(self.master.as_ptr().add(at))) };
        let (param, states) = self.rule.update(simd, grad, param, states);
        for (lanes, state) in states.into_iter().zip(&mut self.states) {
            // SAFETY: as above.
            unsafe { simd.store(state.as_mut_ptr().add(at), lanes) }
        }
        // SAFETY: as above.
        unsafe {
            simd.store(self.master.as_mut_ptr().add(at), param);
            self.compute.store(simd, at, param);
        }
    }
}
