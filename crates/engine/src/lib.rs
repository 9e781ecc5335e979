//! Runs layers by a schedule, one autograd graph a layer, and drives the ZeRO units.
//!
//! A model is a list of [`Layer`]s which own no parameters. The [`Engine`] owns the parameters (through
//! `shardwise_zero`), hands each layer views of them for one call, and keeps one small graph for each layer and
//! micro-batch. Between two layers everything is ordinary Rust: gather before, release after, reduce when the last
//! layer that uses a unit has gone backward. There are no hooks and nothing is traced.
//!
//! ```text
//! forward    for each layer: gather -> y = layer(detach(x)) -> release, prefetch the next
//! backward   for each layer, last first: gather -> (dx, dparams) = grad(y, dy) -> reduce -> release
//! ```
//!
//! A layer whose activations are not kept runs forward without a graph; its backward begins with `y = layer(x)` once more.
//!
//! [`ops`] holds the differentiable operations that layers share.

mod binding;
mod deferred;
mod engine;
mod error;
mod export;
mod gradients;
mod home;
mod infer;
mod layer;
pub mod ops;
mod parked;
mod pass;
mod ranks;
mod slices;
mod source;
mod stage;
mod state;
mod step;
mod tensor_parallel;
mod transport;

pub use binding::Params;
pub use deferred::DeferredWeights;
pub use engine::{Engine, EngineOptions, Phase};
pub use error::EngineError;
pub use layer::{Batch, Context, Layer, Randomness};
pub use ranks::Ranks;
pub use source::{BoxError, ParamSource, RandomInit};
pub use stage::PipelineOptions;
pub use state::StatePart;
pub use step::TrainReport;
pub use tensor_parallel::TensorParallel;
