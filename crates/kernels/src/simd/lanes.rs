//! Loops over a row: lanes at a time, then the rest one by one.
//!
//! A fold keeps [`ROW_LANES`] results, whatever the width of the registers: element `i` of a range goes to result
//! `i % ROW_LANES`, and [`sum`] adds them pairwise (`j` and `j + 16`, then `j + 8`, ...). So a row's sum has the same
//! bits on every instruction set.

use std::ops::Range;

use super::{Float, ROW_LANES, Scalar, Simd};

/// Vectors that a loop takes at a time while there are so many.
const UNROLL: usize = 4;

/// What is done with each element.
pub(crate) trait Each {
    /// Takes `N` vectors.
    ///
    /// # Safety
    /// `at..at + N * S::LANES` lies inside the range of the loop.
    unsafe fn each<S: Simd, const N: usize>(&mut self, simd: S, at: usize);
}

/// Visits `0..numel`.
///
/// # Safety
/// `each` may be called for every part of `0..numel`.
#[inline(always)]
pub(crate) unsafe fn for_each<S: Simd>(simd: S, numel: usize, each: &mut impl Each) {
    let unrolled = numel - numel % (UNROLL * S::LANES);
    let whole = numel - numel % S::LANES;
    for at in (0..unrolled).step_by(UNROLL * S::LANES) {
        // SAFETY: `at + UNROLL * LANES <= unrolled <= numel`.
        unsafe { each.each::<S, UNROLL>(simd, at) }
    }
    for at in (unrolled..whole).step_by(S::LANES) {
        // SAFETY: `at + LANES <= whole <= numel`.
        unsafe { each.each::<S, 1>(simd, at) }
    }
    for at in whole..numel {
        // SAFETY: `at < numel`, and a scalar is one lane.
        unsafe { each.each::<Scalar, 1>(Scalar, at) }
    }
}

/// `N` vectors, one after the other.
///
/// # Safety
/// Valid for reads of `N * S::LANES` elements.
#[inline(always)]
pub(crate) unsafe fn load<T: Float, S: Simd, const N: usize>(simd: S, from: *const T) -> [S::Vector; N] {
    let mut x = [simd.splat(0.0); N];
    for (k, x) in x.iter_mut().enumerate() {
        // SAFETY: `k < N`, the caller's promise.
        *x = unsafe { T::load(simd, from.add(k * S::LANES)) };
    }
    x
}

/// Writes `N` vectors, one after the other.
///
/// # Safety
/// Valid for writes of `N * S::LANES` elements.
#[inline(always)]
pub(crate) unsafe fn store<T: Float, S: Simd, const N: usize>(simd: S, to: *mut T, x: [S::Vector; N]) {
    for (k, x) in x.into_iter().enumerate() {
        // SAFETY: `k < N`, the caller's promise.
        unsafe { T::store(simd, to.add(k * S::LANES), x) }
    }
}

/// Asks for the `N` vectors at `from`, to be read later. They need not exist.
#[inline(always)]
pub(crate) fn prefetch<T, S: Simd, const N: usize>(from: *const T) {
    const LINE_BYTES: usize = 64;
    let num_bytes = N * S::LANES * size_of::<T>();
    // Less than a line belongs to the ends of rows: a neighbour asks for it.
    for at in (0..num_bytes - num_bytes % LINE_BYTES).step_by(LINE_BYTES) {
        let line = from.cast::<i8>().wrapping_add(at);
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a hint that every x86-64 machine takes, and that never faults.
        unsafe {
            std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(line)
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = line;
    }
}

/// What is folded into the result of each lane.
pub(crate) trait Fold {
    /// The lanes' results with the elements at `at` folded in.
    ///
    /// # Safety
    /// `at..at + S::LANES` lies inside the range of the loop.
    unsafe fn fold<S: Simd>(&mut self, simd: S, lanes: S::Vector, at: usize) -> S::Vector;
}

/// Folds `range` into [`ROW_LANES`] results that begin as `start`.
///
/// # Safety
/// `fold` may be called for every part of `range`.
#[inline(always)]
pub(crate) unsafe fn fold<S: Simd>(
    simd: S,
    range: Range<usize>,
    start: f32,
    fold: &mut impl Fold,
) -> [f32; ROW_LANES] {
    let whole = range.end - range.len() % ROW_LANES;
    let mut row = simd.splat_row(start);
    for at in (range.start..whole).step_by(ROW_LANES) {
        for (k, lanes) in row.as_mut().iter_mut().enumerate() {
            // SAFETY: a part of the `ROW_LANES` elements at `at`, which end at `whole` at the latest.
            *lanes = unsafe { fold.fold(simd, *lanes, at + k * S::LANES) };
        }
    }
    let mut results = [0.0; ROW_LANES];
    for (k, &lanes) in row.as_ref().iter().enumerate() {
        // SAFETY: a row is `ROW_LANES` lanes in all.
        unsafe { simd.store(results.as_mut_ptr().add(k * S::LANES), lanes) }
    }
    for (at, result) in (whole..range.end).zip(&mut results) {
        // SAFETY: `at` lies in the range, and a scalar is one lane.
        *result = unsafe { fold.fold(Scalar, *result, at) };
    }
    results
}

/// The sum of the results, pairwise.
#[inline(always)]
pub(crate) fn sum(mut results: [f32; ROW_LANES]) -> f32 {
    let mut width = ROW_LANES;
    while width > 1 {
        width /= 2;
        for j in 0..width {
            results[j] += results[j + width];
        }
    }
    results[0]
}

/// The largest of the results that are numbers, or minus infinity.
#[inline(always)]
pub(crate) fn max(results: [f32; ROW_LANES]) -> f32 {
    results.into_iter().fold(f32::NEG_INFINITY, |max, x| Scalar.max(x, max))
}
