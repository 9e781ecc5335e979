//! Events: places in a stream's order that other streams and the host can wait for.
//!
//! Copies and kernels on logged memory need none: their order follows from what they touch. Events are for work that
//! the log does not see, such as libtorch's, and for time.

use super::api::{self, Handle};
use super::stall::wait_on_host;
use super::uses::not_ready;
use super::{CudaError, Gpu, Stream};

/// Whether an event keeps time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Timing {
    /// It does not, and is cheaper.
    #[default]
    Untimed,
    /// It does, for [`Event::elapsed_ms`].
    Timed,
}

/// A place in a stream's order, once recorded; over before.
#[derive(Debug)]
pub struct Event {
    gpu: Gpu,
    handle: Handle,
}

impl Gpu {
    /// A new event.
    ///
    /// # Errors
    /// What the driver says.
    pub fn event(&self, timing: Timing) -> Result<Event, CudaError> {
        let flags = match timing {
            Timing::Untimed => api::EVENT_DISABLE_TIMING,
            Timing::Timed => api::EVENT_DEFAULT,
        };
        Ok(Event { gpu: self.clone(), handle: self.create_event(flags)? })
    }
}

impl Event {
    /// The GPU it belongs to.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    pub(super) fn handle(&self) -> Handle {
        self.handle
    }

    /// Puts it behind everything that is queued on `stream` now, and forgets where it was.
    ///
    /// # Errors
    /// [`CudaError::WrongGpu`], or what the driver says.
    pub fn record(&self, stream: &Stream) -> Result<(), CudaError> {
        stream.require_gpu("event", &self.gpu)?;
        self.record_on(stream.handle())
    }

    /// [`Event::record`] on a queue of its GPU that is alive.
    pub(super) fn record_on(&self, queue: Handle) -> Result<(), CudaError> {
        let asked = || "record an event".to_owned();
        // SAFETY: both handles are alive and of this context, which is current.
        self.gpu.call("cuEventRecord", asked, |api| unsafe { (api.event_record)(self.handle, queue) })
    }

    /// Whether everything before it is over.
    ///
    /// # Errors
    /// What the driver says, for one if a kernel before it failed.
    pub fn is_over(&self) -> Result<bool, CudaError> {
        let asked = || "ask for an event".to_owned();
        // SAFETY: the handle is alive, the context current.
        match self.gpu.call("cuEventQuery", asked, |api| unsafe { (api.event_query)(self.handle) }) {
            Err(error) if not_ready(&error) => Ok(false),
            result => result.map(|()| true),
        }
    }

    /// Waits on the host.
    ///
    /// # Errors
    /// What the driver says, for one if a kernel before it failed.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        let asked = || "wait for an event".to_owned();
        wait_on_host(|| {
            // SAFETY: the handle is alive, the context current.
            self.gpu.call("cuEventSynchronize", asked, |api| unsafe { (api.event_synchronize)(self.handle) })
        })
    }

    /// Milliseconds from `earlier` to this one, as the GPU measured them. Both are [`Timing::Timed`] and over.
    ///
    /// # Errors
    /// What the driver says, for one if either is not over or keeps no time.
    pub fn elapsed_ms(&self, earlier: &Event) -> Result<f32, CudaError> {
        let mut elapsed = 0.0;
        self.gpu.call(
            "cuEventElapsedTime",
            || "measure time between events".to_owned(),
            |api| {
                // SAFETY: writes one `float` to `elapsed`; both handles are alive.
                unsafe { (api.event_elapsed)(&mut elapsed, earlier.handle, self.handle) }
            },
        )?;
        Ok(elapsed)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        self.gpu.free(
            "cuEventDestroy",
            || "free an event".to_owned(),
            |api| {
                // SAFETY: our handle, not used again. Streams that wait on it have taken note of where it was.
                unsafe { (api.event_destroy)(self.handle) }
            },
        );
    }
}
