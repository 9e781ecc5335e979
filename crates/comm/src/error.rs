//! What can go wrong between ranks.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use shardwise_device::DType;
use shardwise_kernels::cuda::Attempt;
use shardwise_kernels::processor::ProcessorError;

use crate::Operation;

/// What a rank calls: the facts that must agree between ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    /// The method.
    pub operation: Operation,
    /// Which call it is: collectives are numbered in each group, messages between each sender and receiver,
    /// from 0.
    pub sequence: u64,
    /// Element type.
    pub dtype: DType,
    /// Elements of the buffer; of the shard in `reduce_scatter` and `all_gather`.
    pub numel: u64,
    /// What else must agree: the root of a broadcast, the other end of a message, a digest of a new group's
    /// name and ranks.
    pub detail: u64,
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` number `{}`", self.operation, self.sequence)?;
        match self.operation {
            Operation::Barrier | Operation::Subgroup => return Ok(()),
            Operation::Broadcast => write!(f, " from `{}`", self.detail)?,
            Operation::Recv => write!(f, " from `{}`", self.detail)?,
            Operation::Send => write!(f, " to `{}`", self.detail)?,
            _ => {}
        }
        write!(f, " of `{}` x `{}`", self.numel, self.dtype)
    }
}

/// Errors of process groups. Ranks are ranks of the world.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum CommError {
    /// Two ranks made different calls where they should have made the same.
    #[error(
        "ranks `{rank}` and `{other_rank}` disagree in group `{group}`: rank `{rank}` calls {call}, rank `{other_rank}` calls {other_call}"
    )]
    Mismatch {
        /// The group.
        group: String,
        /// One of the two ranks.
        rank: usize,
        /// What it called.
        call: Call,
        /// The other rank.
        other_rank: usize,
        /// What that one called.
        other_call: Call,
    },
    /// A rank's process or thread ended without leaving.
    #[error("rank `{rank}` died: {detail}")]
    Died {
        /// The rank.
        rank: usize,
        /// What was seen.
        detail: String,
    },
    /// A rank did not come to a call within the deadline.
    #[error(
        "rank `{rank}` stalled: rank `{waiting_rank}` waited `{}` s in {call} (group `{group}`)", waited.as_secs_f32()
    )]
    Stalled {
        /// The rank that did not come.
        rank: usize,
        /// The rank whose patience ended.
        waiting_rank: usize,
        /// The group in which it waited.
        group: String,
        /// The call in which it waited.
        call: Call,
        /// How long it waited: the deadline.
        waited: Duration,
    },
    /// A rank dropped its handle on a group while another still needed it there.
    #[error("rank `{rank}` has left group `{group}`, but rank `{waiting_rank}` waits for it in {call}")]
    Left {
        /// The rank that left.
        rank: usize,
        /// The rank that waits for it.
        waiting_rank: usize,
        /// The group.
        group: String,
        /// The call in which it waits.
        call: Call,
    },
    /// A rank gave up by its own decision, or after an error of its own.
    #[error("rank `{rank}` gave up: {reason}")]
    GaveUp {
        /// The rank.
        rank: usize,
        /// Its words.
        reason: String,
    },
    /// A buffer's length does not fit the call.
    #[error(
        "`{operation}` in group `{group}` of `{group_size}` ranks: {what} has `{got}` elements, expected `{expected}`"
    )]
    WrongLength {
        /// The call.
        operation: Operation,
        /// The group.
        group: String,
        /// Its size.
        group_size: usize,
        /// Which buffer.
        what: &'static str,
        /// Its length.
        got: usize,
        /// The length that would fit.
        expected: usize,
    },
    /// A buffer must divide evenly between the ranks.
    #[error(
        "`{operation}` in group `{group}`: `{numel}` elements, expected a multiple of the group size `{group_size}`"
    )]
    NotDivisible {
        /// The call.
        operation: Operation,
        /// The group.
        group: String,
        /// Its size.
        group_size: usize,
        /// The buffer's length.
        numel: usize,
    },
    /// An element type does not fit the call: bytes cannot be summed, and types do not change on the way.
    #[error("`{operation}` in group `{group}`: {what} is `{got}`, expected {expected}")]
    WrongDType {
        /// The call.
        operation: Operation,
        /// The group.
        group: String,
        /// Which buffer.
        what: &'static str,
        /// Its type.
        got: DType,
        /// What would fit.
        expected: String,
    },
    /// A rank that is not there, or that makes no sense as the other end.
    #[error("`{operation}` in group `{group}` of `{group_size}` ranks: no other rank `{rank}`")]
    NoSuchRank {
        /// The call.
        operation: Operation,
        /// The group.
        group: String,
        /// Its size.
        group_size: usize,
        /// The rank asked for.
        rank: usize,
    },
    /// The ranks of a new group are not distinct ranks of its parent.
    #[error(
        "subgroup `{name}` of group `{group}`: ranks {ranks:?} are not distinct ranks of {parent_ranks:?}"
    )]
    BadSubgroup {
        /// The name asked for.
        name: String,
        /// The parent.
        group: String,
        /// The ranks asked for.
        ranks: Vec<usize>,
        /// The parent's ranks.
        parent_ranks: Vec<usize>,
    },
    /// The ranks could not come together.
    #[error("rank `{rank}` cannot join at `{rendezvous}`: {problem}")]
    Join {
        /// This rank.
        rank: usize,
        /// The agreed meeting place.
        rendezvous: String,
        /// Why.
        problem: JoinProblem,
    },
    /// The operating system refused something.
    #[error("could not {action}")]
    System {
        /// What was tried.
        action: &'static str,
        /// What the system said.
        #[source]
        source: Arc<io::Error>,
    },
    /// Memory, a GPU or its kernels failed this rank.
    #[error("`{operation}` in group `{group}`: {source}")]
    Device {
        /// The call.
        operation: Operation,
        /// The group.
        group: String,
        /// What failed.
        source: Arc<ProcessorError>,
    },
    /// NCCL is nowhere, or not usable.
    #[error(
        "no usable NCCL, through which GPUs exchange{}; install the package `nvidia-nccl-cu13` beside libtorch, or name the \
         folder that holds `libnccl.so.2` in `SHARDWISE_NCCL`",
        listed(.tried)
    )]
    NoNccl {
        /// All places, in order, and why they did not do.
        tried: Vec<Attempt>,
    },
    /// A call of NCCL failed, or a communicator met an error behind the calls.
    #[error(
        "`{operation}` in group `{group}`: `{call}` of NCCL failed on rank `{rank}`: {problem}; \
         with `NCCL_DEBUG=INFO` in the environment NCCL says more"
    )]
    Nccl {
        /// The call.
        operation: Operation,
        /// The group.
        group: String,
        /// The rank on which it failed.
        rank: usize,
        /// The function that reported it.
        call: &'static str,
        /// NCCL's words.
        problem: String,
    },
    /// A call that all ranks have queued on their GPUs is not over.
    #[error(
        "{call} (group `{group}`) is not over on rank `{rank}` after `{}` s, though every rank has queued it: a GPU or a link \
         between them is stuck; with `NCCL_DEBUG=INFO` in the environment NCCL says more",
        waited.as_secs_f32()
    )]
    Stuck {
        /// The rank that waited.
        rank: usize,
        /// The group.
        group: String,
        /// The call.
        call: Call,
        /// How long: the deadline.
        waited: Duration,
    },
    /// The queue's closure panicked, so its result is lost.
    #[error("a queued operation of group `{group}` panicked: {message}")]
    QueuePanicked {
        /// The group.
        group: String,
        /// The panic's message.
        message: String,
    },
}

fn listed(tried: &[Attempt]) -> String {
    tried.iter().map(|attempt| format!("; {attempt}")).collect()
}

impl CommError {
    pub(crate) fn system(action: &'static str, source: impl Into<io::Error>) -> Self {
        CommError::System { action, source: Arc::new(source.into()) }
    }

    pub(crate) fn device(operation: Operation, group: &str, source: impl Into<ProcessorError>) -> Self {
        CommError::Device { operation, group: group.to_owned(), source: Arc::new(source.into()) }
    }
}

/// Why ranks could not come together.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[non_exhaustive]
pub enum JoinProblem {
    /// Some ranks did not come in time.
    #[error("ranks {missing:?} of `{world_size}` did not come within `{waited_s}` s")]
    Missing {
        /// Who did not come.
        missing: Vec<usize>,
        /// How many were expected.
        world_size: usize,
        /// How long this rank waited.
        waited_s: u64,
    },
    /// Two processes are the same rank.
    #[error(
        "two processes are rank `{rank}`, or another run meets at the same place (choose another MASTER_PORT)"
    )]
    Duplicate {
        /// The rank.
        rank: usize,
    },
    /// Two ranks were started with different world sizes.
    #[error(
        "rank `{rank}` was started for `{world_size}` ranks, rank `{other_rank}` for `{other_world_size}`"
    )]
    WorldSize {
        /// One rank.
        rank: usize,
        /// Its world size.
        world_size: usize,
        /// The other rank.
        other_rank: usize,
        /// Its world size.
        other_world_size: usize,
    },
    /// A rank is not below its world size.
    #[error("rank `{rank}` does not exist among `{world_size}` ranks")]
    RankOutOfRange {
        /// The rank.
        rank: usize,
        /// How many there are.
        world_size: usize,
    },
    /// Two ranks were started with different configurations.
    #[error(
        "ranks `{rank}` and `{other_rank}` were started with different configurations: `{fingerprint}` and `{other_fingerprint}`"
    )]
    Fingerprint {
        /// One rank.
        rank: usize,
        /// Its configuration.
        fingerprint: String,
        /// The other rank.
        other_rank: usize,
        /// Its configuration.
        other_fingerprint: String,
    },
    /// Two ranks run different versions of this program.
    #[error("rank `{rank}` speaks version `{version}`, rank `{other_rank}` version `{other_version}`")]
    Version {
        /// One rank.
        rank: usize,
        /// Its version.
        version: u32,
        /// The other rank.
        other_rank: usize,
        /// Its version.
        other_version: u32,
    },
    /// A process of another user is at the meeting place.
    #[error("a process of user `{uid}` is at the meeting place, expected user `{expected_uid}`")]
    ForeignUser {
        /// Whose it is.
        uid: u32,
        /// Whose it should be.
        expected_uid: u32,
    },
    /// The name of the meeting place is too long for a socket.
    #[error("the meeting place has `{length}` bytes, at most `{limit}` fit")]
    NameTooLong {
        /// Its length.
        length: usize,
        /// What fits.
        limit: usize,
    },
    /// A rank broke off while the ranks came together.
    #[error("rank `{rank}` broke off while the ranks came together")]
    BrokeOff {
        /// The rank.
        rank: usize,
    },
}
