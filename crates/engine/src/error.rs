//! What can go wrong while training.

use shardwise_comm::CommError;
use shardwise_kernels::cross_entropy::TargetOutOfRange;
use shardwise_plan::SplitError;
use shardwise_plan::pipeline::{PartitionError, ScheduleError};
use shardwise_torch::TorchError;
use shardwise_torch::tch::TchError;
use shardwise_zero::ZeroError;

/// Errors of the engine.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// Sharded state or a collective.
    #[error(transparent)]
    Zero(#[from] ZeroError),
    /// A collective of the engine's own: between pipeline stages, or tensor-parallel ranks.
    #[error(transparent)]
    Comm(#[from] CommError),
    /// An operation of libtorch.
    #[error(transparent)]
    Torch(#[from] TorchError),
    /// A target that is no class.
    #[error(transparent)]
    Target(#[from] TargetOutOfRange),
    /// A layer failed.
    #[error("layer `{layer}`, {pass}")]
    Layer {
        /// The layer's name.
        layer: String,
        /// `forward`, `backward`, or `forward once more`.
        pass: &'static str,
        /// Why.
        #[source]
        source: Box<EngineError>,
    },
    /// A layer asked for a parameter that it does not declare.
    #[error("no parameter `{key}`, the layer declares {declared:?}")]
    NoSuchParam {
        /// The key asked for.
        key: String,
        /// What there is.
        declared: Vec<String>,
    },
    /// A parameter that cannot be cut over the tensor-parallel ranks.
    #[error(transparent)]
    Split(#[from] SplitError),
    /// Layers that cannot be cut into so many stages.
    #[error(transparent)]
    Stages(#[from] PartitionError),
    /// Micro-batches that no schedule exists for.
    #[error(transparent)]
    Schedule(#[from] ScheduleError),
    /// The output of a layer that pipeline stages do not exchange.
    #[error(
        "a layer's output has elements of {kind} and shape `{shape:?}`, expected floats of 16 or 32 bits in at most 8 dimensions: the next layer is on another pipeline stage"
    )]
    NotAnActivation {
        /// Its type.
        kind: String,
        /// Its shape.
        shape: Vec<i64>,
    },
    /// Stages that were cut for something else.
    #[error(
        "the layers were cut into `{num_parts}` parts for `{num_stages}` stages up to layer `{end}`, expected `{expected_parts}` for `{expected_stages}` up to `{num_layers}`"
    )]
    WrongStages {
        /// Stages that they were cut for.
        num_stages: usize,
        /// Parts.
        num_parts: usize,
        /// Where the last part ends.
        end: usize,
        /// Stages of the mesh.
        expected_stages: usize,
        /// Parts of the schedule.
        expected_parts: usize,
        /// Layers of the model.
        num_layers: usize,
    },
    /// Tokens that ranks cannot share evenly.
    #[error(
        "`{num_tokens}` tokens of a sample cannot be shared by `{degree}` tensor-parallel ranks evenly, expected a multiple of `{degree}`"
    )]
    TokensNotDivisible {
        /// Tokens of a sample.
        num_tokens: usize,
        /// Ranks.
        degree: usize,
    },
    /// A token that no rank has.
    #[error("token `{token}` is not in the vocabulary of `{vocab_size}` tokens")]
    NoSuchToken {
        /// The token.
        token: i64,
        /// How many there are.
        vocab_size: usize,
    },
    /// Two layers declare one parameter with different shapes.
    #[error("tied parameter `{name}` has shape `{first:?}` in one layer and `{second:?}` in another")]
    TiedShapes {
        /// The parameter.
        name: String,
        /// Shape where it is owned.
        first: Vec<usize>,
        /// Shape where it is used again.
        second: Vec<usize>,
    },
    /// The last layer gave something else than a loss.
    #[error("the last layer's output has shape `{shape:?}`, expected a scalar loss")]
    LossNotScalar {
        /// Its shape.
        shape: Vec<i64>,
    },
    /// libtorch would compute where the sharded state is not.
    #[error("layers are to run on `{device}`, but `zero.gpu` is not a processor of that GPU")]
    NoProcessor {
        /// Where layers are to run.
        device: String,
    },
    /// A model without layers.
    #[error("a model needs at least one layer")]
    NoLayers,
    /// A pattern of frozen or undecayed parameters matches none.
    #[error("pattern `{pattern}` of `{list}` matches no parameter")]
    PatternMatchesNothing {
        /// The pattern.
        pattern: String,
        /// Which list it is in.
        list: &'static str,
    },
    /// A rule for activations that names no layer.
    #[error("pattern `{pattern}` of `activations` matches no layer, the layers are {layers:?}")]
    NoSuchLayer {
        /// The pattern.
        pattern: String,
        /// What there is.
        layers: Vec<String>,
    },
    /// The data for a micro-batch could not be had.
    #[error("could not read the batch of micro-batch `{microbatch}`")]
    Batch {
        /// The micro-batch.
        microbatch: usize,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl From<TchError> for EngineError {
    fn from(error: TchError) -> Self {
        EngineError::Torch(error.into())
    }
}
