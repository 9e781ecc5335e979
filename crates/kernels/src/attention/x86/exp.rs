//! Powers and logarithms to base 2, 16 at a time.

use std::arch::x86_64::*;

/// `2^f = 1 + f (C1 + f (C2 + ...))` for `|f| <= 1/2`, the least greatest relative error at this degree: 9.2e-8.
#[allow(clippy::approx_constant)] // the first is fitted with the others, and is not ln 2
const POWER: [f32; 5] = [0.693_147, 0.240_222_42, 0.055_507_336, 0.009_671_513, 0.001_326_472_7];

/// Below this every power is 0; keeps infinite arguments out of differences.
const SMALLEST: f32 = -200.0;

/// `2^x`, within 3e-7 of it (2.5 units in the last place); 0 where that is below the normal numbers, NaN for NaN.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn exp2(x: __m512) -> __m512 {
    // The maximum of a number and NaN is its second operand.
    let x = _mm512_max_ps(_mm512_set1_ps(SMALLEST), x);
    let whole = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
    let f = _mm512_sub_ps(x, whole);
    let [c1, c2, c3, c4, c5] = POWER;
    let mut power = _mm512_set1_ps(c5);
    for c in [c4, c3, c2, c1, 1.0] {
        power = _mm512_fmadd_ps(f, power, _mm512_set1_ps(c));
    }
    _mm512_scalef_ps(power, whole)
}

/// `log2 x` of a normal positive number, within 3e-7 of it or of 1, whichever is larger.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn log2(x: __m512) -> __m512 {
    // x = 2^e m with m in [3/4, 3/2), and ln m = 2 artanh z with z = (m - 1) / (m + 1), |z| <= 1/5.
    let m = _mm512_getmant_ps::<_MM_MANT_NORM_P75_1P5, _MM_MANT_SIGN_SRC>(x);
    let e = _mm512_getexp_ps(_mm512_div_ps(x, m));
    let one = _mm512_set1_ps(1.0);
    let z = _mm512_div_ps(_mm512_sub_ps(m, one), _mm512_add_ps(m, one));
    let z2 = _mm512_mul_ps(z, z);
    let mut series = _mm512_set1_ps(1.0 / 11.0);
    for odd in [9.0, 7.0, 5.0, 3.0, 1.0] {
        series = _mm512_fmadd_ps(series, z2, _mm512_set1_ps(1.0 / odd));
    }
    let log2_m = _mm512_mul_ps(_mm512_mul_ps(z, series), _mm512_set1_ps(2.0 * std::f32::consts::LOG2_E));
    _mm512_add_ps(e, log2_m)
}

#[cfg(test)]
mod tests {
    use super::super::Bf16Dot;
    use super::*;

    #[target_feature(enable = "avx512f")]
    fn apply(f: impl Fn(__m512) -> __m512, x: f32) -> f32 {
        let mut lanes = [0.0; 16];
        // SAFETY: room for 16 elements.
        unsafe { _mm512_storeu_ps(lanes.as_mut_ptr(), f(_mm512_set1_ps(x))) };
        lanes[7]
    }

    fn exp2_of(x: f32) -> f32 {
        // SAFETY: the tests detected more than this.
        unsafe { apply(|x| exp2(x), x) }
    }

    fn log2_of(x: f32) -> f32 {
        // SAFETY: as above.
        unsafe { apply(|x| log2(x), x) }
    }

    #[test]
    fn powers_are_near() {
        if Bf16Dot::detect().is_none() {
            return eprintln!("skipped: no AVX512-BF16");
        }
        let mut worst: f64 = 0.0;
        for i in -1_260_000..=1_000_000 {
            let x = i as f32 * 1e-4;
            worst = worst.max((f64::from(exp2_of(x)) / f64::from(x).exp2() - 1.0).abs());
        }
        assert!(worst < 3e-7, "relative error {worst:e}");
        println!("exp2: largest relative error {worst:e}");
        assert_eq!([0.0, 1.0, -1.0, 10.0].map(exp2_of), [1.0, 2.0, 0.5, 1024.0]);
        assert_eq!([-300.0, -1e30, f32::NEG_INFINITY].map(exp2_of), [0.0; 3]);
        assert!(exp2_of(f32::NAN).is_nan());
    }

    #[test]
    fn logarithms_are_near() {
        if Bf16Dot::detect().is_none() {
            return eprintln!("skipped: no AVX512-BF16");
        }
        let mut x = 1e-3_f32;
        while x < 1e6 {
            let right = f64::from(x).log2();
            let error = (f64::from(log2_of(x)) - right).abs() / right.abs().max(1.0);
            assert!(error < 3e-7, "log2({x}): {error:e}");
            x *= 1.0001;
        }
        assert_eq!([0.5, 1.0, 2.0, 256.0].map(log2_of), [-1.0, 0.0, 1.0, 8.0]);
    }
}
