//! Kernels on several threads, with results that do not depend on how many.
//!
//! Work on slices is cut into pieces of [`PIECE_NUMEL`] elements, and the caller's thread with some helpers takes
//! piece after piece until none is left. Cuts lie at fixed element numbers and a piece's result depends on its
//! elements only, so who computes it makes no difference. Helpers live for one call: there is no pool to
//! configure, and work of one piece never leaves the caller's thread.

use std::num::NonZeroUsize;
use std::sync::{Mutex, PoisonError};
use std::thread;

/// Elements taken at a time: enough to pay for starting a thread many times over, few enough to balance.
pub(crate) const PIECE_NUMEL: usize = 1 << 18;

/// How many threads a kernel may use, the caller's own included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Threads(NonZeroUsize);

impl Threads {
    /// The caller's thread alone.
    pub const ONE: Threads = Threads(NonZeroUsize::MIN);

    /// `count` threads, the caller's included; nothing for 0.
    pub const fn new(count: usize) -> Option<Self> {
        match NonZeroUsize::new(count) {
            Some(count) => Some(Threads(count)),
            None => None,
        }
    }

    /// The number of threads.
    pub const fn get(self) -> usize {
        self.0.get()
    }
}

impl From<NonZeroUsize> for Threads {
    fn from(count: NonZeroUsize) -> Self {
        Threads(count)
    }
}

/// Work on a number of elements that can be cut in two.
pub(crate) trait Split: Send + Sized {
    fn numel(&self) -> usize;
    /// The first `at` elements, and the rest. `at` is a multiple of the piece's, [`PIECE_NUMEL`] mostly.
    fn split_at(self, at: usize) -> (Self, Self);
}

impl<T: Sync> Split for &[T] {
    fn numel(&self) -> usize {
        self.len()
    }
    fn split_at(self, at: usize) -> (Self, Self) {
        <[T]>::split_at(self, at)
    }
}

impl<T: Send> Split for &mut [T] {
    fn numel(&self) -> usize {
        self.len()
    }
    fn split_at(self, at: usize) -> (Self, Self) {
        self.split_at_mut(at)
    }
}

/// Two slices of the same length.
impl<A: Split, B: Split> Split for (A, B) {
    fn numel(&self) -> usize {
        self.0.numel()
    }
    fn split_at(self, at: usize) -> (Self, Self) {
        let (a, b) = (self.0.split_at(at), self.1.split_at(at));
        ((a.0, b.0), (a.1, b.1))
    }
}

/// Calls `run` on all of `work`, in one go on one thread, or piece by piece on several.
pub(crate) fn for_each_piece<W: Split>(threads: Threads, work: W, run: impl Fn(W) + Sync) {
    for_each_piece_of(PIECE_NUMEL, threads, work, run);
}

/// [`for_each_piece`] with pieces of another size: where the elements of `work` are rows of a matrix, say.
pub(crate) fn for_each_piece_of<W: Split>(
    piece_numel: usize,
    threads: Threads,
    work: W,
    run: impl Fn(W) + Sync,
) {
    let num_helpers = threads.get().min(work.numel().div_ceil(piece_numel)).saturating_sub(1);
    if num_helpers == 0 {
        return run(work);
    }
    let queue = Mutex::new(Some(work));
    let drain = || {
        while let Some(piece) = next_piece(piece_numel, &queue) {
            run(piece);
        }
    };
    thread::scope(|scope| {
        for _ in 0..num_helpers {
            // A thread that the system refuses costs time, not the result: whoever is there drains the queue.
            if thread::Builder::new().spawn_scoped(scope, drain).is_err() {
                break;
            }
        }
        drain();
    });
}

fn next_piece<W: Split>(piece_numel: usize, queue: &Mutex<Option<W>>) -> Option<W> {
    // Nothing that can fail halfway happens under the lock, so a panic elsewhere leaves the queue whole.
    let mut rest = queue.lock().unwrap_or_else(PoisonError::into_inner);
    let work = rest.take()?;
    if work.numel() <= piece_numel {
        return Some(work);
    }
    let (piece, others) = work.split_at(piece_numel);
    *rest = Some(others);
    Some(piece)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn every_element_is_visited_once_by_any_number_of_threads() {
        for numel in [0, 1, PIECE_NUMEL, PIECE_NUMEL + 1, 5 * PIECE_NUMEL + 7] {
            for count in [1, 2, 3, 7] {
                let mut values: Vec<u32> = (0..numel as u32).collect();
                let mut copy = vec![0; numel];
                let threads = Threads::new(count).unwrap();
                for_each_piece(threads, (&mut values[..], &mut copy[..]), |(values, copy)| {
                    for (value, copy) in values.iter_mut().zip(copy) {
                        *copy += *value;
                        *value += 1;
                    }
                });
                assert!(values.iter().enumerate().all(|(i, &x)| x as usize == i + 1));
                assert!(copy.iter().enumerate().all(|(i, &x)| x as usize == i));
            }
        }
    }

    #[test]
    fn a_small_job_stays_on_the_callers_thread() {
        let caller = thread::current().id();
        let calls = AtomicUsize::new(0);
        for_each_piece(Threads::new(8).unwrap(), &[0u8; 100][..], |_| {
            calls.fetch_add(1, Ordering::Relaxed);
            assert_eq!(thread::current().id(), caller);
        });
        assert_eq!(calls.into_inner(), 1);
    }

    #[test]
    fn no_threads_is_not_a_number_of_threads() {
        assert_eq!(Threads::new(0), None);
        assert_eq!(Threads::new(1), Some(Threads::ONE));
    }
}
