//! Cross-entropy where each rank has the logits of some classes only, with one exchange.
//!
//! A rank reads its part of each row for three numbers, all ranks gather those of all, and each has what the whole row's
//! softmax is made of. The gradient of its own logits needs nothing more:
//!
//! ```text
//! partial      m_r = max(x_r)     s_r = sum(exp(x_r - m_r))     t_r = x[target], or 0 where another rank has it
//!              ── all-gather of (m_r, s_r, t_r) for each row ──
//! combine      m = max(m_r)       s = sum(s_r exp(m_r - m))     loss = ln(s) + m - sum(t_r)
//! gradients    (exp(x_r - m) / s - onehot(target)) * scale      written over x_r
//! ```
//!
//! So no rank ever holds a whole row, and a row costs an exchange of 12 bytes from each rank. Every rank combines the same
//! numbers in the same order and has the same bits. The gradient is made of `m` and `s` rather than of `m + ln(s)`, whose
//! rounding large logits would make coarse.
//!
//! Exponentials are those of [`in_place`](super::in_place). What differs is the order in which they are added, and that sums
//! travel as `f32`; a row in one part of up to 4096 classes has the same bits as there.
//!
//! # Source
//! Shoeybi et al., "Megatron-LM" (arXiv:1909.08053), section 3: scalars of each row travel instead of its logits. Its authors'
//! code reduces maxima, sums and targets' logits one after the other; here one exchange does.

use std::ops::Range;

use super::{BLOCK_NUMEL, Exps, Keep, Row, Softmax, TargetOutOfRange, Write, check};
use crate::isa::{Isa, Kernel};
use crate::rows::{Rows, RowsMut, for_each_rows};
use crate::simd::exp::exp;
use crate::simd::lanes::for_each;
use crate::simd::{Scalar, Simd};
use crate::{Float, Threads};

/// What the other ranks have to know of a rank's part of a row.
#[derive(Debug, Clone, Copy, PartialEq)]
#[repr(C)]
pub struct RowStats {
    /// The largest logit, minus infinity if there is none.
    pub max: f32,
    /// The sum of `exp(logit - max)`, 0 if there is none.
    pub sum: f32,
    /// The target's logit, 0 if another rank has it.
    pub target: f32,
}

impl RowStats {
    /// Numbers of a row.
    pub const NUMEL: usize = 3;

    /// A row of which a rank has no classes.
    pub const EMPTY: RowStats = RowStats { max: f32::NEG_INFINITY, sum: 0.0, target: 0.0 };

    /// The numbers of all rows, to be sent.
    pub fn as_flat(rows: &[RowStats]) -> &[f32] {
        // SAFETY: a row is `NUMEL` numbers without padding (`repr(C)`), aligned as they are.
        unsafe { std::slice::from_raw_parts(rows.as_ptr().cast(), rows.len() * Self::NUMEL) }
    }

    /// The numbers of all rows, to be received.
    pub fn as_flat_mut(rows: &mut [RowStats]) -> &mut [f32] {
        // SAFETY: as in `as_flat`; any numbers are a row, and the exclusive borrow goes on in the result.
        unsafe { std::slice::from_raw_parts_mut(rows.as_mut_ptr().cast(), rows.len() * Self::NUMEL) }
    }

    /// The rows of which these are the numbers.
    ///
    /// # Panics
    /// If the length is no multiple of [`NUMEL`](Self::NUMEL).
    pub fn from_flat(numbers: &[f32]) -> &[RowStats] {
        assert!(numbers.len().is_multiple_of(Self::NUMEL), "`{}` numbers are no rows", numbers.len());
        // SAFETY: as in `as_flat`; the length is that of whole rows (asserted).
        unsafe { std::slice::from_raw_parts(numbers.as_ptr().cast(), numbers.len() / Self::NUMEL) }
    }
}

/// Describes to the other ranks the part of each row that this rank has: the logits of `classes` among `num_classes`.
///
/// # Shapes
/// - `logits`: `[rows, classes.len()]`, contiguous; maybe no classes
/// - `targets`: `[rows]`, classes of the whole, the same on all ranks
/// - `out`: `[rows]`
/// # Errors
/// [`TargetOutOfRange`], on all ranks alike, before anything is written.
/// # Panics
/// If lengths do not match, or `classes` are not among the `num_classes`.
pub fn partial<T: Float>(
    threads: Threads,
    logits: &[T],
    targets: &[i64],
    classes: Range<usize>,
    num_classes: usize,
    out: &mut [RowStats],
) -> Result<(), TargetOutOfRange> {
    partial_with(Isa::best(), threads, logits, targets, classes, num_classes, out)
}

fn partial_with<T: Float>(
    isa: Isa,
    threads: Threads,
    logits: &[T],
    targets: &[i64],
    classes: Range<usize>,
    num_classes: usize,
    out: &mut [RowStats],
) -> Result<(), TargetOutOfRange> {
    assert!(classes.start <= classes.end && classes.end <= num_classes, "`{classes:?}` of `{num_classes}`");
    assert_eq!(logits.len(), targets.len() * classes.len(), "logits against rows of classes");
    assert_eq!(out.len(), targets.len(), "rows against room for their numbers");
    check(targets, num_classes)?;
    let width = classes.len();
    if width == 0 {
        out.fill(RowStats::EMPTY);
        return Ok(());
    }
    let work = ((targets, out), Rows { data: logits, width });
    for_each_rows(threads, width, work, |((targets, out), logits)| {
        isa.run(Partial { first_class: classes.start, targets, logits, out });
    });
    Ok(())
}

/// Puts the ranks' parts of each row together, and returns the sum of the rows' losses with what
/// [`gradients`] needs of each row. Same numbers, same bits: on every rank.
///
/// A row that has no softmax, as in [`forward_backward`](super::forward_backward), has the loss NaN and NaN for its gradient.
///
/// # Shapes
/// - `parts`: `[ranks, rows]`, in the same order on all ranks
/// # Panics
/// If `parts` are not those of `num_rows` rows, of one rank at least.
pub fn combine(parts: &[RowStats], num_rows: usize) -> (f64, Vec<Softmax>) {
    combine_with(Isa::best(), parts, num_rows)
}

fn combine_with(isa: Isa, parts: &[RowStats], num_rows: usize) -> (f64, Vec<Softmax>) {
    if num_rows == 0 && parts.is_empty() {
        return (0.0, Vec::new());
    }
    let is_whole = !parts.is_empty() && parts.len().checked_rem(num_rows) == Some(0);
    assert!(is_whole, "`{}` parts of `{num_rows}` rows", parts.len());
    isa.run(Combine { parts, num_rows })
}

/// Writes the gradient of `scale` times the loss over the logits of `classes`.
///
/// # Shapes
/// - `logits`, `targets`, `classes`: as in [`partial`]
/// - `rows`: `[rows]`, what [`combine`] returned
/// # Panics
/// If lengths do not match.
pub fn gradients<T: Float>(
    threads: Threads,
    logits: &mut [T],
    targets: &[i64],
    classes: Range<usize>,
    rows: &[Softmax],
    scale: f32,
) {
    gradients_with(Isa::best(), threads, logits, targets, classes, rows, scale);
}

fn gradients_with<T: Float>(
    isa: Isa,
    threads: Threads,
    logits: &mut [T],
    targets: &[i64],
    classes: Range<usize>,
    rows: &[Softmax],
    scale: f32,
) {
    let width = classes.len();
    assert_eq!(logits.len(), targets.len() * width, "logits against rows of classes");
    assert_eq!(rows.len(), targets.len(), "rows against what is known of them");
    if width == 0 {
        return;
    }
    let work = ((targets, rows), RowsMut { data: logits, width });
    for_each_rows(threads, width, work, |((targets, rows), logits)| {
        isa.run(Gradients { first_class: classes.start, targets, rows, scale, logits });
    });
}

/// A target's place among own classes, or nothing.
#[inline(always)]
fn own(target: i64, first_class: usize, num_own: usize) -> Option<usize> {
    usize::try_from(target).ok()?.checked_sub(first_class).filter(|&class| class < num_own)
}

struct Partial<'a, T> {
    first_class: usize,
    targets: &'a [i64],
    logits: Rows<'a, T>,
    out: &'a mut [RowStats],
}

impl<T: Float> Kernel for Partial<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Rows { data, width } = self.logits;
        let mut scratch = vec![0.0; BLOCK_NUMEL.min(width)];
        for ((x, &target), out) in data.chunks_exact(width).zip(self.targets).zip(self.out) {
            let row = Row { from: x.as_ptr(), width };
            // SAFETY: the row is readable, and `own` gives elements of it.
            unsafe {
                let max = row.max(simd);
                // Minus infinity less itself would not be a number; so classes that are all masked add up to 0.
                let base = if max == f32::NEG_INFINITY { 0.0 } else { max };
                let sum = row.sum_exps(simd, base, Keep::Block(&mut scratch)) as f32;
                let target = own(target, self.first_class, width).map_or(0.0, |class| row.at(class));
                *out = RowStats { max, sum, target };
            }
        }
    }
}

struct Combine<'a> {
    parts: &'a [RowStats],
    num_rows: usize,
}

impl Kernel for Combine<'_> {
    type Output = (f64, Vec<Softmax>);

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> Self::Output {
        let mut losses = 0.0;
        let mut rows = Vec::with_capacity(self.num_rows);
        for row in 0..self.num_rows {
            let mut max = f32::NEG_INFINITY;
            for part in self.parts[row..].iter().step_by(self.num_rows) {
                max = Scalar.max(part.max, max);
            }
            let (mut sum, mut target) = (0.0, 0.0);
            for part in self.parts[row..].iter().step_by(self.num_rows) {
                // Where all is masked, the sum is 0, or NaN if some logit is.
                let base = if part.max == f32::NEG_INFINITY { max } else { part.max };
                let [weight] = exp(Scalar, [base - max]);
                sum += f64::from(part.sum) * f64::from(weight);
                target += part.target;
            }
            let softmax = Softmax { max, sum };
            losses += softmax.loss(target);
            rows.push(softmax);
        }
        (losses, rows)
    }
}

struct Gradients<'a, T> {
    first_class: usize,
    targets: &'a [i64],
    rows: &'a [Softmax],
    scale: f32,
    logits: RowsMut<'a, T>,
}

impl<T: Float> Kernel for Gradients<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let RowsMut { data, width } = self.logits;
        let mut scratch = vec![0.0; BLOCK_NUMEL.min(width)];
        for ((x, &target), softmax) in data.chunks_exact_mut(width).zip(self.targets).zip(self.rows) {
            let target = own(target, self.first_class, width);
            let inverse = (f64::from(self.scale) / softmax.sum) as f32;
            for (block, x) in x.chunks_mut(BLOCK_NUMEL).enumerate() {
                let (numel, to) = (x.len(), x.as_mut_ptr());
                let exps = &mut scratch[..numel];
                // SAFETY: the block is readable and writable, and `exps` holds as many elements.
                unsafe {
                    for_each(simd, numel, &mut Exps { from: to, max: softmax.max, exps, width });
                    for_each(simd, numel, &mut Write { exps, inverse, to });
                }
                let in_block = target.and_then(|target| target.checked_sub(block * BLOCK_NUMEL));
                if let Some(class) = in_block.filter(|&class| class < numel) {
                    let of_target = scratch[class].mul_add(inverse, -self.scale);
                    // SAFETY: `class` is an element of the block.
                    unsafe { T::store(Scalar, to.add(class), of_target) }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
