//! The gated activation of Llama's MLP.

use shardwise_torch::Tensor;

use crate::EngineError;

/// `silu(gate) * up`.
///
/// # Errors
/// What libtorch says.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor, EngineError> {
    Ok(gate.f_silu()?.f_mul(up)?)
}
