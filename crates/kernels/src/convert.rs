//! Numbers of one type as another type, times a factor; and sums that are kept in 16 bits.
//!
//! What a reduction needs beside the plain casts: gradients are divided before they are sent and rounded to the type
//! that is sent, and sums of micro-batches may be stored in 16 bits. All arithmetic is `f32`, and each result is
//! rounded once.

use shardwise_device::{DType, Slice, SliceMut};

use crate::Threads;
use crate::isa::{Isa, Kernel};
use crate::parallel::for_each_piece;
use crate::reduce::{Store, copy};
use crate::simd::{Element, Scalar, Simd};

/// `to = from * factor`, multiplied in `f32` and rounded once: to nearest, ties to even, and to an infinity where the
/// result is too large for `to`.
///
/// # Shapes
/// Of one length; each of `f32`, `bf16` or `f16`.
/// # Panics
/// If shapes or types are not as above.
pub fn scale_on(threads: Threads, from: Slice<'_>, factor: f32, to: SliceMut<'_>) {
    scale_with(Isa::best(), threads, from, factor, to);
}

/// `sum += x`, added in `f32` and rounded once to the type of `sum`.
///
/// # Shapes
/// Of one length; each of `f32`, `bf16` or `f16`.
/// # Panics
/// If shapes or types are not as above.
pub fn accumulate_on(threads: Threads, sum: SliceMut<'_>, x: Slice<'_>) {
    accumulate_with(Isa::best(), threads, sum, x);
}

/// Calls `$run` with both views as typed slices: each pair of types is compiled apart.
macro_rules! with_types {
    ($a:expr, $b:expr, |$x:ident, $y:ident| $run:expr) => {{
        use half::{bf16, f16};
        const SAME: &str = "the arm's own type";
        macro_rules! second {
            ($ta:ty) => {{
                let $x = $a.typed::<$ta>().expect(SAME);
                match $b.dtype() {
                    DType::F32 => {
                        let $y = $b.typed::<f32>().expect(SAME);
                        $run
                    }
                    DType::Bf16 => {
                        let $y = $b.typed::<bf16>().expect(SAME);
                        $run
                    }
                    DType::F16 => {
                        let $y = $b.typed::<f16>().expect(SAME);
                        $run
                    }
                    DType::U8 => panic!("bytes are no numbers to compute with"),
                }
            }};
        }
        match $a.dtype() {
            DType::F32 => second!(f32),
            DType::Bf16 => second!(bf16),
            DType::F16 => second!(f16),
            DType::U8 => panic!("bytes are no numbers to compute with"),
        }
    }};
}

fn scale_with(isa: Isa, threads: Threads, from: Slice<'_>, factor: f32, to: SliceMut<'_>) {
    assert_eq!(from.numel(), to.numel(), "elements to scale against room for them");
    if factor == 1.0 && from.dtype() == to.dtype() {
        return copy(from, to, Store::Cached);
    }
    with_types!(from, to, |from, to| {
        for_each_piece(threads, (from, to), |(from, to)| isa.run(Scale { from, factor, to }));
    });
}

fn accumulate_with(isa: Isa, threads: Threads, sum: SliceMut<'_>, x: Slice<'_>) {
    assert_eq!(sum.numel(), x.numel(), "sums against addends");
    with_types!(sum, x, |sum, x| {
        for_each_piece(threads, (sum, x), |(sum, x)| isa.run(Accumulate { sum, x }));
    });
}

struct Scale<'a, A, B> {
    from: &'a [A],
    factor: f32,
    to: &'a mut [B],
}

impl<A: Element, B: Element> Scale<'_, A, B> {
    /// # Safety
    /// `at..at + S::LANES` lies inside both slices.
    #[inline(always)]
    unsafe fn scale<S: Simd>(&mut self, simd: S, at: usize) {
        // SAFETY: in range by the caller's promise.
        unsafe {
            let x = A::load(simd, self.from.as_ptr().add(at));
            B::store(simd, self.to.as_mut_ptr().add(at), simd.mul(x, simd.splat(self.factor)));
        }
    }
}

impl<A: Element, B: Element> Kernel for Scale<'_, A, B> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let numel = self.from.len().min(self.to.len());
        let whole = numel - numel % S::LANES;
        for at in (0..whole).step_by(S::LANES) {
            // SAFETY: `at + LANES <= whole <= numel`.
            unsafe { self.scale(simd, at) }
        }
        for at in whole..numel {
            // SAFETY: `at < numel`, and a scalar is one lane.
            unsafe { self.scale(Scalar, at) }
        }
    }
}

struct Accumulate<'a, A, B> {
    sum: &'a mut [A],
    x: &'a [B],
}

impl<A: Element, B: Element> Accumulate<'_, A, B> {
    /// # Safety
    /// `at..at + S::LANES` lies inside both slices.
    #[inline(always)]
    unsafe fn add<S: Simd>(&mut self, simd: S, at: usize) {
        // SAFETY: in range by the caller's promise.
        unsafe {
            let sum = self.sum.as_mut_ptr().add(at);
            let x = B::load(simd, self.x.as_ptr().add(at));
            A::store(simd, sum, simd.add(A::load(simd, sum), x));
        }
    }
}

impl<A: Element, B: Element> Kernel for Accumulate<'_, A, B> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let numel = self.sum.len().min(self.x.len());
        let whole = numel - numel % S::LANES;
        for at in (0..whole).step_by(S::LANES) {
            // SAFETY: `at + LANES <= whole <= numel`.
            unsafe { self.add(simd, at) }
        }
        for at in whole..numel {
            // SAFETY: `at < numel`, and a scalar is one lane.
            unsafe { self.add(Scalar, at) }
        }
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};
    use proptest::prelude::*;
    use shardwise_device::{Buffer, Place};

    use super::*;

    const NUMBERS: [DType; 3] = [DType::F32, DType::Bf16, DType::F16];

    /// The `i`th number, by the crate `half`.
    fn get(view: Slice<'_>, i: usize) -> f32 {
        match view.dtype() {
            DType::F32 => view.typed::<f32>().unwrap()[i],
            DType::Bf16 => view.typed::<bf16>().unwrap()[i].to_f32(),
            _ => view.typed::<f16>().unwrap()[i].to_f32(),
        }
    }

    /// `x` rounded to `dtype` by the crate `half`.
    fn rounded(x: f32, dtype: DType) -> f32 {
        match dtype {
            DType::F32 => x,
            DType::Bf16 => bf16::from_f32(x).to_f32(),
            _ => f16::from_f32(x).to_f32(),
        }
    }

    fn buffer(bits: &[u32], dtype: DType) -> Buffer {
        let mut buffer = Buffer::zeroed(dtype, bits.len(), Place::Cpu).unwrap();
        let width = dtype.size_bytes();
        for (bytes, bits) in buffer.view_mut().bytes().chunks_exact_mut(width).zip(bits) {
            bytes.copy_from_slice(&bits.to_le_bytes()[..width]);
        }
        buffer
    }

    /// Equal bits, any NaN for a NaN.
    fn same(a: f32, b: f32) -> bool {
        a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan())
    }

    proptest! {
        #[test]
        fn every_instruction_set_rounds_once_like_plain_rust(
            bits in prop::collection::vec((any::<u32>(), any::<u32>()), 0..150),
            factor in prop::sample::select(vec![1.0f32, 0.5, 1.0 / 3.0, 1e-4, 3.0]),
            skip in 0usize..9,
        ) {
            let skip = skip.min(bits.len());
            let (a, b): (Vec<u32>, Vec<u32>) = bits.into_iter().unzip();
            for (from, to) in NUMBERS.into_iter().flat_map(|from| NUMBERS.map(|to| (from, to))) {
                let (x, start) = (buffer(&a, from), buffer(&b, to));
                for isa in Isa::all() {
                    let mut scaled = buffer(&b, to);
                    let mut sum = buffer(&b, to);
                    let range = skip..a.len();
                    scale_with(isa, Threads::ONE, x.view().range(range.clone()), factor, scaled.view_mut().into_range(range.clone()));
                    accumulate_with(isa, Threads::ONE, sum.view_mut().into_range(range.clone()), x.view().range(range));
                    for i in 0..a.len() {
                        let (x, start) = (get(x.view(), i), get(start.view(), i));
                        let expected = match i < skip {
                            true => [start; 2],
                            false => [rounded(x * factor, to), rounded(start + x, to)],
                        };
                        for (got, expected) in [get(scaled.view(), i), get(sum.view(), i)].into_iter().zip(expected) {
                            prop_assert!(same(got, expected), "{isa:?}, {from} to {to}, element {i}: {got} for {expected}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn what_is_too_large_for_f16_is_infinite_unless_it_is_divided_first() {
        let x = [40_000f32, -70_000.0, 30_000.0, f32::INFINITY];
        let mut y = [f16::ZERO; 4];
        scale_on(Threads::ONE, Slice::of(&x), 1.0, SliceMut::of(&mut y));
        assert_eq!(y.map(f16::to_f32), [40_000.0, f32::NEG_INFINITY, 30_000.0, f32::INFINITY]);
        scale_on(Threads::ONE, Slice::of(&x), 0.25, SliceMut::of(&mut y));
        assert_eq!(y.map(f16::to_f32), [10_000.0, -17_504.0, 7_500.0, f32::INFINITY]);
        let mut sum = [f16::from_f32(60_000.0), f16::INFINITY, f16::ONE, f16::NEG_INFINITY];
        accumulate_on(Threads::ONE, SliceMut::of(&mut sum), Slice::of(&[60_000f32, 1.0, 1.0, f32::INFINITY]));
        assert_eq!(sum[..3], [f16::INFINITY, f16::INFINITY, f16::from_f32(2.0)]);
        assert!(sum[3].is_nan());
    }

    #[test]
    fn threads_do_not_change_the_numbers() {
        let numel = 2 * crate::parallel::PIECE_NUMEL + 321;
        let x: Vec<f32> = (0..numel).map(|i| i as f32 * 0.37).collect();
        let [one, three] = [1, 3].map(|threads| {
            let threads = Threads::new(threads).unwrap();
            let mut y = vec![bf16::ZERO; numel];
            scale_on(threads, Slice::of(&x), 0.3, SliceMut::of(&mut y));
            accumulate_on(threads, SliceMut::of(&mut y), Slice::of(&x));
            y
        });
        assert!(one == three);
    }

    #[test]
    #[should_panic(expected = "bytes are no numbers")]
    fn bytes_are_not_scaled() {
        scale_on(Threads::ONE, Slice::of(&[1u8]), 1.0, SliceMut::of(&mut [1f32]));
    }
}
