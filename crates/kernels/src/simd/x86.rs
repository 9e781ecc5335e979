//! AVX-512 and AVX2 tokens.
//!
//! The conversion to bf16 is done on integers: the AVX512-BF16 instruction flushes subnormal numbers to zero and
//! would not give the reference's bits. The conversions of f16 are the hardware's, which round as asked.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::{ROW_LANES, SUM_LANES, Simd};

/// 16 lanes. Exists only on machines with AVX-512 (F, DQ) and AVX2, FMA, F16C.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx512(());

/// 8 lanes. Exists only on machines with AVX2, FMA and F16C.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx512 {
    pub fn detect() -> Option<Self> {
        let wide = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512dq");
        Avx2::detect().filter(|_| wide).map(|_| Avx512(()))
    }
}

impl Avx2 {
    pub fn detect() -> Option<Self> {
        let all = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        all.then_some(Avx2(()))
    }
}

const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT;

/// What is added to an `f32`'s bits, with the lowest bit that stays, before the low half is cut: half a unit in
/// the last place, less one.
const BF16_HALF_ULP: i32 = 0x7fff;
/// Makes a NaN quiet in bf16, so that cutting its payload cannot make it infinite.
const BF16_QUIET: i32 = 0x40;

// SAFETY of the intrinsics in both implementations: the token proves that the machine has the instructions; the
// pointers are valid for `LANES` (or `SUM_LANES`) elements by the trait's contract, and accesses are unaligned but for `stream16`.

impl Simd for Avx512 {
    type Vector = __m512;
    type Bits16 = __m256i;
    type Sums = [__m512d; SUM_LANES / 8];
    type Row = [__m512; ROW_LANES / 16];
    const LANES: usize = 16;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    fn splat_row(self, x: f32) -> Self::Row {
        [self.splat(x); ROW_LANES / 16]
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    fn sqrt(self, a: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_sqrt_ps(a) }
    }
    #[inline(always)]
    fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    fn scale(self, x: __m512, n: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_scalef_ps(x, n) }
    }

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, from: *const bf16) -> __m512 {
        // SAFETY: see above.
        unsafe {
            let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
        }
    }
    #[inline(always)]
    unsafe fn load_f16(self, from: *const f16) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32, x: __m512) {
        // SAFETY: see above.
        unsafe { _mm512_storeu_ps(to, x) }
    }
    #[inline(always)]
    fn to_bf16(self, x: __m512) -> __m256i {
        // SAFETY: see above.
        unsafe {
            let bits = _mm512_castps_si512(x);
            let high = _mm512_srli_epi32::<16>(bits);
            let odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
            let half_ulp = _mm512_add_epi32(odd, _mm512_set1_epi32(BF16_HALF_ULP));
            let rounded = _mm512_srli_epi32::<16>(_mm512_add_epi32(bits, half_ulp));
            let is_nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
            let bf16s = _mm512_mask_or_epi32(rounded, is_nan, high, _mm512_set1_epi32(BF16_QUIET));
            _mm512_cvtepi32_epi16(bf16s)
        }
    }
    #[inline(always)]
    fn to_f16(self, x: __m512) -> __m256i {
        // SAFETY: see above.
        unsafe { _mm512_cvtps_ph::<NEAREST>(x) }
    }
    #[inline(always)]
    unsafe fn store16(self, to: *mut u16, bits: __m256i) {
        // SAFETY: see above.
        unsafe { _mm256_storeu_si256(to.cast(), bits) }
    }
    #[inline(always)]
    unsafe fn stream16(self, to: *mut u16, bits: __m256i) {
        // SAFETY: see above; aligned by the caller's promise.
        unsafe { _mm256_stream_si256(to.cast(), bits) }
    }
    #[inline(always)]
    fn fence(self) {
        // SAFETY: see above.
        unsafe { _mm_sfence() }
    }

    #[inline(always)]
    fn zero_sums(self) -> Self::Sums {
        // SAFETY: see above.
        unsafe { [_mm512_setzero_pd(); SUM_LANES / 8] }
    }
    #[inline(always)]
    unsafe fn add_squares(self, mut sums: Self::Sums, from: *const f32) -> Self::Sums {
        for (k, sum) in sums.iter_mut().enumerate() {
            // SAFETY: see above.
            unsafe {
                let x = _mm512_cvtps_pd(_mm256_loadu_ps(from.add(8 * k)));
                *sum = _mm512_fmadd_pd(x, x, *sum);
            }
        }
        sums
    }
    #[inline(always)]
    fn sums(self, sums: Self::Sums) -> [f64; SUM_LANES] {
        let mut out = [0.0; SUM_LANES];
        for (lanes, sum) in out.chunks_exact_mut(8).zip(sums) {
            // SAFETY: see above; `lanes` holds 8.
            unsafe { _mm512_storeu_pd(lanes.as_mut_ptr(), sum) }
        }
        out
    }
}

impl Simd for Avx2 {
    type Vector = __m256;
    type Bits16 = __m128i;
    type Sums = [__m256d; SUM_LANES / 4];
    type Row = [__m256; ROW_LANES / 8];
    const LANES: usize = 8;

    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_set1_ps(x) }
    }
    #[inline(always)]
    fn splat_row(self, x: f32) -> Self::Row {
        [self.splat(x); ROW_LANES / 8]
    }
    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_div_ps(a, b) }
    }
    #[inline(always)]
    fn sqrt(self, a: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_sqrt_ps(a) }
    }
    #[inline(always)]
    fn mul_add(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn max(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_max_ps(a, b) }
    }
    #[inline(always)]
    fn min(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_min_ps(a, b) }
    }
    #[inline(always)]
    fn scale(self, x: __m256, n: __m256) -> __m256 {
        // By halves: each is a normal number, the first product is exact.
        // SAFETY: see above.
        unsafe {
            let n = _mm256_cvtps_epi32(n);
            let half = _mm256_srai_epi32::<1>(n);
            let bias = _mm256_set1_epi32(127);
            let power = |n| _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(n, bias)));
            _mm256_mul_ps(_mm256_mul_ps(x, power(half)), power(_mm256_sub_epi32(n, half)))
        }
    }

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, from: *const bf16) -> __m256 {
        // SAFETY: see above.
        unsafe {
            let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
        }
    }
    #[inline(always)]
    unsafe fn load_f16(self, from: *const f16) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32, x: __m256) {
        // SAFETY: see above.
        unsafe { _mm256_storeu_ps(to, x) }
    }
    #[inline(always)]
    fn to_bf16(self, x: __m256) -> __m128i {
        // SAFETY: see above.
        unsafe {
            let bits = _mm256_castps_si256(x);
            let high = _mm256_srli_epi32::<16>(bits);
            let odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
            let half_ulp = _mm256_add_epi32(odd, _mm256_set1_epi32(BF16_HALF_ULP));
            let rounded = _mm256_srli_epi32::<16>(_mm256_add_epi32(bits, half_ulp));
            let is_nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(x, x));
            let quiet = _mm256_or_si256(high, _mm256_set1_epi32(BF16_QUIET));
            let bf16s = _mm256_blendv_epi8(rounded, quiet, is_nan);
            _mm_packus_epi32(_mm256_castsi256_si128(bf16s), _mm256_extracti128_si256::<1>(bf16s))
        }
    }
    #[inline(always)]
    fn to_f16(self, x: __m256) -> __m128i {
        // SAFETY: see above.
        unsafe { _mm256_cvtps_ph::<NEAREST>(x) }
    }
    #[inline(always)]
    unsafe fn store16(self, to: *mut u16, bits: __m128i) {
        // SAFETY: see above.
        unsafe { _mm_storeu_si128(to.cast(), bits) }
    }
    #[inline(always)]
    unsafe fn stream16(self, to: *mut u16, bits: __m128i) {
        // SAFETY: see above; aligned by the caller's promise.
        unsafe { _mm_stream_si128(to.cast(), bits) }
    }
    #[inline(always)]
    fn fence(self) {
        // SAFETY: see above.
        unsafe { _mm_sfence() }
    }

    #[inline(always)]
    fn zero_sums(self) -> Self::Sums {
        // SAFETY: see above.
        unsafe { [_mm256_setzero_pd(); SUM_LANES / 4] }
    }
    #[inline(always)]
    unsafe fn add_squares(self, mut sums: Self::Sums, from: *const f32) -> Self::Sums {
        for (k, sum) in sums.iter_mut().enumerate() {
            // SAFETY: see above.
            unsafe {
                let x = _mm256_cvtps_pd(_mm_loadu_ps(from.add(4 * k)));
                *sum = _mm256_fmadd_pd(x, x, *sum);
            }
        }
        sums
    }
    #[inline(always)]
    fn sums(self, sums: Self::Sums) -> [f64; SUM_LANES] {
        let mut out = [0.0; SUM_LANES];
        for (lanes, sum) in out.chunks_exact_mut(4).zip(sums) {
            // SAFETY: see above; `lanes` holds 4.
            unsafe { _mm256_storeu_pd(lanes.as_mut_ptr(), sum) }
        }
        out
    }
}
