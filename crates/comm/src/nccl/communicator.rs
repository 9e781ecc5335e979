//! One of NCCL's communicators, on one rank: made with the others, used without ever blocking, ended in good order or aborted.
//!
//! ```text
//! new      unique id, from the first rank ─ ncclCommInitRankConfig ─ ask until it is there
//! run      ncclGroupStart, calls, ncclGroupEnd ─ ask until they are on the stream
//! close    ncclCommFinalize ─ ask until it is over ─ ncclCommDestroy
//! abort    ncclCommAbort: what is on streams ends, done or not
//! ```
//!
//! Whoever asks looks also whether the world has failed, whether another rank makes another call, and at the clock. All calls are made
//! with the handle locked, and nobody sleeps with it locked: so [`super::watch`] can abort between any two questions.

use std::ffi::{CStr, c_int};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use shardwise_device::DeviceError;
use shardwise_device::cuda::{CudaError, Gpu, Stream};
use shardwise_kernels::processor::ProcessorError;

use super::api::{self, Api, Code, Config, Handle, IN_PROGRESS, SUCCESS, UniqueId};
use super::library::Library;
use crate::arguments::Demand;
use crate::member::Patience;
use crate::{Call, CommError, Group};

/// An error from the background may be the first sign of a rank that died. For so long the world may say so.
const GRACE: Duration = Duration::from_secs(1);

/// What a call can meet.
pub(super) enum Fault {
    /// The world's error.
    World(CommError),
    /// This rank's own.
    Own(CommError),
    /// Of this rank's own, memory, a GPU or its kernels.
    Device(ProcessorError),
}

impl From<CudaError> for Fault {
    fn from(error: CudaError) -> Self {
        Fault::Device(error.into())
    }
}

impl From<DeviceError> for Fault {
    fn from(error: DeviceError) -> Self {
        Fault::Device(error.into())
    }
}

impl From<ProcessorError> for Fault {
    fn from(error: ProcessorError) -> Self {
        Fault::Device(error)
    }
}

/// Whom a call waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Others {
    /// All ranks of the group, which show that they have come by posting a call of this number.
    All(u64),
    /// One, of the world.
    One(usize),
    /// One that has said already that it comes.
    Ready,
}

/// A call that is under way.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ticket {
    pub(super) call: Call,
    pub(super) others: Others,
    pub(super) patience: Patience,
}

impl Ticket {
    /// The error of a call that has taken `waited`, now the world's.
    pub(super) fn overdue(&self, group: &Group, waited: Duration) -> CommError {
        let missing = match self.others {
            Others::All(number) => group.missing(number, &self.call),
            Others::One(rank) => Ok(Some(rank)),
            Others::Ready => Ok(None),
        };
        let (waiting_rank, call) = (group.ranks()[group.group_rank()], self.call);
        let name = group.name().to_owned();
        match missing {
            Err(error) => error,
            Ok(Some(rank)) => {
                group.fail(&CommError::Stalled { rank, waiting_rank, group: name, call, waited })
            }
            Ok(None) => group.fail(&CommError::Stuck { rank: waiting_rank, group: name, call, waited }),
        }
    }

    /// Waits until all have come, as far as they say so.
    pub(super) fn gather(&self, group: &Group) -> Result<(), CommError> {
        let Others::All(number) = self.others else { return Ok(()) };
        let (started, mut pause) = (Instant::now(), Pause::default());
        loop {
            group.check()?;
            if group.missing(number, &self.call)?.is_none() {
                return Ok(());
            }
            if started.elapsed() > group.deadline() {
                return Err(self.overdue(group, group.deadline()));
            }
            pause.rest();
        }
    }

    /// # Errors
    /// The world's, and what the others' calls say.
    pub(super) fn check(&self, group: &Group) -> Result<(), CommError> {
        group.check()?;
        match self.others {
            Others::All(number) => group.missing(number, &self.call).map(drop),
            _ => Ok(()),
        }
    }
}

/// One of the calls that are made together. Bytes are in this GPU's memory.
#[derive(Debug, Clone, Copy)]
pub(super) enum Op {
    Send {
        from: *const u8,
        num_bytes: usize,
        to: usize,
    },
    Recv {
        into: *mut u8,
        num_bytes: usize,
        from: usize,
    },
    /// `num_bytes` of each rank.
    AllGather {
        from: *const u8,
        into: *mut u8,
        num_bytes: usize,
    },
    Broadcast {
        buffer: *mut u8,
        num_bytes: usize,
        root: usize,
    },
}

/// How a communicator ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Closed {
    /// All it had on streams is done.
    InOrder,
    /// After an error.
    Failed,
    /// Something was not done within the deadline.
    Overdue,
}

/// A rank's communicator.
pub(super) struct Communicator {
    library: Arc<Library>,
    gpu: Gpu,
    /// The host's group: its ranks, or some of them, have this communicator.
    group: Group,
    /// None once it is destroyed or aborted.
    handle: Mutex<Option<Handle>>,
}

/// An id for a new communicator, which its other ranks have to get.
pub(super) fn unique_id(library: &Library, gpu: &Gpu, group: &Group, call: &Call) -> Result<UniqueId, Fault> {
    let mut id = UniqueId([0; api::ID_BYTES]);
    // SAFETY: writes an id to `id`.
    let code = gpu.with_context(|| unsafe { (library.api().unique_id)(&mut id) })?;
    match code {
        SUCCESS => Ok(id),
        _ => Err(Fault::Own(error(group, call, "ncclGetUniqueId", library.text(code)))),
    }
}

fn error(group: &Group, call: &Call, function: &'static str, problem: String) -> CommError {
    CommError::Nccl {
        operation: call.operation,
        group: group.name().to_owned(),
        rank: group.ranks()[group.group_rank()],
        call: function,
        problem,
    }
}

impl Communicator {
    /// Rank `rank` of `size`, with the others that have the same id.
    pub(super) fn new(
        library: &Arc<Library>,
        gpu: &Gpu,
        group: &Group,
        id: UniqueId,
        (rank, size): (usize, usize),
        ticket: &Ticket,
    ) -> Result<Arc<Self>, Fault> {
        let (mut handle, mut config) = (Handle(std::ptr::null_mut()), Config::non_blocking());
        let number = |number: usize| c_int::try_from(number).expect("fewer ranks than an integer counts");
        let (rank, size) = (number(rank), number(size));
        let code = gpu.with_context(|| {
            // SAFETY: writes a handle; the configuration is laid out as it says, alive during the call, which copies it.
            unsafe { (library.api().init_rank)(&mut handle, size, id, rank, &mut config) }
        })?;
        let made = Arc::new(Communicator {
            library: Arc::clone(library),
            gpu: gpu.clone(),
            group: Arc::clone(group),
            handle: Mutex::new((!handle.0.is_null()).then_some(handle)),
        });
        if code != SUCCESS && code != IN_PROGRESS {
            let problem = made.problem(code);
            made.abort();
            return Err(Fault::Own(error(group, &ticket.call, "ncclCommInitRankConfig", problem)));
        }
        match made.settle("ncclCommInitRankConfig", ticket) {
            Ok(()) => Ok(made),
            Err(fault) => {
                made.abort();
                Err(fault)
            }
        }
    }

    /// Makes calls together, and returns when they are on the stream.
    ///
    /// After an error some may be there or not: then the communicator has to be aborted.
    ///
    /// # Safety
    /// Memory of the calls is valid on this GPU until the stream is past them, and used in the stream's order.
    pub(super) unsafe fn run(&self, ops: &[Op], stream: &Stream, ticket: &Ticket) -> Result<(), Fault> {
        if ops.is_empty() {
            return Ok(());
        }
        let queued = {
            let handle = self.handle();
            let Some(handle) = *handle else { return Err(self.gone(&ticket.call)) };
            self.gpu.with_context(|| queue(self.library.api(), handle, ops, stream))?
        };
        if let Err((function, code)) = queued {
            return Err(Fault::Own(error(&self.group, &ticket.call, function, self.problem(code))));
        }
        self.settle("ncclGroupEnd", ticket)
    }

    /// Asks until what was begun is done.
    fn settle(&self, function: &'static str, ticket: &Ticket) -> Result<(), Fault> {
        let started = Instant::now();
        let mut pause = Pause::default();
        loop {
            match self.state(&ticket.call)? {
                SUCCESS => return Ok(()),
                IN_PROGRESS => ticket.check(&self.group).map_err(Fault::World)?,
                code => {
                    let own = error(&self.group, &ticket.call, function, self.problem(code));
                    return Err(self.after_grace(own));
                }
            }
            let waited = started.elapsed();
            if ticket.patience == Patience::Deadline && waited > self.group.deadline() {
                return Err(Fault::World(ticket.overdue(&self.group, self.group.deadline())));
            }
            pause.rest();
        }
    }

    /// The world's error, if one comes soon, else this one.
    fn after_grace(&self, own: CommError) -> Fault {
        let started = Instant::now();
        while started.elapsed() < self.grace() {
            if let Err(error) = self.group.check() {
                return Fault::World(error);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Fault::Own(own)
    }

    fn grace(&self) -> Duration {
        GRACE.min(self.group.deadline() / 4)
    }

    fn state(&self, call: &Call) -> Result<Code, Fault> {
        let handle = self.handle();
        let Some(handle) = *handle else { return Err(self.gone(call)) };
        let mut state = SUCCESS;
        // SAFETY: the handle is alive, as it is there; writes one result.
        let code =
            self.gpu.with_context(|| unsafe { (self.library.api().async_error)(handle, &mut state) })?;
        match code {
            SUCCESS => Ok(state),
            code => {
                let problem = self.library.text(code);
                Err(Fault::Own(error(&self.group, call, "ncclCommGetAsyncError", problem)))
            }
        }
    }

    /// An error from the background, if there is one that has lasted for the grace since `first`.
    pub(super) fn ailment(&self, call: &Call, first: &mut Option<Instant>) -> Option<Fault> {
        match self.state(call) {
            Ok(SUCCESS | IN_PROGRESS) => None,
            Ok(code) if first.get_or_insert_with(Instant::now).elapsed() >= self.grace() => {
                Some(Fault::Own(error(&self.group, call, "ncclCommGetAsyncError", self.problem(code))))
            }
            Ok(_) => None,
            Err(fault) => Some(fault),
        }
    }

    /// The fault of a call on a communicator that was aborted meanwhile, which is done when the world has failed.
    fn gone(&self, call: &Call) -> Fault {
        match self.group.check() {
            Err(error) => Fault::World(error),
            Ok(()) => {
                let problem = "the communicator was aborted after an earlier error".to_owned();
                Fault::Own(error(&self.group, call, "ncclCommAbort", problem))
            }
        }
    }

    /// NCCL's words for a result, and what it remembers of the last error. Without the handle locked.
    fn problem(&self, code: Code) -> String {
        let text = self.library.text(code);
        let Some(handle) = *self.handle() else { return text };
        // SAFETY: the handle is alive; a text that lives as long as it does, or none.
        let last = unsafe { (self.library.api().last_error)(handle) };
        if last.is_null() {
            return text;
        }
        // SAFETY: zero-terminated, and copied before the handle can go.
        let last = unsafe { CStr::from_ptr(last) }.to_string_lossy();
        match last.trim() {
            "" => text,
            last => format!("{text} ({last})"),
        }
    }

    /// Ends it with what is on streams, done or not.
    pub(super) fn abort(&self) {
        abort_all([self]);
    }

    /// Ends it when what is on streams is done; or, done or not, when the world has failed or patience is at its end.
    pub(super) fn close(&self, patience: Patience) -> Closed {
        let closed = self.finalize(patience);
        if closed != Closed::InOrder {
            self.abort();
        } else if let Some(handle) = self.handle().take() {
            // SAFETY: alive until now, never used again, and finalized.
            let destroy = || unsafe { (self.library.api().destroy)(handle) };
            let _ = self.gpu.with_context(destroy).or_else(|_| self.gpu.with_context(destroy));
        }
        closed
    }

    fn finalize(&self, patience: Patience) -> Closed {
        if std::thread::panicking() || self.group.check().is_err() {
            return Closed::Failed;
        }
        let begun = {
            let handle = self.handle();
            let Some(handle) = *handle else { return Closed::Failed };
            // SAFETY: the handle is alive.
            self.gpu.with_context(|| unsafe { (self.library.api().finalize)(handle) })
        };
        if !matches!(begun, Ok(SUCCESS | IN_PROGRESS)) {
            return Closed::Failed;
        }
        let (started, mut pause) = (Instant::now(), Pause::default());
        let call = Demand::BARRIER.call(0);
        loop {
            match self.state(&call) {
                Ok(SUCCESS) => return Closed::InOrder,
                Ok(IN_PROGRESS) if self.group.check().is_ok() => {}
                _ => return Closed::Failed,
            }
            if patience == Patience::Deadline && started.elapsed() > self.group.deadline() {
                return Closed::Overdue;
            }
            pause.rest();
        }
    }

    pub(super) fn group(&self) -> &Group {
        &self.group
    }

    fn handle(&self) -> MutexGuard<'_, Option<Handle>> {
        self.handle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Ends communicators of one rank with what they have on streams, done or not. All are told to end before any is waited for: what NCCL
/// frees may wait for all of a GPU's work, that of the others too.
pub(super) fn abort_all<'a>(communicators: impl IntoIterator<Item = &'a Communicator>) {
    let handle = |of: &'a Communicator| Some((of, of.handle().take()?));
    let alive: Vec<_> = communicators.into_iter().filter_map(handle).collect();
    let Some((Communicator { library, gpu, .. }, _)) = alive.first() else { return };
    let api = library.api();
    // What they return helps nobody: the handles are gone either way, and the world has failed.
    let abort = || {
        // SAFETY: takes nothing.
        let is_group = unsafe { (api.group_start)() } == SUCCESS;
        for (_, handle) in &alive {
            // SAFETY: alive until now, and never used again.
            unsafe { (api.abort)(*handle) };
        }
        if is_group {
            // SAFETY: takes nothing; the thread has begun a group.
            unsafe { (api.group_end)() };
        }
    };
    // Entering the context may report an earlier error once.
    let _ = gpu.with_context(abort).or_else(|_| gpu.with_context(abort));
}

impl Drop for Communicator {
    fn drop(&mut self) {
        self.abort();
    }
}

/// Between questions: at first none, then longer and longer ones.
#[derive(Default)]
struct Pause {
    num_questions: u32,
}

impl Pause {
    fn rest(&mut self) {
        self.num_questions += 1;
        match self.num_questions {
            0..50 => std::thread::yield_now(),
            n => std::thread::sleep(Duration::from_micros(u64::from(n).min(1000))),
        }
    }
}

/// Makes the calls as one group; or says which failed.
fn queue(api: &Api, comm: Handle, ops: &[Op], stream: &Stream) -> Result<(), (&'static str, Code)> {
    let check = |function, code| match code {
        SUCCESS | IN_PROGRESS => Ok(()),
        code => Err((function, code)),
    };
    // SAFETY: takes nothing.
    check("ncclGroupStart", unsafe { (api.group_start)() })?;
    let stream = stream.as_raw();
    let rank = |rank: usize| rank as c_int;
    let queued = ops.iter().try_for_each(|op| {
        // SAFETY: the handle is alive and its context current; memory is as `Communicator::run` was promised.
        unsafe {
            match *op {
                Op::Send { from, num_bytes, to } => {
                    let code = (api.send)(from.cast(), num_bytes, api::UINT8, rank(to), comm, stream);
                    check("ncclSend", code)
                }
                Op::Recv { into, num_bytes, from } => {
                    let code = (api.recv)(into.cast(), num_bytes, api::UINT8, rank(from), comm, stream);
                    check("ncclRecv", code)
                }
                Op::AllGather { from, into, num_bytes } => {
                    let code =
                        (api.all_gather)(from.cast(), into.cast(), num_bytes, api::UINT8, comm, stream);
                    check("ncclAllGather", code)
                }
                Op::Broadcast { buffer, num_bytes, root } => {
                    let (buffer, root) = (buffer.cast(), rank(root));
                    let code = (api.broadcast)(buffer, buffer, num_bytes, api::UINT8, root, comm, stream);
                    check("ncclBroadcast", code)
                }
            }
        }
    });
    // Also after an error: the thread's group must not stay open.
    // SAFETY: takes nothing; the thread has begun a group.
    let ended = check("ncclGroupEnd", unsafe { (api.group_end)() });
    queued.and(ended)
}
