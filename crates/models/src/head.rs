//! The last layer of a language model: final norm, projection to the vocabulary, loss.

use shardwise_engine::ops::LinearCrossEntropy;
use shardwise_engine::{Context, EngineError, Layer, Params, ops};
use shardwise_plan::LayerSpec;
use shardwise_torch::Tensor;

/// Which normalisation comes last.
pub(crate) enum FinalNorm {
    Rms { eps: f64 },
    Layer { eps: f64 },
}

/// Norm, then scores over the vocabulary; with a target, the mean cross-entropy.
///
/// # Shapes
/// - input: `[batch, seq, hidden]`; output: a scalar, or `[batch, seq, vocab]` without a target
pub(crate) struct LmHead {
    pub spec: LayerSpec,
    pub norm: FinalNorm,
    /// Key of the norm's weight: its bias, if any, is beside it.
    pub norm_key: &'static str,
    pub vocab_size: usize,
}

impl Layer for LmHead {
    fn spec(&self) -> LayerSpec {
        self.spec.clone()
    }

    fn forward(
        &self,
        context: &Context<'_>,
        params: &Params<'_>,
        input: &Tensor,
    ) -> Result<Tensor, EngineError> {
        let weight = params.get(&format!("{}.weight", self.norm_key))?;
        let x = match self.norm {
            FinalNorm::Rms { eps } => ops::rms_norm(context, input, weight, eps)?,
            FinalNorm::Layer { eps } => {
                ops::layer_norm(context, input, weight, params.get(&format!("{}.bias", self.norm_key))?, eps)?
            }
        };
        let x = ops::enter(context, &x)?;
        let weight = params.get("weight")?;
        match context.target {
            Some(target) => {
                let loss = LinearCrossEntropy {
                    chunk_rows: context.head_chunk_rows,
                    loss_scale: context.loss_scale,
                };
                loss.forward_on(context, &x, weight, self.vocab_size, target)
            }
            None => ops::gather_classes(context, &ops::linear(context, &x, weight, None)?, self.vocab_size),
        }
    }
}
