//! Collectives between GPUs, by NCCL, loaded when first needed.
//!
//! [`Nccl`] stands on a group of the host's, which has brought the ranks together and goes on to do what is about hosts: it hands
//! round what a communicator begins with, compares calls, carries messages that must not wait, and knows when a rank has died. Each rank
//! has a GPU of its own.
//!
//! ```text
//! compute   ─ backward ─●                                  ● next use of the shard
//! wire                  └─ exchange 0 ─ exchange 1 ─●      │
//! sums                   pack 0, pack 1 ─ sum 0 ─── sum 1 ─┘
//! host      reduce_scatter() ─► returns when all this is queued
//! ```
//!
//! - **Sums.** NCCL moves bytes and adds nothing: its sums depend on algorithm and topology. A reduction brings each rank the others'
//!   terms of its piece, as many bytes as a ring would bring, and a kernel of ours adds them in rank order in f32 and rounds once. So
//!   results are the host's, bit for bit ([`ProcessGroup`]), and ZeRO's stages agree with each other.
//! - **Memory.** Terms go through staging memory, in pieces of which two are under way: at most four buffers of [`STAGING_BYTES`] for a
//!   group that reduces, made when first needed and kept.
//! - **Order.** Memory of buffers orders itself by its log. Memory without one, libtorch's, is taken as the compute stream leaves it,
//!   and the compute stream goes on when the call is through with it. Use such memory from one thread of a rank only: two
//!   threads would order their calls differently on different ranks, and streams would wait for each other in a circle.
//! - **Return.** Calls return when they are queued. What fails later is the world's error, found by a watcher (`watch.rs`) and returned by the
//!   next call.
//! - **Groups** that never see GPU memory have no communicator and cost nothing.
//! - **The host's memory** goes straight to the inner group; memory of both in one call goes as [`crate::staged`] does.

mod api;
mod communicator;
mod group;
mod library;
mod messages;
mod pieces;
mod watch;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use shardwise_device::cuda::{Access, CudaError, Event, Gpu, Priority, Stream};
use shardwise_device::{Buffer, BufferPool, DType, DeviceError, Memory, Place, Slice, SliceMut};
use shardwise_kernels::Processor;
use shardwise_kernels::processor::GpuProcessor;

use self::communicator::{Communicator, Fault, Op, Others, Ticket};
use self::messages::{Direction, Link};
use self::pieces::Pieces;
use self::watch::{Pool, Watcher};
use crate::arguments::{Caller, Demand};
use crate::member::Patience;
use crate::staged::{self, Staged};
use crate::{CommError, Group, Ledger, Operation, ProcessGroup};

pub use library::{Library, Search, Version};

/// Bytes of a staging buffer, unless a caller of [`Nccl::with_staging`] says otherwise.
pub const STAGING_BYTES: usize = 32 << 20;

/// Sums of up to so many bytes are added by every rank, which needs one exchange less than dividing the work.
const DIRECT_BYTES: usize = 64 << 10;

/// A process group over another one, for buffers on GPUs of which each rank has one.
pub struct Nccl {
    inner: Group,
    /// For messages that must not wait, and for calls with memory of the host's.
    staged: Staged,
    shared: Arc<Shared>,
    /// Where NCCL works.
    wire: Stream,
    /// Packs and sums, on a stream of its own.
    sums: Processor,
    sums_stream: Arc<Stream>,
    /// Marks where one stream is, for another to wait there.
    fence: Event,
    /// ... where sums are.
    summed: Event,
    pool: Pool,
    state: Mutex<State>,
}

/// What a rank's groups have together.
struct Shared {
    library: Arc<Library>,
    processor: Arc<GpuProcessor>,
    compute: Arc<Stream>,
    staging_bytes: usize,
    staged: Arc<staged::Shared>,
    watcher: Watcher,
}

/// Where this rank is in the group's sequence of calls. The lock also keeps a second thread out of a call.
struct State {
    num_collectives: u64,
    num_sent: Vec<u64>,
    num_received: Vec<u64>,
    ledger: Ledger,
    communicator: Option<Arc<Communicator>>,
    links: HashMap<(usize, Direction), Link>,
}

/// Where the memory of a call is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Places {
    /// All of it on the host.
    Host,
    /// All of it on this rank's GPU; some of it may keep no log.
    Gpu { is_unlogged: bool },
    /// Some here, some there.
    Both,
}

impl Nccl {
    /// The group of the ranks of `inner` for buffers on the GPU of `processor`, whose kernels it uses. `compute` is the stream in whose
    /// order memory without a log is used.
    ///
    /// # Errors
    /// [`CommError::Device`] if the GPU has no stream or event to give, or `compute` is another GPU's.
    #[allow(clippy::new_ret_no_self, reason = "callers hold groups, whatever the back end")]
    pub fn new(
        inner: Group,
        library: Arc<Library>,
        processor: Arc<GpuProcessor>,
        compute: Arc<Stream>,
    ) -> Result<Group, CommError> {
        Nccl::with_staging(inner, library, processor, compute, STAGING_BYTES)
    }

    /// As [`Nccl::new`], with staging buffers of at most `staging_bytes`, rounded up to hold 256 bytes for each rank. The same on all
    /// ranks.
    ///
    /// # Errors
    /// As [`Nccl::new`].
    pub fn with_staging(
        inner: Group,
        library: Arc<Library>,
        processor: Arc<GpuProcessor>,
        compute: Arc<Stream>,
        staging_bytes: usize,
    ) -> Result<Group, CommError> {
        let staging_bytes = staging_bytes.max(256 * inner.group_size());
        let staged = staged::Shared::new(processor.gpu(), Arc::clone(&compute), staged::PIECE_BYTES);
        let watcher = Watcher::new();
        let shared = Arc::new(Shared { library, processor, compute, staging_bytes, staged, watcher });
        Ok(Arc::new(Nccl::over(inner, shared)?))
    }

    fn over(inner: Group, shared: Arc<Shared>) -> Result<Nccl, CommError> {
        // Checks whose the compute stream is, too.
        let staged = Staged::over(Arc::clone(&inner), Arc::clone(&shared.staged), Operation::Subgroup)?;
        let gpu = shared.processor.gpu();
        let make = || -> Result<_, CudaError> {
            let sums_stream = Arc::new(gpu.stream(Priority::High)?.named("collectives, sums"));
            let sums = shared.processor.on_stream(Arc::clone(&sums_stream))?;
            let event = || shared.watcher.event(gpu);
            let wire = gpu.stream(Priority::High)?.named("collectives");
            Ok((wire, sums_stream, sums, event()?, event()?))
        };
        let (wire, sums_stream, sums, fence, summed) = make().map_err(|error| {
            let error = CommError::device(Operation::Subgroup, inner.name(), error);
            inner.fail(&error);
            error
        })?;
        let pool = Arc::new(Mutex::new(BufferPool::of(Memory::Gpu(gpu.clone()))));
        let zeros = vec![0; inner.group_size()];
        let state = State {
            num_collectives: 0,
            num_sent: zeros.clone(),
            num_received: zeros,
            ledger: Ledger::default(),
            communicator: None,
            links: HashMap::new(),
        };
        let sums = Processor::Gpu(Arc::new(sums));
        let state = Mutex::new(state);
        Ok(Nccl { inner, staged, shared, wire, sums, sums_stream, fence, summed, pool, state })
    }

    fn size(&self) -> usize {
        self.inner.group_size()
    }

    fn gpu(&self) -> &Gpu {
        self.shared.processor.gpu()
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

    /// Runs one call and enters it in the ledger. Of this rank's own error it gets the error as it is; to the others it has given up.
    fn account<T>(
        &self,
        demand: Demand,
        body: impl FnOnce(&mut State) -> Result<T, Fault>,
    ) -> Result<T, CommError> {
        let started = Instant::now();
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        self.inner.check()?;
        let Demand { operation, dtype, sent_numel, .. } = demand;
        let result = body(&mut state).map_err(|fault| self.fault(operation, fault))?;
        state.ledger.record(operation, sent_numel, dtype.size_bytes(), started.elapsed());
        Ok(result)
    }

    /// The error of a call. Of this rank's own it is the world's too, as far as there is none.
    fn fault(&self, operation: Operation, fault: Fault) -> CommError {
        let own = match fault {
            Fault::World(error) => return error,
            Fault::Own(error) => error,
            Fault::Device(error) => CommError::device(operation, self.inner.name(), error),
        };
        self.inner.fail(&own);
        own
    }

    /// Where the memory of a call is. Views of nothing are anywhere.
    fn places(&self, demand: &Demand, views: &[Slice<'_>]) -> Result<Places, CommError> {
        let mut somewhere: Vec<_> = views.iter().filter(|view| view.num_bytes() > 0).collect();
        if somewhere.is_empty() {
            somewhere = views.iter().collect();
        }
        let here = Place::Cuda { ordinal: self.gpu().ordinal() };
        let on_host = somewhere.iter().filter(|view| view.place() == Place::Cpu).count();
        match on_host {
            0 => {}
            n if n == somewhere.len() => return Ok(Places::Host),
            _ => return Ok(Places::Both),
        }
        if let Some(elsewhere) = somewhere.iter().find(|view| view.place() != here) {
            let (ordinal, from) = (self.gpu().ordinal(), elsewhere.place());
            let error = DeviceError::from(CudaError::WrongPlaces { ordinal, from, to: from });
            let error = CommError::device(demand.operation, self.inner.name(), error);
            self.inner.check()?;
            self.inner.fail(&error);
            return Err(error);
        }
        let is_unlogged = somewhere.iter().any(|view| view.num_bytes() > 0 && !view.is_logged());
        Ok(Places::Gpu { is_unlogged })
    }

    /// Runs a collective on the inner group, or through host memory.
    fn elsewhere<T>(
        &self,
        demand: Demand,
        call: impl FnOnce(&dyn ProcessGroup) -> Result<T, CommError>,
    ) -> Result<T, CommError> {
        self.account(demand, |state| {
            state.num_collectives += 1;
            // Which counts, orders and goes straight to the inner group as it has to.
            call(&self.staged).map_err(Fault::World)
        })
    }

    /// Runs a collective on the GPU.
    fn collective(
        &self,
        demand: Demand,
        is_unlogged: bool,
        body: impl FnOnce(&mut Exchange<'_>) -> Result<(), Fault>,
    ) -> Result<(), CommError> {
        self.account(demand, |state| {
            let call = demand.call(state.num_collectives);
            state.num_collectives += 1;
            let number = self.inner.post(&call);
            let ticket = Ticket { call, others: Others::All(number), patience: Patience::Deadline };
            ticket.check(&self.inner).map_err(Fault::World)?;
            if demand.numel == 0 {
                return Ok(());
            }
            if self.size() == 1 {
                let mut alone = Exchange { group: self, ticket, wired: None };
                return self.in_order(demand.operation, is_unlogged, None, || body(&mut alone));
            }
            let communicator = self.communicator(state, &ticket)?;
            let watched = self.shared.watcher.queueing(&communicator, ticket).map_err(Fault::Own)?;
            let event = || self.shared.watcher.event(self.gpu());
            let (started, over) = (event()?, event()?);
            self.in_order(demand.operation, is_unlogged, Some(&communicator), || {
                let wired =
                    Some(Wired { communicator: &communicator, started: &started, has_started: false });
                let mut exchange = Exchange { group: self, ticket, wired };
                body(&mut exchange)?;
                Ok(over.record(&self.wire)?)
            })?;
            watched.queued((started, over), None);
            Ok(())
        })
    }

    /// Runs a call among the compute stream's work, if some memory has no log. After an error nothing of it goes on.
    fn in_order(
        &self,
        operation: Operation,
        is_unlogged: bool,
        communicator: Option<&Communicator>,
        body: impl FnOnce() -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        let streams = [&self.wire, &*self.sums_stream];
        let queued = || {
            if is_unlogged {
                self.fence.record(&self.shared.compute)?;
                streams.iter().try_for_each(|stream| stream.wait(&self.fence))?;
            }
            body()?;
            if is_unlogged {
                for stream in streams {
                    self.fence.record(stream)?;
                    self.shared.compute.wait(&self.fence)?;
                }
            }
            Ok(())
        };
        queued().map_err(|fault| {
            // First of all the others hear of it, so that they do not wait.
            let error = self.fault(operation, fault);
            // Some of it may be on streams, where the others may never come; and the caller may free the memory.
            if let Some(communicator) = communicator {
                communicator.abort();
            }
            if is_unlogged {
                let waited = streams.iter().try_for_each(|stream| stream.synchronize());
                // If this fails as well, the GPU has, and nothing goes on there.
                let _ = waited.or_else(|_| self.gpu().synchronize());
            }
            Fault::World(error)
        })
    }

    /// The group's communicator, made when it is first needed: all ranks are in the same call then.
    fn communicator(&self, state: &mut State, ticket: &Ticket) -> Result<Arc<Communicator>, Fault> {
        if let Some(communicator) = &state.communicator {
            return Ok(Arc::clone(communicator));
        }
        // A rank that does not come is named with the call that it does not come to.
        ticket.gather(&self.inner).map_err(Fault::World)?;
        let library = &self.shared.library;
        let (me, size) = (self.inner.group_rank(), self.size());
        let mut id = api::UniqueId([0; api::ID_BYTES]);
        if me == 0 {
            id = communicator::unique_id(library, self.gpu(), &self.inner, &ticket.call)?;
        }
        self.inner.broadcast(SliceMut::of(&mut id.0), 0).map_err(Fault::World)?;
        let made = Communicator::new(library, self.gpu(), &self.inner, id, (me, size), ticket)?;
        state.communicator = Some(Arc::clone(&made));
        Ok(made)
    }

    /// Staging memory for `num_bytes`, of a few sizes so that it is used again.
    fn staging(&self, num_bytes: usize) -> Result<Buffer, Fault> {
        let size = num_bytes.next_power_of_two().max(4096).min(self.shared.staging_bytes.max(num_bytes));
        Ok(self.pool.lock().unwrap_or_else(PoisonError::into_inner).take(DType::U8, size)?)
    }

    fn give_back(&self, buffers: impl IntoIterator<Item = Buffer>) {
        let mut pool = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
        buffers.into_iter().for_each(|buffer| pool.give_back(buffer));
    }

    /// Runs a sum piece by piece; see [`Pieces`].
    fn run(&self, exchange: &mut Exchange<'_>, mut pieces: impl Pieces) -> Result<(), Fault> {
        let mut slots = Vec::new();
        let result = pieces::walk(self, exchange, &mut slots, &mut pieces);
        self.give_back(slots.into_iter().flat_map(pieces::Slot::into_buffers));
        result
    }

    /// Gathers the ranks' equal pieces of `full`, of which each has its own in place.
    fn gather_op(&self, full: Slice<'_>) -> Op {
        let num_bytes = full.num_bytes() / self.size();
        let own =
            full.cast(DType::U8).range(self.group_rank() * num_bytes..(self.group_rank() + 1) * num_bytes);
        Op::AllGather { from: own.as_ptr(), into: starts_at(full), num_bytes }
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        let links = state.links.drain().map(|(_, link)| link.into_communicator());
        for communicator in state.communicator.take().into_iter().chain(links) {
            self.shared.watcher.close(&communicator);
        }
    }
}

/// A collective that is being queued.
struct Exchange<'a> {
    group: &'a Nccl,
    ticket: Ticket,
    /// None in a group of one.
    wired: Option<Wired<'a>>,
}

struct Wired<'a> {
    communicator: &'a Communicator,
    /// Marks where all that the first exchange waits for is over.
    started: &'a Event,
    has_started: bool,
}

impl Exchange<'_> {
    /// Queues calls of NCCL on the wire. `uses` are all views that they touch.
    ///
    /// # Safety
    /// The calls touch nothing but `uses`, as these say.
    unsafe fn run(&mut self, ops: &[Op], uses: &[(Slice<'_>, Access)]) -> Result<(), Fault> {
        let wire = &self.group.wire;
        for (view, access) in uses {
            wire.wait_for(*view, *access)?;
        }
        let wired = self.wired.as_mut().expect("a group of one exchanges nothing");
        if !wired.has_started {
            wired.started.record(wire)?;
            wired.has_started = true;
        }
        let span = wire.span(|| "exchange by NCCL".to_owned())?;
        // SAFETY: views are valid until the uses that are noted below are over, or used in the order of the compute stream, which
        // the wire is part of (`in_order`).
        unsafe { wired.communicator.run(ops, wire, &self.ticket)? };
        drop(span);
        for (view, access) in uses {
            wire.note(*view, *access)?;
        }
        Ok(())
    }
}

fn starts_at(view: Slice<'_>) -> *mut u8 {
    view.as_ptr().cast_mut()
}
