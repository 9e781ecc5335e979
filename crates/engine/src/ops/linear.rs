//! Linear maps.

use shardwise_torch::Tensor;

use crate::EngineError;

/// `x @ weight^T + bias`.
///
/// # Shapes
/// - `x`: `[.., in]`; `weight`: `[out, in]`; `bias`: `[out]`
/// - returns `[.., out]`
/// # Errors
/// What libtorch says.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor, EngineError> {
    Ok(x.f_linear(weight, bias)?)
}
