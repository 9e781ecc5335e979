//! The one matrix product: `C += A B`, bf16 by bf16 into `f32`.
//!
//! ```text
//!                       B [depth][columns] pairs along depth, in panels of 64 columns
//!                        ┌─────┬─────┬─────┬─────┐
//!                        │ 16  │ 16  │ 16  │ 16  │  4 registers, loaded once for each step of depth
//!      A [row][depth]    ├─────┼─────┼─────┼─────┤
//!        one pair, in    │  C: 4 rows x 4 vectors: │
//!        all lanes       │  16 sums in registers   │
//!                        └─────────────────────────┘
//! ```
//!
//! A step needs 8 loads for 16 products, and the processor does a load and a product at a time, so products set
//! the pace. Narrower tiles take 8 rows, to keep as many sums in flight as a product takes cycles.

use std::arch::x86_64::*;
use std::ops::Range;

use super::{LANES, PANEL};

/// The left operand: pair `k` of row `i` is `pairs[i * row + k * step]`.
#[derive(Clone, Copy)]
pub(super) struct Left<'a> {
    pub pairs: &'a [u32],
    pub row: usize,
    pub step: usize,
}

/// The right operand: pair `k` of column `j` is `pairs[j / PANEL * panel + k * step + j % PANEL]`.
#[derive(Clone, Copy)]
pub(super) struct Right<'a> {
    pub pairs: &'a [u32],
    pub panel: usize,
    pub step: usize,
}

/// The result: column `j` of row `i` is `sums[i * row + j]`.
pub(super) struct Sums<'a> {
    pub sums: &'a mut [f32],
    pub row: usize,
}

/// What the product is added to.
#[derive(Clone, Copy)]
pub(super) enum Start<'a> {
    Zero,
    /// What is there.
    Sums,
    /// What is there, each row times its factor.
    Scaled(&'a [f32]),
}

/// How much of the operands takes part.
#[derive(Clone)]
pub(super) struct Extent {
    /// A multiple of 8.
    pub rows: usize,
    /// Columns, in vectors of 16.
    pub vectors: Range<usize>,
    /// Pairs along the common dimension.
    pub depth: usize,
}

/// `C = start + A B`.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) fn product(extent: Extent, a: Left<'_>, b: Right<'_>, c: Sums<'_>, start: Start<'_>) {
    let Extent { rows, vectors, depth } = extent;
    if rows == 0 || depth == 0 || vectors.is_empty() {
        return;
    }
    // The last elements that the loops below touch: with them, all are in range.
    const PANEL_VECTORS: usize = PANEL / LANES;
    let last = vectors.end - 1;
    assert!(rows.is_multiple_of(8));
    assert!((rows - 1) * a.row + (depth - 1) * a.step < a.pairs.len());
    let (last_panel, last_vector) = (last / PANEL_VECTORS, last % PANEL_VECTORS + 1);
    assert!(last_panel * b.panel + (depth - 1) * b.step + last_vector * LANES <= b.pairs.len());
    assert!(last_panel == 0 || b.panel >= PANEL, "panels before the last end before it does");
    assert!((rows - 1) * c.row + vectors.end * LANES <= c.sums.len());
    if let Start::Scaled(factors) = start {
        assert!(factors.len() >= rows);
    }

    let mut vector = vectors.start;
    while vector < vectors.end {
        let (panel, within) = (vector / PANEL_VECTORS, vector % PANEL_VECTORS);
        let num_vectors = (PANEL_VECTORS - within).min(vectors.end - vector);
        // SAFETY: offsets of first elements, smaller than those asserted.
        let (b_first, c_first) = unsafe {
            (b.pairs.as_ptr().add(panel * b.panel + within * LANES), c.sums.as_mut_ptr().add(vector * LANES))
        };
        let strip = Strip {
            a: a.pairs.as_ptr(),
            a_row: a.row,
            a_step: a.step,
            b: b_first,
            b_step: b.step,
            c: c_first,
            c_row: c.row,
            depth,
        };
        // SAFETY: the assertions cover `rows` rows, these vectors and `depth` steps.
        unsafe {
            match num_vectors {
                1 => strip.rows::<8, 1>(rows, start),
                2 => strip.rows::<8, 2>(rows, start),
                3 => strip.rows::<8, 3>(rows, start),
                _ => strip.rows::<4, 4>(rows, start),
            }
        }
        vector += num_vectors;
    }
}

/// Some vectors of columns within a panel.
struct Strip {
    a: *const u32,
    a_row: usize,
    a_step: usize,
    b: *const u32,
    b_step: usize,
    c: *mut f32,
    c_row: usize,
    depth: usize,
}

impl Strip {
    /// # Safety
    /// Pointers are valid for `rows` rows (a multiple of `M`), `N` vectors and `depth` steps.
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn rows<const M: usize, const N: usize>(&self, rows: usize, start: Start<'_>) {
        for row in (0..rows).step_by(M) {
            // SAFETY: `row + M <= rows`, and the caller's promise.
            unsafe { self.tile::<M, N>(row, start) }
        }
    }

    /// # Safety
    /// Pointers are valid for rows `row..row + M`, `N` vectors and `depth` steps.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn tile<const M: usize, const N: usize>(&self, row: usize, start: Start<'_>) {
        // SAFETY: the caller's promise for all accesses; pairs may lie at any even address.
        unsafe {
            let c = self.c.add(row * self.c_row);
            let mut sums = [[_mm512_setzero_ps(); N]; M];
            if !matches!(start, Start::Zero) {
                for (i, sums) in sums.iter_mut().enumerate() {
                    for (j, sum) in sums.iter_mut().enumerate() {
                        *sum = _mm512_loadu_ps(c.add(i * self.c_row + j * LANES));
                    }
                }
            }
            if let Start::Scaled(factors) = start {
                for (i, sums) in sums.iter_mut().enumerate() {
                    let factor = _mm512_set1_ps(*factors.get_unchecked(row + i));
                    for sum in sums {
                        *sum = _mm512_mul_ps(*sum, factor);
                    }
                }
            }
            let mut a = self.a.add(row * self.a_row);
            let mut b = self.b;
            for _ in 0..self.depth {
                let mut columns = [_mm512_setzero_si512(); N];
                for (j, column) in columns.iter_mut().enumerate() {
                    *column = _mm512_loadu_si512(b.add(j * LANES).cast());
                }
                for (i, sums) in sums.iter_mut().enumerate() {
                    let pair = pairs(_mm512_set1_epi32(a.add(i * self.a_row).cast::<i32>().read_unaligned()));
                    for (sum, &column) in sums.iter_mut().zip(&columns) {
                        *sum = _mm512_dpbf16_ps(*sum, pair, pairs(column));
                    }
                }
                a = a.wrapping_add(self.a_step);
                b = b.wrapping_add(self.b_step);
            }
            for (i, sums) in sums.iter().enumerate() {
                for (j, &sum) in sums.iter().enumerate() {
                    _mm512_storeu_ps(c.add(i * self.c_row + j * LANES), sum);
                }
            }
        }
    }
}

/// The same bits, named as pairs of bf16.
#[inline(always)]
fn pairs(bits: __m512i) -> __m512bh {
    // SAFETY: both are 512 bits, and any bits are values of both.
    unsafe { std::mem::transmute(bits) }
}
