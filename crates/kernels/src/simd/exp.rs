//! The exponential, in lanes.
//!
//! `exp(x) = 2^n exp(r)` with the whole number `n` nearest to `x / ln 2` and `|r| <= ln(2) / 2`, where a polynomial
//! does the rest. Every step is one IEEE operation, so all instruction sets give the same bits.

use super::Simd;

/// Below, the result rounds to zero; above, to infinity.
const LOWEST: f32 = -104.0;
const HIGHEST: f32 = 89.0;

/// Adding it leaves the whole number that is nearest in the lowest bits of the sum.
const ROUNDING: f32 = 12_582_912.0; // 1.5 * 2^23

/// `ln(2)` in two parts, as one `f32` is too coarse.
const LN_2_HIGH: f32 = std::f32::consts::LN_2;
const LN_2_LOW: f32 = -1.904_654_2e-9;

/// `(exp(r) - 1 - r) / r^2` interpolated at the Chebyshev nodes of `|r| <= ln(2) / 2`, constant term last: an error of
/// 1.1e-8 of `exp(r)`, a sixth of half a unit in the last place. Then the terms 1 and `r`.
const COEFFICIENTS: [f32; 7] = [0.001_392_625, 0.008_363_233, 0.041_666_552, 0.166_665_76, 0.5, 1.0, 1.0];

/// `e^x`, to within 1.1 units in the last place of the exact value. Subnormal results are kept, and NaN stays NaN.
///
/// Each step waits for the one before it, so several vectors go through the steps side by side: the processor would not
/// look far enough ahead to find the next one itself.
#[inline(always)]
pub(crate) fn exp<S: Simd, const N: usize>(simd: S, mut x: [S::Vector; N]) -> [S::Vector; N] {
    let mut n = x;
    let rounding = simd.splat(ROUNDING);
    for k in 0..N {
        // In this order of operands NaN passes.
        x[k] = simd.max(simd.splat(LOWEST), simd.min(simd.splat(HIGHEST), x[k]));
        n[k] = simd.sub(simd.mul_add(x[k], simd.splat(std::f32::consts::LOG2_E), rounding), rounding);
    }
    for part in [-LN_2_HIGH, -LN_2_LOW] {
        for k in 0..N {
            x[k] = simd.mul_add(n[k], simd.splat(part), x[k]);
        }
    }
    let mut p = [simd.splat(COEFFICIENTS[0]); N];
    for &coefficient in &COEFFICIENTS[1..] {
        for k in 0..N {
            p[k] = simd.mul_add(p[k], x[k], simd.splat(coefficient));
        }
    }
    for k in 0..N {
        p[k] = simd.scale(p[k], n[k]);
    }
    p
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::{Isa, Kernel};
    use crate::simd::lanes::{Each, for_each, load, store};

    struct Exp<'a>(&'a mut [f32]);

    impl Each for Exp<'_> {
        #[inline(always)]
        unsafe fn each<S: Simd, const N: usize>(&mut self, simd: S, at: usize) {
            // SAFETY: in range by the caller's promise.
            unsafe {
                let place = self.0.as_mut_ptr().add(at);
                store(simd, place, exp(simd, load::<_, _, N>(simd, place)));
            }
        }
    }

    impl Kernel for Exp<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(mut self, simd: S) {
            let numel = self.0.len();
            // SAFETY: the slice has `numel` elements.
            unsafe { for_each(simd, numel, &mut self) }
        }
    }

    fn with(isa: Isa, x: &[f32]) -> Vec<f32> {
        let mut out = x.to_vec();
        isa.run(Exp(&mut out));
        out
    }

    /// All signs and exponents, some of the fractions.
    fn numbers() -> Vec<f32> {
        (0..=u32::MAX / 1021).map(|i| f32::from_bits(i * 1021)).filter(|x| x.abs() < 120.0).collect()
    }

    /// The best isa against `f64`, in units in the last place of the exact result.
    #[test]
    fn the_error_is_within_its_bound() {
        const BOUND_ULP: f64 = 1.1;
        let x = numbers();
        let mut worst = 0f64;
        for (&x, y) in x.iter().zip(with(Isa::best(), &x)) {
            let exact = f64::from(x).exp();
            if exact > f64::from(f32::MAX) {
                assert!(y == f32::INFINITY || x < 88.7229, "exp({x}) = {y}");
                continue;
            }
            let ulp = 2f64.powi((exact.log2().floor() as i32).max(-126) - 23);
            worst = worst.max((f64::from(y) - exact).abs() / ulp);
        }
        println!("{worst} ulp");
        assert!(worst < BOUND_ULP, "{worst}");
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        let mut x: Vec<f32> = numbers().into_iter().step_by(7).collect();
        x.extend([
            0.0,
            -0.0,
            f32::INFINITY,
            f32::NEG_INFINITY,
            f32::MAX,
            f32::MIN,
            1e-42,
            -104.0,
            -103.9,
            89.0,
        ]);
        let reference = with(Isa::SCALAR, &x);
        for isa in Isa::all() {
            let out = with(isa, &x);
            assert!(out.iter().zip(&reference).all(|(a, b)| a.to_bits() == b.to_bits()), "{isa:?}");
        }
    }

    #[test]
    fn the_ends_of_the_range() {
        for isa in Isa::all() {
            let x = [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1e30, -1e30];
            let y = with(isa, &x);
            assert_eq!(y[..4], [1.0, 1.0, f32::INFINITY, 0.0]);
            assert!(y[4].is_nan());
            assert_eq!(y[5..], [f32::INFINITY, 0.0]);
        }
    }
}
