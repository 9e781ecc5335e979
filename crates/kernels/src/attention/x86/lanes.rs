//! Bounds-checked loads and stores of one vector, and conversions to bf16.

use std::arch::x86_64::*;

use half::bf16;

use super::LANES;

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn load(from: &[f32]) -> __m512 {
    assert!(from.len() >= LANES);
    // SAFETY: 16 elements are there.
    unsafe { _mm512_loadu_ps(from.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn store(to: &mut [f32], x: __m512) {
    assert!(to.len() >= LANES);
    // SAFETY: 16 elements are there.
    unsafe { _mm512_storeu_ps(to.as_mut_ptr(), x) }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn load_bf16(from: &[bf16]) -> __m512 {
    assert!(from.len() >= LANES);
    // SAFETY: 16 elements of 2 bytes are there.
    let bits = unsafe { _mm256_loadu_si256(from.as_ptr().cast()) };
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)))
}

/// Rounds to bf16, ties to even; subnormal numbers become 0.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) fn store_bf16(to: &mut [bf16], x: __m512) {
    assert!(to.len() >= LANES);
    // SAFETY: 16 elements of 2 bytes are there, and any of 16 bits is a bf16.
    unsafe {
        _mm256_storeu_si256(
            to.as_mut_ptr().cast(),
            std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(x)),
        )
    }
}

/// As [`store_bf16`], to the pairs of a left operand.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) fn store_pairs(to: &mut [u32], x: __m512) {
    assert!(to.len() >= LANES / 2);
    // SAFETY: 8 elements of 4 bytes are there.
    unsafe {
        _mm256_storeu_si256(
            to.as_mut_ptr().cast(),
            std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(x)),
        )
    }
}

/// Lane by lane the pair (`even`, `odd`) as bf16.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(super) fn store_interleaved(to: &mut [u32], even: __m512, odd: __m512) {
    assert!(to.len() >= LANES);
    const PAIRS: [i32; LANES] = {
        let mut pairs = [0; LANES];
        let mut lane = 0;
        while lane < LANES {
            pairs[lane] = (lane | (lane + LANES) << 16) as i32;
            lane += 1;
        }
        pairs
    };
    // SAFETY: 16 elements of 4 bytes are there, both times; both vector types are 512 plain bits.
    unsafe {
        let lanes = _mm512_loadu_si512(PAIRS.as_ptr().cast());
        let words = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(odd, even));
        _mm512_storeu_si512(to.as_mut_ptr().cast(), _mm512_permutexvar_epi16(lanes, words));
    }
}
