//! Blocks of quantised numbers, as numbers.
//!
//! A block stores small whole numbers and what they are multiplied with. Each product is rounded as the reference
//! rounds it, so the results are equal bit for bit:
//!
//! | type | numbers | bits | value |
//! |---|---|---|---|
//! | `Q4_0`, `Q5_0` | 32 | 4, 5 | `d * (q - 8)`, `d * (q - 16)` |
//! | `Q4_1`, `Q5_1` | 32 | 4, 5 | `d * q + m` |
//! | `Q8_0` | 32 | 8 | `d * q` |
//! | `Q4_K`, `Q5_K` | 8 groups of 32 | 4, 5 | `(d * scale) * q - (dmin * min)`, scale and min of 6 bits for each group |
//! | `Q6_K` | 16 groups of 16 | 6 | `(d * scale) * (q - 32)`, scale of 8 bits for each group |
//!
//! In blocks of 32, the low halves of 16 bytes are the first 16 numbers and the high halves the last 16; fifth bits
//! stand apart. Blocks of 256 do the same with 32 bytes at a time (64 in `Q6_K`).

use half::{bf16, f16};

use crate::gguf::GgmlType;

/// Decodes whole blocks.
///
/// # Panics
/// If `bytes` are not the blocks of `out.len()` elements, or the type is not readable: the caller has checked both.
pub(super) fn decode(ggml_type: GgmlType, bytes: &[u8], out: &mut [f32]) {
    let num_blocks = out.len() / ggml_type.block_numel();
    assert_eq!(
        (num_blocks * ggml_type.block_numel(), num_blocks * ggml_type.block_bytes()),
        (out.len(), bytes.len())
    );
    match ggml_type {
        GgmlType::F32 => each::<4, 1>(bytes, out, |block, out| out[0] = f32::from_le_bytes(*block)),
        GgmlType::F16 => each::<2, 1>(bytes, out, |block, out| out[0] = scale(block)),
        GgmlType::Bf16 => {
            each::<2, 1>(bytes, out, |block, out| out[0] = bf16::from_le_bytes(*block).to_f32())
        }
        GgmlType::Q4_0 => each::<18, 32>(bytes, out, |block, out| {
            let d = scale(block);
            nibbles(&block[2..], out, |q, _| d * (f32::from(q) - 8.0));
        }),
        GgmlType::Q4_1 => each::<20, 32>(bytes, out, |block, out| {
            let (d, m) = (scale(block), scale(&block[2..]));
            nibbles(&block[4..], out, |q, _| d * f32::from(q) + m);
        }),
        GgmlType::Q5_0 => each::<22, 32>(bytes, out, |block, out| {
            let (d, fifth) = (scale(block), fifth_bits(&block[2..]));
            nibbles(&block[6..], out, |q, i| d * (f32::from(q | fifth(i)) - 16.0));
        }),
        GgmlType::Q5_1 => each::<24, 32>(bytes, out, |block, out| {
            let (d, m, fifth) = (scale(block), scale(&block[2..]), fifth_bits(&block[4..]));
            nibbles(&block[8..], out, |q, i| d * f32::from(q | fifth(i)) + m);
        }),
        GgmlType::Q8_0 => each::<34, 32>(bytes, out, |block, out| {
            let d = scale(block);
            out.iter_mut().zip(&block[2..]).for_each(|(out, &q)| *out = d * f32::from(q as i8));
        }),
        GgmlType::Q4_K => each::<144, 256>(bytes, out, |block, out| {
            k_block(block, &block[16..], |_, _| 0, out);
        }),
        GgmlType::Q5_K => each::<176, 256>(bytes, out, |block, out| {
            k_block(block, &block[48..], |group, i| (block[16 + i] >> group & 1) << 4, out);
        }),
        GgmlType::Q6_K => each::<210, 256>(bytes, out, q6_k),
        other => unreachable!("the caller refuses `{other}`"),
    }
}

/// Calls `decode` for each block of `BYTES` bytes and `NUMEL` numbers.
fn each<const BYTES: usize, const NUMEL: usize>(
    bytes: &[u8],
    out: &mut [f32],
    decode: impl Fn(&[u8; BYTES], &mut [f32; NUMEL]),
) {
    let (blocks, _) = bytes.as_chunks();
    let (out, _) = out.as_chunks_mut();
    blocks.iter().zip(out).for_each(|(block, out)| decode(block, out));
}

/// A half-precision number at the front of `bytes`.
fn scale(bytes: &[u8]) -> f32 {
    f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
}

/// Two numbers of 4 bits a byte: low halves first, then high halves.
fn nibbles(bytes: &[u8], out: &mut [f32], value: impl Fn(u8, usize) -> f32) {
    let (low, high) = out.split_at_mut(bytes.len());
    for (i, ((low, high), &byte)) in low.iter_mut().zip(high).zip(bytes).enumerate() {
        *low = value(byte & 15, i);
        *high = value(byte >> 4, i + bytes.len());
    }
}

/// The fifth bit of each of 32 numbers, in its place.
fn fifth_bits(bytes: &[u8]) -> impl Fn(usize) -> u8 + use<> {
    let bits = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    move |i| ((bits >> i & 1) << 4) as u8
}

/// A block of `Q4_K` or `Q5_K`: scales of groups at byte 4, four bits of each number in `low`, the fifth from `fifth`.
fn k_block(block: &[u8], low: &[u8], fifth: impl Fn(usize, usize) -> u8, out: &mut [f32; 256]) {
    let (d, d_min, packed) = (scale(block), scale(&block[2..]), &block[4..16]);
    // Scales and minima of 6 bits: those of the first four groups are whole, those of the others keep their upper two
    // bits above the first ones.
    let six_bits = |group: usize| match group {
        0..4 => (packed[group] & 63, packed[group + 4] & 63),
        _ => (
            packed[group + 4] & 15 | packed[group - 4] >> 6 << 4,
            packed[group + 4] >> 4 | packed[group] >> 6 << 4,
        ),
    };
    for (pair, (low, out)) in low.chunks_exact(32).zip(out.chunks_exact_mut(64)).enumerate() {
        let [(d1, m1), (d2, m2)] = [2 * pair, 2 * pair + 1].map(|group| {
            let (scale, min) = six_bits(group);
            (d * f32::from(scale), d_min * f32::from(min))
        });
        nibbles(low, out, |q, i| match i {
            0..32 => d1 * f32::from(q | fifth(2 * pair, i)) - m1,
            _ => d2 * f32::from(q | fifth(2 * pair + 1, i - 32)) - m2,
        });
    }
}

/// 128 bytes of low halves, 64 of upper two bits, 16 scales, one scale over all.
fn q6_k(block: &[u8; 210], out: &mut [f32; 256]) {
    let (low, high, scales, d) = (&block[..128], &block[128..192], &block[192..208], scale(&block[208..]));
    let scales: [f32; 16] = std::array::from_fn(|group| d * f32::from(scales[group] as i8));
    for (half, out) in out.chunks_exact_mut(128).enumerate() {
        let (low, high) = (&low[64 * half..][..64], &high[32 * half..][..32]);
        nibbles(low, out, |q, i| {
            let upper = high[i % 32] >> (2 * (i / 32)) & 3;
            scales[8 * half + i / 16] * (f32::from(q | upper << 4) - 32.0)
        });
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    /// Random blocks of every type and what the reference makes of them: `scripts/golden/gguf_blocks.py`.
    const GOLDEN: &str = include_str!("../../tests/fixtures/gguf-blocks.json");

    fn words<const N: usize>(hex: &Value) -> Vec<[u8; N]> {
        let hex = hex.as_str().unwrap();
        let bytes: Vec<u8> =
            (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap()).collect();
        let (words, rest) = bytes.as_chunks();
        assert!(rest.is_empty());
        words.to_vec()
    }

    #[test]
    fn blocks_decode_to_the_bits_of_the_reference() {
        let golden: Value = serde_json::from_str(GOLDEN).unwrap();
        let mut num_types = 0;
        for &ggml_type in crate::gguf::ggml_type::ALL.iter().filter(|ggml_type| ggml_type.is_readable()) {
            let case = &golden[ggml_type.name()];
            let bytes = words::<1>(&case["blocks"]).concat();
            let expected: Vec<u32> =
                words::<4>(&case["values"]).into_iter().map(u32::from_le_bytes).collect();
            let mut values = vec![0.0; expected.len()];
            decode(ggml_type, &bytes, &mut values);
            let bits: Vec<u32> = values.iter().map(|value| value.to_bits()).collect();
            assert!(bits == expected, "{ggml_type}");
            num_types += 1;
        }
        assert_eq!(num_types, golden.as_object().unwrap().len());
    }
}
