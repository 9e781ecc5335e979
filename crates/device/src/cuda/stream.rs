//! Streams: queues of work on a GPU.
//!
//! What is queued on one stream runs in order. Streams run beside each other, but for what they share: copies, fills
//! and kernels wait for the uses of the same bytes on other streams that they conflict with (`uses.rs`). So a
//! forgotten wait cannot be written in safe code; where overlap is wanted, memory has to be disjoint.
//!
//! ```text
//! gather   ─ copy unit 2 ─●─ copy unit 3 ─●─
//! compute  ───────────────└─ kernel on 2 ─└─ kernel on 3 ─
//! ```
//!
//! libtorch queues work that the log does not see. Around it stand [`Stream::wait_for`] and [`Stream::note`].

use std::ffi::{c_int, c_void};
use std::fmt;

use super::api::{Api, Handle};
use super::queue::Queue;
use super::stall::wait_on_host;
use super::uses::{Access, Touch, not_ready};
use super::{CudaError, Event, Gpu};
use crate::{Place, Slice, SliceMut};

/// Which stream's work a GPU starts first, where it has the choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Priority {
    /// Like most.
    #[default]
    Normal,
    /// Before others: short work that others wait for, such as collectives.
    High,
}

/// A queue of work on a GPU.
///
/// Dropping a stream waits for nothing: what is queued still runs, and the buffers it uses wait for it.
pub struct Stream {
    gpu: Gpu,
    queue: Queue,
    owner: Owner,
}

#[derive(Debug, PartialEq, Eq)]
enum Owner {
    Us,
    Someone,
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Stream({:?}, {:?})", self.gpu, self.queue.handle())
    }
}

impl Gpu {
    /// A new stream. It does not wait for the legacy default stream, nor that for it.
    ///
    /// # Errors
    /// What the driver says.
    pub fn stream(&self, priority: Priority) -> Result<Stream, CudaError> {
        let priority = match priority {
            Priority::Normal => 0,
            Priority::High => self.highest_priority()?,
        };
        let queue = Queue::new(self.create_stream(priority)?);
        Ok(Stream { gpu: self.clone(), queue, owner: Owner::Us })
    }

    fn highest_priority(&self) -> Result<c_int, CudaError> {
        let (mut least, mut greatest) = (0, 0);
        self.call(
            "cuCtxGetStreamPriorityRange",
            || "ask for priorities of streams".to_owned(),
            |api| {
                // SAFETY: writes two integers; the context is current.
                unsafe { (api.priority_range)(&mut least, &mut greatest) }
            },
        )?;
        Ok(greatest)
    }

    /// A stream that someone else owns, such as libtorch; null is the legacy default stream.
    ///
    /// # Safety
    /// `stream` is a `CUstream` (or `cudaStream_t`) of this GPU's primary context and outlives the result.
    pub unsafe fn borrow_stream(&self, stream: *mut c_void) -> Stream {
        let queue = Queue::new(Handle(stream));
        Stream { gpu: self.clone(), queue, owner: Owner::Someone }
    }
}

impl Stream {
    /// The same with a name, for timelines.
    #[must_use]
    pub fn named(mut self, name: &'static str) -> Stream {
        self.queue.set_name(name);
        self
    }

    /// Its name.
    pub fn name(&self) -> &'static str {
        self.queue.name()
    }

    /// The GPU it works on.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// The driver's `CUstream`, for libraries that queue work themselves. See [`Stream::wait_for`].
    pub fn as_raw(&self) -> *mut c_void {
        self.queue.handle().0
    }

    pub(super) fn handle(&self) -> Handle {
        self.queue.handle()
    }

    pub(super) fn queue(&self) -> &Queue {
        &self.queue
    }

    pub(super) fn queue_mut(&mut self) -> &mut Queue {
        &mut self.queue
    }

    /// Waits on the host for everything queued.
    ///
    /// # Errors
    /// What the driver says, for one if a kernel failed.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        let asked = || "wait for a stream".to_owned();
        wait_on_host(|| {
            // SAFETY: the handle is alive, the context current.
            let wait = |api: &Api| unsafe { (api.stream_synchronize)(self.handle()) };
            self.gpu.call("cuStreamSynchronize", asked, wait)
        })
    }

    /// Whether everything queued is over.
    ///
    /// # Errors
    /// What the driver says, for one if a kernel failed.
    pub fn is_idle(&self) -> Result<bool, CudaError> {
        let asked = || "ask whether a stream is idle".to_owned();
        // SAFETY: the handle is alive, the context current.
        match self.gpu.call("cuStreamQuery", asked, |api| unsafe { (api.stream_query)(self.handle()) }) {
            Err(error) if not_ready(&error) => Ok(false),
            result => result.map(|()| true),
        }
    }

    /// Makes what is queued from now on wait for `event`, of this GPU or another.
    ///
    /// # Errors
    /// What the driver says.
    pub fn wait(&self, event: &Event) -> Result<(), CudaError> {
        let _still = self.stall()?;
        self.gpu.call(
            "cuStreamWaitEvent",
            || "wait for an event".to_owned(),
            |api| {
                // SAFETY: both handles are alive, the stream's context is current.
                unsafe { (api.stream_wait_event)(self.handle(), event.handle(), 0) }
            },
        )
    }

    /// Makes what is queued from now on wait for every use that `access` to `view` conflicts with. For work that a
    /// library queues on this stream; [`Stream::note`] follows it. Views without a log wait for nothing.
    ///
    /// # Errors
    /// What the driver says.
    pub fn wait_for(&self, view: Slice<'_>, access: Access) -> Result<(), CudaError> {
        match view.touch(access) {
            Some(touch) => self.queue.wait_for(&self.gpu, &[touch]),
            None => Ok(()),
        }
    }

    /// Logs that work queued on this stream uses `view`: later uses wait for it, and so does freeing the memory.
    /// Views without a log are the caller's own business.
    ///
    /// # Errors
    /// What the driver says; the work is over then.
    pub fn note(&self, view: Slice<'_>, access: Access) -> Result<(), CudaError> {
        match view.touch(access) {
            Some(touch) => {
                let asked = || "mark the use of a buffer".to_owned();
                self.queue.submit(&self.gpu, &[touch], "cuEventRecord", asked, |_, _| super::api::SUCCESS)
            }
            None => Ok(()),
        }
    }

    /// Fills `into` with `byte`, when the stream gets there.
    ///
    /// # Errors
    /// [`CudaError::WrongPlaces`] if the memory is not this GPU's, or what the driver says.
    pub fn fill(&self, into: SliceMut<'_>, byte: u8) -> Result<(), CudaError> {
        let (place, num_bytes) = (into.place(), into.num_bytes());
        let ordinal = self.gpu.ordinal();
        if place != (Place::Cuda { ordinal }) {
            return Err(CudaError::WrongPlaces { ordinal, from: place, to: place });
        }
        if num_bytes == 0 {
            return Ok(());
        }
        let into = Slice::from(into);
        let (address, touch) = (into.address(), into.touch(Access::Write));
        let asked = || format!("fill `{num_bytes}` bytes");
        self.queue.submit(&self.gpu, touch.as_slice(), "cuMemsetD8Async", asked, |api, stream| {
            // SAFETY: the view is valid for writes on this GPU until the use that is logged here is over (a
            // buffer's), or as its maker promised (`SliceMut::from_raw`).
            unsafe { (api.fill)(address, byte, num_bytes, stream) }
        })
    }

    pub(super) fn require_gpu(&self, what: &'static str, gpu: &Gpu) -> Result<(), CudaError> {
        let (expected, got) = (self.gpu.ordinal(), gpu.ordinal());
        if expected != got {
            return Err(CudaError::WrongGpu { what, expected, got });
        }
        Ok(())
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.owner == Owner::Us {
            self.gpu.free(
                "cuStreamDestroy",
                || "free a stream".to_owned(),
                |api| {
                    // SAFETY: our handle, not used again; the driver lets queued work finish.
                    unsafe { (api.stream_destroy)(self.handle()) }
                },
            );
        }
    }
}

/// The addresses of a view, as a driver counts them.
impl<'a> Slice<'a> {
    pub(super) fn address(&self) -> u64 {
        self.as_ptr().addr() as u64
    }

    /// The use of this view that is about to begin; nothing if no log is kept or no byte is in view.
    pub(super) fn touch(&self, access: Access) -> Option<Touch<'a>> {
        let start = self.as_ptr().addr();
        let range = start..start + self.num_bytes();
        self.uses().filter(|_| !range.is_empty()).map(|uses| Touch { uses, range, access })
    }
}
