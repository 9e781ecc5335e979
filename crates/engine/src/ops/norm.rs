//! Normalisations over the last dimension.

use half::{bf16, f16};
use shardwise_kernels::rms_norm as kernel;
use shardwise_torch::function::{Saved, link};
use shardwise_torch::{Kind, Tensor, TorchError, no_grad};

use super::norm_gpu::NormOnGpu;
use super::raw::{Fused, elements, elements_mut, fused_kind, threads};
use crate::{Context, EngineError};
use shardwise_kernels::Float;

/// `x / sqrt(mean(x^2) + eps) * weight`.
///
/// # Shapes
/// - `x`: `[.., width]`; `weight`: `[width]`
/// # Errors
/// What libtorch says.
/// # Source
/// Root Mean Square Layer Normalization (arXiv:1910.07467).
pub fn rms_norm(context: &Context<'_>, x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor, EngineError> {
    if let Some(norm) = NormOnGpu::of(context, &[x], weight, None, eps) {
        return norm.norm(x);
    }
    match fused_kind(&[x, weight]) {
        Some(Kind::BFloat16) => fused::<bf16>(x, weight, eps),
        Some(Kind::Half) => fused::<f16>(x, weight, eps),
        Some(_) => fused::<f32>(x, weight, eps),
        None => rms_norm_plain(x, weight, eps),
    }
}

/// [`rms_norm`] in libtorch's own operations.
///
/// # Errors
/// What libtorch says.
pub fn rms_norm_plain(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor, EngineError> {
    Ok(x.f_rms_norm(weight.size(), Some(weight), Some(eps))?)
}

fn fused<T: Fused + Float>(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor, EngineError> {
    let num_rows = x.numel() / weight.numel().max(1);
    let mut y = x.f_empty_like()?;
    let mut inv_rms = Tensor::f_zeros([num_rows as i64], (Kind::Float, x.device()))?;
    no_grad(|| {
        let (out, inv) = (elements_mut::<T>(&mut y), elements_mut::<f32>(&mut inv_rms));
        kernel::forward(threads(), elements::<T>(x), elements::<T>(weight), eps as f32, out, inv);
    });
    link(&[x, weight], &[&y], &[Saved::Input(x), Saved::Input(weight), Saved::Input(&inv_rms)], |args| {
        let [x, weight, inv_rms] = &args.saved[..] else { return Ok(vec![None, None]) };
        let Some(dy) = &args.grads[0] else { return Ok(vec![None, None]) };
        let dy = dy.f_contiguous()?;
        let mut dx = x.f_empty_like()?;
        let mut dweight = Tensor::f_zeros(weight.size(), (Kind::Float, weight.device()))?;
        kernel::backward(
            threads(),
            elements::<T>(x),
            elements::<T>(weight),
            elements::<f32>(inv_rms),
            elements::<T>(&dy),
            elements_mut::<T>(&mut dx),
            elements_mut::<f32>(&mut dweight),
        );
        Ok::<_, TorchError>(vec![Some(dx), Some(dweight.f_to_kind(T::KIND)?)])
    })?;
    Ok(y)
}

/// `x` as it is, for a residual, and its [`rms_norm`]. On a GPU the two gradients are added within the norm's backward pass.
///
/// # Errors
/// What libtorch says.
pub fn fork_rms_norm(
    context: &Context<'_>,
    x: &Tensor,
    weight: &Tensor,
    eps: f64,
) -> Result<[Tensor; 2], EngineError> {
    match NormOnGpu::of(context, &[x], weight, None, eps) {
        Some(norm) => norm.fork(x),
        None => Ok([x.shallow_clone(), rms_norm(context, x, weight, eps)?]),
    }
}

/// `(x - mean(x)) / sqrt(var(x) + eps) * weight + bias`. On the host it is libtorch's.
///
/// # Shapes
/// - `x`: `[.., width]`; `weight`, `bias`: `[width]`
/// # Errors
/// What libtorch says.
/// # Source
/// Layer Normalization (arXiv:1607.06450).
pub fn layer_norm(
    context: &Context<'_>,
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    eps: f64,
) -> Result<Tensor, EngineError> {
    match NormOnGpu::of(context, &[x], weight, Some(bias), eps) {
        Some(norm) => norm.norm(x),
        None => layer_norm_plain(x, weight, bias, eps),
    }
}

/// [`layer_norm`] in libtorch's own operations.
///
/// # Errors
/// What libtorch says.
pub fn layer_norm_plain(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor, EngineError> {
    Ok(x.f_layer_norm(weight.size(), Some(weight), Some(bias), eps, false)?)
}

/// `x` as it is, for a residual, and its [`layer_norm`], as [`fork_rms_norm`].
///
/// # Errors
/// What libtorch says.
pub fn fork_layer_norm(
    context: &Context<'_>,
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    eps: f64,
) -> Result<[Tensor; 2], EngineError> {
    match NormOnGpu::of(context, &[x], weight, Some(bias), eps) {
        Some(norm) => norm.fork(x),
        None => Ok([x.shallow_clone(), layer_norm_plain(x, weight, bias, eps)?]),
    }
}
