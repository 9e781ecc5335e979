//! What a model is made of.

use shardwise_plan::LayerSpec;
use shardwise_torch::Tensor;

use crate::{EngineError, Params};

/// One layer: it declares parameters and computes with them, but owns none.
///
/// A model is a list of layers, each fed the output of the one before; the first is fed the batch's input, the last
/// gives the loss.
pub trait Layer: Send {
    /// The layer's name and parameters. Called a few times at the start; must not change.
    fn spec(&self) -> LayerSpec;

    /// Computes the output from the parameters and the input.
    ///
    /// The last layer returns the loss, a scalar that is the mean over the rows of the batch, if the context has a
    /// target; else whatever the model predicts.
    ///
    /// # Errors
    /// What an operation says; use the fallible methods (`f_matmul(..)?`).
    fn forward(
        &self,
        context: &Context<'_>,
        params: &Params<'_>,
        input: &Tensor,
    ) -> Result<Tensor, EngineError>;
}

/// What a layer may know besides its input.
#[derive(Debug, Clone, Copy)]
pub struct Context<'a> {
    /// What the model should predict for this batch; absent when it is only asked.
    pub target: Option<&'a Tensor>,
}

/// The samples of one micro-batch on one rank.
#[derive(Debug)]
pub struct Batch {
    /// What the first layer is fed.
    pub input: Tensor,
    /// What the last layer compares with.
    pub target: Tensor,
}
