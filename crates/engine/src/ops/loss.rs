//! Losses.

use shardwise_torch::tch::Reduction;
use shardwise_torch::{Kind, Tensor};

use crate::EngineError;

/// Mean cross-entropy of predicted scores, computed in f32 (or f64 where the scores are).
///
/// # Shapes
/// - `logits`: `[.., classes]`; `target`: `[..]`, `i64`
/// - returns a scalar
/// # Errors
/// What libtorch says, of a target out of range among others.
pub fn cross_entropy(logits: &Tensor, target: &Tensor) -> Result<Tensor, EngineError> {
    let num_classes = logits.size().last().copied().unwrap_or(0);
    let kind = if logits.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let scores = logits.f_view([-1, num_classes])?.f_to_kind(kind)?;
    Ok(scores.f_cross_entropy_loss(&target.f_reshape([-1])?, None::<Tensor>, Reduction::Mean, -100, 0.0)?)
}
