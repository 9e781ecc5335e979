//! What waiting costs: how long a stream stood still for others, and how long a thread waited for a GPU.
//!
//! A stream that waits for another, or for a host that is busy elsewhere, has nothing to run meanwhile. Such moments stand between two
//! events that keep time:
//!
//! ```text
//! compute   ─ layer 3 ─●e1 ........ ●e2 ─ layer 4 ─
//! gather    ─ unit 4 ───────────┘ waited for
//! ```
//!
//! Work that was queued before is over at `e1`, so what lies between is time that nothing hides.

use std::cell::Cell;
use std::collections::VecDeque;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use super::api::Handle;
use super::gpu::lock;
use super::{CudaError, Event, Gpu, Stream, Timing};

/// From this many moments on, those that are over are added up: their events serve again.
const MANY: usize = 64;

/// The moments of one stream.
#[derive(Default)]
pub(super) struct Stalls(Mutex<State>);

#[derive(Default)]
struct State {
    /// A moment is under way. Others within it are part of it.
    open: bool,
    /// Beginnings and ends of moments, in the stream's order.
    moments: VecDeque<(Event, Event)>,
    spare: Vec<Event>,
    total: Duration,
}

impl State {
    fn event(&mut self, gpu: &Gpu) -> Result<Event, CudaError> {
        self.spare.pop().map_or_else(|| gpu.event(Timing::Timed), Ok)
    }

    /// Adds up the moments that are over.
    fn settle(&mut self) -> Result<(), CudaError> {
        while let Some((start, end)) = self.moments.pop_front() {
            if !end.is_over()? {
                self.moments.push_front((start, end));
                break;
            }
            self.total += Duration::from_secs_f64(f64::from(end.elapsed_ms(&start)?.max(0.0)) / 1e3);
            self.spare.extend([start, end]);
        }
        Ok(())
    }
}

/// A moment in which a stream may stand still. It ends with the guard.
#[must_use]
#[derive(Default)]
pub struct StallGuard<'a>(Option<Moment<'a>>);

struct Moment<'a> {
    stalls: &'a Stalls,
    gpu: &'a Gpu,
    queue: Handle,
    start: Event,
}

impl Stalls {
    /// Begins a moment of `queue`, if none is under way.
    pub(super) fn begin<'a>(&'a self, gpu: &'a Gpu, queue: Handle) -> Result<StallGuard<'a>, CudaError> {
        let mut state = lock(&self.0);
        if state.open {
            return Ok(StallGuard(None));
        }
        let start = state.event(gpu)?;
        start.record_on(queue)?;
        state.open = true;
        Ok(StallGuard(Some(Moment { stalls: self, gpu, queue, start })))
    }
}

impl Stream {
    /// The same, measuring how long it stands still ([`Stream::stalled`]).
    #[must_use]
    pub fn measuring_stalls(mut self) -> Stream {
        self.queue_mut().measure_stalls();
        self
    }

    /// Begins a moment in which its thread queues nothing here, as it waits for someone. Where the stream itself waits, for uses of memory on
    /// others or for events, such moments begin and end by themselves. On a stream that does not measure them nothing happens.
    ///
    /// # Errors
    /// What the driver says.
    pub fn stall(&self) -> Result<StallGuard<'_>, CudaError> {
        self.queue().stall(self.gpu())
    }

    /// How long it stood still so far, as far as the GPU has got. A moment in which it did not have to counts some microseconds.
    ///
    /// # Errors
    /// What the driver says.
    pub fn stalled(&self) -> Result<Duration, CudaError> {
        let Some(stalls) = self.queue().stalls() else { return Ok(Duration::ZERO) };
        let mut state = lock(&stalls.0);
        state.settle()?;
        Ok(state.total)
    }
}

impl Drop for StallGuard<'_> {
    fn drop(&mut self) {
        let Some(Moment { stalls, gpu, queue, start }) = self.0.take() else { return };
        let mut state = lock(&stalls.0);
        state.open = false;
        // A moment that cannot be closed is left out: whoever waits for the stream hears why.
        let Ok(end) = state.event(gpu) else { return };
        if end.record_on(queue).is_ok() {
            state.moments.push_back((start, end));
            if state.moments.len() >= MANY {
                let _ = state.settle();
            }
        }
    }
}

thread_local! {
    static WAITED: Cell<Duration> = const { Cell::new(Duration::ZERO) };
}

/// How long this thread has waited for GPUs so far, in calls of this crate and in [`wait_on_host`]. A thread that hardly waits is late with new work: its GPU is the
/// one that waits.
pub fn host_waited() -> Duration {
    WAITED.get()
}

/// Counts the time of `wait`, in which this thread does nothing but wait for a GPU.
pub fn wait_on_host<T>(wait: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = wait();
    WAITED.set(WAITED.get() + start.elapsed());
    result
}
