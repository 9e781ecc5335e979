//! Ranks as threads of one process: for tests, and for a single rank.
//!
//! The same code as between processes, over heap memory instead of a shared file.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Mutex, PoisonError};

use crate::arena::Arena;
use crate::member::Member;
use crate::universe::Universe;
use crate::{Group, Options};

/// The handles of a new world of `size` ranks, in rank order, one for each thread.
///
/// # Panics
/// If `size` is 0, or the system has no memory for the ranks' slots.
pub fn world(size: usize, options: Options) -> Vec<Group> {
    assert!(size > 0, "a world has at least one rank");
    let arena = Arc::new(Arena::Heap(Mutex::default()));
    Universe::found(&arena, size, options.slot_bytes).expect("memory for the ranks' slots");
    let enter = |rank| {
        let (universe, segment) = Universe::enter(Arc::clone(&arena), rank, size, options.clone())
            .expect("the world was just founded");
        let ranks = (0..size).collect();
        Arc::new(Member::new("world".to_owned(), ranks, rank, universe, segment, Arc::new(()))) as Group
    };
    (0..size).map(enter).collect()
}

/// Runs `f` on `size` threads, each with its handle on a new world, and returns the results in rank order.
///
/// # Panics
/// If a thread panics: the first panic, once all threads have ended. The others do not hang: a panicking rank
/// has given up.
pub fn run<T: Send>(size: usize, f: impl Fn(Group) -> T + Sync) -> Vec<T> {
    run_with(size, Options::default(), f)
}

/// As [`run`], with options.
///
/// # Panics
/// As [`run`].
pub fn run_with<T: Send>(size: usize, options: Options, f: impl Fn(Group) -> T + Sync) -> Vec<T> {
    let panics: Mutex<Vec<Box<dyn Any + Send>>> = Mutex::default();
    let results: Vec<Option<T>> = std::thread::scope(|scope| {
        let start = |group: Group| {
            let (f, panics) = (&f, &panics);
            scope.spawn(move || {
                catch_unwind(AssertUnwindSafe(|| f(Arc::clone(&group))))
                    .map_err(|payload| {
                        let reason = format!("its thread panicked: {}", panic_message(&*payload));
                        // Noted before the others hear of it: the first in the list is the cause, not a
                        // consequence.
                        panics.lock().unwrap_or_else(PoisonError::into_inner).push(payload);
                        group.poison(&reason);
                    })
                    .ok()
            })
        };
        let threads: Vec<_> = world(size, options).into_iter().map(start).collect();
        threads.into_iter().map(|thread| thread.join().expect("panics are caught inside")).collect()
    });
    if let Some(payload) = panics.into_inner().unwrap_or_else(PoisonError::into_inner).into_iter().next() {
        resume_unwind(payload);
    }
    results.into_iter().map(|result| result.expect("no thread panicked")).collect()
}

/// What a panic said.
pub(crate) fn panic_message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".to_owned())
}
