//! Forward: blocks of queries over blocks of keys, with a running softmax.
//!
//! ```text
//!  keys (packed)   k0       k1       k2
//!               ┌────────┬────────┬──
//!      queries  │ S P O  │ S P O  │         for each stripe of 16 queries: scores S, probabilities P, output O,
//!      of a     │────────│────────│         all in the level 1 cache
//!      block    │        │  ╲ skipped       a stripe's keys end at the diagonal
//! ```
//!
//! Keys and values are packed once for all the query heads that share them.

use std::arch::x86_64::*;
use std::f32::consts::{LN_2, LOG2_E};

use super::super::Forward;
use super::super::operand::{Rows, Shape};
use super::exp::{exp2, log2};
use super::lanes::{load, store, store_bf16, store_pairs};
use super::product::{Extent, Left, Right, Start, Sums, product};
use super::{Aligned, Bf16Dot, LANES, PANEL, STRIPE, pack};

/// Queries that go over the keys together.
const QUERIES: usize = 128;
/// Keys between two updates of the maximum.
const KEYS: usize = 128;

/// Computes key heads with the query heads of each.
pub(in super::super) fn run<'l>(
    _: Bf16Dot,
    inputs: &Forward<'_>,
    work: impl Iterator<Item = (usize, &'l mut [f32])>,
) {
    // SAFETY: the token proves that the machine has the instructions.
    unsafe { heads(inputs, work) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn heads<'l>(inputs: &Forward<'_>, work: impl Iterator<Item = (usize, &'l mut [f32])>) {
    let shape = &inputs.shape;
    let (seq, group) = (shape.seq, shape.group());
    let mut packed = Packed::new(shape);
    let mut block = Block::new(shape.head_dim);
    for (number, lse) in work {
        let (batch, kv_head) = (number / shape.kv_heads, number % shape.kv_heads);
        packed.fill(inputs.k.head(shape, batch, kv_head), inputs.v.head(shape, batch, kv_head));
        for (head, lse) in (kv_head * group..).zip(lse.chunks_mut(seq)) {
            let q = inputs.q.head(shape, batch, head);
            for first in (0..seq).step_by(QUERIES) {
                block.run(q, first, inputs.scale, &packed);
                let lse = &mut lse[first..seq.min(first + QUERIES)];
                // SAFETY: the operand was checked, and each key head is computed by one thread.
                block.finish(lse, |row| unsafe { inputs.out.row(shape, batch, head, first + row) });
            }
        }
    }
}

/// Keys and values of one head.
struct Packed {
    dim: usize,
    padded: usize,
    keys: Aligned<u32>,
    values: Aligned<u32>,
}

impl Packed {
    fn new(shape: &Shape) -> Self {
        let (dim, padded) = (shape.head_dim, shape.seq.next_multiple_of(STRIPE));
        let keys = Aligned::zeroed(padded.next_multiple_of(PANEL) * dim / 2);
        Packed { dim, padded, keys, values: Aligned::zeroed(padded / 2 * dim) }
    }

    #[target_feature(enable = "avx512f,avx512bw")]
    fn fill(&mut self, k: Rows<'_>, v: Rows<'_>) {
        pack::transposed(k, self.padded, self.dim, &mut self.keys);
        pack::interleaved(v, self.padded, self.dim, &mut self.values);
    }
}

/// A block of queries on its way over the keys.
struct Block {
    dim: usize,
    /// `[QUERIES, dim / 2]` pairs.
    queries: Aligned<u32>,
    /// `[QUERIES, dim]`: the sum of values weighted by `2^(score - max)`.
    out: Aligned<f32>,
    /// The largest score of each query so far; scores in this file are scaled to base 2.
    max: Aligned<f32>,
    /// `[QUERIES, LANES]`: the sum of `2^(score - max)`, apart for each lane.
    sum: Aligned<f32>,
    /// `[STRIPE, KEYS]`, before scaling.
    scores: Aligned<f32>,
    /// `[STRIPE, KEYS / 2]` pairs.
    probabilities: Aligned<u32>,
    /// What a new maximum makes of the sums before it.
    rescale: Aligned<f32>,
}

impl Block {
    fn new(dim: usize) -> Self {
        Block {
            dim,
            queries: Aligned::zeroed(QUERIES * dim / 2),
            out: Aligned::zeroed(QUERIES * dim),
            max: Aligned::zeroed(QUERIES),
            sum: Aligned::zeroed(QUERIES * LANES),
            scores: Aligned::zeroed(STRIPE * KEYS),
            probabilities: Aligned::zeroed(STRIPE * KEYS / 2),
            rescale: Aligned::zeroed(STRIPE),
        }
    }

    /// Takes the queries from `first` on over all keys that they see.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    fn run(&mut self, q: Rows<'_>, first: usize, scale: f32, packed: &Packed) {
        let rows = QUERIES.min(packed.padded - first);
        pack::rows(q, first, self.dim, &mut self.queries);
        self.out.fill(0.0);
        self.max.fill(f32::NEG_INFINITY);
        self.sum.fill(0.0);
        for first_key in (0..first + rows).step_by(KEYS) {
            for stripe in (0..rows).step_by(STRIPE) {
                // The stripe sees keys up to its own last position.
                let seen = (first + stripe + STRIPE).saturating_sub(first_key);
                if seen > 0 {
                    let to_diagonal = seen <= KEYS;
                    self.step(stripe, first_key, seen.min(KEYS), to_diagonal, scale * LOG2_E, packed);
                }
            }
        }
    }

    /// Takes 16 queries over a block of keys, which may end at the diagonal.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    fn step(
        &mut self,
        stripe: usize,
        first_key: usize,
        keys: usize,
        to_diagonal: bool,
        scale: f32,
        packed: &Packed,
    ) {
        let dim = self.dim;
        product(
            Extent { rows: STRIPE, vectors: 0..keys / LANES, depth: dim / 2 },
            Left { pairs: &self.queries[stripe * dim / 2..], row: dim / 2, step: 1 },
            Right { pairs: &packed.keys[first_key * dim / 2..], panel: dim / 2 * PANEL, step: PANEL },
            Sums { sums: &mut self.scores, row: KEYS },
            Start::Zero,
        );
        self.softmax(stripe, keys / LANES, to_diagonal, scale);
        product(
            Extent { rows: STRIPE, vectors: 0..dim / LANES, depth: keys / 2 },
            Left { pairs: &self.probabilities, row: KEYS / 2, step: 1 },
            Right { pairs: &packed.values[first_key / 2 * dim..], panel: PANEL, step: dim },
            Sums { sums: &mut self.out[stripe * dim..], row: dim },
            Start::Scaled(&self.rescale),
        );
    }

    /// Probabilities of `vectors` of keys for 16 queries; the last vector is the diagonal's if `to_diagonal`.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    fn softmax(&mut self, stripe: usize, vectors: usize, to_diagonal: bool, scale: f32) {
        let whole = if to_diagonal { vectors - 1 } else { vectors };
        let scale = _mm512_set1_ps(scale);
        let mut maxima = [0.0; STRIPE];
        for (row, maximum) in maxima.iter_mut().enumerate() {
            let scores = &self.scores[row * KEYS..][..KEYS];
            let mut max = _mm512_set1_ps(f32::NEG_INFINITY);
            for vector in 0..whole {
                max = _mm512_max_ps(max, load(&scores[vector * LANES..]));
            }
            if to_diagonal {
                max = _mm512_mask_max_ps(max, up_to(row), max, load(&scores[whole * LANES..]));
            }
            *maximum = _mm512_reduce_max_ps(max);
        }
        let old = load(&self.max[stripe..]);
        let new = _mm512_max_ps(old, _mm512_mul_ps(load(&maxima), scale));
        store(&mut self.rescale, exp2(_mm512_sub_ps(old, new)));
        store(&mut self.max[stripe..], new);

        for row in 0..STRIPE {
            let scores = &self.scores[row * KEYS..][..KEYS];
            let pairs = &mut self.probabilities[row * KEYS / 2..][..KEYS / 2];
            let max = _mm512_set1_ps(self.max[stripe + row]);
            let lanes = &mut self.sum[(stripe + row) * LANES..];
            let mut sum = _mm512_mul_ps(load(lanes), _mm512_set1_ps(self.rescale[row]));
            for vector in 0..whole {
                let p = exp2(_mm512_fmsub_ps(load(&scores[vector * LANES..]), scale, max));
                sum = _mm512_add_ps(sum, p);
                store_pairs(&mut pairs[vector * LANES / 2..], p);
            }
            if to_diagonal {
                let p = exp2(_mm512_fmsub_ps(load(&scores[whole * LANES..]), scale, max));
                let p = _mm512_maskz_mov_ps(up_to(row), p);
                sum = _mm512_add_ps(sum, p);
                store_pairs(&mut pairs[whole * LANES / 2..], p);
            }
            store(lanes, sum);
        }
    }

    /// Divides by the sums and writes outputs and log-sum-exps, one for each element of `lse`.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    fn finish<'o>(&self, lse: &mut [f32], mut out: impl FnMut(usize) -> &'o mut [half::bf16]) {
        for (stripe, lse) in lse.chunks_mut(STRIPE).enumerate() {
            let first = stripe * STRIPE;
            let mut sums = [0.0; STRIPE];
            for (row, sum) in sums.iter_mut().enumerate() {
                *sum = _mm512_reduce_add_ps(load(&self.sum[(first + row) * LANES..]));
            }
            let mut logs = [0.0; STRIPE];
            let log = _mm512_add_ps(load(&self.max[first..]), log2(load(&sums)));
            store(&mut logs, _mm512_mul_ps(log, _mm512_set1_ps(LN_2)));
            lse.copy_from_slice(&logs[..lse.len()]);
            for (row, sum) in sums[..lse.len()].iter().enumerate() {
                let norm = _mm512_set1_ps(1.0 / sum);
                let from = self.out[(first + row) * self.dim..].chunks_exact(LANES);
                for (to, from) in out(first + row).chunks_exact_mut(LANES).zip(from) {
                    store_bf16(to, _mm512_mul_ps(load(from), norm));
                }
            }
        }
    }
}

/// The keys that query `row` of a stripe sees in the diagonal's vector.
#[inline(always)]
fn up_to(row: usize) -> __mmask16 {
    u16::MAX >> (STRIPE - 1 - row)
}
