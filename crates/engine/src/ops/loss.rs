//! The loss of a language model's head.

use half::bf16;
use shardwise_kernels::cross_entropy as kernel;
use shardwise_torch::function::{Saved, link};
use shardwise_torch::tch::Reduction;
use shardwise_torch::{Kind, Tensor, TorchError, no_grad};

use super::raw::{Fused, elements_mut, fused_kind, ids, threads};
use crate::EngineError;
use shardwise_kernels::Float;

/// Mean cross-entropy of the scores `x @ weight^T`, computed in f32 (or f64 where `x` is).
///
/// The gradient of the scores is known as soon as the scores are, and takes their place: they are never held twice, nor
/// in f32.
///
/// # Shapes
/// - `x`: `[.., width]`; `weight`: `[classes, width]`; `target`: `[..]`, `i64`
/// - returns a scalar
/// # Errors
/// A target that is no class; what libtorch says.
pub fn linear_cross_entropy(x: &Tensor, weight: &Tensor, target: &Tensor) -> Result<Tensor, EngineError> {
    let target = target.f_contiguous()?;
    match fused_kind(&[x, weight]) {
        Some(Kind::BFloat16) => fused::<bf16>(x, weight, &target),
        Some(_) => fused::<f32>(x, weight, &target),
        None => linear_cross_entropy_plain(x, weight, &target),
    }
}

/// [`linear_cross_entropy`] in libtorch's own operations.
///
/// # Errors
/// What libtorch says, of a target out of range among others.
pub fn linear_cross_entropy_plain(
    x: &Tensor,
    weight: &Tensor,
    target: &Tensor,
) -> Result<Tensor, EngineError> {
    let logits = x.f_linear(weight, None::<Tensor>)?;
    let kind = if logits.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let scores = logits.f_view([-1, weight.size()[0]])?.f_to_kind(kind)?;
    Ok(scores.f_cross_entropy_loss(&target.f_reshape([-1])?, None::<Tensor>, Reduction::Mean, -100, 0.0)?)
}

fn fused<T: Fused + Float>(x: &Tensor, weight: &Tensor, target: &Tensor) -> Result<Tensor, EngineError> {
    let rows = x.f_reshape([-1, weight.size()[1]])?;
    let num_rows = rows.size()[0];
    let mut scores = no_grad(|| rows.f_linear(weight, None::<Tensor>))?;
    let scale = 1.0 / num_rows as f32;
    let total = kernel::in_place(threads(), elements_mut::<T>(&mut scores), ids(target), scale)?;
    let loss = Tensor::f_from_slice(&[(total / num_rows as f64) as f32])?.f_squeeze()?;
    let shape = x.size();
    let saved = [Saved::Input(x), Saved::Input(weight), Saved::Input(&scores)];
    link(&[x, weight], &[&loss], &saved, move |args| {
        let [x, weight, dscores] = &args.saved[..] else { return Ok(vec![None, None]) };
        let Some(dloss) = &args.grads[0] else { return Ok(vec![None, None]) };
        let dloss = dloss.f_double_value(&[])?;
        let scaled;
        let dscores = if dloss == 1.0 {
            dscores
        } else {
            scaled = dscores.f_mul_scalar(dloss)?;
            &scaled
        };
        let rows = x.f_reshape([-1, weight.size()[1]])?;
        let dx = if args.wanted[0] { Some(dscores.f_mm(weight)?.f_view(&shape[..])?) } else { None };
        let dweight = if args.wanted[1] { Some(dscores.f_tr()?.f_mm(&rows)?) } else { None };
        Ok::<_, TorchError>(vec![dx, dweight])
    })?;
    Ok(loss)
}
