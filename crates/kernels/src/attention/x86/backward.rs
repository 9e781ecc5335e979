//! Backward: blocks of keys over blocks of queries, with probabilities computed again.
//!
//! Everything is held with keys as rows and queries as columns, so that a query's log-sum-exp and delta are lanes
//! of a vector, and `P^T` and `dS^T` lie ready as left operands of `dV` and `dK`:
//!
//! ```text
//! S^T  = K Q^T        A: K rows       B: Q transposed
//! dP^T = V dO^T       A: V rows       B: dO transposed
//! P^T, dS^T                           in f32, written as bf16
//! dV  += P^T dO       A: P^T rows     B: dO interleaved
//! dK  += dS^T Q       A: dS^T rows    B: Q interleaved
//! dQ  += dS K         A: dS^T, two rows interleaved, read by columns     B: K interleaved
//! ```
//!
//! In the block on the diagonal, stripes of keys start at their own queries and stripes of queries end at their own
//! keys. Gradients are `f32` until the last block is added; `dK` and `dV` collect all query heads of the key head.

use std::arch::x86_64::*;
use std::f32::consts::LOG2_E;
use std::ops::Range;

use half::bf16;

use super::super::Backward;
use super::super::operand::{Rows, Shape};
use super::exp::exp2;
use super::lanes::{load, load_bf16, store_bf16, store_interleaved, store_pairs};
use super::product::{Extent, Left, Right, Start, Sums, product};
use super::{Aligned, Bf16Dot, LANES, PANEL, STRIPE, pack};

/// Keys of a block.
const KEYS: usize = 128;
/// Queries of a block, a multiple of the keys.
const QUERIES: usize = 128;

/// Computes key heads with the query heads of each.
pub(in super::super) fn run<'l>(
    _: Bf16Dot,
    inputs: &Backward<'_>,
    work: impl Iterator<Item = (usize, &'l [f32])>,
) {
    // SAFETY: the token proves that the machine has the instructions.
    unsafe { heads(inputs, work) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn heads<'l>(inputs: &Backward<'_>, work: impl Iterator<Item = (usize, &'l [f32])>) {
    let shape = &inputs.shape;
    let (seq, group) = (shape.seq, shape.group());
    let mut keys = Keys::new(shape);
    let mut queries = Queries::new(shape);
    let mut tile = Tile::new();
    for (number, lse) in work {
        let (batch, kv_head) = (number / shape.kv_heads, number % shape.kv_heads);
        keys.fill(inputs.k.head(shape, batch, kv_head), inputs.v.head(shape, batch, kv_head));
        for (head, lse) in (kv_head * group..).zip(lse.chunks(seq)) {
            let [q, out, dout] = [inputs.q, inputs.out, inputs.dout].map(|x| x.head(shape, batch, head));
            queries.fill(q, out, dout, lse);
            for first_key in (0..seq).step_by(KEYS) {
                for first_query in (first_key..seq).step_by(QUERIES) {
                    tile.run(first_key, first_query, inputs.scale, &mut keys, &mut queries);
                }
            }
            // SAFETY: the operands were checked, and each key head is computed by one thread; here and below.
            write(&queries.dq, inputs.scale, seq, |i| unsafe { inputs.dq.row(shape, batch, head, i) });
        }
        // SAFETY: see above.
        write(&keys.dk, inputs.scale, seq, |j| unsafe { inputs.dk.row(shape, batch, kv_head, j) });
        // SAFETY: see above.
        write(&keys.dv, 1.0, seq, |j| unsafe { inputs.dv.row(shape, batch, kv_head, j) });
    }
}

/// Writes `seq` rows of finished gradients.
#[target_feature(enable = "avx512f,avx512bf16")]
fn write<'o>(grad: &[f32], scale: f32, seq: usize, mut out: impl FnMut(usize) -> &'o mut [bf16]) {
    let scale = _mm512_set1_ps(scale);
    let mut from = grad.chunks_exact(LANES);
    for row in 0..seq {
        for (to, from) in out(row).chunks_exact_mut(LANES).zip(&mut from) {
            store_bf16(to, _mm512_mul_ps(load(from), scale));
        }
    }
}

/// Keys and values of one head, and their gradients.
struct Keys {
    dim: usize,
    padded: usize,
    k_rows: Aligned<u32>,
    v_rows: Aligned<u32>,
    k_interleaved: Aligned<u32>,
    dk: Aligned<f32>,
    dv: Aligned<f32>,
}

impl Keys {
    fn new(shape: &Shape) -> Self {
        let (dim, padded) = (shape.head_dim, shape.seq.next_multiple_of(STRIPE));
        let pairs = || Aligned::zeroed(padded * dim / 2);
        let grad = || Aligned::zeroed(padded * dim);
        let (k_rows, v_rows, k_interleaved) = (pairs(), pairs(), pairs());
        Keys { dim, padded, k_rows, v_rows, k_interleaved, dk: grad(), dv: grad() }
    }

    #[target_feature(enable = "avx512f,avx512bw")]
    fn fill(&mut self, k: Rows<'_>, v: Rows<'_>) {
        pack::rows(k, 0, self.dim, &mut self.k_rows);
        pack::rows(v, 0, self.dim, &mut self.v_rows);
        pack::interleaved(k, self.padded, self.dim, &mut self.k_interleaved);
        self.dk.fill(0.0);
        self.dv.fill(0.0);
    }
}

/// What one query head brings, and its gradient.
struct Queries {
    dim: usize,
    padded: usize,
    q_transposed: Aligned<u32>,
    q_interleaved: Aligned<u32>,
    dout_transposed: Aligned<u32>,
    dout_interleaved: Aligned<u32>,
    /// Log-sum-exps to base 2; 0 behind the last query, where any number will do: it meets zeros.
    lse: Aligned<f32>,
    /// `rowsum(dO O)`.
    delta: Aligned<f32>,
    dq: Aligned<f32>,
}

impl Queries {
    fn new(shape: &Shape) -> Self {
        let (dim, padded) = (shape.head_dim, shape.seq.next_multiple_of(STRIPE));
        let transposed = || Aligned::zeroed(padded.next_multiple_of(PANEL) * dim / 2);
        let interleaved = || Aligned::zeroed(padded * dim / 2);
        Queries {
            dim,
            padded,
            q_transposed: transposed(),
            q_interleaved: interleaved(),
            dout_transposed: transposed(),
            dout_interleaved: interleaved(),
            lse: Aligned::zeroed(padded),
            delta: Aligned::zeroed(padded),
            dq: Aligned::zeroed(padded * dim),
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn fill(&mut self, q: Rows<'_>, out: Rows<'_>, dout: Rows<'_>, lse: &[f32]) {
        pack::transposed(q, self.padded, self.dim, &mut self.q_transposed);
        pack::interleaved(q, self.padded, self.dim, &mut self.q_interleaved);
        pack::transposed(dout, self.padded, self.dim, &mut self.dout_transposed);
        pack::interleaved(dout, self.padded, self.dim, &mut self.dout_interleaved);
        for (to, lse) in self.lse.iter_mut().zip(lse) {
            *to = lse * LOG2_E;
        }
        for (i, delta) in self.delta.iter_mut().enumerate() {
            let mut sum = _mm512_setzero_ps();
            for (out, dout) in out.get(i).chunks_exact(LANES).zip(dout.get(i).chunks_exact(LANES)) {
                sum = _mm512_fmadd_ps(load_bf16(out), load_bf16(dout), sum);
            }
            *delta = _mm512_reduce_add_ps(sum);
        }
        self.dq.fill(0.0);
    }
}

/// A block of keys by a block of queries.
struct Tile {
    /// `[KEYS, QUERIES]`: `S^T` before scaling.
    scores: Aligned<f32>,
    /// `[KEYS, QUERIES]`: `dP^T`.
    dp: Aligned<f32>,
    /// `[KEYS, QUERIES / 2]`: `P^T`.
    p: Aligned<u32>,
    /// `[KEYS, QUERIES / 2]`: `dS^T`.
    ds: Aligned<u32>,
    /// `[KEYS / 2, QUERIES]`: `dS` in pairs of keys.
    ds_interleaved: Aligned<u32>,
}

impl Tile {
    fn new() -> Self {
        Tile {
            scores: Aligned::zeroed(KEYS * QUERIES),
            dp: Aligned::zeroed(KEYS * QUERIES),
            p: Aligned::zeroed(KEYS * QUERIES / 2),
            ds: Aligned::zeroed(KEYS * QUERIES / 2),
            ds_interleaved: Aligned::zeroed(KEYS * QUERIES / 2),
        }
    }

    /// Adds what the block gives to the three gradients.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    fn run(&mut self, key0: usize, query0: usize, scale: f32, keys: &mut Keys, queries: &mut Queries) {
        let dim = keys.dim;
        let num_keys = KEYS.min(keys.padded - key0);
        let num_queries = QUERIES.min(queries.padded - query0);
        // Keys go in one stripe, or on the diagonal in stripes that start at their own queries.
        let on_diagonal = key0 == query0;
        let height = if on_diagonal { STRIPE } else { num_keys };
        for key in (0..num_keys).step_by(height) {
            let first = if on_diagonal { key } else { 0 };
            self.probabilities(key, height, key0, first..num_queries, query0, scale, keys, queries);
            self.key_gradients(key, height, key0, first..num_queries, query0, keys, queries);
        }
        let width = if on_diagonal { STRIPE } else { num_queries };
        for query in (0..num_queries).step_by(width) {
            let seen = if on_diagonal { num_keys.min(query + STRIPE) } else { num_keys };
            product(
                Extent { rows: width, vectors: 0..dim / LANES, depth: seen / 2 },
                Left { pairs: &self.ds_interleaved[query..], row: 1, step: QUERIES },
                Right { pairs: &keys.k_interleaved[key0 / 2 * dim..], panel: PANEL, step: dim },
                Sums { sums: &mut queries.dq[(query0 + query) * dim..], row: dim },
                Start::Sums,
            );
        }
    }

    /// `P^T` and `dS^T` of the keys `key..key + height` of the block and a range of its queries.
    #[allow(clippy::too_many_arguments)]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    fn probabilities(
        &mut self,
        key: usize,
        height: usize,
        key0: usize,
        range: Range<usize>,
        query0: usize,
        scale: f32,
        keys: &Keys,
        queries: &Queries,
    ) {
        let half = keys.dim / 2;
        let extent = Extent { rows: height, vectors: range.start / LANES..range.end / LANES, depth: half };
        let sides = [
            (&keys.k_rows, &queries.q_transposed, &mut self.scores),
            (&keys.v_rows, &queries.dout_transposed, &mut self.dp),
        ];
        for (rows, transposed, sums) in sides {
            product(
                extent.clone(),
                Left { pairs: &rows[(key0 + key) * half..], row: half, step: 1 },
                Right { pairs: &transposed[query0 * half..], panel: half * PANEL, step: PANEL },
                Sums { sums: &mut sums[key * QUERIES..], row: QUERIES },
                Start::Zero,
            );
        }
        let scale = _mm512_set1_ps(scale * LOG2_E);
        for even in (key..key + height).step_by(2) {
            for vector in extent.vectors.clone() {
                let query = vector * LANES;
                let lse = load(&queries.lse[query0 + query..]);
                let delta = load(&queries.delta[query0 + query..]);
                // On the diagonal a query sees the keys up to its own.
                let on_diagonal = key0 + key == query0 + query;
                let [even_sees, odd_sees] = match on_diagonal {
                    true => [u16::MAX << (even - key), u16::MAX << (even + 1 - key)],
                    false => [u16::MAX; 2],
                };
                let even_ds = self.element(even * QUERIES + query, even_sees, scale, lse, delta);
                let odd_ds = self.element((even + 1) * QUERIES + query, odd_sees, scale, lse, delta);
                store_interleaved(&mut self.ds_interleaved[even / 2 * QUERIES + query..], even_ds, odd_ds);
            }
        }
    }

    /// `P^T` and `dS^T` of the 16 queries at `at`, where they see the key; returns the latter.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    fn element(&mut self, at: usize, sees: __mmask16, scale: __m512, lse: __m512, delta: __m512) -> __m512 {
        let p = exp2(_mm512_fmsub_ps(load(&self.scores[at..]), scale, lse));
        let p = _mm512_maskz_mov_ps(sees, p);
        let ds = _mm512_mul_ps(p, _mm512_sub_ps(load(&self.dp[at..]), delta));
        store_pairs(&mut self.p[at / 2..], p);
        store_pairs(&mut self.ds[at / 2..], ds);
        ds
    }

    /// Adds to `dV` and `dK` of the same keys what the same queries give.
    #[allow(clippy::too_many_arguments)]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    fn key_gradients(
        &self,
        key: usize,
        height: usize,
        key0: usize,
        range: Range<usize>,
        query0: usize,
        keys: &mut Keys,
        queries: &Queries,
    ) {
        let dim = keys.dim;
        let sides = [
            (&self.p, &queries.dout_interleaved, &mut keys.dv),
            (&self.ds, &queries.q_interleaved, &mut keys.dk),
        ];
        for (left, right, sums) in sides {
            product(
                Extent { rows: height, vectors: 0..dim / LANES, depth: range.len() / 2 },
                Left { pairs: &left[(key * QUERIES + range.start) / 2..], row: QUERIES / 2, step: 1 },
                Right { pairs: &right[(query0 + range.start) / 2 * dim..], panel: PANEL, step: dim },
                Sums { sums: &mut sums[(key0 + key) * dim..], row: dim },
                Start::Sums,
            );
        }
    }
}
