//! Rearranging bf16 vectors for the [`product`](super::product::product).
//!
//! ```text
//! rows           [position][dim / 2]            pairs along dim, as they lie: a left operand
//! transposed     [panel][dim / 2][64 positions] pairs along dim: the right operand of a product over dim
//! interleaved    [position / 2][dim]            pairs of positions: the right operand of a product over positions
//! ```

use std::arch::x86_64::*;

use half::bf16;

use super::super::operand::Rows;
use super::{LANES, PANEL, STRIPE};

/// Copies the vectors from position `first` on, as many as fit `to`.
#[target_feature(enable = "avx512f")]
pub(super) fn rows(from: Rows<'_>, first: usize, dim: usize, to: &mut [u32]) {
    for (i, to) in to.chunks_exact_mut(dim / 2).enumerate() {
        for (from, to) in from.get(first + i).chunks_exact(2 * LANES).zip(to.chunks_exact_mut(LANES)) {
            store(to, load(from));
        }
    }
}

/// Writes positions `0..padded`, a multiple of 16, of the transposed form.
#[target_feature(enable = "avx512f")]
pub(super) fn transposed(from: Rows<'_>, padded: usize, dim: usize, to: &mut [u32]) {
    for first in (0..padded).step_by(STRIPE) {
        let panel = &mut to[first / PANEL * (dim / 2) * PANEL..][..dim / 2 * PANEL];
        let mut rows = [&[][..]; STRIPE];
        for (i, row) in rows.iter_mut().enumerate() {
            *row = from.get(first + i);
        }
        for pair in (0..dim / 2).step_by(LANES) {
            let mut square = [_mm512_setzero_si512(); STRIPE];
            for (row, from) in square.iter_mut().zip(&rows) {
                *row = load(&from[2 * pair..][..2 * LANES]);
            }
            transpose(&mut square);
            for (k, column) in square.iter().enumerate() {
                store(&mut panel[(pair + k) * PANEL + first % PANEL..][..LANES], *column);
            }
        }
    }
}

/// Writes positions `0..padded`, an even number, of the interleaved form.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn interleaved(from: Rows<'_>, padded: usize, dim: usize, to: &mut [u32]) {
    let [low, high] = [0, 16].map(|first: u32| {
        // Words first, 32 + first, first + 1, ...: numbers from 32 on mean the second operand.
        let lane = |k: u32| ((first + k) | ((32 + first + k) << 16)).cast_signed();
        let lanes: [i32; LANES] = std::array::from_fn(|k| lane(k as u32));
        // SAFETY: 16 elements of 4 bytes.
        unsafe { _mm512_loadu_si512(lanes.as_ptr().cast()) }
    });
    for (half, to) in to.chunks_exact_mut(dim).take(padded / 2).enumerate() {
        let (even, odd) = (from.get(2 * half), from.get(2 * half + 1));
        let sources = even.chunks_exact(2 * LANES).zip(odd.chunks_exact(2 * LANES));
        for ((even, odd), to) in sources.zip(to.chunks_exact_mut(2 * LANES)) {
            let (even, odd) = (load(even), load(odd));
            store(&mut to[..LANES], _mm512_permutex2var_epi16(even, low, odd));
            store(&mut to[LANES..], _mm512_permutex2var_epi16(even, high, odd));
        }
    }
}

/// Transposes a square of 16 x 16 words.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose(r: &mut [__m512i; 16]) {
    // Within each 128-bit quarter a square of 4 x 4 words is transposed; then the quarters are, as 4 x 4.
    let mut quarters = [_mm512_setzero_si512(); 16];
    for i in (0..16).step_by(4) {
        let [a, b, c, d] = [r[i], r[i + 1], r[i + 2], r[i + 3]];
        let (ab_low, ab_high) = (_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        let (cd_low, cd_high) = (_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
        quarters[i] = _mm512_unpacklo_epi64(ab_low, cd_low);
        quarters[i + 1] = _mm512_unpackhi_epi64(ab_low, cd_low);
        quarters[i + 2] = _mm512_unpacklo_epi64(ab_high, cd_high);
        quarters[i + 3] = _mm512_unpackhi_epi64(ab_high, cd_high);
    }
    for k in 0..4 {
        let [a, b, c, d] = [quarters[k], quarters[4 + k], quarters[8 + k], quarters[12 + k]];
        let (ab_even, ab_odd) = (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xdd>(a, b));
        let (cd_even, cd_odd) = (_mm512_shuffle_i32x4::<0x88>(c, d), _mm512_shuffle_i32x4::<0xdd>(c, d));
        r[k] = _mm512_shuffle_i32x4::<0x88>(ab_even, cd_even);
        r[4 + k] = _mm512_shuffle_i32x4::<0x88>(ab_odd, cd_odd);
        r[8 + k] = _mm512_shuffle_i32x4::<0xdd>(ab_even, cd_even);
        r[12 + k] = _mm512_shuffle_i32x4::<0xdd>(ab_odd, cd_odd);
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load(from: &[bf16]) -> __m512i {
    assert!(from.len() >= 2 * LANES);
    // SAFETY: 32 elements of 2 bytes.
    unsafe { _mm512_loadu_si512(from.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store(to: &mut [u32], pairs: __m512i) {
    assert!(to.len() >= LANES);
    // SAFETY: 16 elements of 4 bytes.
    unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), pairs) }
}

#[cfg(test)]
mod tests {
    use super::super::super::operand::{Operand, Shape, Strides};
    use super::super::Bf16Dot;
    use super::*;

    #[test]
    fn every_pair_finds_its_place() {
        if Bf16Dot::detect().is_none() {
            return eprintln!("skipped: no AVX512-BF16");
        }
        let shape = Shape { batch: 1, heads: 1, kv_heads: 1, seq: 77, head_dim: 64 };
        let (seq, dim, padded) = (77, 64, 80);
        // Bits of a position and a dimension, all different.
        let bits = |i: usize, d: usize| if i < seq { (i * dim + d) as u16 } else { 0 };
        let data: Vec<bf16> = (0..seq * dim).map(|n| bf16::from_bits(n as u16)).collect();
        let from = Operand::new(&data, Strides::heads_first(&shape, 1)).head(&shape, 0, 0);
        let pair = |low: u16, high: u16| u32::from(low) | u32::from(high) << 16;

        let mut to = [vec![0; 16 * dim / 2], vec![0; 2 * PANEL * dim / 2], vec![0; padded / 2 * dim]];
        // SAFETY: detected.
        unsafe {
            rows(from, 64, dim, &mut to[0]);
            transposed(from, padded, dim, &mut to[1]);
            interleaved(from, padded, dim, &mut to[2]);
        }
        for i in 0..padded {
            for k in 0..dim / 2 {
                let expected = pair(bits(i, 2 * k), bits(i, 2 * k + 1));
                if i >= 64 {
                    assert_eq!(to[0][(i - 64) * dim / 2 + k], expected);
                }
                assert_eq!(to[1][i / PANEL * (dim / 2 * PANEL) + k * PANEL + i % PANEL], expected);
            }
            for d in 0..dim {
                let expected = pair(bits(i & !1, d), bits(i | 1, d));
                assert_eq!(to[2][i / 2 * dim + d], expected);
            }
        }
    }
}
