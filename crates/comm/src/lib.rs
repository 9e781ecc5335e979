//! Process groups and collectives on device buffers.
//!
//! A [`ProcessGroup`] is one rank's handle on a set of ranks that call the same operations in the same order.
//! Two back ends share one implementation over "a piece of shared memory and a futex": [`thread`], ranks as
//! threads of one process, for tests and for a single rank ([`solo`]), and [`shm`], ranks as processes of one
//! host. For buffers on GPUs two more stand on one of these: [`nccl`], between GPUs, and [`staged`], through host memory.
//!
//! What a group promises:
//! - **Sums have one answer.** They add in rank order in f32 and round once, so a result depends on nothing
//!   but the inputs: not on timing, on the back end or on how the data was cut.
//! - **Nobody hangs.** Ranks that call different things, a rank that dies, leaves or is silent past the
//!   deadline: every other rank gets an error that names it. After the first error all groups of that world
//!   return it at once.
//! - **Traffic is counted** where it is caused: each group has a [`Ledger`].
#![allow(unexpected_cfgs, reason = "`--cfg loom` selects the model checker's types, see tests/loom.rs")]

#[cfg(not(loom))]
mod agree;
#[cfg(not(loom))]
mod arena;
#[cfg(not(loom))]
mod arguments;
#[cfg(not(loom))]
mod board;
#[cfg(not(loom))]
mod collectives;
#[cfg(not(loom))]
mod error;
#[cfg(not(loom))]
mod group;
#[cfg(not(loom))]
mod ledger;
#[cfg(not(loom))]
mod member;
#[cfg(not(loom))]
mod messages;
#[cfg(not(loom))]
pub mod nccl;
#[cfg(not(loom))]
mod parts;
#[cfg(not(loom))]
mod queue;
#[cfg(not(loom))]
mod segment;
#[cfg(not(loom))]
pub mod shm;
#[cfg(not(loom))]
pub mod staged;
mod sync;
#[cfg(not(loom))]
pub mod thread;
#[cfg(not(loom))]
mod universe;

#[cfg(not(loom))]
mod word;
#[cfg(loom)]
#[doc(hidden)]
pub mod word;

#[cfg(not(loom))]
pub use {
    error::{Call, CommError, JoinProblem},
    group::{Group, Options, Part, ProcessGroup, solo},
    ledger::{Ledger, LedgerEntry, Operation},
    queue::{CommQueue, Work},
};
