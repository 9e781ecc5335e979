//! How collectives are issued: at once, or in order on a side thread.
//!
//! On the side thread, buffers are moved into the call and come back when it is waited for, so nobody can touch memory
//! that is under way. Every collective of the data group goes through the same lane, which keeps their order equal on
//! all ranks. Other groups are used from the caller's thread: few and small exchanges, which it needs at once.

use std::cell::Cell;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use shardwise_comm::{CommError, CommQueue, Group, ProcessGroup, Work};
use shardwise_device::cuda::{StallGuard, Stream};
use shardwise_device::{Buffer, DeviceError, Slice, SliceMut};

use crate::unit::Down;
use crate::{Groups, Overlap, ZeroError};

pub(crate) struct Lane {
    groups: Groups,
    /// Of the data group.
    queue: Option<CommQueue>,
    /// Time in collectives of the caller's thread.
    inline: Cell<Duration>,
    /// What computes on a GPU, and has nothing to do while the caller's thread waits.
    compute: Option<Arc<Stream>>,
}

/// A result that is here, or under way.
#[must_use]
pub(crate) enum Pending<T> {
    Ready(T),
    UnderWay(Work<T>, Option<Arc<Stream>>),
    /// As `UnderWay`, of work that is not communication alone.
    Mixed(Work<Result<T, ZeroError>>, Option<Arc<Stream>>),
}

/// Has `compute` measure for how long it has nothing to do. A moment that cannot be measured is left out.
fn stall(compute: &Option<Arc<Stream>>) -> Option<StallGuard<'_>> {
    compute.as_ref().and_then(|stream| stream.stall().ok())
}

impl<T> Pending<T> {
    pub fn wait(self) -> Result<T, ZeroError> {
        match self {
            Pending::Ready(value) => Ok(value),
            Pending::UnderWay(work, compute) => {
                let _still = stall(&compute);
                Ok(work.wait()?)
            }
            Pending::Mixed(work, compute) => {
                let _still = stall(&compute);
                work.wait()?
            }
        }
    }
}

impl Lane {
    /// For ranks that compute on the stream `compute`, or on the host.
    pub fn new(groups: Groups, overlap: Overlap, compute: Option<Arc<Stream>>) -> Result<Self, ZeroError> {
        let queue = match overlap {
            Overlap::Inline => None,
            Overlap::SideThread => Some(CommQueue::new(groups.data.clone())?),
        };
        Ok(Lane { groups, queue, inline: Cell::default(), compute })
    }

    pub fn groups(&self) -> &Groups {
        &self.groups
    }

    pub fn is_inline(&self) -> bool {
        self.queue.is_none()
    }

    /// Whether the data group has one rank only. It exchanges nothing, wherever its memory is.
    pub fn is_alone(&self) -> bool {
        self.groups.data.group_size() == 1
    }

    /// How long the caller's thread has been in collectives, or has waited for those of the side thread.
    pub fn exposed(&self) -> Duration {
        self.inline.get() + self.queue.as_ref().map_or(Duration::ZERO, CommQueue::waited)
    }

    fn timed<T>(&self, group: &Group, call: impl FnOnce(&dyn ProcessGroup) -> T) -> T {
        let _still = stall(&self.compute);
        let start = Instant::now();
        let result = call(&**group);
        self.inline.set(self.inline.get() + start.elapsed());
        result
    }

    /// Runs `call` now, or hands it to the side thread.
    fn start<T: Send + 'static>(
        &self,
        call: impl FnOnce(&dyn ProcessGroup) -> Result<T, CommError> + Send + 'static,
    ) -> Result<Pending<T>, ZeroError> {
        Ok(match &self.queue {
            None => Pending::Ready(self.timed(&self.groups.data, call)?),
            Some(queue) => Pending::UnderWay(queue.submit(call), self.compute.clone()),
        })
    }

    /// Runs `call` on borrowed data and waits: only in the caller's thread.
    pub fn inline<T>(
        &self,
        call: impl FnOnce(&dyn ProcessGroup) -> Result<T, CommError>,
    ) -> Result<T, ZeroError> {
        debug_assert!(self.is_inline(), "a collective beside the side thread would break the order");
        Ok(self.timed(&self.groups.data, call)?)
    }

    /// Runs `call` on another group than the lane's, in the caller's thread.
    pub fn beside<T>(
        &self,
        group: &Group,
        call: impl FnOnce(&dyn ProcessGroup) -> Result<T, CommError>,
    ) -> Result<T, ZeroError> {
        debug_assert!(!Arc::ptr_eq(group, &self.groups.data), "the data group has its order to keep");
        Ok(self.timed(group, call)?)
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

    /// Copies `shard` up to its place `own` in `full`, and gathers the first `padded` elements there where there are other ranks.
    pub fn gather_up(
        &self,
        shard: Buffer,
        mut full: Buffer,
        own: Range<usize>,
        padded: usize,
        copies: &Arc<Stream>,
    ) -> Result<Pending<(Buffer, Buffer)>, ZeroError> {
        let copies = copies.clone();
        self.start_mixed(move |group| {
            copies.copy(shard.view(), full.view_mut().into_range(own)).map_err(DeviceError::from)?;
            if group.group_size() > 1 {
                group.all_gather_in_place(full.view_mut().into_range(0..padded))?;
            }
            Ok((shard, full))
        })
    }

    /// Reduce-scatters `down.sent` into `down.summed` if there are other ranks, and copies what comes of it to `down.told`.
    pub fn reduce_down(&self, mut down: Down, copies: &Arc<Stream>) -> Result<Pending<Down>, ZeroError> {
        let copies = copies.clone();
        self.start_mixed(move |group| {
            if let Some(summed) = &mut down.summed {
                let parts = [shardwise_comm::Part::Data(down.sent.view())];
                group.reduce_scatter(&parts, summed.view_mut())?;
            }
            let from = down.summed.as_ref().unwrap_or(&down.sent);
            copies.copy(from.view(), down.told.view_mut()).map_err(DeviceError::from)?;
            Ok(down)
        })
    }

    /// [`Lane::start`] for what may fail otherwise too. Such a failure is this rank's alone: the others are told.
    fn start_mixed<T: Send + 'static>(
        &self,
        call: impl FnOnce(&dyn ProcessGroup) -> Result<T, ZeroError> + Send + 'static,
    ) -> Result<Pending<T>, ZeroError> {
        let call = move |group: &dyn ProcessGroup| {
            let result = call(group);
            if let Err(error) = &result
                && !matches!(error, ZeroError::Comm(_))
            {
                group.poison(&error.to_string());
            }
            result
        };
        Ok(match &self.queue {
            None => Pending::Ready(self.timed(&self.groups.data, call)?),
            Some(queue) => Pending::Mixed(queue.submit(move |group| Ok(call(group))), self.compute.clone()),
        })
    }

    pub fn all_gather_in_place(&self, mut full: Buffer) -> Result<Pending<Buffer>, ZeroError> {
        if self.is_alone() {
            return Ok(Pending::Ready(full));
        }
        self.start(move |group| {
            group.all_gather_in_place(full.view_mut())?;
            Ok(full)
        })
    }

    pub fn all_reduce(&self, mut buffer: Buffer) -> Result<Pending<Buffer>, ZeroError> {
        if self.is_alone() {
            return Ok(Pending::Ready(buffer));
        }
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

    /// The `values` of every data rank, in rank order.
    pub fn exchange(&self, values: &[f64]) -> Result<Vec<Vec<f64>>, ZeroError> {
        let mine = to_bytes(values);
        let all = self.start(move |group| all_bytes(group, &mine))?.wait()?;
        Ok(rows_of(&all, values.len()))
    }

    /// The `values` of every rank of the world, in rank order.
    pub fn exchange_over_world(&self, values: &[f64]) -> Result<Vec<Vec<f64>>, ZeroError> {
        if Arc::ptr_eq(&self.groups.world, &self.groups.data) {
            return self.exchange(values);
        }
        let all = self.beside(&self.groups.world, |group| all_bytes(group, &to_bytes(values)))?;
        Ok(rows_of(&all, values.len()))
    }
}

/// Each number of `rows` summed, in their order.
pub(crate) fn sum_of(rows: &[Vec<f64>], num_values: usize) -> Vec<f64> {
    let mut sums = vec![0.0; num_values];
    for row in rows {
        sums.iter_mut().zip(row).for_each(|(sum, value)| *sum += value);
    }
    sums
}

fn to_bytes(values: &[f64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn all_bytes(group: &dyn ProcessGroup, mine: &[u8]) -> Result<Vec<u8>, CommError> {
    let mut all = vec![0u8; mine.len() * group.group_size()];
    group.all_gather(Slice::of(mine), SliceMut::of(&mut all))?;
    Ok(all)
}

/// The numbers of each rank.
fn rows_of(all: &[u8], num_values: usize) -> Vec<Vec<f64>> {
    let number = |bytes: &[u8]| f64::from_le_bytes(bytes.try_into().expect("chunks of eight bytes"));
    let ranks = all.chunks_exact((8 * num_values).max(1));
    ranks.map(|rank| rank.chunks_exact(8).map(number).collect()).collect()
}
