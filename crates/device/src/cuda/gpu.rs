//! An opened GPU: its primary context, and what is shared by everything made in it.

use std::fmt;
use std::os::raw::c_int;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::api::{self, Api, Code, Handle};
use super::memory::Kind;
use super::queue::Queue;
use super::stall::wait_on_host;
use super::{CudaError, Driver, GpuInfo, trace};
use crate::DType;

/// An opened GPU. Clones are the same opening; the last one closes it.
///
/// The context is current on a thread only while a call of this crate runs there: it is pushed before and popped
/// after, so libtorch finds the context it had.
#[derive(Clone)]
pub struct Gpu(Arc<Inner>);

struct Inner {
    driver: Arc<Driver>,
    info: GpuInfo,
    device: c_int,
    context: Handle,
    /// Zeroes new memory.
    housekeeping: Queue,
    /// Events that mark uses of memory, to be used again.
    spare_events: Mutex<Vec<Handle>>,
    /// The first error that a destructor met.
    lost: Mutex<Option<CudaError>>,
    /// What buffers hold of its memory, and of the host's, pinned.
    held: [Meter; 2],
    trace: trace::Slot,
    /// What someone else may give back before memory is refused.
    reserve: Mutex<Option<Arc<Reserve>>>,
}

/// Gives memory back to the driver, if it can.
type Reserve = dyn Fn() + Send + Sync;

/// Bytes that are held.
#[derive(Default)]
struct Meter {
    now: AtomicUsize,
    peak: AtomicUsize,
}

/// What the buffers of one opening hold. libtorch's memory is its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeldMemory {
    /// Of the GPU's memory, now.
    pub device_bytes: usize,
    /// Of the GPU's memory, the most so far.
    pub peak_device_bytes: usize,
    /// Of the host's memory, pinned, now.
    pub pinned_bytes: usize,
    /// Of the host's memory, pinned, the most so far.
    pub peak_pinned_bytes: usize,
}

/// Memory of a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryInfo {
    /// Bytes that nobody has, in this process or another.
    pub free_bytes: usize,
    /// Bytes in all.
    pub total_bytes: usize,
}

impl fmt::Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gpu({}, {})", self.0.info.ordinal, self.0.info.name)
    }
}

impl Gpu {
    pub(super) fn open(driver: Arc<Driver>, info: GpuInfo, device: c_int) -> Result<Gpu, CudaError> {
        let mut context = Handle::NULL;
        // SAFETY: writes one handle to `context`.
        let code = unsafe { (driver.api.primary_retain)(&mut context, device) };
        driver.check("cuDevicePrimaryCtxRetain", code, || format!("open GPU `{}`", info.ordinal))?;
        let mut inner = Inner {
            driver,
            info,
            device,
            context,
            housekeeping: Queue::new(Handle::NULL),
            spare_events: Mutex::default(),
            lost: Mutex::default(),
            held: <[Meter; 2]>::default(),
            trace: trace::Slot::default(),
            reserve: Mutex::default(),
        };
        // From here on, dropping `inner` undoes what was done.
        inner.housekeeping = Queue::new(inner.create_stream(0)?);
        Ok(Gpu(Arc::new(inner)))
    }

    /// Its number among those the driver sees.
    pub fn ordinal(&self) -> u32 {
        self.0.info.ordinal
    }

    /// What the driver says about it.
    pub fn info(&self) -> &GpuInfo {
        &self.0.info
    }

    /// The driver it was opened with.
    pub fn driver(&self) -> &Arc<Driver> {
        &self.0.driver
    }

    /// Whether it computes in bf16.
    pub fn supports_bf16(&self) -> bool {
        self.0.info.supports_bf16()
    }

    /// Checks that it computes with numbers of type `dtype`.
    ///
    /// # Errors
    /// [`CudaError::UnsupportedDType`] for bf16 on sm_75.
    pub fn require_dtype(&self, dtype: DType) -> Result<(), CudaError> {
        self.0.info.require_dtype(dtype)
    }

    /// Memory free and in all.
    ///
    /// # Errors
    /// What the driver says.
    pub fn memory_info(&self) -> Result<MemoryInfo, CudaError> {
        let mut info = MemoryInfo { free_bytes: 0, total_bytes: 0 };
        self.call(
            "cuMemGetInfo",
            || "ask for free memory".to_owned(),
            |api| {
                // SAFETY: writes two `size_t`, to the fields; the context is current.
                unsafe { (api.memory_info)(&mut info.free_bytes, &mut info.total_bytes) }
            },
        )?;
        Ok(info)
    }

    /// What buffers hold.
    pub fn held_memory(&self) -> HeldMemory {
        let [device, pinned] = &self.0.held;
        let read = |counter: &AtomicUsize| counter.load(Ordering::Relaxed);
        HeldMemory {
            device_bytes: read(&device.now),
            peak_device_bytes: read(&device.peak),
            pinned_bytes: read(&pinned.now),
            peak_pinned_bytes: read(&pinned.peak),
        }
    }

    /// Has `release` give memory back before a buffer is refused for want of it: what a library keeps for later. One at a time: a later one takes
    /// the place of an earlier.
    pub fn when_out_of_memory(&self, release: impl Fn() + Send + Sync + 'static) {
        *lock(&self.0.reserve) = Some(Arc::new(release));
    }

    /// Asks for what is kept for later; whether there is anyone to ask.
    pub(super) fn call_on_reserve(&self) -> bool {
        let reserve = lock(&self.0.reserve).clone();
        reserve.as_ref().map(|release| release()).is_some()
    }

    pub(super) fn trace_slot(&self) -> &trace::Slot {
        &self.0.trace
    }

    /// Counts memory that a buffer has taken.
    pub(super) fn count_taken(&self, kind: Kind, bytes: usize) {
        let meter = &self.0.held[kind as usize];
        let now = meter.now.fetch_add(bytes, Ordering::Relaxed) + bytes;
        meter.peak.fetch_max(now, Ordering::Relaxed);
    }

    /// Counts memory that a buffer has given back.
    pub(super) fn count_given_back(&self, kind: Kind, bytes: usize) {
        self.0.held[kind as usize].now.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Lets kernels and copies of this GPU reach the memory of `peer` directly. Without it, copies between the two
    /// work as well, through host memory.
    ///
    /// # Errors
    /// What the driver says, for one where the two have no direct link.
    pub fn enable_peer_access(&self, peer: &Gpu) -> Result<(), CudaError> {
        let asked = || format!("reach the memory of GPU `{}`", peer.ordinal());
        let result = self.call("cuCtxEnablePeerAccess", asked, |api| {
            // SAFETY: `peer` keeps its context alive; the own context is current.
            unsafe { (api.enable_peer_access)(peer.0.context, 0) }
        });
        match result {
            Err(CudaError::Call { code: api::PEER_ACCESS_ALREADY_ENABLED, .. }) => Ok(()),
            result => result,
        }
    }

    /// Waits for all work of this process on this GPU.
    ///
    /// # Errors
    /// What the driver says, for one if a kernel failed.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        let asked = || "wait for all its work".to_owned();
        // SAFETY: takes no pointer; the context is current.
        wait_on_host(|| self.call("cuCtxSynchronize", asked, |api| unsafe { (api.context_synchronize)() }))
    }

    /// Runs `run` with this GPU's context current on this thread, for libraries that look for it there.
    ///
    /// # Errors
    /// What the driver says; nothing has run then.
    pub fn with_context<T>(&self, run: impl FnOnce() -> T) -> Result<T, CudaError> {
        let _scope = self.enter()?;
        Ok(run())
    }

    /// Takes the first error that dropping a buffer, stream or event met since the last call: destructors cannot
    /// return one. After such an error memory may have been left to the end of the process rather than freed
    /// while in use.
    pub fn take_lost_error(&self) -> Option<CudaError> {
        lock(&self.0.lost).take()
    }

    pub(super) fn keep_lost(&self, error: CudaError) {
        self.0.keep_lost(error);
    }

    pub(super) fn context(&self) -> Handle {
        self.0.context
    }

    pub(super) fn housekeeping(&self) -> &Queue {
        &self.0.housekeeping
    }

    /// A stream that does not wait for the legacy default stream, nor that for it.
    pub(super) fn create_stream(&self, priority: c_int) -> Result<Handle, CudaError> {
        self.0.create_stream(priority)
    }

    /// An event without timing, of the spare ones if there are any.
    pub(super) fn take_event(&self) -> Result<Handle, CudaError> {
        let spare = lock(&self.0.spare_events).pop();
        spare.map_or_else(|| self.create_event(api::EVENT_DISABLE_TIMING), Ok)
    }

    pub(super) fn give_event_back(&self, event: Handle) {
        lock(&self.0.spare_events).push(event);
    }

    pub(super) fn create_event(&self, flags: u32) -> Result<Handle, CudaError> {
        let mut event = Handle::NULL;
        self.call(
            "cuEventCreate",
            || "make an event".to_owned(),
            |api| {
                // SAFETY: writes one handle to `event`; the context is current.
                unsafe { (api.event_create)(&mut event, flags) }
            },
        )?;
        Ok(event)
    }

    /// Runs one entry point with the context current.
    pub(super) fn call(
        &self,
        call: &'static str,
        asked: impl Fn() -> String,
        run: impl FnOnce(&Api) -> Code,
    ) -> Result<(), CudaError> {
        self.0.call(call, asked, run)
    }

    /// Runs an entry point that frees something, for a destructor: errors are kept for [`Gpu::take_lost_error`].
    pub(super) fn free(
        &self,
        call: &'static str,
        asked: impl Fn() -> String,
        run: impl FnOnce(&Api) -> Code,
    ) {
        let freed = self.0.enter_to_free().and_then(|scope| {
            let code = run(scope.api());
            scope.check(call, code, asked)
        });
        if let Err(error) = freed {
            self.keep_lost(error);
        }
    }

    /// Makes the context current on this thread until the guard goes.
    pub(super) fn enter(&self) -> Result<Scope<'_>, CudaError> {
        self.0.enter()
    }
}

/// While it lives, the GPU's context is current on the thread that made it.
pub(super) struct Scope<'a> {
    gpu: &'a Inner,
    /// What is current belongs to a thread: the guard stays on it.
    _thread: std::marker::PhantomData<*mut ()>,
}

impl Scope<'_> {
    pub(super) fn api(&self) -> &Api {
        &self.gpu.driver.api
    }

    pub(super) fn check(
        &self,
        call: &'static str,
        code: Code,
        asked: impl Fn() -> String,
    ) -> Result<(), CudaError> {
        let ordinal = self.gpu.info.ordinal;
        self.gpu.driver.check(call, code, || format!("GPU `{ordinal}`, asked to {}", asked()))
    }
}

impl Drop for Scope<'_> {
    fn drop(&mut self) {
        let mut context = Handle::NULL;
        // SAFETY: writes one handle to `context`. Guards nest, so what is popped is what this one pushed.
        let code = unsafe { (self.api().context_pop)(&mut context) };
        if let Err(error) = self.check("cuCtxPopCurrent", code, || "leave its context".to_owned()) {
            self.gpu.keep_lost(error);
        }
    }
}

impl Inner {
    fn enter(&self) -> Result<Scope<'_>, CudaError> {
        // SAFETY: the context is retained until `self` is dropped.
        let code = unsafe { (self.driver.api.context_push)(self.context) };
        let asked = || format!("GPU `{}`, asked to enter its context", self.info.ordinal);
        self.driver.check("cuCtxPushCurrent", code, asked)?;
        Ok(Scope { gpu: self, _thread: std::marker::PhantomData })
    }

    /// Tries twice: an error that earlier work left may be reported by any call, and must not leak what is freed.
    fn enter_to_free(&self) -> Result<Scope<'_>, CudaError> {
        self.enter().or_else(|error| {
            self.keep_lost(error);
            self.enter()
        })
    }

    fn call(
        &self,
        call: &'static str,
        asked: impl Fn() -> String,
        run: impl FnOnce(&Api) -> Code,
    ) -> Result<(), CudaError> {
        let scope = self.enter()?;
        let code = run(scope.api());
        scope.check(call, code, asked)
    }

    fn create_stream(&self, priority: c_int) -> Result<Handle, CudaError> {
        let mut stream = Handle::NULL;
        self.call(
            "cuStreamCreateWithPriority",
            || "make a stream".to_owned(),
            |api| {
                // SAFETY: writes one handle to `stream`; the context is current.
                unsafe { (api.stream_create)(&mut stream, api::STREAM_NON_BLOCKING, priority) }
            },
        )?;
        Ok(stream)
    }

    fn keep_lost(&self, error: CudaError) {
        lock(&self.lost).get_or_insert(error);
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Nobody is left to ask for errors: each step is tried, whatever the others say.
        let events = std::mem::take(&mut *lock(&self.spare_events));
        let entered = self.enter_to_free();
        if entered.is_ok() {
            let api = &self.driver.api;
            for event in events {
                // SAFETY: our event, whose last holder has given it back; the context is current.
                unsafe { (api.event_destroy)(event) };
            }
            if self.housekeeping.handle() != Handle::NULL {
                // SAFETY: our stream; memory it zeroed has waited for it before it was freed.
                unsafe { (api.stream_destroy)(self.housekeeping.handle()) };
            }
        }
        drop(entered);
        // SAFETY: retained once, in `open`; everything made in the context holds a clone of this opening and is gone.
        unsafe { (self.driver.api.primary_release)(self.device) };
    }
}

/// Locks, also after a panic elsewhere: what our locks protect is whole between any two statements.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
