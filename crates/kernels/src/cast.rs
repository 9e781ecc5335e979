//! Casts between `f32` and the 16-bit floats.
//!
//! To 16 bits: rounded to nearest, ties to even; what is too large becomes infinite; subnormal numbers are kept;
//! NaN stays NaN. From 16 bits: exact.

use half::{bf16, f16};

use crate::Threads;
use crate::isa::{Isa, Kernel};
use crate::parallel::for_each_piece;
use crate::simd::{Element, Scalar, Simd};

/// Rounds `from` into `to`.
///
/// # Panics
/// If the lengths differ.
pub fn f32_to_bf16(from: &[f32], to: &mut [bf16]) {
    cast_with(Isa::best(), Threads::ONE, from, to);
}

/// Rounds `from` into `to`.
///
/// # Panics
/// If the lengths differ.
pub fn f32_to_f16(from: &[f32], to: &mut [f16]) {
    cast_with(Isa::best(), Threads::ONE, from, to);
}

/// Widens `from` into `to`.
///
/// # Panics
/// If the lengths differ.
pub fn bf16_to_f32(from: &[bf16], to: &mut [f32]) {
    cast_with(Isa::best(), Threads::ONE, from, to);
}

/// Widens `from` into `to`.
///
/// # Panics
/// If the lengths differ.
pub fn f16_to_f32(from: &[f16], to: &mut [f32]) {
    cast_with(Isa::best(), Threads::ONE, from, to);
}

/// [`f32_to_bf16`] on several threads.
///
/// # Panics
/// If the lengths differ.
pub fn f32_to_bf16_on(threads: Threads, from: &[f32], to: &mut [bf16]) {
    cast_with(Isa::best(), threads, from, to);
}

/// [`f32_to_f16`] on several threads.
///
/// # Panics
/// If the lengths differ.
pub fn f32_to_f16_on(threads: Threads, from: &[f32], to: &mut [f16]) {
    cast_with(Isa::best(), threads, from, to);
}

/// [`bf16_to_f32`] on several threads.
///
/// # Panics
/// If the lengths differ.
pub fn bf16_to_f32_on(threads: Threads, from: &[bf16], to: &mut [f32]) {
    cast_with(Isa::best(), threads, from, to);
}

/// [`f16_to_f32`] on several threads.
///
/// # Panics
/// If the lengths differ.
pub fn f16_to_f32_on(threads: Threads, from: &[f16], to: &mut [f32]) {
    cast_with(Isa::best(), threads, from, to);
}

fn cast_with<A: Element, B: Element>(isa: Isa, threads: Threads, from: &[A], to: &mut [B]) {
    assert_eq!(from.len(), to.len(), "elements to cast against room for them");
    for_each_piece(threads, (from, to), |(from, to)| isa.run(Cast { from, to }));
}

pub(crate) struct Cast<'a, A, B> {
    pub from: &'a [A],
    pub to: &'a mut [B],
}

impl<A: Element, B: Element> Cast<'_, A, B> {
    /// # Safety
    /// `at..at + S::LANES` lies inside both slices.
    #[inline(always)]
    unsafe fn cast<S: Simd>(&mut self, simd: S, at: usize) {
        // SAFETY: in range by the caller's promise.
        unsafe {
            let x = A::load(simd, self.from.as_ptr().add(at));
            B::store(simd, self.to.as_mut_ptr().add(at), x);
        }
    }
}

impl<A: Element, B: Element> Kernel for Cast<'_, A, B> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let numel = self.from.len().min(self.to.len());
        let whole = numel - numel % S::LANES;
        for at in (0..whole).step_by(S::LANES) {
            // SAFETY: `at + LANES <= whole <= numel`.
            unsafe { self.cast(simd, at) }
        }
        for at in whole..numel {
            // SAFETY: `at < numel`, and a scalar is one lane.
            unsafe { self.cast(Scalar, at) }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Every bit pattern of 16 bits.
    fn all_16() -> impl Iterator<Item = u16> {
        0..=u16::MAX
    }

    /// Casts with `isa`, from an odd offset and with a tail.
    fn cast<A: Element, B: Element>(isa: Isa, from: &[A], zero: B) -> Vec<B> {
        let mut to = vec![zero; from.len()];
        cast_with(isa, Threads::ONE, &from[1..], &mut to[1..]);
        cast_with(isa, Threads::ONE, &from[..1], &mut to[..1]);
        to
    }

    fn check_narrowing(isa: Isa, x: &[f32]) {
        for (x, y) in x.iter().zip(cast(isa, x, bf16::ZERO)) {
            assert_eq!(y.to_bits(), bf16::from_f32(*x).to_bits(), "{isa:?}: {:#x} to bf16", x.to_bits());
            assert_eq!(y.is_nan(), x.is_nan());
        }
        for (x, y) in x.iter().zip(cast(isa, x, f16::ZERO)) {
            assert_eq!(y.to_bits(), f16::from_f32(*x).to_bits(), "{isa:?}: {:#x} to f16", x.to_bits());
            assert_eq!(y.is_nan(), x.is_nan());
        }
    }

    #[test]
    fn all_16_bit_numbers_widen_like_half_and_come_back() {
        let bf16s: Vec<bf16> = all_16().map(bf16::from_bits).collect();
        let f16s: Vec<f16> = all_16().map(f16::from_bits).collect();
        for isa in Isa::all() {
            let wide = cast(isa, &bf16s, 0f32);
            for (x, y) in bf16s.iter().zip(&wide) {
                assert!(x.to_f32().to_bits() == y.to_bits() || (x.is_nan() && y.is_nan()), "{isa:?}: {x:?}");
            }
            for (x, back) in bf16s.iter().zip(cast(isa, &wide, bf16::ZERO)) {
                assert!(x.to_bits() == back.to_bits() || (x.is_nan() && back.is_nan()), "{isa:?}: {x:?}");
            }
            let wide = cast(isa, &f16s, 0f32);
            for (x, y) in f16s.iter().zip(&wide) {
                assert!(x.to_f32().to_bits() == y.to_bits() || (x.is_nan() && y.is_nan()), "{isa:?}: {x:?}");
            }
            for (x, back) in f16s.iter().zip(cast(isa, &wide, f16::ZERO)) {
                assert!(x.to_bits() == back.to_bits() || (x.is_nan() && back.is_nan()), "{isa:?}: {x:?}");
            }
        }
    }

    #[test]
    fn numbers_on_and_beside_every_rounding_boundary_narrow_like_half() {
        // Every 16-bit number and the ties above it, and their neighbours in f32: all exponents, subnormals, NaN.
        let mut x = Vec::new();
        for high in all_16() {
            let bits = u32::from(high) << 16;
            x.extend([0, 1, 0x7fff, 0x8000, 0x8001, 0xffff].map(|low| f32::from_bits(bits | low)));
            let wide = f16::from_bits(high).to_f32().to_bits();
            x.extend([0, 1, 0xfff, 0x1000, 0x1001, 0x1fff].map(|low| f32::from_bits(wide.wrapping_add(low))));
        }
        // Ties of subnormal f16 numbers: odd multiples of half the smallest one, 2^-25.
        for k in 0..2048u32 {
            let tie = (k as f32 * 2.0 + 1.0) * (2f32).powi(-25);
            x.extend([tie, tie.next_up(), tie.next_down(), -tie]);
        }
        for isa in Isa::all() {
            check_narrowing(isa, &x);
        }
    }

    #[test]
    fn rounding_to_even_by_hand() {
        let mut bf16s = [bf16::ZERO; 4];
        f32_to_bf16(&[1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, f32::MAX, -0.0], &mut bf16s);
        assert_eq!(bf16s.map(bf16::to_bits), [0x3f80, 0x3f82, 0x7f80, 0x8000]);
        let mut f16s = [f16::ZERO; 4];
        f32_to_f16(&[1.0 + 1.0 / 2048.0, 1.0 + 3.0 / 2048.0, 65520.0, 65519.0], &mut f16s);
        assert_eq!(f16s.map(f16::to_bits), [0x3c00, 0x3c02, 0x7c00, 0x7bff]);
        let mut f32s = [0.0; 1];
        f16_to_f32(&[f16::from_bits(1)], &mut f32s);
        assert_eq!(f32s[0], 2f32.powi(-24));
        bf16_to_f32(&[bf16::from_bits(1)], &mut f32s);
        assert_eq!(f32s[0], 2f32.powi(-133));
    }

    proptest! {
        #[test]
        fn any_bits_narrow_like_half(bits in prop::collection::vec(any::<u32>(), 1..300)) {
            let x: Vec<f32> = bits.into_iter().map(f32::from_bits).collect();
            for isa in Isa::all() {
                check_narrowing(isa, &x);
            }
        }
    }

    #[test]
    #[should_panic(expected = "against room for them")]
    fn lengths_that_differ_panic() {
        f32_to_bf16(&[0.0; 3], &mut [bf16::ZERO; 4]);
    }
}
