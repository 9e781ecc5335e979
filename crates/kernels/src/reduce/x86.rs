//! The vector paths of sums and copies: AVX-512F, and AVX2 with F16C.
//!
//! The two differ in width only. bf16 is widened by a shift and rounded with integers rather than by the
//! AVX512-BF16 instruction, which would flush subnormal numbers to zero and so differ from the plain path.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::{Number, Store, sum_plain};

/// A number that vector paths load and store.
pub(super) trait Lanes: Number {
    /// # Safety
    /// AVX-512F; `from` is valid for reads of 16 elements.
    unsafe fn load_512(from: *const Self) -> __m512;
    /// # Safety
    /// AVX-512F; `to` is valid for writes of 16 elements, and if `streaming` aligned to 16 elements.
    unsafe fn store_512(to: *mut Self, value: __m512, streaming: bool);
    /// # Safety
    /// AVX2 and F16C; `from` is valid for reads of 8 elements.
    unsafe fn load_256(from: *const Self) -> __m256;
    /// # Safety
    /// AVX2 and F16C; `to` is valid for writes of 8 elements, and if `streaming` aligned to 8 elements.
    unsafe fn store_256(to: *mut Self, value: __m256, streaming: bool);
}

impl Lanes for f32 {
    #[inline(always)]
    unsafe fn load_512(from: *const Self) -> __m512 {
        // SAFETY: the caller's contract.
        unsafe { _mm512_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn store_512(to: *mut Self, value: __m512, streaming: bool) {
        // SAFETY: the caller's contract.
        unsafe { if streaming { _mm512_stream_ps(to, value) } else { _mm512_storeu_ps(to, value) } }
    }
    #[inline(always)]
    unsafe fn load_256(from: *const Self) -> __m256 {
        // SAFETY: the caller's contract.
        unsafe { _mm256_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn store_256(to: *mut Self, value: __m256, streaming: bool) {
        // SAFETY: the caller's contract.
        unsafe { if streaming { _mm256_stream_ps(to, value) } else { _mm256_storeu_ps(to, value) } }
    }
}

impl Lanes for bf16 {
    #[inline(always)]
    unsafe fn load_512(from: *const Self) -> __m512 {
        // SAFETY: the caller's contract.
        unsafe {
            let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
        }
    }
    #[inline(always)]
    unsafe fn store_512(to: *mut Self, value: __m512, streaming: bool) {
        // SAFETY: the caller's contract.
        unsafe {
            let bits = _mm512_castps_si512(value);
            let high = _mm512_srli_epi32::<16>(bits);
            // Half an ulp less one, plus one if the kept part is odd: ties go to even.
            let bias =
                _mm512_add_epi32(_mm512_and_si512(high, _mm512_set1_epi32(1)), _mm512_set1_epi32(0x7fff));
            let rounded = _mm512_srli_epi32::<16>(_mm512_add_epi32(bits, bias));
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(value, value);
            let rounded = _mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40));
            let narrow = _mm512_cvtepi32_epi16(rounded);
            if streaming {
                _mm256_stream_si256(to.cast(), narrow)
            } else {
                _mm256_storeu_si256(to.cast(), narrow)
            }
        }
    }
    #[inline(always)]
    unsafe fn load_256(from: *const Self) -> __m256 {
        // SAFETY: the caller's contract.
        unsafe {
            let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
        }
    }
    #[inline(always)]
    unsafe fn store_256(to: *mut Self, value: __m256, streaming: bool) {
        // SAFETY: the caller's contract.
        unsafe {
            let bits = _mm256_castps_si256(value);
            let high = _mm256_srli_epi32::<16>(bits);
            let bias =
                _mm256_add_epi32(_mm256_and_si256(high, _mm256_set1_epi32(1)), _mm256_set1_epi32(0x7fff));
            let rounded = _mm256_srli_epi32::<16>(_mm256_add_epi32(bits, bias));
            let quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
            let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(value, value));
            let rounded = _mm256_blendv_epi8(rounded, quiet, nan);
            let low = _mm256_castsi256_si128(rounded);
            let narrow = _mm_packus_epi32(low, _mm256_extracti128_si256::<1>(rounded));
            if streaming { _mm_stream_si128(to.cast(), narrow) } else { _mm_storeu_si128(to.cast(), narrow) }
        }
    }
}

impl Lanes for f16 {
    #[inline(always)]
    unsafe fn load_512(from: *const Self) -> __m512 {
        // SAFETY: the caller's contract.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }
    #[inline(always)]
    unsafe fn store_512(to: *mut Self, value: __m512, streaming: bool) {
        // SAFETY: the caller's contract.
        unsafe {
            let narrow = _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(value);
            if streaming {
                _mm256_stream_si256(to.cast(), narrow)
            } else {
                _mm256_storeu_si256(to.cast(), narrow)
            }
        }
    }
    #[inline(always)]
    unsafe fn load_256(from: *const Self) -> __m256 {
        // SAFETY: the caller's contract.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
    }
    #[inline(always)]
    unsafe fn store_256(to: *mut Self, value: __m256, streaming: bool) {
        // SAFETY: the caller's contract.
        unsafe {
            let narrow = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(value);
            if streaming { _mm_stream_si128(to.cast(), narrow) } else { _mm_storeu_si128(to.cast(), narrow) }
        }
    }
}

/// Elements before the first one of `out` that is aligned to `bytes`.
fn head<O>(out: *mut O, bytes: usize, numel: usize) -> usize {
    out.align_offset(bytes).min(numel)
}

macro_rules! sum_path {
    ($name:ident, $features:literal, $width:literal, $load:ident, $store:ident, $add:ident) => {
        /// # Safety
        /// As [`sum_plain`], and the processor has the named features.
        #[target_feature(enable = $features)]
        pub(super) unsafe fn $name<I: Lanes, O: Lanes>(
            terms: &[*const u8],
            out: *mut O,
            numel: usize,
            store: Store,
        ) {
            // SAFETY: every index stays below `numel`, which the caller vouches for; a streaming store only
            // happens after the head, where `out` is aligned to a whole vector.
            unsafe {
                let streaming = store == Store::Streaming;
                let mut i = 0;
                if streaming {
                    i = head(out, $width * size_of::<O>(), numel);
                    sum_plain::<I, O>(terms, out, 0..i);
                }
                let first = terms[0].cast::<I>();
                if let [_, second] = *terms {
                    // Two ranks: by far the commonest case on one host; unrolled to keep several lines in
                    // flight.
                    let second = second.cast::<I>();
                    while i + 4 * $width <= numel {
                        let a = $add(I::$load(first.add(i)), I::$load(second.add(i)));
                        let b = $add(I::$load(first.add(i + $width)), I::$load(second.add(i + $width)));
                        let c =
                            $add(I::$load(first.add(i + 2 * $width)), I::$load(second.add(i + 2 * $width)));
                        let d =
                            $add(I::$load(first.add(i + 3 * $width)), I::$load(second.add(i + 3 * $width)));
                        O::$store(out.add(i), a, streaming);
                        O::$store(out.add(i + $width), b, streaming);
                        O::$store(out.add(i + 2 * $width), c, streaming);
                        O::$store(out.add(i + 3 * $width), d, streaming);
                        i += 4 * $width;
                    }
                }
                while i + $width <= numel {
                    let mut total = I::$load(first.add(i));
                    for term in &terms[1..] {
                        total = $add(total, I::$load(term.cast::<I>().add(i)));
                    }
                    O::$store(out.add(i), total, streaming);
                    i += $width;
                }
                sum_plain::<I, O>(terms, out, i..numel);
                if streaming {
                    // Streaming stores are weakly ordered: a peer may be told about them next.
                    _mm_sfence();
                }
            }
        }
    };
}

sum_path!(sum_512, "avx512f", 16, load_512, store_512, _mm512_add_ps);
sum_path!(sum_256, "avx2,f16c", 8, load_256, store_256, _mm256_add_ps);

macro_rules! copy_path {
    ($name:ident, $features:literal, $width:literal, $load:ident, $store:ident) => {
        /// # Safety
        /// As [`super::copy_bytes`], and the processor has the named features.
        #[target_feature(enable = $features)]
        pub(super) unsafe fn $name(from: *const u8, out: *mut u8, num_bytes: usize) {
            // SAFETY: every offset stays below `num_bytes`, which the caller vouches for; streaming stores
            // only happen after the head, where `out` is aligned to a whole vector.
            unsafe {
                let mut i = head(out, $width, num_bytes);
                std::ptr::copy_nonoverlapping(from, out, i);
                while i + 4 * $width <= num_bytes {
                    let a = $load(from.add(i).cast());
                    let b = $load(from.add(i + $width).cast());
                    let c = $load(from.add(i + 2 * $width).cast());
                    let d = $load(from.add(i + 3 * $width).cast());
                    $store(out.add(i).cast(), a);
                    $store(out.add(i + $width).cast(), b);
                    $store(out.add(i + 2 * $width).cast(), c);
                    $store(out.add(i + 3 * $width).cast(), d);
                    i += 4 * $width;
                }
                std::ptr::copy_nonoverlapping(from.add(i), out.add(i), num_bytes - i);
                _mm_sfence();
            }
        }
    };
}

// Streaming needs the alignment and the fence; the cached copy shares the loop, which beats a plain `memcpy`
// for the sizes of slots because that may write past the cache on its own account.
copy_path!(stream_512, "avx512f", 64, _mm512_loadu_si512, _mm512_stream_si512);
copy_path!(stream_256, "avx", 32, _mm256_loadu_si256, _mm256_stream_si256);
copy_path!(copy_512, "avx512f", 64, _mm512_loadu_si512, _mm512_store_si512);
