//! Sums, piece by piece: terms are packed, exchanged, added, and if all ranks want the sum, gathered.
//!
//! ```text
//! sums    pack 0 │ pack 1 │        sum 0 │ pack 2 │        sum 1 │
//! wire             exchange 0 │            exchange 1, gather 0 │  exchange 2, gather 1
//! ```
//!
//! A piece is as many elements of each rank as fit the staging memory, each rank's beginning at the same distance. Sums are made element
//! by element in rank order, so no cut changes a bit.

use std::ops::Range;

use shardwise_device::cuda::Access;
use shardwise_device::{Buffer, DType, Slice, SliceMut};
use shardwise_kernels::processor::Piece;

use super::communicator::{Fault, Op};
use super::{Exchange, Nccl, starts_at};
use crate::Part;
use crate::parts::{runs, starts_of};

/// Staging memory for one piece.
pub(super) struct Slot {
    /// A term from each rank for this rank to add.
    terms: Buffer,
    /// This rank's terms for the others, where they do not lie together.
    packed: Option<Buffer>,
}

impl Slot {
    pub(super) fn into_buffers(self) -> impl Iterator<Item = Buffer> {
        [Some(self.terms), self.packed].into_iter().flatten()
    }
}

/// A sum in pieces.
pub(super) trait Pieces {
    fn num_pieces(&self) -> usize;

    /// Bytes of the staging memory of a piece; of the terms, and of what is packed, if anything may be.
    fn staging_bytes(&self) -> (usize, Option<usize>);

    /// Queues on the sums' stream what comes before the exchange.
    fn prepare(&mut self, group: &Nccl, piece: usize, slot: &mut Slot) -> Result<(), Fault>;

    /// Queues the exchange.
    fn exchange(&mut self, exchange: &mut Exchange<'_>, piece: usize, slot: &mut Slot) -> Result<(), Fault>;

    /// Queues the sum.
    fn sum(&mut self, group: &Nccl, piece: usize, slot: &Slot) -> Result<(), Fault>;

    /// Queues what gives the sum to the others.
    fn gather(&mut self, exchange: &mut Exchange<'_>, piece: usize) -> Result<(), Fault> {
        let _ = (exchange, piece);
        Ok(())
    }
}

/// Queues all pieces. What a piece needs of a slot that is in use waits on its stream.
pub(super) fn walk(
    group: &Nccl,
    exchange: &mut Exchange<'_>,
    slots: &mut Vec<Slot>,
    pieces: &mut impl Pieces,
) -> Result<(), Fault> {
    let num_pieces = pieces.num_pieces();
    let (terms_bytes, packed_bytes) = pieces.staging_bytes();
    for _ in 0..num_pieces.min(2) {
        let terms = group.staging(terms_bytes)?;
        slots.push(Slot { terms, packed: None });
        let slot = slots.last_mut().expect("just pushed");
        slot.packed = packed_bytes.map(|num_bytes| group.staging(num_bytes)).transpose()?;
    }
    if num_pieces > 0 {
        pieces.prepare(group, 0, &mut slots[0])?;
    }
    for piece in 0..num_pieces {
        if piece + 1 < num_pieces {
            pieces.prepare(group, piece + 1, &mut slots[(piece + 1) % 2])?;
        }
        pieces.exchange(exchange, piece, &mut slots[piece % 2])?;
        if piece > 0 {
            pieces.gather(exchange, piece - 1)?;
        }
        pieces.sum(group, piece, &slots[piece % 2])?;
    }
    match num_pieces {
        0 => Ok(()),
        _ => pieces.gather(exchange, num_pieces - 1),
    }
}

/// Elements of each of `n` ranks that fit staging memory of `staging_bytes`: whole cache lines, and of `numel` not more than needed.
fn step(staging_bytes: usize, n: usize, dtype: DType, numel: usize) -> usize {
    let most = staging_bytes / n / dtype.size_bytes() / 64 * 64;
    most.min(numel.next_multiple_of(64)).max(64)
}

fn elements(buffer: &Buffer, dtype: DType, range: Range<usize>) -> Slice<'_> {
    let width = dtype.size_bytes();
    buffer.view().range(range.start * width..range.end * width).cast(dtype)
}

fn elements_mut(buffer: &mut Buffer, dtype: DType, range: Range<usize>) -> SliceMut<'_> {
    let width = dtype.size_bytes();
    buffer.view_mut().into_range(range.start * width..range.end * width).cast(dtype)
}

/// As a processor takes them. It copies: the factor is 1.
pub(super) fn pieces_of<'a>(parts: impl Iterator<Item = Part<'a>>) -> Vec<Piece<'a>> {
    let piece = |part| match part {
        Part::Data(data) => Piece::Data(data),
        Part::Zeros(numel) => Piece::Zeros(numel),
    };
    parts.map(piece).collect()
}

/// Cut in the shard: a piece has that range of each rank's part of the input.
pub(super) struct ReduceScatter<'a> {
    parts: &'a [Part<'a>],
    starts: Vec<usize>,
    shard: SliceMut<'a>,
    dtype: DType,
    n: usize,
    me: usize,
    step: usize,
}

impl<'a> ReduceScatter<'a> {
    pub(super) fn new(group: &Nccl, parts: &'a [Part<'a>], shard: SliceMut<'a>, dtype: DType) -> Self {
        let (n, me) = (group.size(), group.inner.group_rank());
        let step = step(group.shared.staging_bytes, n, dtype, shard.numel());
        ReduceScatter { parts, starts: starts_of(parts), shard, dtype, n, me, step }
    }

    fn range(&self, piece: usize) -> Range<usize> {
        piece * self.step..((piece + 1) * self.step).min(self.shard.numel())
    }

    /// What this rank has for `rank` in a piece.
    fn runs(&self, piece: usize, rank: usize) -> Vec<Part<'a>> {
        let (range, start) = (self.range(piece), rank * self.shard.numel());
        runs(self.parts, &self.starts, start + range.start..start + range.end).collect()
    }
}

/// The elements, if they lie together.
fn together<'a>(runs: &[Part<'a>]) -> Option<Slice<'a>> {
    match runs {
        [Part::Data(data)] => Some(*data),
        _ => None,
    }
}

impl Pieces for ReduceScatter<'_> {
    fn num_pieces(&self) -> usize {
        self.shard.numel().div_ceil(self.step)
    }

    fn staging_bytes(&self) -> (usize, Option<usize>) {
        let bytes = self.n * self.step * self.dtype.size_bytes();
        // What lies together for one piece may not for the next.
        let mut all = (0..self.num_pieces()).flat_map(|piece| (0..self.n).map(move |rank| (piece, rank)));
        let is_packed =
            all.any(|(piece, rank)| rank != self.me && together(&self.runs(piece, rank)).is_none());
        (bytes, is_packed.then_some(bytes))
    }

    fn prepare(&mut self, group: &Nccl, piece: usize, slot: &mut Slot) -> Result<(), Fault> {
        let numel = self.range(piece).len();
        for rank in 0..self.n {
            let runs = self.runs(piece, rank);
            let buffer = match &mut slot.packed {
                _ if rank == self.me => &mut slot.terms,
                Some(packed) if together(&runs).is_none() => packed,
                _ => continue,
            };
            let place = elements_mut(buffer, self.dtype, rank * self.step..rank * self.step + numel);
            group.sums.pack(&pieces_of(runs.into_iter()), 1.0, place)?;
        }
        Ok(())
    }

    fn exchange(&mut self, exchange: &mut Exchange<'_>, piece: usize, slot: &mut Slot) -> Result<(), Fault> {
        let numel = self.range(piece).len();
        let (mut ops, mut uses) = (Vec::new(), Vec::new());
        for peer in (0..self.n).filter(|&peer| peer != self.me) {
            let place = peer * self.step..peer * self.step + numel;
            let into = elements(&slot.terms, self.dtype, place.clone());
            let from = match (together(&self.runs(piece, peer)), &slot.packed) {
                (Some(data), _) => data,
                (None, Some(packed)) => elements(packed, self.dtype, place),
                (None, None) => unreachable!("`staging_bytes` has seen that nothing is packed"),
            };
            let num_bytes = from.num_bytes();
            ops.push(Op::Send { from: from.as_ptr(), num_bytes, to: peer });
            ops.push(Op::Recv { into: starts_at(into), num_bytes, from: peer });
            uses.extend([(from, Access::Read), (into, Access::Write)]);
        }
        // SAFETY: each call has its view in `uses`.
        unsafe { exchange.run(&ops, &uses) }
    }

    fn sum(&mut self, group: &Nccl, piece: usize, slot: &Slot) -> Result<(), Fault> {
        let range = self.range(piece);
        let terms = elements(&slot.terms, self.dtype, 0..(self.n - 1) * self.step + range.len());
        Ok(group.sums.sum_ranks(terms, self.step, self.shard.range_mut(range))?)
    }
}

/// In place.
pub(super) struct AllReduce<'a> {
    buffer: SliceMut<'a>,
    n: usize,
    me: usize,
    step: usize,
    how: How,
}

enum How {
    /// Every rank gets all terms of a piece of `step` elements, and adds them.
    Direct,
    /// Of a piece of `n * step` elements every rank adds a part, and gives the sum to the others.
    Divided,
}

impl<'a> AllReduce<'a> {
    pub(super) fn direct(group: &Nccl, buffer: SliceMut<'a>) -> Self {
        let (n, me) = (group.size(), group.inner.group_rank());
        let step = step(group.shared.staging_bytes, n, buffer.dtype(), buffer.numel());
        AllReduce { buffer, n, me, step, how: How::Direct }
    }

    pub(super) fn divided(group: &Nccl, buffer: SliceMut<'a>) -> Self {
        let (n, me) = (group.size(), group.inner.group_rank());
        let step = step(group.shared.staging_bytes, n, buffer.dtype(), buffer.numel().div_ceil(n));
        AllReduce { buffer, n, me, step, how: How::Divided }
    }

    fn piece_numel(&self) -> usize {
        match self.how {
            How::Direct => self.step,
            How::Divided => self.n * self.step,
        }
    }

    fn range(&self, piece: usize) -> Range<usize> {
        let numel = self.piece_numel();
        piece * numel..((piece + 1) * numel).min(self.buffer.numel())
    }

    /// The part of a piece that `rank` adds. The last ones may be short or empty.
    fn part(&self, piece: usize, rank: usize) -> Range<usize> {
        let range = self.range(piece);
        match self.how {
            How::Direct => range,
            How::Divided => {
                let at = |rank: usize| (range.start + rank * self.step).min(range.end);
                at(rank)..at(rank + 1)
            }
        }
    }

    fn peers(&self) -> impl Iterator<Item = usize> + use<> {
        let me = self.me;
        (0..self.n).filter(move |&peer| peer != me)
    }
}

impl Pieces for AllReduce<'_> {
    fn num_pieces(&self) -> usize {
        self.buffer.numel().div_ceil(self.piece_numel())
    }

    fn staging_bytes(&self) -> (usize, Option<usize>) {
        (self.n * self.step * self.buffer.dtype().size_bytes(), None)
    }

    fn prepare(&mut self, group: &Nccl, piece: usize, slot: &mut Slot) -> Result<(), Fault> {
        if let How::Direct = self.how {
            return Ok(());
        }
        let own = self.buffer.as_slice().range(self.part(piece, self.me));
        let start = self.me * self.step;
        let place = elements_mut(&mut slot.terms, own.dtype(), start..start + own.numel());
        Ok(group.sums_stream.copy(own, place)?)
    }

    fn exchange(&mut self, exchange: &mut Exchange<'_>, piece: usize, slot: &mut Slot) -> Result<(), Fault> {
        let dtype = self.buffer.dtype();
        let own = self.part(piece, self.me);
        if let How::Direct = self.how {
            // Short pieces lie close together.
            let from = self.buffer.as_slice().range(own.clone());
            let into = elements(&slot.terms, dtype, 0..self.n * own.len());
            let op =
                Op::AllGather { from: from.as_ptr(), into: starts_at(into), num_bytes: from.num_bytes() };
            // SAFETY: reads the piece, and writes as many bytes for each rank.
            return unsafe { exchange.run(&[op], &[(from, Access::Read), (into, Access::Write)]) };
        }
        let (mut ops, mut uses) = (Vec::new(), Vec::new());
        for peer in self.peers() {
            let from = self.buffer.as_slice().range(self.part(piece, peer));
            let into = elements(&slot.terms, dtype, peer * self.step..peer * self.step + own.len());
            if from.numel() > 0 {
                ops.push(Op::Send { from: from.as_ptr(), num_bytes: from.num_bytes(), to: peer });
                uses.push((from, Access::Read));
            }
            if into.numel() > 0 {
                ops.push(Op::Recv { into: starts_at(into), num_bytes: into.num_bytes(), from: peer });
                uses.push((into, Access::Write));
            }
        }
        // SAFETY: each call has its view in `uses`.
        unsafe { exchange.run(&ops, &uses) }
    }

    fn sum(&mut self, group: &Nccl, piece: usize, slot: &Slot) -> Result<(), Fault> {
        let (own, dtype) = (self.part(piece, self.me), self.buffer.dtype());
        let stride = match self.how {
            How::Direct => own.len(),
            How::Divided => self.step,
        };
        if !own.is_empty() {
            let terms = elements(&slot.terms, dtype, 0..(self.n - 1) * stride + own.len());
            group.sums.sum_ranks(terms, stride, self.buffer.range_mut(own))?;
        }
        match &self.how {
            How::Direct => Ok(()),
            // Memory without a log would not make the wire wait.
            How::Divided => Ok(group.summed.record(&group.sums_stream)?),
        }
    }

    fn gather(&mut self, exchange: &mut Exchange<'_>, piece: usize) -> Result<(), Fault> {
        if let How::Direct = self.how {
            return Ok(());
        }
        exchange.group.wire.wait(&exchange.group.summed)?;
        let range = self.range(piece);
        let all = self.buffer.as_slice().range(range.clone());
        if range.len() == self.n * self.step {
            // SAFETY: reads and writes `all` alone.
            return unsafe { exchange.run(&[exchange.group.gather_op(all)], &[(all, Access::Write)]) };
        }
        // Parts of different lengths.
        let own = self.buffer.as_slice().range(self.part(piece, self.me));
        let mut ops = Vec::new();
        for peer in self.peers() {
            let theirs = self.buffer.as_slice().range(self.part(piece, peer));
            if own.numel() > 0 {
                ops.push(Op::Send { from: own.as_ptr(), num_bytes: own.num_bytes(), to: peer });
            }
            if theirs.numel() > 0 {
                ops.push(Op::Recv { into: starts_at(theirs), num_bytes: theirs.num_bytes(), from: peer });
            }
        }
        // SAFETY: all of it is in `all`, and what is written apart from what is read.
        unsafe { exchange.run(&ops, &[(all, Access::Write)]) }
    }
}
