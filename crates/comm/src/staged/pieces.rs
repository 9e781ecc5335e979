//! What each operation does with a piece: bring it down, exchange it, send the result up.

use std::ops::Range;

use shardwise_device::{Buffer, DType, Place, Slice, SliceMut};

use super::{Fault, Staged};
use crate::Part;
use crate::member::Patience;
use crate::parts::{runs as runs_of, starts_of};

/// Pinned memory for one piece.
pub(super) struct Slot {
    /// What goes into the exchange; if it works in place or only receives, also what comes out.
    input: Buffer,
    /// What comes out of it, else.
    output: Option<Buffer>,
    /// A reduction's input: pieces of `input` one after the other, and zeros between.
    runs: Vec<Run>,
}

enum Run {
    /// Elements of `input`.
    Data(Range<usize>),
    Zeros(usize),
}

impl Slot {
    pub(super) fn into_buffers(self) -> impl Iterator<Item = Buffer> {
        [Some(self.input), self.output].into_iter().flatten()
    }
}

/// The first `numel` elements of a pinned buffer.
fn read(buffer: &Buffer, dtype: DType, numel: usize) -> Slice<'_> {
    buffer.view().range(0..numel * dtype.size_bytes()).cast(dtype)
}

/// The first `numel` elements of a pinned buffer, to write.
fn write(buffer: &mut Buffer, dtype: DType, numel: usize) -> SliceMut<'_> {
    buffer.view_mut().into_range(0..numel * dtype.size_bytes()).cast(dtype)
}

/// As [`read`], once the copies that write there are over: the inner group has no error for them.
fn ready(buffer: &Buffer, dtype: DType, numel: usize) -> Result<Slice<'_>, Fault> {
    let view = read(buffer, dtype, numel);
    view.host_bytes()?;
    Ok(view)
}

/// As [`write`], once the copies that read there are over.
fn free(buffer: &mut Buffer, dtype: DType, numel: usize) -> Result<SliceMut<'_>, Fault> {
    let mut view = write(buffer, dtype, numel);
    view.reborrow().host_bytes()?;
    Ok(view)
}

impl Staged {
    /// Pinned memory of the pool.
    pub(super) fn slot(&self, with_output: bool) -> Result<Slot, Fault> {
        let mut pinned = self.shared.pinned();
        let input = pinned.take(DType::U8, self.shared.piece_bytes)?;
        let output = match with_output.then(|| pinned.take(DType::U8, self.shared.piece_bytes)).transpose() {
            Ok(output) => output,
            Err(error) => {
                pinned.give_back(input);
                return Err(error.into());
            }
        };
        Ok(Slot { input, output, runs: Vec::new() })
    }

    /// Brings a part of a call's input into pinned memory.
    fn bring_down(&self, from: Slice<'_>, into: SliceMut<'_>) -> Result<(), Fault> {
        match from.place() {
            Place::Cpu => copy_on_host(from, into),
            Place::Cuda { .. } => Ok(self.down.copy(from, into)?),
        }
    }

    /// Brings a part of a call's result to its place.
    fn bring_up(&self, from: Slice<'_>, into: SliceMut<'_>) -> Result<(), Fault> {
        match into.place() {
            Place::Cpu => copy_on_host(from, into),
            Place::Cuda { .. } => Ok(self.up.copy(from, into)?),
        }
    }
}

fn copy_on_host(from: Slice<'_>, into: SliceMut<'_>) -> Result<(), Fault> {
    into.host_bytes()?.copy_from_slice(from.host_bytes()?);
    Ok(())
}

/// A call in pieces. A piece is a range of the elements that may be cut.
pub(super) trait Pieces {
    /// Whether what comes out of the exchange needs memory of its own.
    const HAS_OUTPUT: bool = false;

    /// Bytes of the larger of the two buffers that one element takes.
    fn bytes_per_element(&self) -> usize;

    /// Queues the way down.
    fn down(&mut self, staged: &Staged, range: Range<usize>, slot: &mut Slot) -> Result<(), Fault>;

    /// Exchanges what is down, and queues the way up.
    fn exchange(&mut self, staged: &Staged, range: Range<usize>, slot: &mut Slot) -> Result<(), Fault>;
}

pub(super) struct AllReduce<'a> {
    pub(super) buffer: SliceMut<'a>,
}

impl Pieces for AllReduce<'_> {
    fn bytes_per_element(&self) -> usize {
        self.buffer.dtype().size_bytes()
    }

    fn down(&mut self, staged: &Staged, range: Range<usize>, slot: &mut Slot) -> Result<(), Fault> {
        let (dtype, numel) = (self.buffer.dtype(), range.len());
        staged.bring_down(self.buffer.as_slice().range(range), write(&mut slot.input, dtype, numel))
    }

    fn exchange(&mut self, staged: &Staged, range: Range<usize>, slot: &mut Slot) -> Result<(), Fault> {
        let (dtype, numel) = (self.buffer.dtype(), range.len());
        staged.inner.all_reduce(free(&mut slot.input, dtype, numel)?)?;
        staged.bring_up(read(&slot.input, dtype, numel), self.buffer.range_mut(range))
    }
}

/// Cut in the shard: a piece has that range of each rank's part of the input.
pub(super) struct ReduceScatter<'a> {
    parts: &'a [Part<'a>],
    /// First element of each part, and the end.
    starts: Vec<usize>,
    shard: SliceMut<'a>,
    dtype: DType,
    n: usize,
}

impl<'a> ReduceScatter<'a> {
    pub(super) fn new(parts: &'a [Part<'a>], shard: SliceMut<'a>, dtype: DType, n: usize) -> Self {
        ReduceScatter { parts, starts: starts_of(parts), shard, dtype, n }
    }
}

impl Pieces for ReduceScatter<'_> {
    const HAS_OUTPUT: bool = true;

    fn bytes_per_element(&self) -> usize {
        (self.n * self.dtype.size_bytes()).max(self.shard.dtype().size_bytes())
    }

    fn down(&mut self, staged: &Staged, range: Range<usize>, slot: &mut Slot) -> Result<(), Fault> {
        let Slot { input, runs, .. } = slot;
        runs.clear();
        let mut at = 0;
        for rank in 0..self.n {
            let start = rank * self.shard.numel();
            for part in runs_of(self.parts, &self.starts, start + range.start..start + range.end) {
                let data = match part {
                    Part::Data(data) => data,
                    Part::Zeros(numel) => {
                        runs.push(Run::Zeros(numel));
                        continue;
                    }
                };
                let end = at + data.numel();
                let place = write(input, self.dtype, end).into_range(at..end);
                staged.bring_down(data, place)?;
                match runs.last_mut() {
                    Some(Run::Data(before)) => before.end = end,
                    _ => runs.push(Run::Data(at..end)),
                }
                at = end;
            }
        }
        Ok(())
    }

    fn exchange(&mut self, staged: &Staged, range: Range<usize>, slot: &mut Slot) -> Result<(), Fault> {
        let Slot { input, output, runs } = slot;
        let output = output.as_mut().expect("a slot of an operation with output has one");
        let numel = runs.iter().map(|run| if let Run::Data(data) = run { data.len() } else { 0 }).sum();
        let input = ready(input, self.dtype, numel)?;
        let part = |run: &Run| match run {
            Run::Data(data) => Part::Data(input.range(data.clone())),
            Run::Zeros(numel) => Part::Zeros(*numel),
        };
        // The last part has no elements and states the type, in case all are zeros.
        let parts: Vec<_> = runs.iter().map(part).chain([Part::Data(input.range(0..0))]).collect();
        let (shard_dtype, numel) = (self.shard.dtype(), range.len());
        staged.inner.reduce_scatter(&parts, free(output, shard_dtype, numel)?)?;
        staged.bring_up(read(output, shard_dtype, numel), self.shard.range_mut(range))
    }
}

/// Cut in the shard: what comes out is that range of each rank's.
pub(super) struct AllGather<'a> {
    /// In place if there is none.
    pub(super) shard: Option<Slice<'a>>,
    pub(super) full: SliceMut<'a>,
    pub(super) n: usize,
    pub(super) me: usize,
}

impl Pieces for AllGather<'_> {
    const HAS_OUTPUT: bool = true;

    fn bytes_per_element(&self) -> usize {
        self.n * self.full.dtype().size_bytes()
    }

    fn down(&mut self, staged: &Staged, range: Range<usize>, slot: &mut Slot) -> Result<(), Fault> {
        let start = self.me * (self.full.numel() / self.n);
        let place = write(&mut slot.input, self.full.dtype(), range.len());
        match self.shard {
            Some(shard) => staged.bring_down(shard.range(range), place),
            None => {
                let own = self.full.as_slice().range(start + range.start..start + range.end);
                staged.bring_down(own, place)
            }
        }
    }

    fn exchange(&mut self, staged: &Staged, range: Range<usize>, slot: &mut Slot) -> Result<(), Fault> {
        let Slot { input, output, .. } = slot;
        let output = output.as_mut().expect("a slot of an operation with output has one");
        let (dtype, numel, shard_numel) = (self.full.dtype(), range.len(), self.full.numel() / self.n);
        let own = ready(input, dtype, numel)?;
        staged.inner.all_gather(own, free(output, dtype, self.n * numel)?)?;
        let gathered = read(output, dtype, self.n * numel);
        for rank in (0..self.n).filter(|&rank| rank != self.me || self.shard.is_some()) {
            let (start, piece) = (rank * shard_numel, gathered.range(rank * numel..(rank + 1) * numel));
            staged.bring_up(piece, self.full.range_mut(start + range.start..start + range.end))?;
        }
        Ok(())
    }
}

pub(super) struct Broadcast<'a> {
    pub(super) buffer: SliceMut<'a>,
    pub(super) root: usize,
    pub(super) me: usize,
}

impl Pieces for Broadcast<'_> {
    fn bytes_per_element(&self) -> usize {
        self.buffer.dtype().size_bytes()
    }

    fn down(&mut self, staged: &Staged, range: Range<usize>, slot: &mut Slot) -> Result<(), Fault> {
        if self.me != self.root {
            return Ok(());
        }
        let (dtype, numel) = (self.buffer.dtype(), range.len());
        staged.bring_down(self.buffer.as_slice().range(range), write(&mut slot.input, dtype, numel))
    }

    fn exchange(&mut self, staged: &Staged, range: Range<usize>, slot: &mut Slot) -> Result<(), Fault> {
        let (dtype, numel) = (self.buffer.dtype(), range.len());
        staged.inner.broadcast(free(&mut slot.input, dtype, numel)?, self.root)?;
        if self.me == self.root {
            return Ok(());
        }
        staged.bring_up(read(&slot.input, dtype, numel), self.buffer.range_mut(range))
    }
}

/// Cut in what goes to each rank.
pub(super) struct AllToAll<'a> {
    pub(super) input: Slice<'a>,
    pub(super) output: SliceMut<'a>,
    pub(super) n: usize,
}

impl Pieces for AllToAll<'_> {
    const HAS_OUTPUT: bool = true;

    fn bytes_per_element(&self) -> usize {
        self.n * self.input.dtype().size_bytes()
    }

    fn down(&mut self, staged: &Staged, range: Range<usize>, slot: &mut Slot) -> Result<(), Fault> {
        let (dtype, numel, of_rank) = (self.input.dtype(), range.len(), self.input.numel() / self.n);
        let mut place = write(&mut slot.input, dtype, self.n * numel);
        for rank in 0..self.n {
            let piece = self.input.range(rank * of_rank + range.start..rank * of_rank + range.end);
            staged.bring_down(piece, place.range_mut(rank * numel..(rank + 1) * numel))?;
        }
        Ok(())
    }

    fn exchange(&mut self, staged: &Staged, range: Range<usize>, slot: &mut Slot) -> Result<(), Fault> {
        let Slot { input, output, .. } = slot;
        let output = output.as_mut().expect("a slot of an operation with output has one");
        let (dtype, numel, of_rank) = (self.input.dtype(), range.len(), self.input.numel() / self.n);
        let sent = ready(input, dtype, self.n * numel)?;
        staged.inner.all_to_all(sent, free(output, dtype, self.n * numel)?)?;
        let received = read(output, dtype, self.n * numel);
        for rank in 0..self.n {
            let place = rank * of_rank + range.start..rank * of_rank + range.end;
            let piece = received.range(rank * numel..(rank + 1) * numel);
            staged.bring_up(piece, self.output.range_mut(place))?;
        }
        Ok(())
    }
}

pub(super) enum Message<'a> {
    Send { buffer: Slice<'a>, to: usize, patience: Patience },
    Recv { buffer: SliceMut<'a>, from: usize },
}

impl Pieces for Message<'_> {
    fn bytes_per_element(&self) -> usize {
        match self {
            Message::Send { buffer, .. } => buffer.dtype().size_bytes(),
            Message::Recv { buffer, .. } => buffer.dtype().size_bytes(),
        }
    }

    fn down(&mut self, staged: &Staged, range: Range<usize>, slot: &mut Slot) -> Result<(), Fault> {
        match self {
            Message::Send { buffer, .. } => {
                let place = write(&mut slot.input, buffer.dtype(), range.len());
                staged.bring_down(buffer.range(range), place)
            }
            Message::Recv { .. } => Ok(()),
        }
    }

    fn exchange(&mut self, staged: &Staged, range: Range<usize>, slot: &mut Slot) -> Result<(), Fault> {
        let numel = range.len();
        match self {
            Message::Send { buffer, to, patience } => {
                let piece = ready(&slot.input, buffer.dtype(), numel)?;
                match patience {
                    Patience::Deadline => staged.inner.send(piece, *to)?,
                    Patience::Endless => staged.inner.send_ahead(piece, *to)?,
                }
                Ok(())
            }
            Message::Recv { buffer, from } => {
                let dtype = buffer.dtype();
                staged.inner.recv(free(&mut slot.input, dtype, numel)?, *from)?;
                staged.bring_up(read(&slot.input, dtype, numel), buffer.range_mut(range))
            }
        }
    }
}
