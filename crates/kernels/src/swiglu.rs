//! SwiGLU: `out = silu(gate) * up`, with `silu(g) = g * sigmoid(g)`.
//!
//! One pass over memory each way. The backward pass computes the sigmoid again rather than keep it: an exponential
//! costs less than reading one more array. Arithmetic is `f32`, rounded once at the end.
//!
//! # Source
//! "GLU Variants Improve Transformer" (arXiv:2002.05202).

use crate::isa::{Isa, Kernel};
use crate::parallel::{Split, for_each_piece};
use crate::simd::Simd;
use crate::simd::exp::exp;
use crate::simd::lanes::{Each, for_each, load, store};
use crate::{Float, Threads};

/// `out = silu(gate) * up`.
///
/// # Panics
/// If the lengths differ.
pub fn forward<T: Float>(threads: Threads, gate: &[T], up: &[T], out: &mut [T]) {
    forward_with(Isa::best(), threads, gate, up, out);
}

/// The gradients of [`forward`]: `dgate = dy * up * silu'(gate)` and `dup = dy * silu(gate)`.
///
/// # Panics
/// If the lengths differ.
pub fn backward<T: Float>(threads: Threads, gate: &[T], up: &[T], dy: &[T], dgate: &mut [T], dup: &mut [T]) {
    backward_with(Isa::best(), threads, Backward { gate, up, dy, dgate, dup });
}

fn forward_with<T: Float>(isa: Isa, threads: Threads, gate: &[T], up: &[T], out: &mut [T]) {
    assert_eq!(gate.len(), up.len(), "gates against what they let through");
    assert_eq!(gate.len(), out.len(), "gates against room for results");
    for_each_piece(threads, (gate, (up, out)), |(gate, (up, out))| isa.run(Forward { gate, up, out }));
}

fn backward_with<T: Float>(isa: Isa, threads: Threads, backward: Backward<'_, T>) {
    let numel = backward.gate.len();
    assert_eq!(numel, backward.up.len(), "gates against what they let through");
    assert_eq!(numel, backward.dy.len(), "gates against gradients of results");
    assert_eq!(numel, backward.dgate.len(), "gates against room for their gradients");
    assert_eq!(numel, backward.dup.len(), "gates against room for the other gradients");
    for_each_piece(threads, backward, |piece| isa.run(piece));
}

/// `sigmoid(x) = 1 / (1 + exp(-x))`: right at both ends, as the exponential becomes 0 or infinite.
#[inline(always)]
fn sigmoid<S: Simd, const N: usize>(simd: S, mut x: [S::Vector; N]) -> [S::Vector; N] {
    for x in &mut x {
        *x = simd.mul(*x, simd.splat(-1.0));
    }
    let mut x = exp(simd, x);
    let one = simd.splat(1.0);
    for x in &mut x {
        *x = simd.div(one, simd.add(one, *x));
    }
    x
}

struct Forward<'a, T> {
    gate: &'a [T],
    up: &'a [T],
    out: &'a mut [T],
}

impl<T: Float> Each for Forward<'_, T> {
    #[inline(always)]
    unsafe fn each<S: Simd, const N: usize>(&mut self, simd: S, at: usize) {
        // SAFETY: in range by the caller's promise.
        unsafe {
            let gate: [_; N] = load(simd, self.gate.as_ptr().add(at));
            let sigmoid = sigmoid(simd, gate);
            let mut out: [_; N] = load(simd, self.up.as_ptr().add(at));
            for k in 0..N {
                out[k] = simd.mul(simd.mul(gate[k], sigmoid[k]), out[k]);
            }
            store(simd, self.out.as_mut_ptr().add(at), out);
        }
    }
}

impl<T: Float> Kernel for Forward<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let numel = self.gate.len().min(self.up.len()).min(self.out.len());
        // SAFETY: every slice has `numel` elements.
        unsafe { for_each(simd, numel, &mut self) }
    }
}

struct Backward<'a, T> {
    gate: &'a [T],
    up: &'a [T],
    dy: &'a [T],
    dgate: &'a mut [T],
    dup: &'a mut [T],
}

impl<T: Float> Split for Backward<'_, T> {
    fn numel(&self) -> usize {
        self.gate.len()
    }
    fn split_at(self, at: usize) -> (Self, Self) {
        let Backward { gate, up, dy, dgate, dup } = self;
        let (gate, up, dy) = (gate.split_at(at), up.split_at(at), dy.split_at(at));
        let (dgate, dup) = (dgate.split_at_mut(at), dup.split_at_mut(at));
        (
            Backward { gate: gate.0, up: up.0, dy: dy.0, dgate: dgate.0, dup: dup.0 },
            Backward { gate: gate.1, up: up.1, dy: dy.1, dgate: dgate.1, dup: dup.1 },
        )
    }
}

impl<T: Float> Each for Backward<'_, T> {
    #[inline(always)]
    unsafe fn each<S: Simd, const N: usize>(&mut self, simd: S, at: usize) {
        // SAFETY: in range by the caller's promise.
        unsafe {
            let gate: [_; N] = load(simd, self.gate.as_ptr().add(at));
            let sigmoid = sigmoid(simd, gate);
            let mut dgate: [_; N] = load(simd, self.up.as_ptr().add(at));
            let mut dup: [_; N] = load(simd, self.dy.as_ptr().add(at));
            let one = simd.splat(1.0);
            for k in 0..N {
                let silu = simd.mul(gate[k], sigmoid[k]);
                // silu' = sigmoid + gate * sigmoid * (1 - sigmoid)
                let slope = simd.mul_add(silu, simd.sub(one, sigmoid[k]), sigmoid[k]);
                dgate[k] = simd.mul(simd.mul(dup[k], dgate[k]), slope);
                dup[k] = simd.mul(dup[k], silu);
            }
            store(simd, self.dgate.as_mut_ptr().add(at), dgate);
            store(simd, self.dup.as_mut_ptr().add(at), dup);
        }
    }
}

impl<T: Float> Kernel for Backward<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let numel = self.gate.len();
        assert!(self.up.len() == numel && self.dy.len() == numel);
        assert!(self.dgate.len() == numel && self.dup.len() == numel);
        // SAFETY: every slice has `numel` elements (asserted).
        unsafe { for_each(simd, numel, &mut self) }
    }
}

#[cfg(test)]
mod tests;
