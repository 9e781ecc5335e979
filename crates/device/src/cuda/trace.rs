//! What streams did, and when: for timelines.
//!
//! While a [`Trace`] lives, every copy, fill and kernel that is queued on any stream of the GPU stands between two events that keep
//! time; so does what a [`SpanGuard`] covers, such as a layer of libtorch's. Without one, nothing is recorded and a call
//! costs one look at a flag.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Instant;

use super::gpu::lock;
use super::{CudaError, Event, Gpu, Stream, Timing};

/// Work on a stream.
#[derive(Debug, Clone, PartialEq)]
pub struct Span {
    /// The stream's name.
    pub stream: &'static str,
    /// What was done.
    pub name: String,
    /// Microseconds from the beginning of the trace.
    pub start_us: f64,
    /// Microseconds that it took, waits of the stream for others not counted.
    pub duration_us: f64,
}

/// The recording of a GPU's work, from its making to [`Trace::finish`]. One at a time: a later one takes over.
#[derive(Debug)]
pub struct Trace {
    gpu: Gpu,
    recording: Arc<Recording>,
    /// When the host saw the event that times count from.
    began: Instant,
}

/// What has been queued since.
#[derive(Debug)]
pub(super) struct Recording {
    origin: Event,
    spans: Mutex<Vec<Recorded>>,
}

#[derive(Debug)]
struct Recorded {
    stream: &'static str,
    name: String,
    start: Event,
    end: Event,
}

/// Where a GPU finds its recording, if there is one. It does not keep it: events keep the GPU.
#[derive(Debug, Default)]
pub(super) struct Slot {
    is_on: AtomicBool,
    recording: Mutex<Weak<Recording>>,
}

impl Slot {
    fn set(&self, recording: &Weak<Recording>) {
        *lock(&self.recording) = recording.clone();
        self.is_on.store(recording.strong_count() > 0, Ordering::Release);
    }

    /// The recording, if one is under way.
    pub fn get(&self) -> Option<Arc<Recording>> {
        self.is_on.load(Ordering::Acquire).then(|| lock(&self.recording).upgrade()).flatten()
    }
}

impl Gpu {
    /// Begins to record.
    ///
    /// # Errors
    /// What the driver says.
    pub fn trace(&self) -> Result<Trace, CudaError> {
        self.synchronize()?;
        let origin = self.event(Timing::Timed)?;
        let stream = self.stream(super::Priority::Normal)?;
        origin.record(&stream)?;
        origin.synchronize()?;
        let began = Instant::now();
        let recording = Arc::new(Recording { origin, spans: Mutex::default() });
        self.trace_slot().set(&Arc::downgrade(&recording));
        Ok(Trace { gpu: self.clone(), recording, began })
    }
}

impl Trace {
    /// The time of the host that spans count from, but for the microseconds that it took to hear of the event.
    pub fn began(&self) -> Instant {
        self.began
    }

    /// Waits for all work and says what it was, in the order it was queued.
    ///
    /// # Errors
    /// What the driver says.
    pub fn finish(self) -> Result<Vec<Span>, CudaError> {
        self.gpu.trace_slot().set(&Weak::new());
        self.gpu.synchronize()?;
        let origin = &self.recording.origin;
        let spans = std::mem::take(&mut *lock(&self.recording.spans));
        let told = spans.into_iter().map(|Recorded { stream, name, start, end }| {
            let start_us = f64::from(start.elapsed_ms(origin)?) * 1e3;
            let duration_us = f64::from(end.elapsed_ms(&start)?) * 1e3;
            Ok(Span { stream, name, start_us, duration_us })
        });
        told.collect()
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        self.gpu.trace_slot().set(&Weak::new());
    }
}

/// A span that has begun: it ends with the guard.
#[must_use]
#[derive(Debug)]
pub struct SpanGuard<'a> {
    open: Option<Open<'a>>,
}

#[derive(Debug)]
struct Open<'a> {
    stream: &'a Stream,
    recording: Arc<Recording>,
    name: String,
    start: Event,
    end: Event,
}

impl Stream {
    /// Covers what is queued until the guard goes, for work that the device layer does not queue itself. Nothing if no trace is
    /// under way.
    ///
    /// # Errors
    /// What the driver says.
    pub fn span(&self, name: impl FnOnce() -> String) -> Result<SpanGuard<'_>, CudaError> {
        let Some(recording) = self.gpu().trace_slot().get() else { return Ok(SpanGuard { open: None }) };
        let (start, end) = (self.gpu().event(Timing::Timed)?, self.gpu().event(Timing::Timed)?);
        start.record(self)?;
        Ok(SpanGuard { open: Some(Open { stream: self, recording, name: name(), start, end }) })
    }
}

impl Drop for SpanGuard<'_> {
    fn drop(&mut self) {
        let Some(Open { stream, recording, name, start, end }) = self.open.take() else { return };
        // A span that cannot be closed is left out: whoever waits for the stream hears why.
        if end.record(stream).is_ok() {
            recording.add(stream.name(), name, start, end);
        }
    }
}

impl Recording {
    fn add(&self, stream: &'static str, name: String, start: Event, end: Event) {
        let recorded = Recorded { stream, name, start, end };
        self.spans.lock().unwrap_or_else(PoisonError::into_inner).push(recorded);
    }

    /// A pair of events for work that is about to be queued.
    pub fn events(gpu: &Gpu) -> Result<(Event, Event), CudaError> {
        Ok((gpu.event(Timing::Timed)?, gpu.event(Timing::Timed)?))
    }

    /// Work that stands between its two events.
    pub fn keep(&self, stream: &'static str, name: String, (start, end): (Event, Event)) {
        self.add(stream, name, start, end);
    }
}
