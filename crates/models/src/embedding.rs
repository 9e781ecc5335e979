//! Token (and position) embeddings.

use shardwise_engine::ops::Dropout;
use shardwise_engine::{Context, EngineError, Layer, Params, ops};
use shardwise_plan::LayerSpec;
use shardwise_torch::{Kind, Tensor};

/// Turns token ids into vectors.
///
/// # Shapes
/// - input: `[batch, seq]`, `i64`; output: `[batch, seq, hidden]`, of its tokens where tensor-parallel ranks share them
pub(crate) struct Embedding {
    pub spec: LayerSpec,
    /// Keys of the token table and, where positions are learned, of theirs.
    pub token_key: &'static str,
    pub vocab_size: usize,
    pub position_key: Option<&'static str>,
    /// Of the sum.
    pub dropout: Dropout,
}

impl Layer for Embedding {
    fn spec(&self) -> LayerSpec {
        self.spec.clone()
    }

    fn forward(
        &self,
        context: &Context<'_>,
        params: &Params<'_>,
        input: &Tensor,
    ) -> Result<Tensor, EngineError> {
        let mut x = ops::embedding(context, params.get(self.token_key)?, self.vocab_size, input)?;
        if let Some(key) = self.position_key {
            let positions = Tensor::f_arange(input.size()[1], (Kind::Int64, input.device()))?;
            let positions = ops::own_positions(context, &positions)?;
            x = x.f_add(&Tensor::f_embedding(params.get(key)?, &positions, -1, false, false)?)?;
        }
        self.dropout.apply_to_residual(context, &x)
    }
}
