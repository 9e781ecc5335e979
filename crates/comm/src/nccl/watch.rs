//! The watcher: a thread that looks after calls that are on streams.
//!
//! A rank's calls return when they are queued, and then nobody waits for them: a rank that dies would leave the others' streams
//! waiting for good, and whoever waits for those. So each rank has a thread that, while calls are under way, looks every few
//! milliseconds whether the world has failed, whether NCCL reports an error from the background, whether another rank makes another
//! call, and how long a call has been at it. If one of these is so, the world has failed, and all communicators of the rank
//! are aborted: streams come free.
//!
//! ```text
//! stream    ─ waits for the computation ─●started ─ exchange ─●over ─
//! watcher                                 └─ from here on the deadline runs
//! ```

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use shardwise_device::cuda::{CudaError, Event, Gpu, Timing};
use shardwise_device::{Buffer, BufferPool};

use super::communicator::{Closed, Communicator, Fault, Ticket, abort_all};
use crate::CommError;
use crate::member::Patience;

/// How often it looks.
const TICK: Duration = Duration::from_millis(5);

/// Looks after a rank's calls, in all its groups.
pub(super) struct Watcher {
    watched: Arc<Watched>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Default)]
struct Watched {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    flights: Vec<Flight>,
    spare: Vec<Event>,
    next_id: u64,
    stopped: bool,
}

/// Where buffers of a call go when it is over.
pub(super) type Pool = Arc<Mutex<BufferPool>>;

/// A call on a stream.
struct Flight {
    id: u64,
    communicator: Arc<Communicator>,
    ticket: Ticket,
    progress: Progress,
    /// Since when the communicator has reported an error.
    ailing: Option<Instant>,
}

enum Progress {
    /// The host queues it. It looks at the clock itself, so this one is for a driver that does not return.
    Queueing(Instant),
    Queued {
        started: Event,
        over: Event,
        since: Option<Instant>,
        /// Memory that must not be used before the call is over.
        kept: Option<(Buffer, Pool)>,
    },
}

/// A call that is being queued. Dropped without [`Watcher::queued`], it is watched no more.
pub(super) struct Queueing<'a> {
    watcher: &'a Watcher,
    id: u64,
}

impl Watcher {
    pub(super) fn new() -> Self {
        Watcher { watched: Arc::default(), thread: Mutex::default() }
    }

    /// An event to mark a place in a stream.
    pub(super) fn event(&self, gpu: &Gpu) -> Result<Event, CudaError> {
        let spare = self.watched.state().spare.pop();
        spare.map_or_else(|| gpu.event(Timing::Untimed), Ok)
    }

    /// Watches a call that is about to be queued.
    ///
    /// # Errors
    /// [`CommError::System`] if no thread can be started.
    pub(super) fn queueing(
        &self,
        communicator: &Arc<Communicator>,
        ticket: Ticket,
    ) -> Result<Queueing<'_>, CommError> {
        self.start()?;
        let mut state = self.watched.state();
        let id = state.next_id;
        state.next_id += 1;
        let (communicator, progress) = (Arc::clone(communicator), Progress::Queueing(Instant::now()));
        state.flights.push(Flight { id, communicator, ticket, progress, ailing: None });
        // With others under way it looks soon anyway.
        if state.flights.len() == 1 {
            self.watched.changed.notify_all();
        }
        drop(state);
        Ok(Queueing { watcher: self, id })
    }

    fn start(&self) -> Result<(), CommError> {
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if thread.is_none() {
            let watched = Arc::clone(&self.watched);
            let started =
                std::thread::Builder::new().name("nccl-watcher".into()).spawn(move || watched.run());
            let refused = |error| CommError::system("start a thread that watches GPUs", error);
            *thread = Some(started.map_err(refused)?);
        }
        Ok(())
    }

    /// Ends a communicator when its calls are over, and watches them no more.
    pub(super) fn close(&self, communicator: &Arc<Communicator>) {
        let is_its = |flight: &mut Flight| Arc::ptr_eq(&flight.communicator, communicator);
        // Out of the watcher's sight, for which a communicator without handle is one that failed.
        let flights: Vec<Flight> = self.watched.state().flights.extract_if(.., is_its).collect();
        let is_endless = flights.iter().any(|flight| flight.ticket.patience == Patience::Endless);
        let patience = if is_endless { Patience::Endless } else { Patience::Deadline };
        if communicator.close(patience) == Closed::Overdue
            && let Some(flight) = flights.first()
        {
            flight.ticket.overdue(communicator.group(), communicator.group().deadline());
        }
        for flight in flights {
            flight.retire();
        }
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.watched.state().stopped = true;
        self.watched.changed.notify_all();
        let thread = self.thread.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            // It does not panic on its own account; if it did, there is nobody left to watch for.
            let _ = thread.join();
        }
    }
}

impl Queueing<'_> {
    /// The call is between two events on a stream. `kept` goes to its pool when it is over.
    pub(super) fn queued(self, (started, over): (Event, Event), kept: Option<(Buffer, Pool)>) {
        let mut state = self.watcher.watched.state();
        match state.flights.iter_mut().find(|flight| flight.id == self.id) {
            Some(flight) => flight.progress = Progress::Queued { started, over, since: None, kept },
            // The world has failed meanwhile, and the communicator is aborted.
            None => {
                drop(state);
                drop(kept);
            }
        }
    }
}

impl Drop for Queueing<'_> {
    fn drop(&mut self) {
        let mut state = self.watcher.watched.state();
        let id = self.id;
        state.flights.retain(|flight| flight.id != id || matches!(flight.progress, Progress::Queued { .. }));
    }
}

impl Flight {
    /// Gives back what was kept.
    fn retire(self) -> Option<[Event; 2]> {
        match self.progress {
            Progress::Queueing(_) => None,
            Progress::Queued { started, over, kept, .. } => {
                if let Some((buffer, pool)) = kept {
                    pool.lock().unwrap_or_else(PoisonError::into_inner).give_back(buffer);
                }
                Some([started, over])
            }
        }
    }

    /// Whether it is over; or what is wrong.
    fn look(&mut self) -> Result<bool, CommError> {
        let Flight { communicator, ticket, progress, ailing, .. } = self;
        let group = communicator.group();
        let device =
            |error: CudaError| group.fail(&CommError::device(ticket.call.operation, group.name(), error));
        let waited = match progress {
            Progress::Queueing(since) => since.elapsed().saturating_sub(group.deadline()),
            Progress::Queued { started, over, since, .. } => {
                if over.is_over().map_err(device)? {
                    return Ok(true);
                }
                if since.is_none() && started.is_over().map_err(device)? {
                    *since = Some(Instant::now());
                }
                if let Some(fault) = communicator.ailment(&ticket.call, ailing) {
                    return Err(match fault {
                        Fault::World(error) => error,
                        Fault::Own(error) => group.fail(&error),
                        Fault::Device(error) => {
                            group.fail(&CommError::device(ticket.call.operation, group.name(), error))
                        }
                    });
                }
                since.map_or(Duration::ZERO, |since| since.elapsed())
            }
        };
        ticket.check(group)?;
        match ticket.patience == Patience::Deadline && waited > group.deadline() {
            true => Err(ticket.overdue(group, group.deadline())),
            false => Ok(false),
        }
    }
}

impl Watched {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let mut state = self.state();
        while !state.stopped {
            if state.flights.is_empty() {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let failed = state.look();
            if failed.is_empty() {
                let waited = self.changed.wait_timeout(state, TICK);
                state = waited.unwrap_or_else(PoisonError::into_inner).0;
                continue;
            }
            // Not with the lock: it may take a while, and buffers wait for their streams before they go.
            drop(state);
            abort_all(failed.iter().map(|flight| &*flight.communicator));
            drop(failed);
            state = self.state();
        }
    }
}

impl State {
    /// Looks at every call. What is over goes; what has failed comes out.
    fn look(&mut self) -> Vec<Flight> {
        let mut failed = Vec::new();
        let mut at = 0;
        while at < self.flights.len() {
            match self.flights[at].look() {
                Ok(false) => at += 1,
                Ok(true) => self.spare.extend(self.flights.swap_remove(at).retire().into_iter().flatten()),
                Err(_) => failed.push(self.flights.swap_remove(at)),
            }
        }
        failed
    }
}
