//! The heart: units of flat buffers with ZeRO stages 0 to 3.
//!
//! A *unit* is one layer's parameters as one flat buffer (`shardwise_plan::UnitLayout`). [`Zero`] owns, for every unit,
//! all model state of this rank: the compute copy of the parameters, the fp32 master weights, the optimizer states and
//! the fp32 gradients, each whole or just this rank's shard as the stage demands. It knows no tensors, layers or
//! schedules; its caller says
//!
//! ```text
//! gather(unit)    the unit's parameters are about to be used     (stage 3: all-gather; below: nothing)
//! release(unit)   they are not needed for now                    (stage 3: the buffer goes back to the pool)
//! prefetch(unit)  they will be needed next                       (stage 3 with a side thread: starts the all-gather)
//! reduce(unit)    these are its gradients of this micro-batch    (reduce-scatter, now or at the last micro-batch)
//! step(lr)        norm, one decision on all ranks, fused update  (then all-gather below stage 3)
//! ```
//!
//! | kept by each rank | stage 0 | 1 | 2 | 3 |
//! |---|---|---|---|---|
//! | compute copy | all | all | all | shard |
//! | fp32 gradient, no accumulation | all | shard | shard | shard |
//! | fp32 gradient, with accumulation | all | all | shard | shard |
//! | master weights, moments | all | shard | shard | shard |
//!
//! In fp32 the compute copy is the master copy. In fp16 the caller starts each backward pass with
//! [`Zero::loss_scale`] as the gradient of the loss; [`LossScaler`] says how that scale moves.
//!
//! State lies on the host, on a GPU, or on both ([`Offload`]); its place changes no bit.
//!
//! On a mesh a rank holds some layers, cut ([`Zero::on_mesh`]): state is sharded over its data group, while norm and decision are over the
//! world ([`Groups`]), where each element counts once ([`Placement`]).
//!
//! **Numbers.** Gradients of ranks are added in rank order in f32; the mean over ranks and micro-batches, like the loss
//! scale, is one factor in the step ([`ReductionOptions`] has other ways). Without accumulation every stage adds the same numbers in the same order, so all stages give the same
//! bits; with accumulation stages 0 and 1 add micro-batches first and ranks then, stages 2 and 3 the other way round.

mod algorithm;
mod decision;
mod error;
mod export;
mod gradients;
mod lamb;
mod lane;
mod mesh;
mod optimizer;
mod options;
mod pieces;
mod reduction;
mod report;
mod scaler;
mod state;
mod tiers;
mod unit;
mod update;
mod zero;

pub use algorithm::{
    AdagradOptions, AdamOptions, LambOptions, LionOptions, MuonOptions, Optimizer, SgdOptions,
};
pub use error::ZeroError;
pub use mesh::{Groups, Placement};
pub use options::{OnNonFinite, Overlap, StatePrecision, ZeroOptions};
pub use pieces::ParamGroup;
pub use reduction::{GradientOp, Predivide, ReductionOptions};
pub use report::{Divergence, SkipReason, StateBytes, StepOutcome, StepReport};
pub use scaler::{
    DynamicLossScale, Found, HysteresisRefill, LossScaler, LossScalerState, LossScaling, Verdict,
};
pub use shardwise_kernels::optimizer::{BiasCorrection, Direction};
pub use state::{PARAM, StateSlice};
pub use tiers::{Offload, Tier};
pub use zero::{Fill, Zero};
