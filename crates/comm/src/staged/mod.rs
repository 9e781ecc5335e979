//! Collectives on GPU memory through pinned memory and a group of the host's.
//!
//! Several ranks can so share one GPU, and cards without direct links to each other work as well. A call is cut into pieces, and
//! each piece goes down to pinned memory, through the inner group and up again. While the host exchanges one piece, the next is
//! on its way down and the last one on its way up:
//!
//! ```text
//! down     piece 0 │ piece 1 │ piece 2 │
//! host               piece 0 │ piece 1 │ piece 2 │
//! up                           piece 0 │ piece 1 │ piece 2
//! ```
//!
//! Sums are made element by element in rank order, so no cut changes a bit: results are the inner group's.
//!
//! - **Memory.** A call has at most two pieces under way, each with one or two pinned buffers of [`PIECE_BYTES`]: 16 MiB for each
//!   call that is under way at once in a rank's groups. The buffers go back to a pool that a group and its subgroups share.
//! - **Order.** Memory of buffers orders itself by its log. Memory without one, libtorch's, is taken as the compute stream leaves
//!   it: copies wait for what is queued there when the call begins, and it waits for the copies.
//! - **Return.** A call returns when its last copies are queued. A sender's buffer may be written again at once, by streams or, if
//!   it is pinned, by the host: who does waits for what it has to.
//! - **Host memory** goes straight to the inner group.

mod pieces;

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use shardwise_device::cuda::{CudaError, Event, Gpu, Priority, Stream, Timing};
use shardwise_device::{BufferPool, DeviceError, Memory, Place, Slice, SliceMut};

use self::pieces::{AllGather, AllReduce, AllToAll, Broadcast, Message, Pieces, ReduceScatter, Slot};
use crate::agree::{agree, announce, expect};
use crate::arguments::{Caller, Demand};
use crate::member::Patience;
use crate::{Call, CommError, Group, Ledger, Operation, Part, ProcessGroup};

/// Bytes of a pinned buffer, unless a caller of [`Staged::with_pieces`] says otherwise.
pub const PIECE_BYTES: usize = 4 << 20;

/// A process group over another one, for buffers on a GPU.
pub struct Staged {
    inner: Group,
    shared: Arc<Shared>,
    down: Stream,
    up: Stream,
    /// Marks where one stream is, for another to wait there.
    fence: Event,
    state: Mutex<State>,
}

/// What a group and its subgroups have together.
pub(crate) struct Shared {
    gpu: Gpu,
    compute: Arc<Stream>,
    piece_bytes: usize,
    pinned: Mutex<BufferPool>,
}

/// Where this rank is in the group's sequence of calls. The lock also keeps a second thread out of a call.
struct State {
    num_collectives: u64,
    num_sent: Vec<u64>,
    num_received: Vec<u64>,
    ledger: Ledger,
}

/// Where the memory of a call is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Places {
    /// All of it on the host.
    Host,
    /// Some of it on a GPU; some of that may keep no log.
    Gpu { is_unlogged: bool },
}

/// What a piece can meet.
enum Fault {
    /// The inner group's error, which is the world's.
    Comm(CommError),
    /// This rank's own.
    Device(DeviceError),
}

impl From<CommError> for Fault {
    fn from(error: CommError) -> Self {
        Fault::Comm(error)
    }
}

impl From<DeviceError> for Fault {
    fn from(error: DeviceError) -> Self {
        Fault::Device(error)
    }
}

impl From<CudaError> for Fault {
    fn from(error: CudaError) -> Self {
        Fault::Device(error.into())
    }
}

impl Staged {
    /// The group of the ranks of `inner` for buffers on `gpu`, one rank's GPU. `compute` is the stream in whose order memory without a
    /// log is used.
    ///
    /// # Errors
    /// [`CommError::Device`] if the GPU has no stream or event to give, or `compute` is another GPU's.
    #[allow(clippy::new_ret_no_self, reason = "callers hold groups, whatever the back end")]
    pub fn new(inner: Group, gpu: &Gpu, compute: Arc<Stream>) -> Result<Group, CommError> {
        Staged::with_pieces(inner, gpu, compute, PIECE_BYTES)
    }

    /// As [`Staged::new`], with pinned buffers of `piece_bytes`, rounded up to hold 64 bytes for each rank. The same on all ranks.
    ///
    /// # Errors
    /// As [`Staged::new`].
    pub fn with_pieces(
        inner: Group,
        gpu: &Gpu,
        compute: Arc<Stream>,
        piece_bytes: usize,
    ) -> Result<Group, CommError> {
        let shared = Shared::new(gpu, compute, piece_bytes.max(64 * inner.group_size()));
        Ok(Arc::new(Staged::over(inner, shared, Operation::Subgroup)?))
    }

    pub(crate) fn over(inner: Group, shared: Arc<Shared>, operation: Operation) -> Result<Staged, CommError> {
        let Shared { gpu, compute, .. } = &*shared;
        let make = || {
            let (expected, got) = (gpu.ordinal(), compute.gpu().ordinal());
            if expected != got {
                return Err(CudaError::WrongGpu { what: "compute stream", expected, got });
            }
            let (down, up) = (gpu.stream(Priority::High)?, gpu.stream(Priority::High)?);
            Ok((down.named("collectives, down"), up.named("collectives, up"), gpu.event(Timing::Untimed)?))
        };
        let (down, up, fence) = make().map_err(|error| {
            let error = CommError::device(operation, inner.name(), DeviceError::from(error));
            inner.fail(&error);
            error
        })?;
        let zeros = vec![0; inner.group_size()];
        let state = State {
            num_collectives: 0,
            num_sent: zeros.clone(),
            num_received: zeros,
            ledger: Ledger::default(),
        };
        Ok(Staged { inner, shared, down, up, fence, state: Mutex::new(state) })
    }

    fn size(&self) -> usize {
        self.inner.group_size()
    }

    fn caller(&self) -> Caller<'_> {
        Caller { name: self.inner.name(), ranks: self.inner.ranks(), me: self.inner.group_rank() }
    }

    fn accept(&self, demand: Result<Demand, CommError>) -> Result<Demand, CommError> {
        if let Err(error) = &demand {
            self.inner.check()?;
            self.inner.fail(error);
        }
        demand
    }

    /// This rank gets its error as it is; to the others it has given up.
    fn own_error(&self, operation: Operation, error: DeviceError) -> CommError {
        let error = CommError::device(operation, self.inner.name(), error);
        self.inner.fail(&error);
        error
    }

    /// Runs one call and enters it in the ledger.
    fn account<T>(
        &self,
        demand: Demand,
        body: impl FnOnce(&mut State) -> Result<T, Fault>,
    ) -> Result<T, CommError> {
        let started = Instant::now();
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        self.inner.check()?;
        let Demand { operation, dtype, sent_numel, .. } = demand;
        let result = body(&mut state).map_err(|fault| match fault {
            Fault::Comm(error) => error,
            Fault::Device(error) => self.own_error(operation, error),
        })?;
        state.ledger.record(operation, sent_numel, dtype.size_bytes(), started.elapsed());
        Ok(result)
    }

    /// Where the memory of a call is. What the host has is ready for it then: an error of a stream that uses pinned memory shows
    /// here, and would be a panic further down.
    fn places(&self, demand: &Demand, views: &[Slice<'_>]) -> Result<Places, CommError> {
        let is_unlogged =
            |view: &Slice<'_>| view.place() != Place::Cpu && !view.is_logged() && view.num_bytes() > 0;
        if !views.iter().all(|view| view.place() == Place::Cpu) {
            return Ok(Places::Gpu { is_unlogged: views.iter().any(is_unlogged) });
        }
        let ready = views.iter().try_for_each(|view| view.host_bytes().map(drop));
        ready.map(|()| Places::Host).map_err(|error| self.own_error(demand.operation, error))
    }

    /// Runs a collective whose memory is the host's, on the inner group.
    fn straight<T>(
        &self,
        demand: Demand,
        call: impl FnOnce(&dyn ProcessGroup) -> Result<T, CommError>,
    ) -> Result<T, CommError> {
        self.account(demand, |state| {
            state.num_collectives += 1;
            Ok(call(&*self.inner)?)
        })
    }

    /// Runs a collective whose elements `0..total` may be cut anywhere.
    fn collective(
        &self,
        demand: Demand,
        places: Places,
        total: usize,
        mut pieces: impl Pieces,
    ) -> Result<(), CommError> {
        self.account(demand, |state| {
            let call = demand.call(state.num_collectives);
            state.num_collectives += 1;
            let step = self.step(pieces.bytes_per_element());
            if total > step && self.size() > 1 {
                agree(&*self.inner, &call)?;
            }
            self.run(places, total, step, &mut pieces)
        })
    }

    /// Sends or receives a message.
    fn message(
        &self,
        demand: Demand,
        places: Places,
        other: usize,
        patience: Patience,
        mut pieces: impl Pieces,
    ) -> Result<(), CommError> {
        self.account(demand, |state| {
            let is_send = demand.operation == Operation::Send;
            let counts = if is_send { &mut state.num_sent } else { &mut state.num_received };
            let call: Call = demand.call(counts[other]);
            counts[other] += 1;
            let step = self.step(pieces.bytes_per_element());
            if demand.numel > step {
                match is_send {
                    true => announce(&*self.inner, &call, other, patience)?,
                    false => expect(&*self.inner, &call, other)?,
                }
            }
            self.run(places, demand.numel, step, &mut pieces)
        })
    }

    /// Elements of a piece, of which each takes so many bytes of a buffer: whole cache lines where that is possible.
    fn step(&self, bytes_per_element: usize) -> usize {
        let most = (self.shared.piece_bytes / bytes_per_element.max(1)).max(1);
        if most >= 64 { most / 64 * 64 } else { most }
    }

    /// Orders the copies of a call among the compute stream's work, if some memory has no log, and runs it piece by piece.
    fn run(&self, places: Places, total: usize, step: usize, pieces: &mut impl Pieces) -> Result<(), Fault> {
        if places != (Places::Gpu { is_unlogged: true }) {
            return self.run_pieces(total, step, pieces);
        }
        let Shared { compute, gpu, .. } = &*self.shared;
        self.fence.record(compute)?;
        self.down.wait(&self.fence)?;
        self.up.wait(&self.fence)?;
        let result = self.run_pieces(total, step, pieces);
        let rejoin = |copies: &Stream| {
            self.fence.record(copies)?;
            compute.wait(&self.fence)
        };
        let rejoined = rejoin(&self.down).and_then(|()| rejoin(&self.up));
        if result.is_err() || rejoined.is_err() {
            // The caller may free the memory, and nothing else would wait. If this fails, the GPU has.
            let waited = self.down.synchronize().and_then(|()| self.up.synchronize());
            waited.or_else(|_| gpu.synchronize())?;
        }
        result.and(rejoined.map_err(Fault::from))
    }

    fn run_pieces<P: Pieces>(&self, total: usize, step: usize, pieces: &mut P) -> Result<(), Fault> {
        let num_steps = total.div_ceil(step).max(1);
        let mut slots = Vec::new();
        let result = self.walk(&mut slots, (num_steps, total, step), pieces);
        let mut pinned = self.shared.pinned();
        slots.into_iter().flat_map(Slot::into_buffers).for_each(|buffer| pinned.give_back(buffer));
        result
    }

    fn walk<P: Pieces>(
        &self,
        slots: &mut Vec<Slot>,
        (num_steps, total, step): (usize, usize, usize),
        pieces: &mut P,
    ) -> Result<(), Fault> {
        let range = |i: usize| -> Range<usize> { (i * step).min(total)..((i + 1) * step).min(total) };
        for _ in 0..num_steps.min(2) {
            slots.push(self.slot(P::HAS_OUTPUT)?);
        }
        pieces.down(self, range(0), &mut slots[0])?;
        for i in 0..num_steps {
            if i + 1 < num_steps {
                // Waits, on its stream, for the copy up that last used the slot.
                pieces.down(self, range(i + 1), &mut slots[(i + 1) % 2])?;
            }
            pieces.exchange(self, range(i), &mut slots[i % 2])?;
        }
        Ok(())
    }
}

impl Shared {
    pub(crate) fn new(gpu: &Gpu, compute: Arc<Stream>, piece_bytes: usize) -> Arc<Self> {
        let pinned = Mutex::new(BufferPool::of(Memory::Pinned(gpu.clone())));
        Arc::new(Shared { gpu: gpu.clone(), compute, piece_bytes, pinned })
    }

    fn pinned(&self) -> MutexGuard<'_, BufferPool> {
        self.pinned.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ProcessGroup for Staged {
    crate::group::as_inner!();

    fn group_size(&self) -> usize {
        self.size()
    }

    fn all_reduce(&self, buffer: SliceMut<'_>) -> Result<(), CommError> {
        let demand = self.accept(self.caller().all_reduce(buffer.as_slice()))?;
        let total = buffer.numel();
        let places = self.places(&demand, &[buffer.as_slice()])?;
        if places == Places::Host {
            return self.straight(demand, |inner| inner.all_reduce(buffer));
        }
        self.collective(demand, places, total, AllReduce { buffer })
    }

    fn reduce_scatter(&self, input: &[Part<'_>], shard: SliceMut<'_>) -> Result<(), CommError> {
        let demand = self.accept(self.caller().reduce_scatter(input, shard.as_slice()))?;
        let data = input.iter().filter_map(|part| match part {
            Part::Data(data) => Some(*data),
            Part::Zeros(_) => None,
        });
        let views: Vec<_> = data.chain([shard.as_slice()]).collect();
        let places = self.places(&demand, &views)?;
        if places == Places::Host {
            return self.straight(demand, |inner| inner.reduce_scatter(input, shard));
        }
        let pieces = ReduceScatter::new(input, shard, demand.dtype, self.size());
        self.collective(demand, places, demand.numel, pieces)
    }

    fn all_gather(&self, shard: Slice<'_>, full: SliceMut<'_>) -> Result<(), CommError> {
        let demand = self.accept(self.caller().all_gather(shard, full.as_slice()))?;
        let places = self.places(&demand, &[shard, full.as_slice()])?;
        if places == Places::Host {
            return self.straight(demand, |inner| inner.all_gather(shard, full));
        }
        let (n, me) = (self.size(), self.group_rank());
        self.collective(demand, places, demand.numel, AllGather { shard: Some(shard), full, n, me })
    }

    fn all_gather_in_place(&self, full: SliceMut<'_>) -> Result<(), CommError> {
        let demand = self.accept(self.caller().all_gather_in_place(full.as_slice()))?;
        let places = self.places(&demand, &[full.as_slice()])?;
        if places == Places::Host {
            return self.straight(demand, |inner| inner.all_gather_in_place(full));
        }
        let (n, me) = (self.size(), self.group_rank());
        self.collective(demand, places, demand.numel, AllGather { shard: None, full, n, me })
    }

    fn broadcast(&self, buffer: SliceMut<'_>, root: usize) -> Result<(), CommError> {
        let demand = self.accept(self.caller().broadcast(buffer.as_slice(), root))?;
        let places = self.places(&demand, &[buffer.as_slice()])?;
        if places == Places::Host {
            return self.straight(demand, |inner| inner.broadcast(buffer, root));
        }
        let me = self.group_rank();
        self.collective(demand, places, demand.numel, Broadcast { buffer, root, me })
    }

    fn all_to_all(&self, input: Slice<'_>, output: SliceMut<'_>) -> Result<(), CommError> {
        let demand = self.accept(self.caller().all_to_all(input, output.as_slice()))?;
        let places = self.places(&demand, &[input, output.as_slice()])?;
        if places == Places::Host {
            return self.straight(demand, |inner| inner.all_to_all(input, output));
        }
        let n = self.size();
        self.collective(demand, places, demand.numel / n, AllToAll { input, output, n })
    }

    fn send(&self, buffer: Slice<'_>, to: usize) -> Result<(), CommError> {
        let demand = self.accept(self.caller().send(buffer, to))?;
        let (patience, places) = (Patience::Deadline, self.places(&demand, &[buffer])?);
        self.message(demand, places, to, patience, Message::Send { buffer, to, patience })
    }

    fn send_ahead(&self, buffer: Slice<'_>, to: usize) -> Result<(), CommError> {
        let demand = self.accept(self.caller().send(buffer, to))?;
        let (patience, places) = (Patience::Endless, self.places(&demand, &[buffer])?);
        self.message(demand, places, to, patience, Message::Send { buffer, to, patience })
    }

    fn recv(&self, buffer: SliceMut<'_>, from: usize) -> Result<(), CommError> {
        let demand = self.accept(self.caller().recv(buffer.as_slice(), from))?;
        let places = self.places(&demand, &[buffer.as_slice()])?;
        self.message(demand, places, from, Patience::Deadline, Message::Recv { buffer, from })
    }

    fn barrier(&self) -> Result<(), CommError> {
        self.straight(Demand::BARRIER, |inner| inner.barrier())
    }

    fn subgroup(&self, name: &str, ranks: &[usize]) -> Result<Option<Group>, CommError> {
        let demand = self.accept(self.caller().subgroup(name, ranks))?;
        let inner = self.straight(demand, |inner| inner.subgroup(name, ranks))?;
        let over = |inner| Staged::over(inner, Arc::clone(&self.shared), Operation::Subgroup);
        Ok(inner.map(over).transpose()?.map(|group| Arc::new(group) as Group))
    }

    fn ledger(&self) -> Ledger {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).ledger
    }
}
