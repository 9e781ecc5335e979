//! Sums of squares and the check for infinities.
//!
//! The order of additions is fixed by element numbers alone, so the sum has the same bits on every instruction
//! set and for any number of threads: within a block of [`BLOCK_NUMEL`] elements, element `i` goes to the `f64`
//! sum `i % 32`; the 32 sums are added pairwise (`j` and `j + 16`, then `j + 8`, ...); blocks are added in order.

use std::sync::atomic::{AtomicBool, Ordering};

use half::{bf16, f16};
use shardwise_device::{DType, Slice};

use crate::Threads;
use crate::cast::Cast;
use crate::isa::{Isa, Kernel};
use crate::parallel::{PIECE_NUMEL, Split, for_each_piece};
use crate::simd::{Element, SUM_LANES, Scalar, Simd};

/// Elements that are summed apart before blocks are added.
pub const BLOCK_NUMEL: usize = 1 << 16;

// Pieces are cut between blocks.
const _: () = assert!(PIECE_NUMEL.is_multiple_of(BLOCK_NUMEL) && BLOCK_NUMEL.is_multiple_of(SUM_LANES));

/// The sum of squares of `x`, in `f64`.
///
/// The square of an `f32` and the sum of any number of them fit `f64`, so the result is finite exactly when all
/// elements are: a gradient norm needs no pass of its own to find infinities.
pub fn sum_of_squares(x: &[f32]) -> f64 {
    sum_of_squares_with(Isa::best(), x)
}

/// [`sum_of_squares`] on several threads, the same bits.
pub fn sum_of_squares_on(threads: Threads, x: &[f32]) -> f64 {
    if threads == Threads::ONE || x.len() <= PIECE_NUMEL {
        return sum_of_squares(x);
    }
    let isa = Isa::best();
    let mut sums = vec![0.0; x.len().div_ceil(BLOCK_NUMEL)];
    for_each_piece(threads, BlockSums { x, sums: &mut sums }, |piece| {
        for (block, sum) in piece.x.chunks(BLOCK_NUMEL).zip(piece.sums) {
            *sum = isa.run(SumOfSquares(block));
        }
    });
    sums.iter().fold(0.0, |total, sum| total + sum)
}

/// [`sum_of_squares_on`] of numbers of any type: the bits of the sum over the same numbers in `f32`.
///
/// # Panics
/// If `x` holds bytes.
pub fn sum_of_squares_of(threads: Threads, x: Slice<'_>) -> f64 {
    const SAME: &str = "the arm's own type";
    match x.dtype() {
        DType::F32 => sum_of_squares_on(threads, x.typed().expect(SAME)),
        DType::Bf16 => sum_of_widened_squares(Isa::best(), threads, x.typed::<bf16>().expect(SAME)),
        DType::F16 => sum_of_widened_squares(Isa::best(), threads, x.typed::<f16>().expect(SAME)),
        DType::U8 => panic!("bytes are no numbers to compute with"),
    }
}

/// Widens a block at a time, in the cache.
fn sum_of_widened_squares<T: Element>(isa: Isa, threads: Threads, x: &[T]) -> f64 {
    let mut sums = vec![0.0; x.len().div_ceil(BLOCK_NUMEL)];
    for_each_piece(threads, BlockSums { x, sums: &mut sums }, |piece| {
        let mut wide = vec![0f32; BLOCK_NUMEL.min(piece.x.len())];
        for (block, sum) in piece.x.chunks(BLOCK_NUMEL).zip(piece.sums) {
            let wide = &mut wide[..block.len()];
            isa.run(Cast { from: block, to: wide });
            *sum = isa.run(SumOfSquares(wide));
        }
    });
    sums.iter().fold(0.0, |total, sum| total + sum)
}

/// Whether no element is infinite or NaN.
pub fn all_finite(x: &[f32]) -> bool {
    all_finite_with(Isa::best(), x)
}

/// [`all_finite`] on several threads.
pub fn all_finite_on(threads: Threads, x: &[f32]) -> bool {
    every_piece_finite(threads, x)
}

fn every_piece_finite<T: Element>(threads: Threads, x: &[T]) -> bool {
    let isa = Isa::best();
    let finite = AtomicBool::new(true);
    // Only the threads' joining publishes anything: the flag itself needs no order.
    for_each_piece(threads, x, |piece| {
        if finite.load(Ordering::Relaxed) && !all_finite_with(isa, piece) {
            finite.store(false, Ordering::Relaxed);
        }
    });
    finite.into_inner()
}

/// [`all_finite_on`] of numbers of any type.
///
/// # Panics
/// If `x` holds bytes.
pub fn all_finite_of(threads: Threads, x: Slice<'_>) -> bool {
    const SAME: &str = "the arm's own type";
    match x.dtype() {
        DType::F32 => every_piece_finite(threads, x.typed::<f32>().expect(SAME)),
        DType::Bf16 => every_piece_finite(threads, x.typed::<bf16>().expect(SAME)),
        DType::F16 => every_piece_finite(threads, x.typed::<f16>().expect(SAME)),
        DType::U8 => panic!("bytes are no numbers to compute with"),
    }
}

fn sum_of_squares_with(isa: Isa, x: &[f32]) -> f64 {
    x.chunks(BLOCK_NUMEL).fold(0.0, |total, block| total + isa.run(SumOfSquares(block)))
}

fn all_finite_with<T: Element>(isa: Isa, x: &[T]) -> bool {
    x.chunks(BLOCK_NUMEL).all(|block| isa.run(AllFinite(block)))
}

/// Elements, and a place for the sum of each block of them.
struct BlockSums<'a, T> {
    x: &'a [T],
    sums: &'a mut [f64],
}

impl<T: Sync> Split for BlockSums<'_, T> {
    fn numel(&self) -> usize {
        self.x.len()
    }
    fn split_at(self, at: usize) -> (Self, Self) {
        let x = self.x.split_at(at);
        let sums = self.sums.split_at_mut(at / BLOCK_NUMEL);
        (BlockSums { x: x.0, sums: sums.0 }, BlockSums { x: x.1, sums: sums.1 })
    }
}

/// One block's sum.
struct SumOfSquares<'a>(&'a [f32]);

impl Kernel for SumOfSquares<'_> {
    type Output = f64;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f64 {
        let (chunks, tail) = self.0.as_chunks::<SUM_LANES>();
        let mut sums = simd.zero_sums();
        for chunk in chunks {
            // SAFETY: a chunk holds `SUM_LANES` elements.
            sums = unsafe { simd.add_squares(sums, chunk.as_ptr()) };
        }
        let mut sums = simd.sums(sums);
        for (sum, &x) in sums.iter_mut().zip(tail) {
            let x = f64::from(x);
            *sum += x * x;
        }
        let mut width = SUM_LANES;
        while width > 1 {
            width /= 2;
            for j in 0..width {
                sums[j] += sums[j + width];
            }
        }
        sums[0]
    }
}

/// Whether a block is finite: `0 * x` is zero for a finite `x` and NaN for any other, and a sum keeps a NaN.
struct AllFinite<'a, T>(&'a [T]);

impl<T: Element> AllFinite<'_, T> {
    /// # Safety
    /// `at + S::LANES` is at most the length.
    #[inline(always)]
    unsafe fn add<S: Simd>(&self, simd: S, sum: S::Vector, at: usize) -> S::Vector {
        // SAFETY: in range by the caller's promise.
        let x = unsafe { T::load(simd, self.0.as_ptr().add(at)) };
        simd.add(sum, simd.mul(x, simd.splat(0.0)))
    }
}

impl<T: Element> Kernel for AllFinite<'_, T> {
    type Output = bool;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> bool {
        let numel = self.0.len();
        let whole = numel - numel % S::LANES;
        let mut sum = simd.splat(0.0);
        for at in (0..whole).step_by(S::LANES) {
            // SAFETY: `at + LANES <= whole <= numel`.
            sum = unsafe { self.add(simd, sum, at) };
        }
        let mut tail = 0.0;
        for at in whole..numel {
            // SAFETY: `at < numel`, and a scalar is one lane.
            tail = unsafe { self.add(Scalar, tail, at) };
        }
        let mut lanes = [0.0; MAX_LANES];
        assert!(S::LANES <= MAX_LANES);
        // SAFETY: `lanes` has room for `LANES` elements (asserted).
        unsafe { simd.store(lanes.as_mut_ptr(), sum) };
        tail == 0.0 && lanes.iter().all(|&lane| lane == 0.0)
    }
}

/// Lanes of the widest registers.
const MAX_LANES: usize = 16;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The documented order of additions, word for word.
    fn in_the_documented_order(x: &[f32]) -> f64 {
        let mut total = 0.0;
        for block in x.chunks(BLOCK_NUMEL) {
            let mut sums = [0f64; 32];
            for (i, &x) in block.iter().enumerate() {
                sums[i % 32] += f64::from(x) * f64::from(x);
            }
            for width in [16, 8, 4, 2, 1] {
                for j in 0..width {
                    sums[j] += sums[j + width];
                }
            }
            total += sums[0];
        }
        total
    }

    fn numbers(numel: usize) -> Vec<f32> {
        (0..numel).map(|i| ((i * 7919) % 10007) as f32 * 1.7e-3 - 8.0).collect()
    }

    #[test]
    fn the_sum_is_that_of_the_documented_order_on_every_instruction_set() {
        for numel in [0, 1, 31, 32, 33, 1000, BLOCK_NUMEL, BLOCK_NUMEL + 1, 3 * BLOCK_NUMEL + 45] {
            let x = numbers(numel);
            for isa in Isa::all() {
                let sum = sum_of_squares_with(isa, &x);
                assert_eq!(sum.to_bits(), in_the_documented_order(&x).to_bits(), "{isa:?}, {numel} elements");
            }
        }
    }

    #[test]
    fn threads_do_not_change_the_sum() {
        let x = numbers(3 * PIECE_NUMEL + 12_345);
        let one = sum_of_squares(&x);
        for count in [1, 2, 3, 8] {
            assert_eq!(sum_of_squares_on(Threads::new(count).unwrap(), &x).to_bits(), one.to_bits());
        }
    }

    #[test]
    fn the_largest_numbers_do_not_overflow() {
        let sum = sum_of_squares(&[f32::MAX; 1024]);
        assert_eq!(sum, f64::from(f32::MAX) * f64::from(f32::MAX) * 1024.0);
    }

    #[test]
    fn one_bad_element_anywhere_is_found() {
        let numel = PIECE_NUMEL + 77;
        let mut x = vec![f32::MAX; numel];
        assert!(all_finite(&x) && sum_of_squares(&x).is_finite());
        for at in [0, 1, 15, 16, 63, BLOCK_NUMEL, numel - 14, numel - 1] {
            for bad in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
                x[at] = bad;
                for isa in Isa::all() {
                    assert!(!all_finite_with(isa, &x), "{bad} at {at}, {isa:?}");
                    assert!(!sum_of_squares_with(isa, &x).is_finite());
                }
                assert!(!all_finite_on(Threads::new(2).unwrap(), &x));
                x[at] = f32::MIN_POSITIVE / 2.0;
            }
        }
        assert!(all_finite_on(Threads::new(2).unwrap(), &x));
    }

    #[test]
    fn every_16_bit_number_counts_as_it_does_in_f32() {
        // All bit patterns, finite and not, over more than one block and piece.
        let bits = |i: usize| (i.wrapping_mul(0x9e37) >> 2) as u16;
        let numel = PIECE_NUMEL + 3 * BLOCK_NUMEL + 45;
        let finite16: Vec<f16> = (0..numel)
            .map(|i| f16::from_bits(bits(i)))
            .map(|x| if x.is_finite() { x } else { f16::ONE })
            .collect();
        let finiteb: Vec<bf16> = (0..numel).map(|i| bf16::from_f32(finite16[i].to_f32())).collect();
        for threads in [1, 3].map(|count| Threads::new(count).unwrap()) {
            let wide: Vec<f32> = finite16.iter().map(|x| x.to_f32()).collect();
            let sum = sum_of_squares_of(threads, Slice::of(&finite16));
            assert_eq!(sum.to_bits(), sum_of_squares(&wide).to_bits());
            let wide: Vec<f32> = finiteb.iter().map(|x| x.to_f32()).collect();
            let sum = sum_of_squares_of(threads, Slice::of(&finiteb));
            assert_eq!(sum.to_bits(), sum_of_squares(&wide).to_bits());
            assert_eq!(sum.to_bits(), sum_of_squares_of(threads, Slice::of(&wide)).to_bits());
            assert!(all_finite_of(threads, Slice::of(&finite16)));
            assert!(all_finite_of(threads, Slice::of(&finiteb)));
        }
        for x in (0..=u16::MAX).map(f16::from_bits) {
            for isa in Isa::all() {
                assert_eq!(all_finite_with(isa, &[f16::ONE, x]), x.is_finite(), "{isa:?}, {x:?}");
            }
            let x = bf16::from_bits(x.to_bits());
            let mut many = [bf16::MAX; 40];
            many[usize::from(x.to_bits()) % 40] = x;
            assert_eq!(all_finite_of(Threads::ONE, Slice::of(&many)), x.is_finite(), "{x:?}");
            assert_eq!(sum_of_squares_of(Threads::ONE, Slice::of(&many)).is_finite(), x.is_finite());
        }
    }

    proptest! {
        #[test]
        fn any_bits_at_any_offset(bits in prop::collection::vec(any::<u32>(), 0..300), offset in 0usize..20) {
            let x: Vec<f32> = bits.into_iter().map(f32::from_bits).collect();
            let x = &x[offset.min(x.len())..];
            let finite = x.iter().all(|x| x.is_finite());
            let expected = in_the_documented_order(x);
            for isa in Isa::all() {
                prop_assert_eq!(all_finite_with(isa, x), finite);
                let sum = sum_of_squares_with(isa, x);
                prop_assert_eq!(sum.is_finite(), finite);
                prop_assert!(sum.to_bits() == expected.to_bits() || (sum.is_nan() && expected.is_nan()));
            }
        }
    }
}
