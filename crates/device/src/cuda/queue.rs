//! How work gets onto a stream: after what it has to wait for, and logged where it is used.

use std::sync::{Arc, Mutex};

use super::api::{Api, Code, Handle};
use super::gpu::{Scope, lock};
use super::stall::{StallGuard, Stalls};
use super::trace::Recording;
use super::uses::{Identity, Mark, Touch, wait_on_queue};
use super::{CudaError, Event, Gpu};

/// A stream of the driver with an identity that is never used again, as its handle may be.
pub(super) struct Queue {
    handle: Handle,
    /// For timelines.
    name: &'static str,
    identity: Identity,
    /// How long it stood still for others, where that is measured.
    stalls: Option<Stalls>,
    /// The number of the last mark. Held while work is queued, so that numbers follow the queue's order.
    last: Mutex<u64>,
}

impl Queue {
    pub(super) fn new(handle: Handle) -> Self {
        Queue { handle, name: "stream", identity: Identity::new(), stalls: None, last: Mutex::new(0) }
    }

    pub(super) fn handle(&self) -> Handle {
        self.handle
    }

    pub(super) fn name(&self) -> &'static str {
        self.name
    }

    pub(super) fn set_name(&mut self, name: &'static str) {
        self.name = name;
    }

    pub(super) fn measure_stalls(&mut self) {
        self.stalls.get_or_insert_default();
    }

    pub(super) fn stalls(&self) -> Option<&Stalls> {
        self.stalls.as_ref()
    }

    /// Begins a moment in which it may stand still, if that is measured.
    pub(super) fn stall<'a>(&'a self, gpu: &'a Gpu) -> Result<StallGuard<'a>, CudaError> {
        self.stalls
            .as_ref()
            .map_or_else(|| Ok(StallGuard::default()), |stalls| stalls.begin(gpu, self.handle))
    }

    /// Queues work that touches logged memory: behind the uses it conflicts with, and followed by a mark.
    ///
    /// After an error the work was not queued, or is over.
    pub(super) fn submit(
        &self,
        gpu: &Gpu,
        touches: &[Touch<'_>],
        call: &'static str,
        asked: impl Fn() -> String,
        enqueue: impl FnOnce(&Api, Handle) -> Code,
    ) -> Result<(), CudaError> {
        let scope = gpu.enter()?;
        let mut last = lock(&self.last);
        let waited = self.order(gpu, &scope, touches)?;
        // The event is there before the work is, so that its absence cannot leave work unmarked.
        let mark = match touches {
            [] => None,
            _ => Some(Mark::new(gpu, &self.identity, *last + 1)?),
        };
        // What a note marks has been queued by someone else.
        let recording = gpu.trace_slot().get().filter(|_| call != "cuEventRecord");
        let times = recording.as_ref().map(|_| Recording::events(gpu)).transpose()?;
        let record = |event: &Event| {
            // SAFETY: both handles are alive and of this context, which is current.
            let code = unsafe { (scope.api().event_record)(event.handle(), self.handle) };
            scope.check("cuEventRecord", code, &asked)
        };
        times.iter().try_for_each(|(start, _)| record(start))?;
        let code = enqueue(scope.api(), self.handle);
        let ended = |()| times.iter().try_for_each(|(_, end)| record(end));
        let queued = scope.check(call, code, &asked).and_then(ended).and_then(|()| match &mark {
            Some(mark) => {
                // SAFETY: both handles are alive and of this context, which is current.
                let code = unsafe { (scope.api().event_record)(mark.event(), self.handle) };
                scope.check("cuEventRecord", code, &asked)
            }
            None => Ok(()),
        });
        if let Err(error) = queued {
            self.settle(&scope, touches);
            return Err(error);
        }
        if let (Some(recording), Some(times)) = (recording, times) {
            recording.keep(self.name, asked(), times);
        }
        if let Some(mark) = mark {
            *last += 1;
            for touch in touches {
                touch.uses.note(touch.range.clone(), touch.access, &mark, &waited);
            }
        }
        Ok(())
    }

    /// Makes the queue wait for every use that `touches` conflict with, without queueing work.
    pub(super) fn wait_for(&self, gpu: &Gpu, touches: &[Touch<'_>]) -> Result<(), CudaError> {
        let scope = gpu.enter()?;
        let _in_order = lock(&self.last);
        self.order(gpu, &scope, touches).map(drop)
    }

    fn order(
        &self,
        gpu: &Gpu,
        scope: &Scope<'_>,
        touches: &[Touch<'_>],
    ) -> Result<Vec<Arc<Mark>>, CudaError> {
        let mut awaited: Vec<Arc<Mark>> = Vec::new();
        for touch in touches {
            for mark in touch.uses.conflicts(&touch.range, touch.access, Some(&self.identity)) {
                if !awaited.iter().any(|known| Arc::ptr_eq(known, &mark)) {
                    awaited.push(mark);
                }
            }
        }
        if !awaited.is_empty() {
            let _still = self.stall(gpu)?;
            awaited.iter().try_for_each(|mark| wait_on_queue(scope, self.handle, mark))?;
        }
        Ok(awaited)
    }

    /// Waits for work that may have been queued without a mark.
    fn settle(&self, scope: &Scope<'_>, touches: &[Touch<'_>]) {
        // SAFETY: the queue's stream is alive and its context current.
        let code = unsafe { (scope.api().stream_synchronize)(self.handle) };
        if code != super::api::SUCCESS {
            touches.iter().for_each(|touch| touch.uses.abandon());
        }
    }
}
