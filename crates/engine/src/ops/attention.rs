//! Causal attention.

use shardwise_torch::Tensor;

use crate::EngineError;

/// Attention of every position to itself and those before it, scaled by the square root of the head's width.
///
/// # Shapes
/// - `q`: `[batch, heads, seq, head_dim]`; `k`, `v`: `[batch, kv_heads, seq, head_dim]`, `heads` a multiple of `kv_heads`
/// - returns `[batch, heads, seq, head_dim]`
/// # Errors
/// What libtorch says.
pub fn causal_attention(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor, EngineError> {
    let grouped = q.size().get(1) != k.size().get(1);
    Ok(Tensor::f_scaled_dot_product_attention(q, k, v, None::<Tensor>, 0.0, true, None::<f64>, grouped)?)
}
