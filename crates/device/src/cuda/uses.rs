//! Who uses a piece of memory: the log that keeps streams in order and memory alive.
//!
//! A GPU works later than the host asks. So each buffer of a GPU, and each pinned one, keeps a log of uses: which
//! bytes, read or written, on which stream, and an event that the stream reaches once the use is over.
//!
//! ```text
//! host        copy(a → b) on S1          launch(b → c) on S2          drop(b)
//! S1          ── copy ──● e1
//! S2                     └─ waits e1 ─ kernel ──● e2
//! host                                           └─ waits e1, e2 ─ frees
//! log of b    [write e1]                 [write e1, read e2]          []
//! ```
//!
//! A use waits for the earlier ones that it conflicts with: two uses conflict if their bytes overlap, one of them
//! writes, and they are on different streams. The host waits in the same way before it touches pinned memory, and
//! before memory is freed. Uses of disjoint bytes, and reads, never wait for each other.

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use super::api::{self, Handle};
use super::gpu::lock;
use super::stall::wait_on_host;
use super::{CudaError, Gpu};

/// From this many entries on, a log is searched for uses that are over; then again when it has twice as many as were left.
const LONG_LOG: usize = 32;

/// What is done to memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// It is read.
    Read,
    /// It is written, and perhaps read.
    Write,
}

/// Which queue. Unlike a driver's handle it names no other queue later, on this GPU or another, as long as anyone
/// remembers it: it is an address that stays taken.
#[derive(Clone)]
pub(super) struct Identity(Arc<u8>);

impl Identity {
    pub(super) fn new() -> Self {
        Identity(Arc::new(0))
    }

    fn is(&self, other: &Identity) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// A place in a stream's order: reached once everything queued before is done.
pub(super) struct Mark {
    gpu: Gpu,
    event: Handle,
    /// The queue it is on, and its number there.
    queue: Identity,
    number: u64,
}

impl Mark {
    /// A mark that is still to be recorded.
    pub(super) fn new(gpu: &Gpu, queue: &Identity, number: u64) -> Result<Arc<Mark>, CudaError> {
        Ok(Arc::new(Mark { gpu: gpu.clone(), event: gpu.take_event()?, queue: queue.clone(), number }))
    }

    pub(super) fn event(&self) -> Handle {
        self.event
    }

    /// Waits on the host.
    fn wait(&self) -> Result<(), CudaError> {
        let asked = || "wait for the use of a buffer".to_owned();
        wait_on_host(|| {
            // SAFETY: the event lives as long as this mark; the context is current.
            self.gpu.call("cuEventSynchronize", asked, |api| unsafe { (api.event_synchronize)(self.event) })
        })
    }

    fn is_over(&self) -> bool {
        let asked = || "ask whether a buffer is in use".to_owned();
        // SAFETY: as in `wait`. An error leaves the entry in the log, where the next wait meets it.
        self.gpu.call("cuEventQuery", asked, |api| unsafe { (api.event_query)(self.event) }).is_ok()
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        // Streams that wait on the event have taken note of where it was; it may be recorded anew.
        self.gpu.give_event_back(self.event);
    }
}

struct Use {
    range: Range<usize>,
    access: Access,
    mark: Arc<Mark>,
}

/// The log of one piece of memory.
pub(crate) struct Uses {
    gpu: Gpu,
    log: Mutex<Vec<Use>>,
    /// Entries from which on the log is searched next. Changed with the log locked.
    long: AtomicUsize,
    abandoned: AtomicBool,
}

impl fmt::Debug for Uses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Uses({})", lock(&self.log).len())
    }
}

/// A view of logged memory that is about to be used.
pub(super) struct Touch<'a> {
    pub(super) uses: &'a Uses,
    /// Addresses.
    pub(super) range: Range<usize>,
    pub(super) access: Access,
}

impl Uses {
    pub(super) fn new(gpu: &Gpu) -> Self {
        let (long, abandoned) = (AtomicUsize::new(LONG_LOG), AtomicBool::new(false));
        Uses { gpu: gpu.clone(), log: Mutex::default(), long, abandoned }
    }

    /// The GPU whose memory it is, or that pinned it.
    pub(super) fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// The uses that one of `access` to `range` has to wait for, but for those on `queue`, which are in order anyway.
    pub(super) fn conflicts(
        &self,
        range: &Range<usize>,
        access: Access,
        queue: Option<&Identity>,
    ) -> Vec<Arc<Mark>> {
        lock(&self.log)
            .iter()
            .filter(|old| overlap(&old.range, range))
            .filter(|old| access == Access::Write || old.access == Access::Write)
            .filter(|old| !queue.is_some_and(|queue| queue.is(&old.mark.queue)))
            .map(|old| Arc::clone(&old.mark))
            .collect()
    }

    /// Notes a use whose queue has waited for `waited`.
    ///
    /// What the new use covers and has waited for need not be remembered: who waits for the new one waits for both.
    pub(super) fn note(&self, range: Range<usize>, access: Access, mark: &Arc<Mark>, waited: &[Arc<Mark>]) {
        let mut log = lock(&self.log);
        log.retain(|old| {
            let earlier = old.mark.queue.is(&mark.queue) && old.mark.number < mark.number;
            let covered = range.start <= old.range.start && old.range.end <= range.end;
            let after = earlier || waited.iter().any(|waited| Arc::ptr_eq(waited, &old.mark));
            // A reader does not stand for a writer: other readers do not wait for readers.
            let stands_for = access == Access::Write || (old.access == Access::Read && earlier);
            !(covered && after && stands_for)
        });
        if log.len() >= self.long.load(Ordering::Relaxed) {
            log.retain(|old| !old.mark.is_over());
            self.long.store(LONG_LOG.max(2 * log.len()), Ordering::Relaxed);
        }
        log.push(Use { range, access, mark: Arc::clone(mark) });
    }

    /// Waits on the host until `access` to `range` conflicts with nothing.
    pub(crate) fn wait(&self, range: &Range<usize>, access: Access) -> Result<(), CudaError> {
        let marks = self.conflicts(range, access, None);
        for mark in &marks {
            mark.wait()?;
        }
        if !marks.is_empty() {
            lock(&self.log).retain(|old| !marks.iter().any(|mark| Arc::ptr_eq(mark, &old.mark)));
        }
        Ok(())
    }

    /// Waits for every use, before the memory is freed. `false`: some may go on, so the memory must stay.
    pub(super) fn wait_for_all(&self) -> bool {
        let all = 0..usize::MAX;
        let settled = self.conflicts(&all, Access::Write, None).iter().all(|mark| {
            let waited = mark.wait().or_else(|error| {
                mark.gpu.keep_lost(error);
                mark.gpu.synchronize()
            });
            waited.is_ok()
        });
        lock(&self.log).clear();
        settled && !self.abandoned.load(Ordering::Relaxed)
    }

    /// Says that a use could neither be marked nor waited for, so that the memory is never freed.
    pub(super) fn abandon(&self) {
        self.abandoned.store(true, Ordering::Relaxed);
    }
}

fn overlap(a: &Range<usize>, b: &Range<usize>) -> bool {
    a.start < b.end && b.start < a.end
}

/// Makes `queue` of `gpu` wait for a mark.
pub(super) fn wait_on_queue(
    scope: &super::gpu::Scope<'_>,
    queue: Handle,
    mark: &Mark,
) -> Result<(), CudaError> {
    // SAFETY: both handles are alive: the caller holds the mark and the queue. The context of the queue is current.
    let code = unsafe { (scope.api().stream_wait_event)(queue, mark.event(), 0) };
    scope.check("cuStreamWaitEvent", code, || "wait for another stream".to_owned())
}

/// Whether a driver's answer to a query means "not yet".
pub(super) fn not_ready(error: &CudaError) -> bool {
    matches!(error, CudaError::Call { code: api::NOT_READY, .. })
}
