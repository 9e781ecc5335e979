//! Pure plans: who owns which elements, in what order micro-batches run, what it will cost.
//!
//! Nothing here allocates model state, talks to another rank or knows a tensor. A plan is data: printable, comparable,
//! tested without a device. The engines walk it.
//!
//! | module | its question |
//! |---|---|
//! | [`mesh`] | which rank is where on the pipeline, data and tensor axes? |
//! | [`param`] | what parameters does a layer have, and how are they born? |
//! | [`tensor`] | how is a parameter cut over the ranks of a tensor group? |
//! | [`local`] | which elements of a cut parameter are which of the whole one? |
//! | [`pattern`] | which parameters does a name with `*` in it mean? |
//! | [`layout`] | where does each parameter lie in its unit's flat buffer, and which part is a rank's shard? |
//! | [`pipeline`] | which layers does a pipeline stage hold, and in what order does it run them? |
//! | [`activations`] | what becomes of a layer's activations until its backward? |
//! | [`gpu`] | what does a rank with a GPU keep on the host? |
//! | [`memory`] | how many bytes does a rank need, by kind? |
//! | [`traffic`] | how many elements does a rank send in a step? |
//! | [`share`] | what does one rank of a mesh hold and send? |
//! | [`run`] | all of that for one run |
//! | [`planner`] | which layout of many ranks fits their memory, and which is fastest? |
//! | [`zoo`] | what layers does a Hugging Face `config.json` describe? |

#![forbid(unsafe_code)]

pub mod activations;
mod bytes;
pub mod gpu;
pub mod layout;
pub mod local;
pub mod memory;
pub mod mesh;
mod overlap;
pub mod param;
pub mod pattern;
pub mod pipeline;
pub mod planner;
pub mod quantity;
pub mod run;
pub mod share;
mod stage;
pub mod tensor;
pub mod traffic;
pub mod zoo;

pub use activations::{ActivationPolicy, ActivationRules, LossTurn};
pub use bytes::{Bytes, NotBytes};
pub use gpu::{Collectives, Cuda, Device, Offload, OffloadTo};
pub use layout::{Fragment, ParamSlot, UnitLayout};
pub use local::LocalBlock;
pub use mesh::{Axis, Coordinates, Mesh};
pub use overlap::Overlap;
pub use param::{Init, LayerSpec, ParamSpec};
pub use pattern::NamePattern;
pub use stage::ZeroStage;
pub use tensor::{SplitError, SplitUnits, TensorSplit};
