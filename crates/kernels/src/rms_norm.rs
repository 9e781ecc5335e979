//! Root-mean-square normalization of rows.
//!
//! ```text
//! forward    r = 1 / sqrt(mean(x^2) + eps)       out = x r weight
//! backward   g = weight dy      dx = r (g - x r^2 mean(g x))      dweight = sum over rows of dy x r
//! ```
//!
//! A row is read twice each way, the second time from the cache. Arithmetic is `f32`, rounded once at the end.
//! Sums over a row follow the order of `simd::lanes`, sums over rows that of blocks of a fixed
//! number of rows: within a block row by row, then block by block. So neither the instruction set nor the number of
//! threads changes a bit.
//!
//! [`fused`] adds a residual on the way.
//!
//! # Source
//! "Root Mean Square Layer Normalization" (arXiv:1910.07467).

use crate::isa::{Isa, Kernel};
use crate::parallel::Split;
use crate::rows::{Rows, RowsMut, for_each_rows, rows_per_piece};
use crate::simd::Simd;
use crate::simd::lanes::{self, Each, Fold, for_each, load, store};
use crate::{Float, Threads};

/// `out = x / sqrt(mean(x^2) + eps) * weight`, row by row; keeps the rows' factors for [`backward`].
///
/// # Shapes
/// - `x`, `out`: `[rows, width]`, contiguous
/// - `weight`: `[width]`
/// - `inv_rms`: `[rows]`
/// # Panics
/// If lengths do not match.
pub fn forward<T: Float>(
    threads: Threads,
    x: &[T],
    weight: &[T],
    eps: f32,
    out: &mut [T],
    inv_rms: &mut [f32],
) {
    forward_with(Isa::best(), threads, x, weight, eps, out, inv_rms);
}

/// The gradients of [`forward`]. `dweight` is overwritten with the sum over all rows.
///
/// # Shapes
/// As [`forward`]; `dy`, `dx` like `x`, and `dweight` like `weight`.
/// # Panics
/// If lengths do not match.
pub fn backward<T: Float>(
    threads: Threads,
    x: &[T],
    weight: &[T],
    inv_rms: &[f32],
    dy: &[T],
    dx: &mut [T],
    dweight: &mut [f32],
) {
    backward_with(Isa::best(), threads, x, weight, inv_rms, dy, dx, dweight);
}

fn forward_with<T: Float>(
    isa: Isa,
    threads: Threads,
    x: &[T],
    weight: &[T],
    eps: f32,
    out: &mut [T],
    inv_rms: &mut [f32],
) {
    let width = weight.len();
    assert_eq!(x.len(), inv_rms.len() * width, "elements against rows and weights");
    assert_eq!(x.len(), out.len(), "elements against room for results");
    if width == 0 {
        // The mean of nothing: no element will ask for it.
        return inv_rms.fill(f32::NAN);
    }
    let work = (Rows { data: x, width }, (RowsMut { data: out, width }, inv_rms));
    for_each_rows(threads, width, work, |(x, (out, inv_rms))| {
        isa.run(Forward { x: x.data, weight, eps, out: out.data, inv_rms });
    });
}

#[allow(clippy::too_many_arguments, reason = "the public function's, and the instruction set")]
fn backward_with<T: Float>(
    isa: Isa,
    threads: Threads,
    x: &[T],
    weight: &[T],
    inv_rms: &[f32],
    dy: &[T],
    dx: &mut [T],
    dweight: &mut [f32],
) {
    let width = weight.len();
    assert_eq!(x.len(), inv_rms.len() * width, "elements against rows and weights");
    assert_eq!(x.len(), dy.len(), "elements against gradients of results");
    assert_eq!(x.len(), dx.len(), "elements against room for their gradients");
    assert_eq!(width, dweight.len(), "weights against room for their gradients");
    dweight.fill(0.0);
    if x.is_empty() {
        return;
    }
    let num_blocks = inv_rms.len().div_ceil(rows_per_piece(width));
    let mut sums = vec![0.0; num_blocks * width];
    let work = Blocks {
        x: Rows { data: x, width },
        inv_rms,
        dy: Rows { data: dy, width },
        dx: RowsMut { data: dx, width },
        sums: &mut sums,
    };
    for_each_rows(threads, width, work, |Blocks { x, inv_rms, dy, dx, sums }| {
        isa.run(Backward { x: x.data, weight, inv_rms, dy: dy.data, dx: dx.data, sums });
    });
    for block in sums.chunks_exact(width) {
        dweight.iter_mut().zip(block).for_each(|(total, sum)| *total += sum);
    }
}

struct Forward<'a, T> {
    x: &'a [T],
    weight: &'a [T],
    eps: f32,
    out: &'a mut [T],
    inv_rms: &'a mut [f32],
}

impl<T: Float> Kernel for Forward<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let width = self.weight.len();
        let rows = self.x.chunks_exact(width).zip(self.out.chunks_exact_mut(width)).zip(self.inv_rms);
        for ((x, out), inv_rms) in rows {
            // SAFETY: a row has `width` elements.
            let squares = lanes::sum(unsafe { lanes::fold(simd, 0..width, 0.0, &mut Squares(x)) });
            let factor = 1.0 / (squares / width as f32 + self.eps).sqrt();
            *inv_rms = factor;
            // SAFETY: as above, and there are `width` weights.
            unsafe { for_each(simd, width, &mut Scale { x, weight: self.weight, factor, out }) }
        }
    }
}

struct Squares<'a, T>(&'a [T]);

impl<T: Float> Fold for Squares<'_, T> {
    #[inline(always)]
    unsafe fn fold<S: Simd>(&mut self, simd: S, lanes: S::Vector, at: usize) -> S::Vector {
        // SAFETY: in range by the caller's promise.
        let x = unsafe { T::load(simd, self.0.as_ptr().add(at)) };
        simd.mul_add(x, x, lanes)
    }
}

struct Scale<'a, T> {
    x: &'a [T],
    weight: &'a [T],
    factor: f32,
    out: &'a mut [T],
}

impl<T: Float> Each for Scale<'_, T> {
    #[inline(always)]
    unsafe fn each<S: Simd, const N: usize>(&mut self, simd: S, at: usize) {
        // SAFETY: in range by the caller's promise.
        unsafe {
            let mut x: [_; N] = load(simd, self.x.as_ptr().add(at));
            let weight: [_; N] = load(simd, self.weight.as_ptr().add(at));
            for k in 0..N {
                x[k] = simd.mul(simd.mul(x[k], simd.splat(self.factor)), weight[k]);
            }
            store(simd, self.out.as_mut_ptr().add(at), x);
        }
    }
}

/// Rows, and for each block of [`rows_per_piece`] of them a place for its gradient of the weight.
struct Blocks<'a, T> {
    x: Rows<'a, T>,
    inv_rms: &'a [f32],
    dy: Rows<'a, T>,
    dx: RowsMut<'a, T>,
    sums: &'a mut [f32],
}

impl<T: Float> Split for Blocks<'_, T> {
    fn numel(&self) -> usize {
        self.inv_rms.len()
    }
    fn split_at(self, at: usize) -> (Self, Self) {
        let width = self.x.width;
        let (x, dy, dx) = (self.x.split_at(at), self.dy.split_at(at), self.dx.split_at(at));
        let inv_rms = self.inv_rms.split_at(at);
        let sums = self.sums.split_at_mut(at / rows_per_piece(width) * width);
        (
            Blocks { x: x.0, inv_rms: inv_rms.0, dy: dy.0, dx: dx.0, sums: sums.0 },
            Blocks { x: x.1, inv_rms: inv_rms.1, dy: dy.1, dx: dx.1, sums: sums.1 },
        )
    }
}

struct Backward<'a, T> {
    x: &'a [T],
    weight: &'a [T],
    inv_rms: &'a [f32],
    dy: &'a [T],
    dx: &'a mut [T],
    /// Zeros, to begin with.
    sums: &'a mut [f32],
}

impl<T: Float> Kernel for Backward<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (width, weight) = (self.weight.len(), self.weight);
        let block_rows = rows_per_piece(width);
        let rows = self.x.chunks_exact(width).zip(self.dy.chunks_exact(width));
        let rows = rows.zip(self.dx.chunks_exact_mut(width)).zip(self.inv_rms).enumerate();
        for (row, (((x, dy), dx), &factor)) in rows {
            // SAFETY: a row has `width` elements, as have the weights, here and below.
            let dot = lanes::sum(unsafe { lanes::fold(simd, 0..width, 0.0, &mut Dot { x, weight, dy }) });
            let minus_pull = -(factor * factor * (dot / width as f32));
            let dweight = &mut self.sums[row / block_rows * width..][..width];
            // SAFETY: as above.
            unsafe {
                for_each(simd, width, &mut BackwardRow { x, weight, dy, factor, minus_pull, dx, dweight });
            }
        }
    }
}

/// The product of a row and the gradient of what it was normalized to.
struct Dot<'a, T> {
    x: &'a [T],
    weight: &'a [T],
    dy: &'a [T],
}

impl<T: Float> Fold for Dot<'_, T> {
    #[inline(always)]
    unsafe fn fold<S: Simd>(&mut self, simd: S, lanes: S::Vector, at: usize) -> S::Vector {
        // SAFETY: in range by the caller's promise.
        unsafe {
            let x = T::load(simd, self.x.as_ptr().add(at));
            let weight = T::load(simd, self.weight.as_ptr().add(at));
            let dy = T::load(simd, self.dy.as_ptr().add(at));
            simd.mul_add(simd.mul(weight, dy), x, lanes)
        }
    }
}

struct BackwardRow<'a, T> {
    x: &'a [T],
    weight: &'a [T],
    dy: &'a [T],
    factor: f32,
    /// `-r^2 mean(g x)`
    minus_pull: f32,
    dx: &'a mut [T],
    dweight: &'a mut [f32],
}

impl<T: Float> Each for BackwardRow<'_, T> {
    #[inline(always)]
    unsafe fn each<S: Simd, const N: usize>(&mut self, simd: S, at: usize) {
        // SAFETY: in range by the caller's promise.
        unsafe {
            let x: [_; N] = load(simd, self.x.as_ptr().add(at));
            let weight: [_; N] = load(simd, self.weight.as_ptr().add(at));
            let dy: [_; N] = load(simd, self.dy.as_ptr().add(at));
            let mut dweight: [_; N] = load(simd, self.dweight.as_ptr().add(at));
            let mut dx = x;
            let (factor, minus_pull) = (simd.splat(self.factor), simd.splat(self.minus_pull));
            for k in 0..N {
                dx[k] = simd.mul(factor, simd.mul_add(x[k], minus_pull, simd.mul(weight[k], dy[k])));
                dweight[k] = simd.mul_add(simd.mul(dy[k], factor), x[k], dweight[k]);
            }
            store(simd, self.dx.as_mut_ptr().add(at), dx);
            store(simd, self.dweight.as_mut_ptr().add(at), dweight);
        }
    }
}

pub mod fused;

#[cfg(test)]
mod tests;
