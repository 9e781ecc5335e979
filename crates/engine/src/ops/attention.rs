//! Causal attention.

use half::bf16;
use shardwise_kernels::attention as kernel;
use shardwise_torch::function::{Saved, link};
use shardwise_torch::tch::{TchError, with_grad};
use shardwise_torch::{Kind, Tensor, TorchError, autograd, no_grad};

use super::Dropout;
use super::gpu::on_gpu;
use super::raw::{elements, elements_mut, fused_kind, multiplies_in_f32, threads};
use crate::{Context, EngineError};

/// Attention of every position to itself and those before it, scaled by the square root of the head's width.
///
/// # Shapes
/// - `q`: `[batch, seq, heads, head_dim]`; `k`, `v`: `[batch, seq, kv_heads, head_dim]`, `heads` a multiple of `kv_heads`
/// - returns `[batch, seq, heads, head_dim]`, contiguous
/// # Errors
/// What libtorch says.
pub fn causal_attention(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor, EngineError> {
    let shape = shape(q, k)?;
    if fused_kind(&[q, k, v]) == Some(Kind::BFloat16) && kernel::is_fast() && kernel::supports(&shape) {
        return fused(q, k, v, shape);
    }
    if multiplies_in_f32(&[q, k, v]) {
        return in_f32(q, k, v);
    }
    causal_attention_plain(q, k, v)
}

/// Attention of copies in f32, which last as long as a pass: the backward pass makes them, and the forward pass, once more.
fn in_f32(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor, EngineError> {
    let exact = |x: &Tensor| x.f_to_kind(Kind::Float);
    let kind = q.kind();
    let out = no_grad(|| plain([&exact(q)?, &exact(k)?, &exact(v)?], Heads::Shared)?.f_to_kind(kind))?;
    link(&[q, k, v], &[&out], &[q, k, v].map(Saved::Input), move |args| {
        let Some(dout) = &args.grads[0] else { return Ok(vec![None, None, None]) };
        let leaves: Vec<Tensor> = args
            .saved
            .iter()
            .map(|x| exact(x)?.f_detach()?.f_set_requires_grad(true))
            .collect::<Result<_, _>>()?;
        let [q, k, v] = &leaves[..] else { return Ok(vec![None, None, None]) };
        let out = with_grad(|| plain([q, k, v], Heads::Shared))?;
        let grads = autograd::grad(&[&out], &[Some(&exact(dout)?)], &[q, k, v])?;
        let rounded = grads.into_iter().map(|grad| grad.map(|grad| grad.f_to_kind(kind)).transpose());
        Ok(rounded.collect::<Result<_, _>>()?)
    })?;
    Ok(out)
}

/// [`causal_attention`] in libtorch's own operations.
///
/// # Errors
/// What libtorch says.
pub fn causal_attention_plain(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor, EngineError> {
    Ok(plain([q, k, v], Heads::Shared)?)
}

/// How the query heads of a group see their key-value head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Heads {
    Shared,
    /// Each has a copy, for forms of attention that know no groups.
    Copied,
}

impl Heads {
    /// On a GPU only libtorch's forms for 16 bits of sm_80 and later know groups. Without a form it would hold all scores.
    fn on_gpu(context: &Context<'_>, tensors: &[&Tensor]) -> Self {
        match on_gpu(context, tensors) {
            Some(gpu) if gpu.kind == Kind::Float || gpu.gpu.gpu().info().capability.major < 8 => {
                Heads::Copied
            }
            _ => Heads::Shared,
        }
    }
}

fn plain([q, k, v]: [&Tensor; 3], heads: Heads) -> Result<Tensor, TchError> {
    let heads_first = |x: &Tensor| x.f_transpose(1, 2);
    let q = heads_first(q)?;
    let (k, v) = match heads {
        Heads::Shared => (heads_first(k)?, heads_first(v)?),
        Heads::Copied => (every_head(&q, k)?, every_head(&q, v)?),
    };
    let grouped = q.size().get(1) != k.size().get(1);
    let out =
        Tensor::f_scaled_dot_product_attention(&q, &k, &v, None::<Tensor>, 0.0, true, None::<f64>, grouped)?;
    out.f_transpose(1, 2)?.f_contiguous()
}

/// Keys or values for each of the heads of `q`, heads first: a group of query heads has copies of the same.
fn every_head(q: &Tensor, x: &Tensor) -> Result<Tensor, TchError> {
    let (batch, heads) = (q.size()[0], q.size()[1]);
    let [_, seq, kv_heads, head_dim] = x.size()[..] else { return x.f_transpose(1, 2) };
    let x = x.f_transpose(1, 2)?;
    if kv_heads == heads {
        return Ok(x);
    }
    let shared = x.f_unsqueeze(2)?.f_expand([batch, kv_heads, heads / kv_heads, seq, head_dim], false)?;
    shared.f_reshape([batch, heads, seq, head_dim])
}

/// [`causal_attention`] with dropout of its probabilities while the model learns. They are then whole in memory, twice: what is
/// dropped is to be the same for every split of a batch, which libtorch's own dropout is not.
///
/// # Shapes
/// As [`causal_attention`]; where ranks split the layer, the heads are this rank's share.
/// # Errors
/// What libtorch says.
pub fn dropped_causal_attention(
    context: &Context<'_>,
    dropout: &Dropout,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
) -> Result<Tensor, EngineError> {
    if !dropout.is_on(context) {
        return match Heads::on_gpu(context, &[q, k, v]) {
            Heads::Shared => causal_attention(q, k, v),
            Heads::Copied => Ok(plain([q, k, v], Heads::Copied)?),
        };
    }
    if multiplies_in_f32(&[q, k, v]) {
        let exact = |x: &Tensor| x.f_to_kind(Kind::Float);
        let out = dropped_causal_attention(context, dropout, &exact(q)?, &exact(k)?, &exact(v)?)?;
        return Ok(out.f_to_kind(q.kind())?);
    }
    let (_, t, _, head_dim) = q.size4()?;
    let q = q.f_transpose(1, 2)?;
    let (k, v) = (every_head(&q, k)?, every_head(&q, v)?);
    let later = Tensor::f_ones([t, t], (Kind::Bool, q.device()))?.f_triu(1)?;
    let probabilities = {
        let mut scores = q.f_mul_scalar(1.0 / (head_dim as f64).sqrt())?.f_matmul(&k.f_transpose(2, 3)?)?;
        scores.f_masked_fill_(&later, f64::NEG_INFINITY)?.f_softmax(-1, scores.kind())?
    };
    let out = dropout.apply_to_share(context, &probabilities)?.f_matmul(&v)?;
    Ok(out.f_transpose(1, 2)?.f_contiguous()?)
}

fn shape(q: &Tensor, k: &Tensor) -> Result<kernel::Shape, EngineError> {
    let ((batch, seq, heads, head_dim), (_, _, kv_heads, _)) = (q.size4()?, k.size4()?);
    let [batch, seq, heads, kv_heads, head_dim] = [batch, seq, heads, kv_heads, head_dim].map(|n| n as usize);
    Ok(kernel::Shape { batch, heads, kv_heads, seq, head_dim })
}

fn fused(q: &Tensor, k: &Tensor, v: &Tensor, shape: kernel::Shape) -> Result<Tensor, EngineError> {
    let scale = 1.0 / (shape.head_dim as f32).sqrt();
    let q_strides = kernel::Strides::positions_first(&shape, shape.heads);
    let kv_strides = kernel::Strides::positions_first(&shape, shape.kv_heads);
    let mut out = q.f_empty_like()?;
    let stats = [shape.batch, shape.heads, shape.seq].map(|n| n as i64);
    let mut lse = Tensor::f_zeros(stats, (Kind::Float, q.device()))?;
    no_grad(|| {
        let out = kernel::OperandMut::new(elements_mut::<bf16>(&mut out), q_strides);
        let [q, k, v] = [(q, q_strides), (k, kv_strides), (v, kv_strides)].map(operand);
        kernel::forward(threads(), shape, scale, q, k, v, out, elements_mut::<f32>(&mut lse));
    });
    let saved = [Saved::Input(q), Saved::Input(k), Saved::Input(v), Saved::Output(&out), Saved::Input(&lse)];
    link(&[q, k, v], &[&out], &saved, move |args| {
        let [q, k, v, out, lse] = &args.saved[..] else { return Ok(vec![None, None, None]) };
        let Some(dout) = &args.grads[0] else { return Ok(vec![None, None, None]) };
        let dout = dout.f_contiguous()?;
        let (mut dq, mut dk, mut dv) = (q.f_empty_like()?, k.f_empty_like()?, v.f_empty_like()?);
        let [q, out, dout] = [q, out, &dout].map(|x| operand((x, q_strides)));
        let [k, v] = [k, v].map(|x| operand((x, kv_strides)));
        kernel::backward(
            threads(),
            shape,
            scale,
            q,
            k,
            v,
            out,
            elements::<f32>(lse),
            dout,
            kernel::OperandMut::new(elements_mut::<bf16>(&mut dq), q_strides),
            kernel::OperandMut::new(elements_mut::<bf16>(&mut dk), kv_strides),
            kernel::OperandMut::new(elements_mut::<bf16>(&mut dv), kv_strides),
        );
        Ok::<_, TorchError>(vec![Some(dq), Some(dk), Some(dv)])
    })?;
    Ok(out)
}

fn operand((tensor, strides): (&Tensor, kernel::Strides)) -> kernel::Operand<'_> {
    kernel::Operand::new(elements::<bf16>(tensor), strides)
}
