//! Dropout whose mask is computed, never kept.
//!
//! Whether element `i` is dropped is a pure function of (seed, name, `i`), by the generator of [`philox`](crate::philox). So
//! the backward pass computes the mask again, a forward pass that runs twice drops the same elements twice, and a batch that
//! is cut over ranks or micro-batches drops what the whole one would: each part begins at the index of its first element. Where
//! rows themselves are cut, [`Mask::of_part`] passes over what other ranks have.
//!
//! ```text
//! word(i) >= rate * 2^32 ?  out = x * scale  :  out = x * 0          scale = 1 / (1 - rate)
//! ```
//!
//! Dropped elements are multiplied by zero rather than replaced: what is not a number stays seen.
//!
//! # Source
//! Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from Overfitting", JMLR 2014.

use std::ops::Range;

use crate::isa::{Isa, Kernel};
use crate::parallel::{Split, for_each_piece};
use crate::philox::{Distribution, Draws, GROUP_NUMEL, Numbers, Runs, Stream, fill_with};
use crate::simd::Simd;
use crate::simd::lanes::{Each, for_each, load, store};
use crate::{Float, Threads};

/// Which elements are dropped, and how much the others weigh.
#[derive(Debug, Clone, Copy)]
pub struct Mask {
    stream: Stream,
    numbers: Numbers,
    keep: Keep,
}

impl Mask {
    /// The mask of the elements from `first` on of the place `name` in a model.
    ///
    /// # Panics
    /// If `rate` is not in `0.0..1.0`.
    pub fn new(seed: u64, name: &str, first: u64, rate: f64) -> Self {
        assert!((0.0..1.0).contains(&rate), "a rate of `{rate}`");
        Mask { stream: Stream::new(seed, name), numbers: Numbers::from(first), keep: Keep::new(rate) }
    }

    /// The mask of a part of each row, where a rank has some heads or some positions only.
    ///
    /// Rows of `row_numel` elements begin at this mask's first element. Element `i` of row `r` of the part is element
    /// `part.start + i` of row `r`:
    ///
    /// ```text
    /// self              aaaaBBBBBBcc aaaaBBBBBBcc aaaaBBBBBBcc      row_numel = 12
    /// of_part(12, 4..10)    BBBBBB BBBBBB BBBBBB
    /// ```
    ///
    /// # Panics
    /// If `part` is not a part of a row, if this mask is of a part already, or if `part` begins beyond 64 bits.
    #[must_use]
    pub fn of_part(self, row_numel: usize, part: Range<usize>) -> Self {
        let Some(numbers) = self.numbers.of_parts(row_numel as u64, part.start as u64..part.end as u64)
        else {
            panic!("elements `{part:?}` of rows of `{row_numel}` of {:?}", self.numbers);
        };
        Mask { numbers, ..self }
    }

    /// `out = x * mask`: what dropout does to activations, and to their gradients.
    ///
    /// # Panics
    /// If the lengths differ, the last index does not fit `u64`, or there are elements where the part of a row has none.
    pub fn apply<T: Float>(&self, threads: Threads, x: &[T], out: &mut [T]) {
        self.apply_with(Isa::best(), threads, x, out);
    }

    /// The mask itself: 0 where elements are dropped, the scale elsewhere.
    ///
    /// # Panics
    /// If the last index does not fit `u64`, or there are elements where the part of a row has none.
    pub fn fill(&self, threads: Threads, out: &mut [f32]) {
        fill_with(Isa::best(), threads, self.draws(), out);
    }

    fn apply_with<T: Float>(&self, isa: Isa, threads: Threads, x: &[T], out: &mut [T]) {
        assert_eq!(x.len(), out.len(), "elements against room for them");
        let draws = self.draws();
        draws.check(x.len());
        for_each_piece(threads, Apply { draws, x, out }, |piece| isa.run(piece));
    }

    /// The mask of `numel` elements, for a kernel.
    ///
    /// # Panics
    /// If the last index does not fit `u64`, or there are elements where the part of a row has none.
    pub(crate) fn on_device(&self, numel: usize) -> DeviceMask {
        self.draws().check(numel);
        DeviceMask { numbers: self.numbers.runs(), stream: self.stream, keep: self.keep }
    }

    fn draws(&self) -> Draws<Keep> {
        Draws::new(self.stream, self.numbers, self.keep)
    }
}

/// A mask as `cuda/dropout.cu` reads it.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct DeviceMask {
    numbers: Runs,
    stream: Stream,
    keep: Keep,
}

/// A word drops its element if it is below a threshold.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Keep {
    threshold: u32,
    scale: f32,
}

impl Keep {
    fn new(rate: f64) -> Self {
        const WORDS: f64 = 4_294_967_296.0;
        let threshold = (rate * WORDS).round().min(WORDS - 1.0);
        // Of the share that is kept by these words, so that the mean stays to the last bit.
        Keep { threshold: threshold as u32, scale: (WORDS / (WORDS - threshold)) as f32 }
    }
}

impl Distribution for Keep {
    #[inline(always)]
    fn sample(self, words: [u32; 4]) -> [f32; 4] {
        words.map(|word| if word >= self.threshold { self.scale } else { 0.0 })
    }
}

struct Apply<'a, T> {
    draws: Draws<Keep>,
    x: &'a [T],
    out: &'a mut [T],
}

impl<T: Float> Split for Apply<'_, T> {
    fn numel(&self) -> usize {
        self.x.len()
    }
    fn split_at(self, at: usize) -> (Self, Self) {
        let (x, out) = (self.x.split_at(at), self.out.split_at_mut(at));
        (
            Apply { draws: self.draws, x: x.0, out: out.0 },
            Apply { draws: self.draws.skip(at), x: x.1, out: out.1 },
        )
    }
}

impl<T: Float> Kernel for Apply<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Apply { mut draws, mut x, mut out } = self;
        let mut weights = [0.0; GROUP_NUMEL];
        while !x.is_empty() {
            let drawn = draws.next(x.len(), &mut weights);
            let take = drawn.len();
            let (now, later) = x.split_at(take);
            let (out_now, out_later) = out.split_at_mut(take);
            let mut product = Product { weights: &weights[drawn], x: now, out: out_now };
            // SAFETY: all three slices have `take` elements.
            unsafe { for_each(simd, take, &mut product) };
            (x, out) = (later, out_later);
        }
    }
}

/// `out = x * weights`.
struct Product<'a, T> {
    weights: &'a [f32],
    x: &'a [T],
    out: &'a mut [T],
}

impl<T: Float> Each for Product<'_, T> {
    #[inline(always)]
    unsafe fn each<S: Simd, const N: usize>(&mut self, simd: S, at: usize) {
        // SAFETY: in range by the caller's promise.
        unsafe {
            let mut x: [_; N] = load(simd, self.x.as_ptr().add(at));
            let weights: [_; N] = load(simd, self.weights.as_ptr().add(at));
            for k in 0..N {
                x[k] = simd.mul(x[k], weights[k]);
            }
            store(simd, self.out.as_mut_ptr().add(at), x);
        }
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};
    use proptest::prelude::*;

    use super::*;
    use crate::parallel::PIECE_NUMEL;
    use crate::testing::{Number, bits, normal, ways};

    fn mask(first: u64, numel: usize, rate: f64) -> Vec<f32> {
        let mut mask = vec![f32::NAN; numel];
        Mask::new(7, "h.0.mlp", first, rate).fill(Threads::ONE, &mut mask);
        mask
    }

    fn check<T: Number>() {
        let numel = 2 * PIECE_NUMEL + 77;
        let x = normal::<T>("x", numel, 1.0);
        for first in [0, 3, 64, (1 << 40) + 5] {
            let expected: Vec<T> = (x.iter().zip(mask(first, numel, 0.1)))
                .map(|(x, weight)| T::of(x.wide() as f32 * weight))
                .collect();
            for (isa, threads) in ways() {
                let mut out = vec![T::of(f32::NAN); numel];
                Mask::new(7, "h.0.mlp", first, 0.1).apply_with(isa, threads, &x, &mut out);
                assert!(bits(&out) == bits(&expected), "{isa:?}, {threads:?}, from {first}");
            }
        }
    }

    #[test]
    fn every_instruction_set_and_number_of_threads_drops_the_same_elements() {
        check::<f32>();
        check::<bf16>();
        check::<f16>();
    }

    proptest! {
        /// A part has the mask that the whole has there.
        #[test]
        fn a_mask_does_not_depend_on_where_it_is_cut(first in 0u64..1 << 50, at in 0usize..300, numel in 0usize..300) {
            let whole = mask(first, at + numel, 0.3);
            prop_assert_eq!(&whole[at..], &mask(first + at as u64, numel, 0.3)[..]);
        }
    }

    /// Parts of rows, put together, against the whole rows' mask.
    fn check_parts<T: Number>() {
        const NUM_ROWS: usize = 5;
        for (row_numel, cuts) in
            [(1, vec![]), (12, vec![4, 4, 6]), (301, vec![1, 67, 130]), (2 * PIECE_NUMEL + 9, vec![77, 999])]
        {
            let numel = NUM_ROWS * row_numel;
            let x = normal::<T>("x", numel, 1.0);
            let whole = Mask::new(7, "h.0.attn", (3 << 33) + 5, 0.3);
            let (mut expected, mut weights) = (vec![T::of(f32::NAN); numel], vec![f32::NAN; numel]);
            whole.apply(Threads::ONE, &x, &mut expected);
            whole.fill(Threads::ONE, &mut weights);

            let starts = std::iter::once(0).chain(cuts.iter().copied());
            for part in starts.zip(cuts.iter().copied().chain([row_numel])).map(|(start, end)| start..end) {
                let x = of_rows(&x, row_numel, &part);
                let mask = whole.of_part(row_numel, part.clone());
                for (isa, threads) in ways() {
                    let mut out = vec![T::of(f32::NAN); x.len()];
                    mask.apply_with(isa, threads, &x, &mut out);
                    let expected = of_rows(&expected, row_numel, &part);
                    assert!(bits(&out) == bits(&expected), "{isa:?}, {threads:?}, {part:?} of {row_numel}");
                }
                for threads in [Threads::ONE, Threads::new(3).unwrap()] {
                    let mut out = vec![f32::NAN; x.len()];
                    mask.fill(threads, &mut out);
                    assert!(
                        out == of_rows(&weights, row_numel, &part),
                        "{threads:?}, {part:?} of {row_numel}"
                    );
                }
            }
        }
    }

    fn of_rows<T: Copy>(x: &[T], row_numel: usize, part: &Range<usize>) -> Vec<T> {
        x.chunks_exact(row_numel).flat_map(|row| &row[part.clone()]).copied().collect()
    }

    #[test]
    fn parts_of_rows_have_the_mask_of_the_whole_rows() {
        check_parts::<f32>();
        check_parts::<bf16>();
        check_parts::<f16>();
    }

    #[test]
    #[should_panic(expected = "elements `4..13` of rows of `12`")]
    fn a_part_goes_no_further_than_its_row() {
        let _ = Mask::new(1, "x", 0, 0.1).of_part(12, 4..13);
    }

    #[test]
    #[should_panic(expected = "element numbers fit 64 bits")]
    fn numbers_beyond_64_bits_are_refused() {
        Mask::new(1, "x", u64::MAX - 20, 0.1).of_part(10, 0..4).fill(Threads::ONE, &mut [0.0; 9]);
    }

    proptest! {
        #[test]
        fn any_part_of_any_rows(
            first in 0u64..1 << 50, num_rows in 0usize..6, row_numel in 1usize..300, cuts in prop::array::uniform2(0usize..300),
        ) {
            let whole = mask(first, num_rows * row_numel, 0.3);
            let [a, b] = cuts.map(|cut| cut % (row_numel + 1));
            let part = a.min(b)..a.max(b);
            let mut out = vec![f32::NAN; num_rows * part.len()];
            Mask::new(7, "h.0.mlp", first, 0.3).of_part(row_numel, part.clone()).fill(Threads::ONE, &mut out);
            prop_assert_eq!(out, of_rows(&whole, row_numel, &part));
        }
    }

    #[test]
    fn the_share_is_the_rate_and_the_mean_is_kept() {
        const NUMEL: usize = 1 << 20;
        for rate in [0.0, 0.001, 0.1, 0.5, 0.9] {
            let mask = mask(11, NUMEL, rate);
            let dropped = mask.iter().filter(|&&weight| weight == 0.0).count() as f64 / NUMEL as f64;
            let bound = 5.0 * (rate * (1.0 - rate) / NUMEL as f64).sqrt();
            assert!((dropped - rate).abs() <= bound, "{dropped} dropped at a rate of {rate}");
            let mean = mask.iter().map(|&weight| f64::from(weight)).sum::<f64>() / NUMEL as f64;
            assert!((mean - 1.0).abs() <= bound / (1.0 - rate) + 1e-7, "{mean} at a rate of {rate}");
            assert!(mask.iter().all(|&w| w == 0.0 || (f64::from(w) * (1.0 - rate) - 1.0).abs() < 1e-6));
        }
    }

    #[test]
    fn neighbours_places_and_seeds_are_independent() {
        const NUMEL: usize = 1 << 18;
        let is_dropped = |seed, name, first| {
            let mut mask = vec![0.0; NUMEL];
            Mask::new(seed, name, first, 0.5).fill(Threads::ONE, &mut mask);
            mask.into_iter().map(|weight| weight == 0.0).collect::<Vec<_>>()
        };
        let one = is_dropped(1, "h.0.mlp", 0);
        let others = [(1, "h.0.mlp", 1), (1, "h.0.mlp", 64), (1, "h.1.mlp", 0), (2, "h.0.mlp", 0)];
        for (seed, name, first) in others {
            let other = is_dropped(seed, name, first);
            let agree = one.iter().zip(other).filter(|(a, b)| *a == b).count() as f64 / NUMEL as f64;
            // Five standard errors of a fair coin.
            assert!((agree - 0.5).abs() < 2.5 / (NUMEL as f64).sqrt(), "{agree}: {seed} {name} {first}");
        }
    }

    #[test]
    fn what_is_not_a_number_is_not_hidden() {
        let x = [f32::NAN; 100];
        let mut out = [0.0; 100];
        Mask::new(1, "x", 0, 0.9).apply(Threads::ONE, &x, &mut out);
        assert!(out.iter().all(|x| x.is_nan()));
    }

    #[test]
    #[should_panic(expected = "a rate of `1`")]
    fn everything_cannot_be_dropped() {
        Mask::new(1, "x", 0, 1.0);
    }
}
