//! The primitives that `word.rs` stands on, as the model checker has them. The real ones are in `shardwise-comm`.

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
