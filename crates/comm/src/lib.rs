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

mod agree;
mod arena;
mod arguments;
mod board;
mod collectives;
mod error;
mod group;
mod ledger;
mod member;
mod messages;
pub mod nccl;
mod parts;
mod queue;
mod segment;
pub mod shm;
pub mod staged;
mod sync;
pub mod thread;
mod universe;
mod word;

pub use {
    error::{Call, CommError, JoinProblem},
    group::{Group, Options, Part, ProcessGroup, solo},
    ledger::{Ledger, LedgerEntry, Operation},
    queue::{CommQueue, Work},
};
