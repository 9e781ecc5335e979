//! Causal self-attention with grouped queries, in bf16, without a matrix of `seq x seq` anywhere.
//!
//! The method is FlashAttention's: keys are visited block by block, each query row carries its running maximum and
//! sum, and the backward pass computes the probabilities again from the saved log-sum-exp. Operands are read where
//! they lie: a tensor of shape `[batch, position, head, dim]` is used as it is, by its [`Strides`].
//!
//! ```text
//! forward          S = Q K^T      P = exp(scale S - max)     O = P V / sum(P)     lse = log sum exp(scale S)
//! backward         P = exp(scale S - lse)     dP = dO V^T     dS = P (dP - rowsum(dO O))
//!                  dV = P^T dO       dK = scale dS^T Q       dQ = scale dS K
//! ```
//!
//! Products multiply bf16 numbers and add in `f32`; maxima, sums, exponentials and the accumulated results are `f32`;
//! `P` and `dS` are rounded to bf16 as operands of the next product. Where several query heads share a key head,
//! their gradients are added in `f32`, in head order. One thread computes all of a key head's outputs,
//! so the number of threads does not change a bit.
//!
//! The vector path needs AVX512-BF16 ([`is_fast`]). Other machines and head sizes ([`supports`]) run the
//! plain reference: right, slow, and with other roundings, unlike this crate's other kernels.
//!
//! # Source
//! FlashAttention-2 (arXiv:2307.08691), algorithms 1 and 2.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::thread;

use crate::Threads;

pub use operand::{Operand, OperandMut, Shape, Strides};

mod operand;
mod reference;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod x86;

/// Whether this machine has the instructions of the vector path.
pub fn is_fast() -> bool {
    #[cfg(target_arch = "x86_64")]
    return x86::Bf16Dot::detect().is_some();
    #[cfg(not(target_arch = "x86_64"))]
    return false;
}

/// Whether the vector path covers `shape`, on a machine that has it: any sequence, head sizes that are multiples
/// of 32 up to 256.
pub fn supports(shape: &Shape) -> bool {
    shape.head_dim.is_multiple_of(32) && (32..=256).contains(&shape.head_dim)
}

/// Causal attention: `out = softmax(scale * q k^T) v`, where position `i` sees positions `0..=i`.
///
/// # Shapes
/// - `q`, `out`: `[batch, heads, seq, head_dim]`
/// - `k`, `v`: `[batch, kv_heads, seq, head_dim]`; query head `h` uses key head `h / (heads / kv_heads)`
/// - `lse`: `[batch, heads, seq]`, contiguous; the natural logarithm of the sum of the exponentials of a
///   query's scaled scores, for [`backward`]
///
/// # Panics
/// If an operand does not hold its shape, elements of `out` overlap, `heads` is not a multiple of `kv_heads`, or
/// `scale` is not positive.
#[allow(clippy::too_many_arguments)] // the operation's own operands
pub fn forward(
    threads: Threads,
    shape: Shape,
    scale: f32,
    q: Operand<'_>,
    k: Operand<'_>,
    v: Operand<'_>,
    out: OperandMut<'_>,
    lse: &mut [f32],
) {
    shape.check(scale, lse);
    for (operand, heads) in [(q, shape.heads), (k, shape.kv_heads), (v, shape.kv_heads)] {
        operand.check(&shape, heads);
    }
    out.check(&shape, shape.heads);
    forward_by(Path::best(&shape), threads, &Forward { shape, scale, q, k, v, out: &out }, lse);
}

/// The gradients of [`forward`] for `dout`, the gradient of `out`.
///
/// # Shapes
/// - `q`, `out`, `dout`, `dq`: `[batch, heads, seq, head_dim]`
/// - `k`, `v`, `dk`, `dv`: `[batch, kv_heads, seq, head_dim]`
/// - `out`, `lse`: what [`forward`] gave for the same operands
///
/// # Panics
/// As [`forward`].
#[allow(clippy::too_many_arguments)] // the operation's own operands
pub fn backward(
    threads: Threads,
    shape: Shape,
    scale: f32,
    q: Operand<'_>,
    k: Operand<'_>,
    v: Operand<'_>,
    out: Operand<'_>,
    lse: &[f32],
    dout: Operand<'_>,
    dq: OperandMut<'_>,
    dk: OperandMut<'_>,
    dv: OperandMut<'_>,
) {
    shape.check(scale, lse);
    for operand in [q, out, dout] {
        operand.check(&shape, shape.heads);
    }
    for operand in [k, v] {
        operand.check(&shape, shape.kv_heads);
    }
    dq.check(&shape, shape.heads);
    dk.check(&shape, shape.kv_heads);
    dv.check(&shape, shape.kv_heads);
    let inputs = Backward { shape, scale, q, k, v, out, dout, dq: &dq, dk: &dk, dv: &dv };
    backward_by(Path::best(&shape), threads, &inputs, lse);
}

/// Who computes.
#[derive(Debug, Clone, Copy)]
enum Path {
    Reference,
    #[cfg(target_arch = "x86_64")]
    Vector(x86::Bf16Dot),
}

impl Path {
    fn best(shape: &Shape) -> Self {
        #[cfg(target_arch = "x86_64")]
        if let Some(token) = x86::Bf16Dot::detect().filter(|_| supports(shape)) {
            return Path::Vector(token);
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = shape;
        Path::Reference
    }
}

/// Checked operands of [`forward`].
struct Forward<'a> {
    shape: Shape,
    scale: f32,
    q: Operand<'a>,
    k: Operand<'a>,
    v: Operand<'a>,
    out: &'a OperandMut<'a>,
}

/// Checked operands of [`backward`].
struct Backward<'a> {
    shape: Shape,
    scale: f32,
    q: Operand<'a>,
    k: Operand<'a>,
    v: Operand<'a>,
    out: Operand<'a>,
    dout: Operand<'a>,
    dq: &'a OperandMut<'a>,
    dk: &'a OperandMut<'a>,
    dv: &'a OperandMut<'a>,
}

fn forward_by(path: Path, threads: Threads, inputs: &Forward<'_>, lse: &mut [f32]) {
    let shape = &inputs.shape;
    let queue = lse.chunks_mut((shape.group() * shape.seq).max(1)).enumerate();
    for_each_head(threads, shape.batch * shape.kv_heads, queue, |work| match path {
        Path::Reference => reference::forward(inputs, work),
        #[cfg(target_arch = "x86_64")]
        Path::Vector(token) => x86::forward::run(token, inputs, work),
    });
}

fn backward_by(path: Path, threads: Threads, inputs: &Backward<'_>, lse: &[f32]) {
    let shape = &inputs.shape;
    let queue = lse.chunks((shape.group() * shape.seq).max(1)).enumerate();
    for_each_head(threads, shape.batch * shape.kv_heads, queue, |work| match path {
        Path::Reference => reference::backward(inputs, work),
        #[cfg(target_arch = "x86_64")]
        Path::Vector(token) => x86::backward::run(token, inputs, work),
    });
}

/// The key heads that a thread is to compute: each comes once, whoever asks, as its number
/// `batch * kv_heads + kv_head` and the `[group, seq]` log-sum-exps of its query heads.
struct Work<'q, I>(&'q Mutex<I>);

impl<L, I: Iterator<Item = (usize, L)>> Iterator for Work<'_, I> {
    type Item = (usize, L);
    fn next(&mut self) -> Option<Self::Item> {
        // Advancing over chunks cannot fail halfway, so a panic elsewhere leaves the queue whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner).next()
    }
}

/// Calls `run` on the caller's thread and some helpers, which empty `queue` together.
///
/// Each call of `run` gets all the work that its thread will do, so that it allocates its scratch memory once.
fn for_each_head<I: Iterator + Send>(
    threads: Threads,
    num_heads: usize,
    queue: I,
    run: impl Fn(Work<'_, I>) + Sync,
) {
    let queue = Mutex::new(queue);
    let num_helpers = threads.get().min(num_heads).saturating_sub(1);
    thread::scope(|scope| {
        for _ in 0..num_helpers {
            // A thread that the system refuses costs time, not the result: whoever is there empties the queue.
            if thread::Builder::new().spawn_scoped(scope, || run(Work(&queue))).is_err() {
                break;
            }
        }
        run(Work(&queue));
    });
}
