//! Normalisations over the last dimension.

use half::{bf16, f16};
use shardwise_kernels::cuda::{RmsNormBackward, RmsNormForward, RmsNormWeightGrad};
use shardwise_kernels::rms_norm as kernel;
use shardwise_torch::function::{Saved, link};
use shardwise_torch::{Kind, Tensor, TorchError, no_grad};

use super::gpu::{OnGpu, address, on_gpu};
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
    if let Some(gpu) = on_gpu(context, &[x, weight]) {
        return on_a_gpu(gpu, x, weight, eps);
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

fn on_a_gpu(gpu: OnGpu, x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor, EngineError> {
    const NAME: &str = "rms_norm";
    let width = weight.numel() as u64;
    let rows = x.numel() as u64 / width.max(1);
    let y = x.f_empty_like()?;
    let inv_rms = Tensor::f_empty([rows as i64], (Kind::Float, x.device()))?;
    let forward = RmsNormForward {
        x: address(x),
        weight: address(weight),
        out: address(&y),
        inv_rms: address(&inv_rms),
        rows,
        width,
        eps: eps as f32,
    };
    gpu.run(NAME, &forward.launch(gpu.float))?;
    let saved = [Saved::Input(x), Saved::Input(weight), Saved::Input(&inv_rms)];
    link(&[x, weight], &[&y], &saved, move |args| {
        let [x, weight, inv_rms] = &args.saved[..] else { return Ok(vec![None, None]) };
        let Some(dy) = &args.grads[0] else { return Ok(vec![None, None]) };
        let dy = dy.f_contiguous()?;
        let dx = x.f_empty_like()?;
        let float = (Kind::Float, x.device());
        let num_partials = RmsNormBackward::num_partials(rows);
        let partial = Tensor::f_empty([num_partials as i64, width as i64], float)?;
        let dweight = Tensor::f_empty(weight.size(), float)?;
        let backward = RmsNormBackward {
            x: address(x),
            weight: address(weight),
            inv_rms: address(inv_rms),
            dy: address(&dy),
            dx: address(&dx),
            partial_dweight: address(&partial),
            rows,
            width,
        };
        gpu.run(NAME, &backward.launch(gpu.float))?;
        let (partial_dweight, dweight_at) = (address(&partial), address(&dweight));
        let sum = RmsNormWeightGrad { partial_dweight, dweight: dweight_at, num_partials, width };
        gpu.run(NAME, &sum.launch())?;
        Ok(vec![Some(dx), Some(dweight.f_to_kind(gpu.kind)?)])
    })?;
    Ok(y)
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

/// `(x - mean(x)) / sqrt(var(x) + eps) * weight + bias`.
///
/// # Shapes
/// - `x`: `[.., width]`; `weight`, `bias`: `[width]`
/// # Errors
/// What libtorch says.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor, EngineError> {
    Ok(x.f_layer_norm(weight.size(), Some(weight), Some(bias), eps, false)?)
}
