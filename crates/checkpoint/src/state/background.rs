//! One piece of work on a thread of its own, whose end is asked for later.
//!
//! ```text
//!   training   step 7 │ copy │ step 8        │ step 9        │ step 10
//!                        └─start               └─poll: None    └─poll: Some(result)
//!   thread               └── write, sync ─────────────────┘
//! ```
//!
//! At most one is under way. A failure, and a panic too, is a result like any other: nothing is lost in the thread.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use crate::CheckpointError;
use crate::error::io;
use crate::state::problem::SaveProblem;

/// Asks work on another thread to end early.
#[derive(Debug, Clone, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// The work ends with an error at the next place where it looks.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether to end.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// The saving that goes on behind training, if any. Dropped, it cancels it and waits.
#[derive(Debug)]
pub struct Background<T> {
    running: Option<Running<T>>,
}

#[derive(Debug)]
struct Running<T> {
    step: u64,
    cancel: Cancel,
    thread: JoinHandle<Result<T, CheckpointError>>,
}

impl<T> Default for Background<T> {
    fn default() -> Self {
        Background { running: None }
    }
}

impl<T: Send + 'static> Background<T> {
    /// Nothing is under way.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether a result is still to be taken.
    pub fn is_busy(&self) -> bool {
        self.running.is_some()
    }

    /// Starts to save the state after step `step`; `job` should give its [`Cancel`] to the writer.
    ///
    /// # Errors
    /// [`CheckpointError::Save`] with [`SaveProblem::Busy`] until the result of the one before is taken,
    /// [`CheckpointError::Io`] if no thread can be had.
    pub fn start(
        &mut self,
        step: u64,
        job: impl FnOnce(&Cancel) -> Result<T, CheckpointError> + Send + 'static,
    ) -> Result<(), CheckpointError> {
        if self.running.is_some() {
            return Err(CheckpointError::save(step, SaveProblem::Busy));
        }
        let cancel = Cancel::default();
        let seen = cancel.clone();
        let work = move || match catch_unwind(AssertUnwindSafe(|| job(&seen))) {
            Ok(result) => result,
            Err(panic) => {
                let text = panic.downcast_ref::<String>().map(String::as_str);
                let text =
                    text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("(no message)").to_owned();
                Err(CheckpointError::save(step, SaveProblem::Panicked(text)))
            }
        };
        let thread = std::thread::Builder::new()
            .name("checkpoint".to_owned())
            .spawn(work)
            .map_err(|source| io("start a thread for", "checkpoint".as_ref(), source))?;
        self.running = Some(Running { step, cancel, thread });
        Ok(())
    }

    /// The result, once there is one.
    pub fn poll(&mut self) -> Option<Result<T, CheckpointError>> {
        self.running.as_ref()?.thread.is_finished().then(|| self.wait())?
    }

    /// The result, as soon as there is one; `None` if nothing is under way.
    pub fn wait(&mut self) -> Option<Result<T, CheckpointError>> {
        let Running { step, thread, .. } = self.running.take()?;
        Some(thread.join().unwrap_or_else(|_| {
            let problem = SaveProblem::Panicked("(while it reported a panic)".to_owned());
            Err(CheckpointError::save(step, problem))
        }))
    }

    /// Asks the work under way to end early; its result still has to be taken.
    pub fn cancel(&self) {
        if let Some(running) = &self.running {
            running.cancel.cancel();
        }
    }
}

impl<T> Drop for Background<T> {
    fn drop(&mut self) {
        if let Some(Running { cancel, thread, .. }) = self.running.take() {
            cancel.cancel();
            // Whoever drops it does not want to know how it ended.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn one_at_a_time_and_each_result_once() {
        let mut saving = Background::new();
        assert!(saving.poll().is_none() && saving.wait().is_none());
        let (go, wait) = mpsc::channel::<()>();
        saving
            .start(3, move |_| {
                wait.recv().unwrap();
                Ok(7)
            })
            .unwrap();
        assert!(saving.poll().is_none() && saving.is_busy());
        let error = saving.start(4, |_| Ok(8)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "checkpoint of step `4` was not saved: the save before is still being written"
        );
        go.send(()).unwrap();
        assert_eq!(saving.wait().unwrap().unwrap(), 7);
        assert!(saving.poll().is_none() && !saving.is_busy());
    }

    #[test]
    fn a_panic_is_a_failure() {
        let mut saving = Background::<()>::new();
        saving.start(3, |_| panic!("at {}", 12)).unwrap();
        let error = saving.wait().unwrap().unwrap_err();
        assert_eq!(error.to_string(), "checkpoint of step `3` was not saved: writing it panicked: at 12");
    }

    #[test]
    fn dropping_cancels() {
        let mut saving = Background::<()>::new();
        let (ended, end) = mpsc::channel();
        saving
            .start(3, move |cancel| {
                while !cancel.is_cancelled() {
                    std::thread::yield_now();
                }
                ended.send(()).unwrap();
                Ok(())
            })
            .unwrap();
        drop(saving);
        end.try_recv().unwrap();
    }
}
