//! The few primitives that the protocol in [`crate::word`] stands on. The model checker has its own, in `loom/`.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::thread::futex;

/// A 32-bit number that can be waited on, in memory shared by threads or processes.
#[derive(Default)]
#[repr(transparent)]
pub(crate) struct Futex(AtomicU32);

impl Futex {
    pub(crate) fn load(&self, ordering: Ordering) -> u32 {
        self.0.load(ordering)
    }
    pub(crate) fn fetch_add(&self, value: u32, ordering: Ordering) -> u32 {
        self.0.fetch_add(value, ordering)
    }
    pub(crate) fn fetch_or(&self, value: u32, ordering: Ordering) -> u32 {
        self.0.fetch_or(value, ordering)
    }
    pub(crate) fn fetch_and(&self, value: u32, ordering: Ordering) -> u32 {
        self.0.fetch_and(value, ordering)
    }

    /// Sleeps while the number is `expected`, at most `timeout`. May return early.
    pub(crate) fn wait(&self, expected: u32, timeout: Duration) {
        let timeout =
            futex::Timespec { tv_sec: timeout.as_secs() as _, tv_nsec: timeout.subsec_nanos() as _ };
        // Not `PRIVATE`: the waker may be another process. Any outcome (woken, changed, timed out,
        // interrupted) makes the caller look again.
        let _ = futex::wait(&self.0, futex::Flags::empty(), expected, Some(&timeout));
    }

    /// Wakes all who sleep on the number.
    pub(crate) fn wake_all(&self) {
        let _ = futex::wake(&self.0, futex::Flags::empty(), i32::MAX as u32);
    }
}

/// Calls `look` until it is true or `limit` has passed; whether it was true.
pub(crate) fn spin_until(limit: Duration, look: impl Fn() -> bool) -> bool {
    if look() {
        return true;
    }
    if limit.is_zero() {
        return false;
    }
    let started = Instant::now();
    loop {
        for _ in 0..16 {
            std::hint::spin_loop();
            if look() {
                return true;
            }
        }
        if started.elapsed() >= limit {
            return false;
        }
    }
}
