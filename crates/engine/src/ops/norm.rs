//! Normalisations over the last dimension.

use shardwise_torch::Tensor;

use crate::EngineError;

/// `x / sqrt(mean(x^2) + eps) * weight`.
///
/// # Shapes
/// - `x`: `[.., width]`; `weight`: `[width]`
/// # Errors
/// What libtorch says.
/// # Source
/// Root Mean Square Layer Normalization (arXiv:1910.07467).
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor, EngineError> {
    Ok(x.f_rms_norm(weight.size(), Some(weight), Some(eps))?)
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
