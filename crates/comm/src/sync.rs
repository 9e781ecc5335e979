//! The few primitives that the protocol in [`crate::word`] stands on, real or as the model checker's.

/// A 32-bit number that can be waited on, in memory shared by threads or processes.
#[cfg(not(loom))]
mod real {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::{Duration, Instant};

    use rustix::thread::futex;

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
}

#[cfg(loom)]
mod model {
    use std::time::Duration;

    use loom::sync::atomic::{AtomicU32, Ordering};
    use loom::sync::{Condvar, Mutex};

    /// The kernel's part is played by a lock: comparing and falling asleep are one step, as in a real futex.
    #[derive(Default)]
    pub(crate) struct Futex {
        value: AtomicU32,
        kernel: Mutex<()>,
        sleepers: Condvar,
    }

    impl Futex {
        pub(crate) fn load(&self, ordering: Ordering) -> u32 {
            self.value.load(ordering)
        }
        pub(crate) fn fetch_add(&self, value: u32, ordering: Ordering) -> u32 {
            self.value.fetch_add(value, ordering)
        }
        pub(crate) fn fetch_or(&self, value: u32, ordering: Ordering) -> u32 {
            self.value.fetch_or(value, ordering)
        }
        pub(crate) fn fetch_and(&self, value: u32, ordering: Ordering) -> u32 {
            self.value.fetch_and(value, ordering)
        }

        /// Never times out: a wake-up that is lost is a deadlock, which the checker reports.
        pub(crate) fn wait(&self, expected: u32, _timeout: Duration) {
            let guard = self.kernel.lock().expect("no one panics with this lock");
            if self.value.load(Ordering::Relaxed) == expected {
                drop(self.sleepers.wait(guard).expect("no one panics with this lock"));
            }
        }

        pub(crate) fn wake_all(&self) {
            let _guard = self.kernel.lock().expect("no one panics with this lock");
            self.sleepers.notify_all();
        }
    }

    /// One look stands for any number of them.
    pub(crate) fn spin_until(limit: Duration, look: impl Fn() -> bool) -> bool {
        !limit.is_zero() && look()
    }
}

#[cfg(loom)]
pub(crate) use model::*;
#[cfg(not(loom))]
pub(crate) use real::*;
