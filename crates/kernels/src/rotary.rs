//! Rotary position embedding.
//!
//! Coordinates `i` and `i + head_dim / 2` of a head are the two sides of a plane, turned by an angle that depends on
//! the position and on `i`:
//!
//! ```text
//! forward   low' = low cos - high sin        inverse   low' =  low cos + high sin
//!           high' = high cos + low sin                 high' = high cos - low sin
//! ```
//!
//! A turn is orthogonal, so the gradient of [`Direction::Forward`] is the [`Direction::Inverse`] turn of the gradient.
//! Angles come as tables: which bases and which scaling made them is the model's matter.
//!
//! # Source
//! RoFormer (arXiv:2104.09864), with coordinates paired as in Hugging Face's Llama.

use std::ops::Range;

use crate::isa::{Isa, Kernel};
use crate::rows::{Rows, RowsMut, for_each_rows};
use crate::simd::Simd;
use crate::simd::lanes::{Each, for_each, load, store};
use crate::{Float, Threads};

/// Which way to turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// By the angle.
    Forward,
    /// Back by the angle: the transpose of forward, for gradients.
    Inverse,
}

/// The shape of what is turned: `[batch, seq, heads, head_dim]`, contiguous.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Sequences.
    pub batch: usize,
    /// Positions of each.
    pub seq: usize,
    /// Heads at each position.
    pub heads: usize,
    /// Coordinates of a head, an even number.
    pub head_dim: usize,
}

impl Shape {
    /// Elements in all.
    pub const fn numel(&self) -> usize {
        self.batch * self.seq * self.heads * self.head_dim
    }
}

/// Turns `x` into `out`.
///
/// # Shapes
/// - `x`, `out`: `shape`
/// - `cos`, `sin`: `[seq, head_dim / 2]`
/// # Panics
/// If lengths do not match or `head_dim` is odd.
pub fn rotate<T: Float>(
    threads: Threads,
    direction: Direction,
    x: &[T],
    out: &mut [T],
    cos: &[f32],
    sin: &[f32],
    shape: Shape,
) {
    rotate_with(Isa::best(), threads, direction, x, out, Angles { cos, sin, shape });
}

/// The tables, and what they apply to.
#[derive(Debug, Clone, Copy)]
struct Angles<'a> {
    cos: &'a [f32],
    sin: &'a [f32],
    shape: Shape,
}

fn rotate_with<T: Float>(
    isa: Isa,
    threads: Threads,
    direction: Direction,
    x: &[T],
    out: &mut [T],
    angles: Angles<'_>,
) {
    let shape = angles.shape;
    assert!(shape.head_dim.is_multiple_of(2), "coordinates of a head come in pairs");
    assert_eq!(x.len(), shape.numel(), "elements against their shape");
    assert_eq!(out.len(), shape.numel(), "room against the shape");
    assert_eq!(angles.cos.len(), shape.seq * shape.head_dim / 2, "cosines against positions and pairs");
    assert_eq!(angles.sin.len(), shape.seq * shape.head_dim / 2, "sines against positions and pairs");
    if shape.numel() == 0 {
        return;
    }
    // A row is all heads of a position.
    let width = shape.heads * shape.head_dim;
    let rows = 0..shape.batch * shape.seq;
    let work = (rows, (Rows { data: x, width }, RowsMut { data: out, width }));
    for_each_rows(threads, width, work, |(rows, (x, out))| {
        isa.run(Rotate { direction, rows, x: x.data, out: out.data, angles });
    });
}

/// The rows of a piece.
struct Rotate<'a, T> {
    direction: Direction,
    rows: Range<usize>,
    x: &'a [T],
    out: &'a mut [T],
    angles: Angles<'a>,
}

impl<T: Float> Kernel for Rotate<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Shape { seq, heads, head_dim, .. } = self.angles.shape;
        let half = head_dim / 2;
        let sign = match self.direction {
            Direction::Forward => 1.0,
            Direction::Inverse => -1.0,
        };
        let width = heads * head_dim;
        let rows = self.rows.zip(self.x.chunks_exact(width)).zip(self.out.chunks_exact_mut(width));
        for ((row, x), out) in rows {
            let position = row % seq;
            let cos = &self.angles.cos[position * half..][..half];
            let sin = &self.angles.sin[position * half..][..half];
            for (x, out) in x.chunks_exact(head_dim).zip(out.chunks_exact_mut(head_dim)) {
                // SAFETY: a head has twice `half` elements, the tables `half` at each position.
                unsafe { for_each(simd, half, &mut Head { sign, half, cos, sin, x, out }) }
            }
        }
    }
}

/// One head at one position.
struct Head<'a, T> {
    /// Of the sines.
    sign: f32,
    half: usize,
    cos: &'a [f32],
    sin: &'a [f32],
    x: &'a [T],
    out: &'a mut [T],
}

impl<T: Float> Each for Head<'_, T> {
    #[inline(always)]
    unsafe fn each<S: Simd, const N: usize>(&mut self, simd: S, at: usize) {
        // SAFETY: in range by the caller's promise, `half` further on as well.
        unsafe {
            let cos: [_; N] = load(simd, self.cos.as_ptr().add(at));
            let sin: [_; N] = load(simd, self.sin.as_ptr().add(at));
            let mut low: [_; N] = load(simd, self.x.as_ptr().add(at));
            let mut high: [_; N] = load(simd, self.x.as_ptr().add(at + self.half));
            let sign = simd.splat(self.sign);
            for k in 0..N {
                let sin = simd.mul(sin[k], sign);
                let across = (simd.mul(low[k], sin), simd.mul(high[k], simd.mul(sin, simd.splat(-1.0))));
                low[k] = simd.mul_add(low[k], cos[k], across.1);
                high[k] = simd.mul_add(high[k], cos[k], across.0);
            }
            store(simd, self.out.as_mut_ptr().add(at), low);
            store(simd, self.out.as_mut_ptr().add(at + self.half), high);
        }
    }
}

#[cfg(test)]
mod tests;
