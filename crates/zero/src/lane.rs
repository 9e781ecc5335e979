//! How collectives are issued: at once, or in order on a side thread.
//!
//! On the side thread, buffers are moved into the call and come back when it is waited for, so nobody can touch memory
//! that is under way. Every collective of the group goes through the same lane, which keeps their order equal on
//! all ranks.

use std::cell::Cell;
use std::time::{Duration, Instant};

use shardwise_comm::{CommError, CommQueue, Group, ProcessGroup, Work};
use shardwise_device::{Buffer, Slice, SliceMut};

use crate::{Overlap, ZeroError};

pub(crate) struct Lane {
    group: Group,
    queue: Option<CommQueue>,
    /// Time in collectives of the caller's thread.
    inline: Cell<Duration>,
}

/// A result that is here, or under way.
#[must_use]
pub(crate) enum Pending<T> {
    Ready(T),
    UnderWay(Work<T>),
}

impl<T> Pending<T> {
    pub fn wait(self) -> Result<T, ZeroError> {
        match self {
            Pending::Ready(value) => Ok(value),
            Pending::UnderWay(work) => Ok(work.wait()?),
        }
    }
}

impl Lane {
    pub fn new(group: Group, overlap: Overlap) -> Result<Self, ZeroError> {
        let queue = match overlap {
            Overlap::Inline => None,
            Overlap::SideThread => Some(CommQueue::new(group.clone())?),
        };
        Ok(Lane { group, queue, inline: Cell::default() })
    }

    pub fn group(&self) -> &Group {
        &self.group
    }

    pub fn is_inline(&self) -> bool {
        self.queue.is_none()
    }

    /// How long the caller's thread has been in collectives, or has waited for those of the side thread.
    pub fn exposed(&self) -> Duration {
        self.inline.get() + self.queue.as_ref().map_or(Duration::ZERO, CommQueue::waited)
    }

    fn timed<T>(&self, call: impl FnOnce(&dyn ProcessGroup) -> T) -> T {
        let start = Instant::now();
        let result = call(&*self.group);
        self.inline.set(self.inline.get() + start.elapsed());
        result
    }

    /// Runs `call` now, or hands it to the side thread.
    fn start<T: Send + 'static>(
        &self,
        call: impl FnOnce(&dyn ProcessGroup) -> Result<T, CommError> + Send + 'static,
    ) -> Result<Pending<T>, ZeroError> {
        Ok(match &self.queue {
            None => Pending::Ready(self.timed(call)?),
            Some(queue) => Pending::UnderWay(queue.submit(call)),
        })
    }

    /// Runs `call` on borrowed data and waits: only in the caller's thread.
    pub fn inline<T>(
        &self,
        call: impl FnOnce(&dyn ProcessGroup) -> Result<T, CommError>,
    ) -> Result<T, ZeroError> {
        debug_assert!(self.is_inline(), "a collective beside the side thread would break the order");
        Ok(self.timed(call)?)
    }

    pub fn all_gather(
        &self,
        shard: Buffer,
        mut full: Buffer,
    ) -> Result<Pending<(Buffer, Buffer)>, ZeroError> {
        self.start(move |group| {
            let numel = shard.numel() * group.group_size();
            group.all_gather(shard.view(), full.view_mut().into_range(0..numel))?;
            Ok((shard, full))
        })
    }

    pub fn all_gather_in_place(&self, mut full: Buffer) -> Result<Pending<Buffer>, ZeroError> {
        self.start(move |group| {
            group.all_gather_in_place(full.view_mut())?;
            Ok(full)
        })
    }

    pub fn all_reduce(&self, mut buffer: Buffer) -> Result<Pending<Buffer>, ZeroError> {
        self.start(move |group| {
            group.all_reduce(buffer.view_mut())?;
            Ok(buffer)
        })
    }

    /// Reduce-scatters `input` into `shard_at` of `output`.
    pub fn reduce_scatter(
        &self,
        input: Buffer,
        mut output: Buffer,
        shard_at: std::ops::Range<usize>,
    ) -> Result<Pending<(Buffer, Buffer)>, ZeroError> {
        self.start(move |group| {
            let parts = [shardwise_comm::Part::Data(input.view())];
            group.reduce_scatter(&parts, output.view_mut().into_range(shard_at))?;
            Ok((input, output))
        })
    }

    /// Waits until everything issued so far has run.
    pub fn drain(&self) -> Result<(), ZeroError> {
        self.start(|_| Ok(()))?.wait()
    }

    /// The `values` of every rank, in rank order.
    pub fn exchange(&self, values: &[f64]) -> Result<Vec<Vec<f64>>, ZeroError> {
        let mine: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let num_bytes = mine.len();
        let all = self
            .start(move |group| {
                let mut all = vec![0u8; num_bytes * group.group_size()];
                group.all_gather(Slice::of(&mine), SliceMut::of(&mut all))?;
                Ok(all)
            })?
            .wait()?;
        let number = |bytes: &[u8]| f64::from_le_bytes(bytes.try_into().expect("chunks of eight bytes"));
        let ranks = all.chunks_exact(num_bytes.max(1));
        Ok(ranks.map(|rank| rank.chunks_exact(8).map(number).collect()).collect())
    }

    /// Sums each of `values` over the ranks, in rank order.
    pub fn sum(&self, values: &[f64]) -> Result<Vec<f64>, ZeroError> {
        let mut sums = vec![0.0; values.len()];
        for rank in self.exchange(values)? {
            for (sum, value) in sums.iter_mut().zip(rank) {
                *sum += value;
            }
        }
        Ok(sums)
    }
}
