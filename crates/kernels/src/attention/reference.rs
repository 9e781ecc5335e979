//! Attention in plain Rust, one query after the other: what the vector path is held against, and what runs where
//! there is none.
//!
//! Everything is `f32`, nothing is rounded to bf16 before the end, and a query's scores are held all at once, so
//! that the code can be read beside the formulas. Memory is one row of scores for each thread.

use half::bf16;

use super::operand::Rows;
use super::{Backward, Forward};

/// Computes key heads with the query heads of each, for [`forward`](super::forward).
pub(super) fn forward<'l>(inputs: &Forward<'_>, work: impl Iterator<Item = (usize, &'l mut [f32])>) {
    let shape = &inputs.shape;
    let mut p = vec![0.0; shape.seq];
    let mut out = vec![0.0; shape.head_dim];
    for (number, lse) in work {
        let (batch, kv_head) = (number / shape.kv_heads, number % shape.kv_heads);
        let (k, v) = (inputs.k.head(shape, batch, kv_head), inputs.v.head(shape, batch, kv_head));
        for (member, lse) in lse.chunks_mut(shape.seq).enumerate() {
            let head = kv_head * shape.group() + member;
            let q = inputs.q.head(shape, batch, head);
            for (i, lse) in lse.iter_mut().enumerate() {
                *lse = forward_query(inputs.scale, q.get(i), k, v, &mut p[..=i], &mut out);
                // SAFETY: the operand was checked, and each key head is computed by one thread.
                round(&out, unsafe { inputs.out.row(shape, batch, head, i) });
            }
        }
    }
}

/// The output of one query, which sees the keys that `p` has room for; returns its log-sum-exp.
fn forward_query(scale: f32, q: &[bf16], k: Rows<'_>, v: Rows<'_>, p: &mut [f32], out: &mut [f32]) -> f32 {
    for (j, p) in p.iter_mut().enumerate() {
        *p = scale * dot(q, k.get(j));
    }
    let max = p.iter().fold(f32::NEG_INFINITY, |max, &score| max.max(score));
    let sum: f32 = p.iter().map(|score| (score - max).exp()).sum();
    let lse = max + sum.ln();
    out.fill(0.0);
    for (j, p) in p.iter().enumerate() {
        add_scaled(out, (p - max).exp() / sum, v.get(j));
    }
    lse
}

/// Computes key heads with the query heads of each, for [`backward`](super::backward).
pub(super) fn backward<'l>(inputs: &Backward<'_>, work: impl Iterator<Item = (usize, &'l [f32])>) {
    let shape = &inputs.shape;
    let dim = shape.head_dim;
    for (number, lse) in work {
        let (batch, kv_head) = (number / shape.kv_heads, number % shape.kv_heads);
        let heads = kv_head * shape.group()..(kv_head + 1) * shape.group();
        let mut grads = Gradients::new(heads.len(), shape.seq, dim);
        for (member, head) in heads.clone().enumerate() {
            let operands = HeadOperands {
                q: inputs.q.head(shape, batch, head),
                k: inputs.k.head(shape, batch, kv_head),
                v: inputs.v.head(shape, batch, kv_head),
                out: inputs.out.head(shape, batch, head),
                dout: inputs.dout.head(shape, batch, head),
                lse: &lse[member * shape.seq..][..shape.seq],
            };
            grads.add_head(inputs.scale, member, &operands);
        }
        // SAFETY: the operands were checked, and each key head is computed by one thread; here and below.
        for i in 0..shape.seq {
            for (member, head) in heads.clone().enumerate() {
                let dq = &grads.dq[(member * shape.seq + i) * dim..][..dim];
                // SAFETY: see above.
                round(dq, unsafe { inputs.dq.row(shape, batch, head, i) });
            }
            // SAFETY: see above.
            round(&grads.dk[i * dim..][..dim], unsafe { inputs.dk.row(shape, batch, kv_head, i) });
            // SAFETY: see above.
            round(&grads.dv[i * dim..][..dim], unsafe { inputs.dv.row(shape, batch, kv_head, i) });
        }
    }
}

/// What one query head's gradients are computed from.
struct HeadOperands<'a> {
    q: Rows<'a>,
    k: Rows<'a>,
    v: Rows<'a>,
    out: Rows<'a>,
    dout: Rows<'a>,
    lse: &'a [f32],
}

/// The gradients of one key head, and of its query heads, before rounding.
struct Gradients {
    /// `[group, seq, dim]`
    dq: Vec<f32>,
    /// `[seq, dim]`
    dk: Vec<f32>,
    /// `[seq, dim]`
    dv: Vec<f32>,
    seq: usize,
    dim: usize,
}

impl Gradients {
    fn new(group: usize, seq: usize, dim: usize) -> Self {
        let (dq, dk, dv) = (vec![0.0; group * seq * dim], vec![0.0; seq * dim], vec![0.0; seq * dim]);
        Gradients { dq, dk, dv, seq, dim }
    }

    /// Adds query head `member` of the group.
    fn add_head(&mut self, scale: f32, member: usize, x: &HeadOperands<'_>) {
        let dim = self.dim;
        for i in 0..self.seq {
            let (q, dout) = (x.q.get(i), x.dout.get(i));
            let delta = dot(dout, x.out.get(i));
            for j in 0..=i {
                let p = (scale * dot(q, x.k.get(j)) - x.lse[i]).exp();
                let ds = scale * p * (dot(dout, x.v.get(j)) - delta);
                add_scaled(&mut self.dv[j * dim..][..dim], p, dout);
                add_scaled(&mut self.dk[j * dim..][..dim], ds, q);
                add_scaled(&mut self.dq[(member * self.seq + i) * dim..][..dim], ds, x.k.get(j));
            }
        }
    }
}

fn dot(a: &[bf16], b: &[bf16]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a.to_f32() * b.to_f32()).sum()
}

fn add_scaled(sum: &mut [f32], factor: f32, x: &[bf16]) {
    for (sum, x) in sum.iter_mut().zip(x) {
        *sum += factor * x.to_f32();
    }
}

fn round(from: &[f32], to: &mut [bf16]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = bf16::from_f32(*from);
    }
}
