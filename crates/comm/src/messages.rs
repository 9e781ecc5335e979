//! Messages between two ranks: a ring of two slots for each sender and receiver.
//!
//! The sender fills slot `k % 2` with chunk `k` once chunk `k - 2` is taken, so up to two chunks are on their
//! way without the receiver. The first chunk of a message carries the sender's call, which the receiver
//! compares with its own.
//!
//! Two ranks of which each waits for the other would sit there until the deadline. The commonest cases are
//! recognised: a rank that waits here for a peer that itself waits, in this group, for this very rank, in a
//! collective or in `recv`. As a rank does one thing at a time in a group, neither can ever go on, and both
//! are named.

use std::sync::atomic::Ordering;

use shardwise_device::{Slice, SliceMut};
use shardwise_kernels::reduce::{Store, copy_bytes};

use crate::member::{Member, Patience};
use crate::segment::CHANNEL_SLOT_BYTES;
use crate::word::{self, Seen};
use crate::{Call, CommError};

/// Byte ranges of a message's chunks; an empty message has one, too.
fn chunks(num_bytes: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    let num_chunks = num_bytes.div_ceil(CHANNEL_SLOT_BYTES).max(1);
    (0..num_chunks).map(move |i| i * CHANNEL_SLOT_BYTES..((i + 1) * CHANNEL_SLOT_BYTES).min(num_bytes))
}

impl Member {
    pub(crate) fn send_message(
        &self,
        buffer: Slice<'_>,
        to: usize,
        patience: Patience,
    ) -> Result<(), CommError> {
        let demand = self.accept(self.caller().send(buffer, to))?;
        self.account(demand, |state| {
            let channel = self.segment.channel(self.me, to);
            let phase = state.phase();
            let (chunk, sequence) = &mut state.sent[to];
            let call = demand.call(*sequence);
            *sequence += 1;
            for range in chunks(buffer.num_bytes()) {
                // Chunk `k` needs its slot back: `k - 2` taken, that is `k - 1` chunks.
                let target = word::previous(*chunk);
                self.wait_on(&channel.taken, target, to, &call, patience, || {
                    let blocked = || channel.taken.look(target) == Seen::Nothing;
                    self.waits_in_collective(to, phase, &call, blocked)
                })?;
                let bytes = &buffer.bytes()[range.clone()];
                // SAFETY: the slot and its post are free, as the chunk before in them is taken; a chunk fits
                // a slot.
                unsafe {
                    copy_bytes(
                        bytes.as_ptr(),
                        self.segment.channel_slot(self.me, to, *chunk),
                        bytes.len(),
                        Store::Cached,
                    );
                    if range.start == 0 {
                        channel.posts[(*chunk % 2) as usize].write(&call);
                    }
                }
                channel.sent.advance();
                *chunk = word::next(*chunk);
            }
            Ok(())
        })
    }

    pub(crate) fn receive_message(&self, buffer: SliceMut<'_>, from: usize) -> Result<(), CommError> {
        let demand = self.accept(self.caller().recv(buffer.as_slice(), from))?;
        let bytes = buffer.bytes();
        self.account(demand, |state| {
            let channel = self.segment.channel(from, self.me);
            let phase = state.phase();
            let sent_back = state.sent[from].0;
            let (chunk, sequence) = &mut state.received[from];
            let call = demand.call(*sequence);
            *sequence += 1;
            for range in chunks(bytes.len()) {
                let target = word::next(*chunk);
                if channel.sent.look(target) == Seen::Nothing {
                    // SAFETY: the sender reads the post only while `awaited` is set.
                    unsafe { channel.wanted.write(&call) };
                    channel.awaited.store(*chunk + 1, Ordering::Release);
                    self.wait_on(&channel.sent, target, from, &call, Patience::Deadline, || {
                        let blocked = || channel.sent.look(target) == Seen::Nothing;
                        self.waits_in_collective(from, phase, &call, blocked)
                            .or_else(|| self.waits_for_message(from, sent_back, &call, blocked))
                    })?;
                    channel.awaited.store(0, Ordering::Release);
                } else {
                    self.wait_on(&channel.sent, target, from, &call, Patience::Deadline, || None)?;
                }
                if range.start == 0 {
                    // SAFETY: the chunk is published, and its post stays until it is taken.
                    let sent = unsafe { channel.posts[(*chunk % 2) as usize].read() };
                    if (sent.sequence, sent.dtype, sent.numel) != (call.sequence, call.dtype, call.numel) {
                        return Err(self.disagree(from, sent, &call));
                    }
                }
                let place = &mut bytes[range];
                // SAFETY: the chunk is published and has the size that both calls give it.
                unsafe {
                    let slot = self.segment.channel_slot(from, self.me, *chunk);
                    copy_bytes(slot, place.as_mut_ptr(), place.len(), Store::Cached);
                }
                channel.taken.advance();
                *chunk = word::next(*chunk);
            }
            Ok(())
        })
    }

    fn disagree(&self, other: usize, other_call: Call, call: &Call) -> CommError {
        self.universe.fail(&self.mismatch(other, other_call, call))
    }

    fn mismatch(&self, other: usize, other_call: Call, call: &Call) -> CommError {
        let (rank, other_rank) = (self.ranks[self.me], self.ranks[other]);
        CommError::Mismatch { group: self.name.clone(), rank, call: *call, other_rank, other_call }
    }

    /// Whether `peer` waits in a collective that this rank, at `phase`, has not come to, while this rank is
    /// still blocked.
    fn waits_in_collective(
        &self,
        peer: usize,
        phase: u32,
        call: &Call,
        blocked: impl Fn() -> bool,
    ) -> Option<CommError> {
        if self.segment.words()[peer].count() != word::next(phase) || !blocked() {
            return None;
        }
        // SAFETY: the peer has published the first phase of a call and cannot go on without this rank.
        let other_call = unsafe { self.segment.post(peer, phase).read() };
        Some(self.mismatch(peer, other_call, call))
    }

    /// Whether `peer` waits for a chunk from this rank, which has sent `sent_back` to it, while this rank is
    /// still blocked.
    fn waits_for_message(
        &self,
        peer: usize,
        sent_back: u32,
        call: &Call,
        blocked: impl Fn() -> bool,
    ) -> Option<CommError> {
        let back = self.segment.channel(self.me, peer);
        if back.awaited.load(Ordering::Acquire) != sent_back + 1 || !blocked() {
            return None;
        }
        // SAFETY: the peer has published its wish and cannot take it back without this rank.
        let other_call = unsafe { back.wanted.read() };
        Some(self.mismatch(peer, other_call, call))
    }
}
