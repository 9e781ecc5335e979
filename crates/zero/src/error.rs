//! What can go wrong with sharded state.

use shardwise_comm::CommError;
use shardwise_device::DeviceError;

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
