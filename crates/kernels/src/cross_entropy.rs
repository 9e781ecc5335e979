//! Cross-entropy of a softmax, and the gradient of its logits, without probabilities in memory.
//!
//! A row of logits is read for its maximum, read again for the sum of its exponentials, which are kept in a scratch
//! row that stays in the cache, and the gradient is written from there:
//!
//! ```text
//! m = max(x)     e = exp(x - m)     loss = ln(sum(e)) + m - x[target]     grad = (e / sum(e) - onehot(target)) * scale
//! ```
//!
//! [`in_place`] overwrites the logits, usually the largest tensor of a step, by their gradient. Arithmetic on elements is `f32`, rounded
//! once at the end; a row's sum adds blocks of 4096 exponentials in `f64`, and rows' losses are added in `f64`,
//! in row order. Neither the instruction set nor the number of threads changes a bit.
//!
//! Where each rank has the logits of some classes only, [`split`] does the same with an exchange in the middle.

use crate::isa::{Isa, Kernel};
use crate::parallel::Split;
use crate::philox::ln;
use crate::rows::{Rows, RowsMut, for_each_rows};
use crate::simd::exp::exp;
use crate::simd::lanes::{self, Each, Fold, for_each, load, prefetch, store};
use crate::simd::{Scalar, Simd};
use crate::{Float, Threads};

pub mod split;

/// A row's target names no class.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("target `{target}` of row `{row}` is none of the `{num_classes}` classes")]
pub struct TargetOutOfRange {
    /// The first such row.
    pub row: usize,
    /// Its target.
    pub target: i64,
    /// Classes, counted from 0.
    pub num_classes: usize,
}

/// Writes `(softmax(logits) - onehot(targets)) * scale` to `grad` and returns the sum over rows of
/// `-ln softmax(logits)[target]`, unscaled.
///
/// A row that holds NaN or plus infinity, or minus infinity only, has the loss NaN and NaN for its gradient. No rows: 0.
///
/// # Shapes
/// - `logits`, `grad`: `[rows, classes]`, contiguous
/// - `targets`: `[rows]`
/// # Errors
/// [`TargetOutOfRange`] before anything is written.
/// # Panics
/// If lengths do not match.
pub fn forward_backward<T: Float>(
    threads: Threads,
    logits: &[T],
    targets: &[i64],
    scale: f32,
    grad: &mut [T],
) -> Result<f64, TargetOutOfRange> {
    assert_eq!(logits.len(), grad.len(), "logits against room for their gradients");
    rows_with(Isa::best(), threads, targets, scale, Logits::Apart(logits, grad))
}

/// [`forward_backward`], the gradient written over the logits.
///
/// # Errors
/// As [`forward_backward`]; the logits are then as they were.
/// # Panics
/// As [`forward_backward`].
pub fn in_place<T: Float>(
    threads: Threads,
    logits: &mut [T],
    targets: &[i64],
    scale: f32,
) -> Result<f64, TargetOutOfRange> {
    rows_with(Isa::best(), threads, targets, scale, Logits::InPlace(logits))
}

/// The loss of [`forward_backward`], without the gradient.
///
/// # Errors
/// As [`forward_backward`].
/// # Panics
/// As [`forward_backward`].
pub fn loss_only<T: Float>(threads: Threads, logits: &[T], targets: &[i64]) -> Result<f64, TargetOutOfRange> {
    rows_with(Isa::best(), threads, targets, 0.0, Logits::Read(logits))
}

/// All rows' logits, and where their gradients go.
enum Logits<'a, T> {
    Read(&'a [T]),
    Apart(&'a [T], &'a mut [T]),
    InPlace(&'a mut [T]),
}

fn rows_with<T: Float>(
    isa: Isa,
    threads: Threads,
    targets: &[i64],
    scale: f32,
    logits: Logits<'_, T>,
) -> Result<f64, TargetOutOfRange> {
    let numel = match &logits {
        Logits::Read(logits) | Logits::Apart(logits, _) => logits.len(),
        Logits::InPlace(logits) => logits.len(),
    };
    let width = numel.checked_div(targets.len()).unwrap_or(0);
    assert_eq!(numel, width * targets.len(), "logits against rows of classes");
    check(targets, width)?;
    if targets.is_empty() {
        return Ok(0.0);
    }
    let mut losses = vec![0.0; targets.len()];
    let rows = (targets, &mut losses[..]);
    match logits {
        Logits::Read(logits) => {
            let work = (rows, Rows { data: logits, width });
            for_each_rows(threads, width, work, |((targets, losses), logits)| {
                isa.run(Losses { targets, losses, logits });
            });
        }
        Logits::Apart(logits, grad) => {
            let work = (rows, (Rows { data: logits, width }, RowsMut { data: grad, width }));
            for_each_rows(threads, width, work, |((targets, losses), (logits, grad))| {
                let places = Places { from: logits.data.as_ptr(), to: grad.data.as_mut_ptr(), width };
                assert!(logits.numel() == targets.len() && grad.numel() == targets.len());
                // SAFETY: both slices hold a row for each target (asserted), one to be read, one to be written.
                isa.run(unsafe { Gradients::new(targets, losses, scale, places) });
            });
        }
        Logits::InPlace(logits) => {
            let work = (rows, RowsMut { data: logits, width });
            for_each_rows(threads, width, work, |((targets, losses), logits)| {
                assert_eq!(logits.numel(), targets.len());
                let to = logits.data.as_mut_ptr();
                let places = Places { from: to, to, width };
                // SAFETY: the slice holds a row for each target (asserted), to be read and written.
                isa.run(unsafe { Gradients::new(targets, losses, scale, places) });
            });
        }
    }
    Ok(losses.iter().fold(0.0, |total, loss| total + loss))
}

/// Whether all targets are classes.
fn check(targets: &[i64], num_classes: usize) -> Result<(), TargetOutOfRange> {
    let outside = |target: i64| usize::try_from(target).map_or(true, |target| target >= num_classes);
    match targets.iter().position(|&target| outside(target)) {
        Some(row) => Err(TargetOutOfRange { row, target: targets[row], num_classes }),
        None => Ok(()),
    }
}

/// Losses without gradients.
struct Losses<'a, T> {
    targets: &'a [i64],
    losses: &'a mut [f64],
    logits: Rows<'a, T>,
}

impl<T: Float> Kernel for Losses<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let rows = self.logits.data.chunks_exact(self.logits.width).zip(self.targets).zip(self.losses);
        let mut scratch = vec![0.0; BLOCK_NUMEL.min(self.logits.width)];
        for ((x, &target), loss) in rows {
            // SAFETY: the row is readable, and targets are classes (checked for all rows).
            unsafe {
                let row = Row { from: x.as_ptr(), width: x.len() };
                *loss = row.softmax(simd, Keep::Block(&mut scratch)).loss(row.at(target as usize));
            }
        }
    }
}

/// Where the first row of logits is, and where its gradient goes, maybe the same place.
struct Places<T> {
    from: *const T,
    to: *mut T,
    width: usize,
}

/// Losses and gradients.
struct Gradients<'a, T> {
    targets: &'a [i64],
    losses: &'a mut [f64],
    scale: f32,
    places: Places<T>,
}

impl<'a, T> Gradients<'a, T> {
    /// # Safety
    /// Each place has a row of `width` elements for each target, readable and writable, while the kernel runs; the two are the
    /// same or do not overlap. Targets are below `width`.
    unsafe fn new(targets: &'a [i64], losses: &'a mut [f64], scale: f32, places: Places<T>) -> Self {
        Gradients { targets, losses, scale, places }
    }
}

impl<T: Float> Kernel for Gradients<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Places { from, to, width } = self.places;
        let mut scratch = vec![0.0; width];
        for (row, (&target, loss)) in self.targets.iter().zip(self.losses).enumerate() {
            let target = target as usize;
            // SAFETY: `row` is one of the targets', for which the promise of `new` gives the rows, and `target` is
            // below `width`. Where the places are the same, all of a row is read before any of it is written.
            unsafe {
                let (from, to) = (from.add(row * width), to.add(row * width));
                let logits = Row { from, width };
                let softmax = logits.softmax(simd, Keep::Row(&mut scratch));
                *loss = softmax.loss(logits.at(target));
                let inverse = (f64::from(self.scale) / softmax.sum) as f32;
                for_each(simd, width, &mut Write { exps: &scratch, inverse, to });
                let of_target = scratch[target].mul_add(inverse, -self.scale);
                T::store(Scalar, to.add(target), of_target);
            }
        }
    }
}

/// One row of logits.
struct Row<T> {
    from: *const T,
    width: usize,
}

/// What a row's probabilities are made of, `exp(x - max) / sum`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Softmax {
    max: f32,
    sum: f64,
}

/// Exponentials that are added in `f32` before `f64` takes over.
const BLOCK_NUMEL: usize = 4096;

/// Where exponentials are written.
enum Keep<'a> {
    /// All of a row's, to be read later: room for the row.
    Row(&'a mut [f32]),
    /// Every block's over the last one's: room for [`BLOCK_NUMEL`], or the row if that is shorter.
    Block(&'a mut [f32]),
}

impl<T: Float> Row<T> {
    /// # Safety
    /// The row is readable.
    #[inline(always)]
    unsafe fn softmax<S: Simd>(&self, simd: S, keep: Keep<'_>) -> Softmax {
        // SAFETY: the caller's promise.
        unsafe {
            let max = self.max(simd);
            Softmax { max, sum: self.sum_exps(simd, max, keep) }
        }
    }

    /// # Safety
    /// The row is readable.
    #[inline(always)]
    unsafe fn max<S: Simd>(&self, simd: S) -> f32 {
        // SAFETY: the caller's promise.
        lanes::max(unsafe { lanes::fold(simd, 0..self.width, f32::NEG_INFINITY, &mut Max(self.from)) })
    }

    /// The sum of `exp(x - max)`.
    ///
    /// # Safety
    /// The row is readable.
    #[inline(always)]
    unsafe fn sum_exps<S: Simd>(&self, simd: S, max: f32, mut keep: Keep<'_>) -> f64 {
        let mut sum = 0.0;
        for start in (0..self.width).step_by(BLOCK_NUMEL) {
            let numel = BLOCK_NUMEL.min(self.width - start);
            let exps = match &mut keep {
                Keep::Row(row) => &mut row[start..start + numel],
                Keep::Block(block) => &mut block[..numel],
            };
            // SAFETY: the row has `numel` elements from `start` on, and `exps` holds as many.
            unsafe {
                for_each(simd, numel, &mut Exps { from: self.from.add(start), max, exps, width: self.width });
                sum += f64::from(lanes::sum(lanes::fold(simd, 0..numel, 0.0, &mut Sum(exps))));
            }
        }
        sum
    }

    /// # Safety
    /// The row is readable, and `class` one of its elements.
    #[inline(always)]
    unsafe fn at(&self, class: usize) -> f32 {
        // SAFETY: the caller's promise.
        unsafe { T::load(Scalar, self.from.add(class)) }
    }
}

impl Softmax {
    #[inline(always)]
    fn loss(&self, logit: f32) -> f64 {
        // The largest element alone adds 1, so the sum is normal or NaN.
        let ln_sum = if self.sum.is_nan() { f64::NAN } else { ln(self.sum) };
        ln_sum + (f64::from(self.max) - f64::from(logit))
    }
}

/// A row's maximum; NaN is passed over, and makes itself felt in the sum.
struct Max<T>(*const T);

impl<T: Float> Fold for Max<T> {
    #[inline(always)]
    unsafe fn fold<S: Simd>(&mut self, simd: S, lanes: S::Vector, at: usize) -> S::Vector {
        // SAFETY: in range by the caller's promise.
        simd.max(unsafe { T::load(simd, self.0.add(at)) }, lanes)
    }
}

/// The exponentials of a block.
struct Exps<'a, T> {
    from: *const T,
    max: f32,
    exps: &'a mut [f32],
    /// Elements from a row to the next.
    width: usize,
}

impl<T: Float> Each for Exps<'_, T> {
    #[inline(always)]
    unsafe fn each<S: Simd, const N: usize>(&mut self, simd: S, at: usize) {
        // SAFETY: in range by the caller's promise.
        unsafe {
            let mut x: [_; N] = load(simd, self.from.add(at));
            // Exponentials leave memory idle; the next row's maximum will ask more of it than it has.
            prefetch::<T, S, N>(self.from.wrapping_add(at + self.width));
            for x in &mut x {
                *x = simd.sub(*x, simd.splat(self.max));
            }
            store(simd, self.exps.as_mut_ptr().add(at), exp(simd, x));
        }
    }
}

struct Sum<'a>(&'a [f32]);

impl Fold for Sum<'_> {
    #[inline(always)]
    unsafe fn fold<S: Simd>(&mut self, simd: S, lanes: S::Vector, at: usize) -> S::Vector {
        // SAFETY: in range by the caller's promise.
        simd.add(lanes, unsafe { simd.load(self.0.as_ptr().add(at)) })
    }
}

/// Writes a row of scaled probabilities.
struct Write<'a, T> {
    exps: &'a [f32],
    /// `scale / sum`
    inverse: f32,
    to: *mut T,
}

impl<T: Float> Each for Write<'_, T> {
    #[inline(always)]
    unsafe fn each<S: Simd, const N: usize>(&mut self, simd: S, at: usize) {
        // SAFETY: in range by the caller's promise.
        unsafe {
            let mut x: [_; N] = load(simd, self.exps.as_ptr().add(at));
            for x in &mut x {
                *x = simd.mul(*x, simd.splat(self.inverse));
            }
            store(simd, self.to.add(at), x);
        }
    }
}

#[cfg(test)]
mod tests;
