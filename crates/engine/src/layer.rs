//! What a model is made of.

use std::sync::Arc;

use shardwise_kernels::processor::GpuProcessor;
use shardwise_plan::LayerSpec;
use shardwise_torch::Tensor;

use crate::{DeferredWeights, EngineError, Params, TensorParallel};

/// One layer: it declares parameters and computes with them, but owns none.
///
/// A model is a list of layers, each fed the output of the one before; the first is fed the batch's input, the last
/// gives the loss. What one layer gives the next is a float tensor: pipeline stages exchange it.
///
/// Where ranks split layers, a layer is called with its part of each parameter that says how it is cut, and uses
/// [`ops::enter`](crate::ops::enter) and [`ops::leave`](crate::ops::leave) around linear maps. A layer whose parameters are
/// all whole computes the same on each of those ranks.
pub trait Layer: Send {
    /// The layer's name and parameters. Called a few times at the start; must not change.
    fn spec(&self) -> LayerSpec;

    /// Computes the output from the parameters and the input.
    ///
    /// The last layer returns the loss, a scalar that is the mean over the rows of the batch, if the context has a
    /// target; else whatever the model predicts. Called twice for a micro-batch where activations are recomputed: the
    /// same arguments must give the same output.
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
    /// What random numbers depend on; absent when the model does not learn: then nothing is dropped.
    pub random: Option<Randomness>,
    /// The gradient of the loss that the backward pass will begin with. Who computes gradients within the forward pass, as a
    /// head does, takes it in before they are rounded.
    pub loss_scale: f64,
    /// Rows whose scores over the vocabulary a head holds at a time; `None` leaves it to the head.
    pub head_chunk_rows: Option<usize>,
    /// The ranks that split this layer with this one; absent, or of one rank, where the layer is whole.
    pub tensor: Option<&'a TensorParallel>,
    /// Where linear maps leave what the gradients of their matrices follow from, if these are to be computed later.
    pub deferred: Option<&'a DeferredWeights>,
    /// What runs our kernels where tensors are on a GPU: on the stream that libtorch uses.
    pub gpu: Option<&'a Arc<GpuProcessor>>,
}

impl<'a> Context<'a> {
    /// The context of a model that does not learn.
    pub fn inference(target: Option<&'a Tensor>) -> Self {
        Context {
            target,
            random: None,
            loss_scale: 1.0,
            head_chunk_rows: None,
            tensor: None,
            deferred: None,
            gpu: None,
        }
    }
}

/// Where the random numbers of a micro-batch stand among those of the run: they do not depend on how often they are drawn, nor
/// on which rank draws them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Randomness {
    /// The seed of the run's random numbers.
    pub seed: u64,
    /// [`Batch::first_row`].
    pub first_row: u64,
    /// Rows of the micro-batch.
    pub num_rows: usize,
}

/// The samples of one micro-batch on one rank.
#[derive(Debug)]
pub struct Batch {
    /// What the first layer is fed.
    pub input: Tensor,
    /// What the last layer compares with.
    pub target: Tensor,
    /// The place of its first row in the line of all rows of the run, which orders them by step, micro-batch, rank and row:
    /// `((step * grad_accum_steps + microbatch) * num_ranks + rank) * rows`, steps counted from 0. What is dropped from a
    /// row follows from its place; a model without dropout does not look at it.
    pub first_row: u64,
}
