//! Messages between two ranks.
//!
//! A rank that sends must not wait for the receiver with what fits 512 KiB ([`ProcessGroup::send`]), and what NCCL sends waits. So such
//! messages go through host memory. Larger ones go between the GPUs, by a communicator that the two ranks have for this direction alone,
//! with a stream of its own: they wait for nothing but each other.
//!
//! ```text
//! sender     copy aside ─ announce ─ (first: id) ─ ncclSend            compute goes on when the copy is made
//! receiver                compare  ─ (first: id) ─ ncclRecv
//! ```
//!
//! The copy is what makes a sender's compute stream independent of the receiver's: two ranks that send to each other would otherwise each
//! wait for the other to be through.
//!
//! [`ProcessGroup::send`]: crate::ProcessGroup::send

use std::collections::hash_map::Entry;
use std::sync::Arc;

use shardwise_device::cuda::{Access, Event, Priority, Stream};
use shardwise_device::{Buffer, Slice, SliceMut};

use super::communicator::{self, Communicator, Fault, Op, Others, Ticket};
use super::watch::Queueing;
use super::{Nccl, Places, State, api, starts_at};
use crate::agree::{announce, expect};
use crate::member::Patience;
use crate::segment::CHANNEL_SLOT_BYTES;
use crate::{CommError, Operation, ProcessGroup};

/// What is on its way without the receiver, through host memory.
const SMALL_BYTES: usize = 2 * CHANNEL_SLOT_BYTES;

/// Which way messages go between this rank and another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Direction {
    ToPeer,
    FromPeer,
}

/// What two ranks have for messages in one direction.
pub(super) struct Link {
    communicator: Arc<Communicator>,
    stream: Arc<Stream>,
}

impl Link {
    pub(super) fn into_communicator(self) -> Arc<Communicator> {
        self.communicator
    }
}

impl Nccl {
    pub(super) fn send_message(
        &self,
        buffer: Slice<'_>,
        to: usize,
        patience: Patience,
    ) -> Result<(), CommError> {
        let demand = self.accept(self.caller().send(buffer, to))?;
        let places = self.places(&demand, &[buffer])?;
        self.account(demand, |state| {
            let call = demand.call(state.num_sent[to]);
            state.num_sent[to] += 1;
            let Places::Gpu { is_unlogged } = places else {
                return self.send_through_host(buffer, to, patience);
            };
            if buffer.num_bytes() <= SMALL_BYTES {
                return self.send_through_host(buffer, to, patience);
            }
            announce(&*self.inner, &call, to, patience).map_err(Fault::World)?;
            let ticket = Ticket { call, others: Others::One(self.inner.ranks()[to]), patience };
            let (communicator, stream) = self.link(state, to, Direction::ToPeer, &ticket)?;
            let mut aside = self.staging(buffer.num_bytes())?;
            let place = aside.view_mut().into_range(0..buffer.num_bytes()).cast(buffer.dtype());
            self.copy_aside(is_unlogged, buffer, place)?;
            let sent = aside.view().range(0..buffer.num_bytes());
            let op = Op::Send { from: sent.as_ptr(), num_bytes: sent.num_bytes(), to: 1 };
            self.exchange_on(&communicator, &stream, ticket, op, (sent, Access::Read))?.queued(Some(aside));
            Ok(())
        })
    }

    fn send_through_host(&self, buffer: Slice<'_>, to: usize, patience: Patience) -> Result<(), Fault> {
        let sent = match patience {
            Patience::Deadline => self.staged.send(buffer, to),
            Patience::Endless => self.staged.send_ahead(buffer, to),
        };
        sent.map_err(Fault::World)
    }

    pub(super) fn receive_message(&self, buffer: SliceMut<'_>, from: usize) -> Result<(), CommError> {
        let demand = self.accept(self.caller().recv(buffer.as_slice(), from))?;
        let places = self.places(&demand, &[buffer.as_slice()])?;
        self.account(demand, |state| {
            let call = demand.call(state.num_received[from]);
            state.num_received[from] += 1;
            let is_unlogged = match places {
                Places::Gpu { is_unlogged } if buffer.num_bytes() > SMALL_BYTES => is_unlogged,
                _ => return self.staged.recv(buffer, from).map_err(Fault::World),
            };
            expect(&*self.inner, &call, from).map_err(Fault::World)?;
            let ticket = Ticket { call, others: Others::Ready, patience: Patience::Deadline };
            let (communicator, stream) = self.link(state, from, Direction::FromPeer, &ticket)?;
            let view = buffer.as_slice();
            let op = Op::Recv { into: starts_at(view), num_bytes: view.num_bytes(), from: 0 };
            if is_unlogged {
                self.fence.record(&self.shared.compute)?;
                stream.wait(&self.fence)?;
            }
            let queued = self.exchange_on(&communicator, &stream, ticket, op, (view, Access::Write))?;
            if is_unlogged {
                let rejoined =
                    self.fence.record(&stream).and_then(|()| self.shared.compute.wait(&self.fence));
                if let Err(error) = rejoined {
                    communicator.abort();
                    stream.synchronize().or_else(|_| self.gpu().synchronize())?;
                    return Err(error.into());
                }
            }
            queued.queued(None);
            Ok(())
        })
    }

    /// Copies what is to be sent. The compute stream waits for no more than that.
    fn copy_aside(&self, is_unlogged: bool, from: Slice<'_>, into: SliceMut<'_>) -> Result<(), Fault> {
        self.in_order(Operation::Send, is_unlogged, None, || Ok(self.sums_stream.copy(from, into)?))
    }

    /// What this rank and `peer` have for messages in this direction, made with the first.
    fn link(
        &self,
        state: &mut State,
        peer: usize,
        direction: Direction,
        ticket: &Ticket,
    ) -> Result<(Arc<Communicator>, Arc<Stream>), Fault> {
        let vacant = match state.links.entry((peer, direction)) {
            Entry::Occupied(link) => {
                let Link { communicator, stream } = link.get();
                return Ok((Arc::clone(communicator), Arc::clone(stream)));
            }
            Entry::Vacant(vacant) => vacant,
        };
        let library = &self.shared.library;
        let mut id = api::UniqueId([0; api::ID_BYTES]);
        let rank = match direction {
            Direction::ToPeer => {
                id = communicator::unique_id(library, self.gpu(), &self.inner, &ticket.call)?;
                let shown = Slice::of(&id.0);
                let told = match ticket.patience {
                    Patience::Deadline => self.inner.send(shown, peer),
                    Patience::Endless => self.inner.send_ahead(shown, peer),
                };
                told.map_err(Fault::World)?;
                0
            }
            Direction::FromPeer => {
                self.inner.recv(SliceMut::of(&mut id.0), peer).map_err(Fault::World)?;
                1
            }
        };
        let stream = Arc::new(self.gpu().stream(Priority::High)?);
        let communicator = Communicator::new(library, self.gpu(), &self.inner, id, (rank, 2), ticket)?;
        vacant.insert(Link { communicator: Arc::clone(&communicator), stream: Arc::clone(&stream) });
        Ok((communicator, stream))
    }

    /// Queues one call, watched.
    fn exchange_on<'a>(
        &'a self,
        communicator: &Arc<Communicator>,
        stream: &Stream,
        ticket: Ticket,
        op: Op,
        (view, access): (Slice<'_>, Access),
    ) -> Result<Sent<'a>, Fault> {
        let watcher = &self.shared.watcher;
        let watched = watcher.queueing(communicator, ticket).map_err(Fault::Own)?;
        let (started, over) = (watcher.event(self.gpu())?, watcher.event(self.gpu())?);
        let queue = || {
            stream.wait_for(view, access)?;
            started.record(stream)?;
            // SAFETY: the view is valid until its noted use is over, or used in the order of the compute stream.
            unsafe { communicator.run(&[op], stream, &ticket)? };
            stream.note(view, access)?;
            Ok(over.record(stream)?)
        };
        if let Err(fault) = queue() {
            communicator.abort();
            stream.synchronize().or_else(|_| self.gpu().synchronize())?;
            return Err(fault);
        }
        Ok(Sent { group: self, watched, events: (started, over) })
    }
}

/// A message that is on its stream.
struct Sent<'a> {
    group: &'a Nccl,
    watched: Queueing<'a>,
    events: (Event, Event),
}

impl Sent<'_> {
    /// From here on the watcher has it, with a buffer that comes back when it is over.
    fn queued(self, kept: Option<Buffer>) {
        let kept = kept.map(|buffer| (buffer, Arc::clone(&self.group.pool)));
        self.watched.queued(self.events, kept);
    }
}
