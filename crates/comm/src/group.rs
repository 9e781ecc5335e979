//! What a process group can do: the trait that engines are written against.

use std::sync::Arc;
use std::time::Duration;

use shardwise_device::{DType, Slice, SliceMut};

use crate::{Call, CommError, Ledger};

/// A shared handle on a process group.
pub type Group = Arc<dyn ProcessGroup>;

/// One piece of a reduction's input. The input is the concatenation of its parts, so callers need not
/// flatten.
#[derive(Debug, Clone, Copy)]
pub enum Part<'a> {
    /// These elements.
    Data(Slice<'a>),
    /// So many zeros: padding, or a parameter without gradient.
    Zeros(usize),
}

impl Part<'_> {
    /// Elements of this part.
    pub fn numel(&self) -> usize {
        match self {
            Part::Data(slice) => slice.numel(),
            Part::Zeros(numel) => *numel,
        }
    }

    /// Its element type; zeros have none of their own.
    pub fn dtype(&self) -> Option<DType> {
        match self {
            Part::Data(slice) => Some(slice.dtype()),
            Part::Zeros(_) => None,
        }
    }
}

/// How a world of ranks behaves; the same on each of them.
#[derive(Debug, Clone)]
pub struct Options {
    /// How long a rank waits for another inside one call before that rank counts as stalled.
    pub deadline: Duration,
    /// Bytes that each of two ranks shows to the other at a time. Larger calls go in pieces of this size,
    /// small enough to stay in the processor's cache, large enough that few pieces have to be waited for. In
    /// larger groups each rank shows less, so that the slots of a group together stay within four of these
    /// (with at least 64 KiB a rank).
    pub slot_bytes: usize,
}

impl Default for Options {
    fn default() -> Self {
        Options { deadline: Duration::from_secs(300), slot_bytes: 1 << 20 }
    }
}

/// A rank's handle on a process group.
///
/// One thread of the rank calls a group at a time, and every rank of the group makes the same calls in the
/// same order (sends and receives: the same order for each pair). Different groups of a rank may be used at
/// once from different threads. Methods return when this rank's buffers are done with. `root`, `to` and
/// `from` count inside the group; [`ranks`](Self::ranks) and the ranks in errors count in the world.
///
/// # Errors
/// All methods: the error of the world if it has one already; [`CommError::Mismatch`], [`CommError::Died`],
/// [`CommError::Left`], [`CommError::Stalled`] or [`CommError::GaveUp`] naming the rank at fault. A call with
/// arguments that cannot be right returns an error of its own, and this rank then counts as having given up.
pub trait ProcessGroup: Send + Sync {
    /// The name used in messages.
    fn name(&self) -> &str;

    /// This rank's place in the group.
    fn group_rank(&self) -> usize;

    /// How many ranks the group has.
    fn group_size(&self) -> usize;

    /// The world's ranks that are in the group, in group order.
    fn ranks(&self) -> &[usize];

    /// Sums `buffer` over the ranks, in rank order in f32, in place.
    ///
    /// # Shapes
    /// - `buffer`: f32, bf16 or f16, of one length on every rank
    fn all_reduce(&self, buffer: SliceMut<'_>) -> Result<(), CommError>;

    /// Sums the ranks' inputs, in rank order in f32, and writes this rank's piece of the sum to `shard`.
    ///
    /// # Shapes
    /// - `input`: together `group_size * shard` elements of f32, bf16 or f16. If a rank has only zeros, the
    ///   type is the shard's, unless an empty `Data` part states it
    /// - `shard`: of the input's type, or f32
    fn reduce_scatter(&self, input: &[Part<'_>], shard: SliceMut<'_>) -> Result<(), CommError>;

    /// Writes the ranks' shards one after the other to `full`.
    ///
    /// # Shapes
    /// - `shard`: any type
    /// - `full`: `group_size * shard` elements of the same type
    fn all_gather(&self, shard: Slice<'_>, full: SliceMut<'_>) -> Result<(), CommError>;

    /// As [`all_gather`](Self::all_gather), with this rank's shard already in its place in `full`.
    ///
    /// # Shapes
    /// - `full`: any type, a multiple of the group size
    fn all_gather_in_place(&self, full: SliceMut<'_>) -> Result<(), CommError>;

    /// Copies `buffer` of rank `root` of this group to all others.
    fn broadcast(&self, buffer: SliceMut<'_>, root: usize) -> Result<(), CommError>;

    /// Sends piece `i` of `input` to rank `i`, and writes the piece from rank `i` at place `i` of `output`.
    ///
    /// # Shapes
    /// - `input`, `output`: any type, one length, a multiple of the group size
    fn all_to_all(&self, input: Slice<'_>, output: SliceMut<'_>) -> Result<(), CommError>;

    /// Sends `buffer` to rank `to` of this group, which must call [`recv`](Self::recv).
    ///
    /// Up to 512 KiB to one receiver are on their way without waiting for it; a caller whose ranks all send
    /// before they receive must stay below.
    fn send(&self, buffer: Slice<'_>, to: usize) -> Result<(), CommError>;

    /// As [`send`](Self::send), for a thread that runs ahead of its rank. It waits for the receiver as long as that takes: the
    /// deadline is for ranks that cannot go on, and this one may be computing. When the two are stuck, one of them waits for the
    /// other in a call that has a deadline.
    fn send_ahead(&self, buffer: Slice<'_>, to: usize) -> Result<(), CommError>;

    /// Receives what rank `from` of this group sends; length and type must agree.
    fn recv(&self, buffer: SliceMut<'_>, from: usize) -> Result<(), CommError>;

    /// Returns when every rank has called it.
    fn barrier(&self) -> Result<(), CommError>;

    /// A group of some of this group's ranks, given as ranks of the world, in the order they shall have
    /// there.
    ///
    /// # Collective
    /// Every rank of this group calls it, with the same arguments; those not in `ranks` get `None`.
    fn subgroup(&self, name: &str, ranks: &[usize]) -> Result<Option<Group>, CommError>;

    /// Shows the other ranks a call that this rank queues on a device, where hosts do not wait for each other. Returns its number
    /// among the calls so shown in this group.
    ///
    /// For back ends that stand on this group; a group that cannot show anything returns 0.
    fn post(&self, call: &Call) -> u64 {
        let _ = call;
        0
    }

    /// The rank of the world that is to blame if this group waits for a call of this number: the first that has not shown one, or
    /// the one it waits for. None if all have, or nobody can know.
    ///
    /// # Errors
    /// [`CommError::Mismatch`], now the world's, if a rank has shown another call than `call` under this number;
    /// [`CommError::Left`] if one has left before it came so far.
    fn missing(&self, number: u64, call: &Call) -> Result<Option<usize>, CommError> {
        let _ = (number, call);
        Ok(None)
    }

    /// What this rank has sent in this group so far.
    fn ledger(&self) -> Ledger;

    /// This rank gives up: present and future calls of every rank fail, naming this rank and `reason`.
    fn poison(&self, reason: &str);

    /// The world's error, if it has one already.
    ///
    /// # Errors
    /// That error.
    fn check(&self) -> Result<(), CommError>;

    /// Makes `error` the world's, unless it has one already, and returns the world's. Ranks that get an error that is no other
    /// rank's business hear that this one gave up, and why.
    fn fail(&self, error: &CommError) -> CommError;

    /// How long a call waits for another rank.
    fn deadline(&self) -> Duration;
}

/// A group of one rank. It needs no shared memory and never waits.
pub fn solo() -> Group {
    crate::thread::world(1, Options::default()).pop().expect("a world of one rank has one handle")
}

/// What a group that stands on another one does as that one does: the field `inner`.
macro_rules! as_inner {
    () => {
        fn name(&self) -> &str {
            self.inner.name()
        }

        fn group_rank(&self) -> usize {
            self.inner.group_rank()
        }

        fn ranks(&self) -> &[usize] {
            self.inner.ranks()
        }

        fn post(&self, call: &$crate::Call) -> u64 {
            self.inner.post(call)
        }

        fn missing(&self, number: u64, call: &$crate::Call) -> Result<Option<usize>, $crate::CommError> {
            self.inner.missing(number, call)
        }

        fn poison(&self, reason: &str) {
            self.inner.poison(reason);
        }

        fn check(&self) -> Result<(), $crate::CommError> {
            self.inner.check()
        }

        fn fail(&self, error: &$crate::CommError) -> $crate::CommError {
            self.inner.fail(error)
        }

        fn deadline(&self) -> std::time::Duration {
            self.inner.deadline()
        }
    };
}
pub(crate) use as_inner;
