//! The one synchronisation primitive: a counter that others wait on, with three flags in the same word.
//!
//! Each rank has a [`Word`] in each group; its count is the number of phases the rank has published. In phase
//! `k` a rank fills its slot `k % 2`, publishes (count becomes `k + 1`), waits until every peer's count is at
//! least `k + 1`, and reads the peers' slots:
//!
//! ```text
//! rank 0   fill s0 │ publish 1 │ wait 1 │ read s0 , fill s1 │ publish 2 │ wait 2 │ read s1 , fill s0 ...
//! rank 1      fill s0 │ publish 1 │ wait 1 │ read s0 , fill s1 │ publish 2 │ wait 2 │ ...
//! ```
//!
//! Two slots are enough: a rank reads phase `k` before it publishes phase `k + 1`, and refills slot `k % 2`
//! for phase `k + 2` only when it has seen everyone's phase `k + 1`.
//!
//! The flags share the word with the count, so a waiter sees all that concerns it in one load and the kernel
//! compares all of it before the waiter sleeps: no order between two variables has to be argued, and a
//! wake-up cannot be lost.

use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::sync::{Futex, spin_until};

const POISONED: u32 = 1;
const LEFT: u32 = 2;
const SLEEPERS: u32 = 4;
const STEP: u32 = 8;
const COUNT_SHIFT: u32 = STEP.trailing_zeros();
/// Counts wrap here.
const COUNT_MASK: u32 = u32::MAX >> COUNT_SHIFT;

/// A rank's count of published phases. Alone in its cache lines (two, as processors fetch pairs).
#[repr(C, align(128))]
#[derive(Default)]
pub struct Word {
    futex: Futex,
}

/// What a waiter saw.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seen {
    /// The count is there.
    Reached,
    /// The owner has left and will never come.
    Left,
    /// The group is poisoned.
    Poisoned,
    /// Nothing yet.
    Nothing,
}

/// The count that follows `count`.
pub fn next(count: u32) -> u32 {
    count.wrapping_add(1) & COUNT_MASK
}

/// The count before `count`.
pub fn previous(count: u32) -> u32 {
    count.wrapping_sub(1) & COUNT_MASK
}

impl Word {
    /// How many phases are published, modulo the wrap.
    pub fn count(&self) -> u32 {
        self.futex.load(Ordering::Acquire) >> COUNT_SHIFT
    }

    /// Publishes one more phase: all that this thread wrote before is visible to whoever sees the count.
    pub fn advance(&self) {
        // Only the owner adds, and the count is in the top bits, so it wraps without touching the flags.
        let before = self.futex.fetch_add(STEP, Ordering::AcqRel);
        self.wake_sleepers(before);
    }

    /// Tells all waiters, present and future, that the group is poisoned.
    pub fn poison(&self) {
        let before = self.futex.fetch_or(POISONED, Ordering::AcqRel);
        self.wake_sleepers(before);
    }

    /// Tells all waiters, present and future, that the owner has left.
    pub fn leave(&self) {
        let before = self.futex.fetch_or(LEFT, Ordering::AcqRel);
        self.wake_sleepers(before);
    }

    /// What a waiter for `target` sees now.
    pub fn look(&self, target: u32) -> Seen {
        Self::judge(self.futex.load(Ordering::Acquire), target)
    }

    /// Waits until the count reaches `target`: looks for about `spin`, then sleeps for at most `timeout`.
    pub fn wait(&self, target: u32, spin: Duration, timeout: Duration) -> Seen {
        if spin_until(spin, || self.look(target) != Seen::Nothing) {
            return self.look(target);
        }
        let before = self.futex.fetch_or(SLEEPERS, Ordering::AcqRel);
        match Self::judge(before, target) {
            // Sleeps only while the word is still exactly this: no phase, no flag, no waking has come
            // between.
            Seen::Nothing => self.futex.wait(before | SLEEPERS, timeout),
            seen => return seen,
        }
        self.look(target)
    }

    fn judge(value: u32, target: u32) -> Seen {
        let ahead = (value >> COUNT_SHIFT).wrapping_sub(target) & COUNT_MASK;
        if value & POISONED != 0 {
            Seen::Poisoned
        } else if ahead <= COUNT_MASK / 2 {
            Seen::Reached
        } else if value & LEFT != 0 {
            Seen::Left
        } else {
            Seen::Nothing
        }
    }

    fn wake_sleepers(&self, before: u32) {
        if before & SLEEPERS != 0 {
            self.futex.fetch_and(!SLEEPERS, Ordering::AcqRel);
            self.futex.wake_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word_at(count: u32) -> Word {
        let word = Word::default();
        word.futex.fetch_add(count << COUNT_SHIFT, Ordering::Relaxed);
        word
    }

    #[test]
    fn counts_wrap_without_touching_flags() {
        let word = word_at(COUNT_MASK);
        assert_eq!(word.look(0), Seen::Nothing);
        assert_eq!(word.look(COUNT_MASK), Seen::Reached);
        word.leave();
        word.advance();
        assert_eq!((word.count(), word.look(0), word.look(1)), (0, Seen::Reached, Seen::Left));
        assert_eq!(next(COUNT_MASK), 0);
    }

    #[test]
    fn poison_comes_before_everything() {
        let word = word_at(5);
        assert_eq!(word.wait(5, Duration::ZERO, Duration::ZERO), Seen::Reached);
        word.poison();
        assert_eq!(word.wait(5, Duration::ZERO, Duration::ZERO), Seen::Poisoned);
    }

    #[test]
    fn waiting_ends_with_the_timeout() {
        assert_eq!(word_at(0).wait(1, Duration::from_micros(10), Duration::from_millis(5)), Seen::Nothing);
    }
}
