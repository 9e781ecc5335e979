//! What can go wrong with sharded state.

use shardwise_comm::CommError;
use shardwise_device::{DType, DeviceError};
use shardwise_kernels::processor::ProcessorError;

/// Errors of [`crate::Zero`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ZeroError {
    /// A collective failed.
    #[error(transparent)]
    Comm(#[from] CommError),
    /// Memory could not be had.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Arithmetic could not be done, for one because a GPU failed.
    #[error(transparent)]
    Processor(#[from] ProcessorError),
    /// The first values of a parameter could not be had.
    #[error("could not fill `{param}`")]
    Fill {
        /// The parameter's name.
        param: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A gradient of the wrong size was given.
    #[error("gradient of `{param}` has `{got}` elements, expected `{expected}`")]
    WrongGradient {
        /// The parameter's name.
        param: String,
        /// Its elements.
        expected: usize,
        /// The gradient's elements.
        got: usize,
    },
    /// A gradient of the wrong element type was given.
    #[error("gradient of `{param}` is `{got}`, expected the compute type `{expected}`")]
    WrongGradientType {
        /// The parameter's name.
        param: String,
        /// The compute type.
        expected: DType,
        /// The gradient's type.
        got: DType,
    },
    /// Micro-batches must be reduced once each, in order.
    #[error("unit `{unit}` is given the gradients of micro-batch `{got}`, expected micro-batch `{expected}`")]
    WrongMicroBatch {
        /// The unit's name.
        unit: String,
        /// The next one.
        expected: usize,
        /// The one given.
        got: usize,
    },
    /// A step would use gradients that are not there, or those of an earlier step.
    #[error("unit `{unit}` has the gradients of `{got}` micro-batches, a step needs `{expected}`")]
    MissingGradient {
        /// The unit's name.
        unit: String,
        /// Micro-batches in a step.
        expected: usize,
        /// Micro-batches reduced since the last step.
        got: usize,
    },
    /// An option that cannot be honoured.
    #[error("`{option}` is `{got}`, expected {expected}")]
    WrongOption {
        /// The option.
        option: &'static str,
        /// Its value.
        got: String,
        /// What would do.
        expected: &'static str,
    },
    /// A collective that failed earlier took the unit's memory with it.
    #[error("the state of unit `{unit}` was lost when an earlier collective failed")]
    Lost {
        /// The unit's name.
        unit: String,
    },
    /// The layouts were made for another number of ranks.
    #[error("unit `{unit}` is laid out for `{expected}` ranks, the group has `{got}`")]
    WrongGroup {
        /// The unit's name.
        unit: String,
        /// Shards in the layout.
        expected: usize,
        /// Ranks in the group.
        got: usize,
    },
}
