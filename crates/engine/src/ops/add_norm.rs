//! A residual's addition and the norm after it, in one pass: what stands between attention and MLP in a block.

use half::{bf16, f16};
use shardwise_kernels::rms_norm::fused as kernel;
use shardwise_torch::function::{Saved, link};
use shardwise_torch::{Kind, Tensor, TorchError, no_grad};

use super::norm::{layer_norm_plain, rms_norm_plain};
use super::norm_gpu::NormOnGpu;
use super::raw::{Fused, elements, elements_mut, fused_kind, threads};
use crate::{Context, EngineError};
use shardwise_kernels::Float;

/// `sum = x + residual`, and [`rms_norm`](super::rms_norm) of the sum, with the bits of the two one after the other.
///
/// # Shapes
/// - `x`, `residual`: `[.., width]`; `weight`: `[width]`
/// - returns `sum` and its norm, both like `x`
/// # Errors
/// What libtorch says.
pub fn add_rms_norm(
    context: &Context<'_>,
    x: &Tensor,
    residual: &Tensor,
    weight: &Tensor,
    eps: f64,
) -> Result<[Tensor; 2], EngineError> {
    let inputs = [x, residual, weight];
    if x.size() != residual.size() {
        return add_rms_norm_plain(x, residual, weight, eps);
    }
    if let Some(norm) = NormOnGpu::of(context, &[x, residual], weight, None, eps) {
        return norm.add(x, residual);
    }
    match fused_kind(&inputs) {
        Some(Kind::BFloat16) => fused::<bf16>(inputs, eps),
        Some(Kind::Half) => fused::<f16>(inputs, eps),
        Some(_) => fused::<f32>(inputs, eps),
        None => add_rms_norm_plain(x, residual, weight, eps),
    }
}

/// [`add_rms_norm`] in libtorch's own operations.
///
/// # Errors
/// What libtorch says.
pub fn add_rms_norm_plain(
    x: &Tensor,
    residual: &Tensor,
    weight: &Tensor,
    eps: f64,
) -> Result<[Tensor; 2], EngineError> {
    let sum = x.f_add(residual)?;
    let out = rms_norm_plain(&sum, weight, eps)?;
    Ok([sum, out])
}

/// `sum = x + residual`, and [`layer_norm`](super::layer_norm) of the sum: one pass on a GPU, libtorch's operations on the host.
///
/// # Shapes
/// - `x`, `residual`: `[.., width]`; `weight`, `bias`: `[width]`
/// - returns `sum` and its norm, both like `x`
/// # Errors
/// What libtorch says.
pub fn add_layer_norm(
    context: &Context<'_>,
    x: &Tensor,
    residual: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    eps: f64,
) -> Result<[Tensor; 2], EngineError> {
    let on_gpu = NormOnGpu::of(context, &[x, residual], weight, Some(bias), eps);
    match on_gpu.filter(|_| x.size() == residual.size()) {
        Some(norm) => norm.add(x, residual),
        None => {
            let sum = x.f_add(residual)?;
            let out = layer_norm_plain(&sum, weight, bias, eps)?;
            Ok([sum, out])
        }
    }
}

/// Gradients of the sum and of the weight.
type Grads = Result<[Tensor; 2], TorchError>;

/// Links sum and norm to their inputs. `backward` is given the sum, the weight, the rows' factors, and the gradients of sum and norm.
fn linked(
    [x, residual, weight]: [&Tensor; 3],
    [sum, out, inv_rms]: [Tensor; 3],
    backward: impl Fn([&Tensor; 3], &Tensor, &Tensor) -> Grads + Send + 'static,
) -> Result<[Tensor; 2], EngineError> {
    let saved = [Saved::Output(&sum), Saved::Input(weight), Saved::Input(&inv_rms)];
    link(&[x, residual, weight], &[&sum, &out], &saved, move |args| {
        let [sum, weight, inv_rms] = &args.saved[..] else { return Ok(vec![None, None, None]) };
        let given = |grad: &Option<Tensor>| match grad {
            Some(grad) => grad.f_contiguous(),
            None => sum.f_zeros_like(),
        };
        if args.grads.iter().all(Option::is_none) {
            return Ok(vec![None, None, None]);
        }
        let (dsum, dy) = (given(&args.grads[0])?, given(&args.grads[1])?);
        let [dx, dweight] = backward([sum, weight, inv_rms], &dsum, &dy)?;
        Ok(vec![Some(dx.shallow_clone()), Some(dx), Some(dweight.f_to_kind(weight.kind())?)])
    })?;
    Ok([sum, out])
}

fn fused<T: Fused + Float>(inputs: [&Tensor; 3], eps: f64) -> Result<[Tensor; 2], EngineError> {
    let [x, residual, weight] = inputs;
    let num_rows = x.numel() / weight.numel().max(1);
    let (mut sum, mut out) = (x.f_empty_like()?, x.f_empty_like()?);
    let mut inv_rms = Tensor::f_zeros([num_rows as i64], (Kind::Float, x.device()))?;
    no_grad(|| {
        kernel::forward(
            threads(),
            elements::<T>(x),
            elements::<T>(residual),
            elements::<T>(weight),
            eps as f32,
            elements_mut::<T>(&mut sum),
            elements_mut::<T>(&mut out),
            elements_mut::<f32>(&mut inv_rms),
        );
    });
    linked(inputs, [sum, out, inv_rms], |[sum, weight, inv_rms], dsum, dy| {
        let mut dx = sum.f_empty_like()?;
        let mut dweight = Tensor::f_zeros(weight.size(), (Kind::Float, weight.device()))?;
        kernel::backward(
            threads(),
            elements::<T>(sum),
            elements::<T>(weight),
            elements::<f32>(inv_rms),
            elements::<T>(dy),
            elements::<T>(dsum),
            elements_mut::<T>(&mut dx),
            elements_mut::<f32>(&mut dweight),
        );
        Ok([dx, dweight])
    })
}
