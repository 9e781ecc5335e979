//! Muon: momentum, made orthogonal.
//!
//! ```text
//! pass 1         g = grad * grad_scale
//!                b = momentum * b + (1 - momentum) * g
//!                u = (1 - momentum) * g + momentum * b              (without Nesterov: u = b)
//! whole matrix   o = orthogonalize(u)
//! pass 2         p = p * (1 - lr * weight_decay) - lr * scale(rows, cols) * o
//! ```
//!
//! Singular values of `u` go towards 1 by five steps of a polynomial that needs products of matrices only. They run in fp32:
//! every rank that has the whole `u` gets the same bits, whatever its number of threads, as products are cut into the
//! same blocks of rows.

use super::sgd::Direction;
use super::{Rule, Tensors, apply_on};
use crate::Threads;
use crate::isa::{Isa, Kernel};
use crate::norm;
use crate::parallel::{Split, for_each_piece, for_each_piece_of};
use crate::simd::{Scalar, Simd};

/// What one step is told. States: `momentum_buffer`. For parameters of two dimensions.
///
/// # Source
/// Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024: the polynomial, the normalisation and
/// the factor `sqrt(max(1, rows / cols))` are the ones published, and those of `torch.optim.Muon` and DeepSpeed, which both compute
/// in 16 bits where ours is fp32.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Muon {
    /// Learning rate of this step.
    pub lr: f64,
    /// Decay of the mean of gradients.
    pub momentum: f64,
    /// Which way the parameter goes.
    pub direction: Direction,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

/// Coefficients of the odd polynomial `a x + b x^3 + c x^5`, steep at zero.
const COEFFICIENTS: [f32; 3] = [3.4445, -4.7750, 2.0315];
/// Keeps a vanishing norm from being divided by.
const NORM_EPS: f64 = 1e-7;
/// Rows of a product computed in one call.
const BLOCK_ROWS: usize = 128;

impl Muon {
    /// The first pass: moves the momentum and writes the direction that is to be made orthogonal.
    ///
    /// # Panics
    /// If slices differ in length.
    pub fn momentum_on(
        &self,
        threads: Threads,
        grad_scale: f32,
        grad: &[f32],
        momentum_buffer: &mut [f32],
        direction: &mut [f32],
    ) {
        self.momentum_with(Isa::best(), threads, grad_scale, grad, momentum_buffer, direction);
    }

    fn momentum_with(
        &self,
        isa: Isa,
        threads: Threads,
        grad_scale: f32,
        grad: &[f32],
        buffer: &mut [f32],
        direction: &mut [f32],
    ) {
        assert_eq!([buffer.len(), direction.len()], [grad.len(); 2], "momentum against gradients");
        let factors = Factors {
            grad_scale,
            momentum: self.momentum as f32,
            one_minus_momentum: (1.0 - self.momentum) as f32,
            direction: self.direction,
        };
        for_each_piece(threads, (grad, (buffer, direction)), |(grad, (buffer, direction))| {
            isa.run(Momentum { factors, grad, buffer, direction });
        });
    }

    /// The second pass: moves a part of a `rows` x `cols` matrix along its orthogonal direction, given in `tensors.grad`.
    ///
    /// # Panics
    /// If slices differ in length.
    pub fn apply_on(&self, threads: Threads, [rows, cols]: [usize; 2], tensors: Tensors<'_, 0>) {
        let scale = (rows as f64 / cols.max(1) as f64).max(1.0).sqrt();
        let rule =
            Apply { decay: (1.0 - self.lr * self.weight_decay) as f32, minus_lr: (-self.lr * scale) as f32 };
        apply_on(threads, rule, tensors);
    }
}

#[derive(Debug, Clone, Copy)]
struct Factors {
    grad_scale: f32,
    momentum: f32,
    one_minus_momentum: f32,
    direction: Direction,
}

struct Momentum<'a> {
    factors: Factors,
    grad: &'a [f32],
    buffer: &'a mut [f32],
    direction: &'a mut [f32],
}

impl Momentum<'_> {
    /// # Safety
    /// `at..at + S::LANES` lies inside every slice.
    #[inline(always)]
    unsafe fn update<S: Simd>(&mut self, simd: S, at: usize) {
        let k = self.factors;
        // SAFETY: in range by the caller's promise.
        unsafe {
            let buffer = self.buffer.as_mut_ptr().add(at);
            let g = simd.mul(simd.load(self.grad.as_ptr().add(at)), simd.splat(k.grad_scale));
            let share = simd.mul(simd.splat(k.one_minus_momentum), g);
            let b = simd.mul_add(simd.splat(k.momentum), simd.load(buffer), share);
            let u = match k.direction {
                Direction::Momentum => b,
                Direction::Nesterov => simd.mul_add(simd.splat(k.momentum), b, share),
            };
            simd.store(buffer, b);
            simd.store(self.direction.as_mut_ptr().add(at), u);
        }
    }
}

impl Kernel for Momentum<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let numel = self.grad.len();
        assert!(self.buffer.len() == numel && self.direction.len() == numel);
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

#[derive(Debug, Clone, Copy)]
struct Apply {
    decay: f32,
    minus_lr: f32,
}

impl Rule<0> for Apply {
    #[inline(always)]
    fn update<S: Simd>(
        self,
        simd: S,
        grad: S::Vector,
        param: S::Vector,
        _: [S::Vector; 0],
    ) -> (S::Vector, [S::Vector; 0]) {
        let param = simd.mul(param, simd.splat(self.decay));
        (simd.mul_add(simd.splat(self.minus_lr), grad, param), [])
    }
}

/// Replaces a `rows` x `cols` matrix, row by row, by one with the same singular vectors and singular values near 1.
///
/// Needs memory for a second such matrix and two squares of its shorter side.
///
/// # Panics
/// If the matrix has another number of elements.
pub fn orthogonalize_on(threads: Threads, [rows, cols]: [usize; 2], num_steps: usize, matrix: &mut [f32]) {
    assert_eq!(matrix.len(), rows * cols, "elements of a {rows} x {cols} matrix");
    let norm = norm::sum_of_squares_on(threads, matrix).sqrt();
    let scale = (1.0 / norm.max(NORM_EPS)) as f32;
    matrix.iter_mut().for_each(|x| *x *= scale);

    let [a, b, c] = COEFFICIENTS;
    let side = rows.min(cols);
    let (mut gram, mut poly) = (vec![0f32; side * side], vec![0f32; side * side]);
    let mut next = vec![0f32; matrix.len()];
    for _ in 0..num_steps {
        let x = View { data: matrix, rows, cols, row_stride: cols, col_stride: 1 };
        let (short, long) = if rows <= cols { (x, x.transposed()) } else { (x.transposed(), x) };
        // G = X Xᵀ, with X lying on its longer side.
        multiply(threads, 1.0, short, long, 0.0, &mut gram);
        // B = b G + c G G
        poly.copy_from_slice(&gram);
        let g = View { data: &gram, rows: side, cols: side, row_stride: side, col_stride: 1 };
        multiply(threads, c, g, g, b, &mut poly);
        // a X + B X, or its transpose
        next.copy_from_slice(matrix);
        let x = View { data: matrix, rows, cols, row_stride: cols, col_stride: 1 };
        let p = View { data: &poly, rows: side, cols: side, row_stride: side, col_stride: 1 };
        match rows <= cols {
            true => multiply(threads, 1.0, p, x, a, &mut next),
            false => multiply(threads, 1.0, x, p.transposed(), a, &mut next),
        }
        matrix.copy_from_slice(&next);
    }
}

/// A matrix in memory.
#[derive(Debug, Clone, Copy)]
struct View<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl View<'_> {
    fn transposed(self) -> Self {
        View {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }

    /// Elements from the first to the last, which lie in `data`.
    fn reaches_numel(&self) -> usize {
        if self.rows == 0 || self.cols == 0 {
            return 0;
        }
        (self.rows - 1) * self.row_stride + (self.cols - 1) * self.col_stride + 1
    }
}

/// Rows of the result of a product.
struct Rows<'a> {
    first: usize,
    cols: usize,
    out: &'a mut [f32],
}

impl Split for Rows<'_> {
    fn numel(&self) -> usize {
        self.out.len() / self.cols
    }
    fn split_at(self, at: usize) -> (Self, Self) {
        let (low, high) = self.out.split_at_mut(at * self.cols);
        (Rows { out: low, ..self }, Rows { first: self.first + at, out: high, ..self })
    }
}

/// `out = alpha * left * right + beta * out`, with `out` row by row.
fn multiply(threads: Threads, alpha: f32, left: View<'_>, right: View<'_>, beta: f32, out: &mut [f32]) {
    assert_eq!(left.cols, right.rows, "inner sides of a product");
    assert_eq!(out.len(), left.rows * right.cols, "elements of a product");
    assert!(left.reaches_numel() <= left.data.len() && right.reaches_numel() <= right.data.len());
    if out.is_empty() {
        return;
    }
    let rows = Rows { first: 0, cols: right.cols, out };
    for_each_piece_of(BLOCK_ROWS, threads, rows, |piece| {
        // One thread gets all rows at once: cut here too, so that it makes the same calls.
        for (index, out) in piece.out.chunks_mut(BLOCK_ROWS * piece.cols).enumerate() {
            let first = piece.first + index * BLOCK_ROWS;
            let num_rows = out.len() / piece.cols;
            // SAFETY: `left` has rows `first..first + num_rows` and `right` all of its elements (asserted above);
            // `out` holds `num_rows * cols` elements, row by row, and is borrowed for this call alone.
            unsafe {
                matrixmultiply::sgemm(
                    num_rows,
                    left.cols,
                    right.cols,
                    alpha,
                    left.data.as_ptr().add(first * left.row_stride),
                    left.row_stride as isize,
                    left.col_stride as isize,
                    right.data.as_ptr(),
                    right.row_stride as isize,
                    right.col_stride as isize,
                    beta,
                    out.as_mut_ptr(),
                    piece.cols as isize,
                    1,
                );
            }
        }
    });
}
