//! Collectives beside the computation: a thread that issues them in order.
//!
//! The queue's thread is the one thread that uses the group. A caller moves its buffers into a closure, goes
//! on computing, and gets them back from the [`Work`] when it needs them:
//!
//! ```
//! # use shardwise_comm::{CommQueue, Options};
//! # use shardwise_device::{Buffer, DType, Place};
//! # let group = shardwise_comm::solo();
//! let queue = CommQueue::new(group)?;
//! let mut gradients = Buffer::zeroed(DType::F32, 1024, Place::Cpu)?;
//! let work = queue.submit(move |group| {
//!     group.all_reduce(gradients.view_mut())?;
//!     Ok(gradients)
//! });
//! // ... compute ...
//! let gradients = work.wait()?;
//! # assert_eq!(gradients.numel(), 1024);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::thread::panic_message;
use crate::{CommError, Group, ProcessGroup};

type Job = Box<dyn FnOnce(&dyn ProcessGroup) + Send>;

/// A thread that runs operations on one group in the order in which they were submitted.
///
/// Dropping it waits for what was submitted.
pub struct CommQueue {
    group: Group,
    jobs: Option<Sender<Job>>,
    waited_ns: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

/// The result of a submitted operation, which may still be under way.
#[must_use = "an operation's buffers and its error come back through `wait`"]
pub struct Work<T> {
    result: Receiver<Result<T, CommError>>,
    waited_ns: Arc<AtomicU64>,
    group: Group,
}

impl CommQueue {
    /// A queue for `group`. Others must not use the group while the queue does.
    ///
    /// # Errors
    /// [`CommError::System`] if no thread can be started.
    pub fn new(group: Group) -> Result<Self, CommError> {
        let (jobs, queue) = channel::<Job>();
        let served = group.clone();
        let thread = std::thread::Builder::new()
            .name(format!("comm-{}", group.name()))
            .spawn(move || queue.into_iter().for_each(|job| job(&*served)))
            .map_err(|error| CommError::system("start a thread for collectives", error))?;
        Ok(CommQueue { group, jobs: Some(jobs), waited_ns: Arc::default(), thread: Some(thread) })
    }

    /// The group it serves.
    pub fn group(&self) -> &Group {
        &self.group
    }

    /// How long callers have been in [`Work::wait`] so far: communication that nothing was computed beside.
    pub fn waited(&self) -> Duration {
        Duration::from_nanos(self.waited_ns.load(Ordering::Relaxed))
    }

    /// Queues `operation`.
    pub fn submit<T: Send + 'static>(
        &self,
        operation: impl FnOnce(&dyn ProcessGroup) -> Result<T, CommError> + Send + 'static,
    ) -> Work<T> {
        let (done, result) = sync_channel(1);
        let job: Job = Box::new(move |group| {
            let outcome = catch_unwind(AssertUnwindSafe(|| operation(group))).unwrap_or_else(|payload| {
                let message = panic_message(&*payload);
                group.poison(&format!("a queued operation panicked: {message}"));
                Err(CommError::QueuePanicked { group: group.name().to_owned(), message })
            });
            // Nobody waits for it any more: then nobody wants it.
            let _ = done.send(outcome);
        });
        let jobs = self.jobs.as_ref().expect("taken in drop only");
        jobs.send(job).expect("the thread ends only after the sender is dropped, and jobs do not panic");
        Work { result, waited_ns: self.waited_ns.clone(), group: self.group.clone() }
    }
}

impl Drop for CommQueue {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // The other ranks would not come to what is still queued.
            self.group.poison("its thread panicked");
        }
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take() {
            // Jobs catch panics, so there is nothing to hear.
            let _ = thread.join();
        }
    }
}

impl<T> Work<T> {
    /// Waits for the operation and returns what it returned.
    ///
    /// # Errors
    /// The operation's; [`CommError::QueuePanicked`] if it panicked.
    pub fn wait(self) -> Result<T, CommError> {
        let start = Instant::now();
        let result = self.result.recv();
        self.waited_ns.fetch_add(start.elapsed().as_nanos() as u64, Ordering::Relaxed);
        result.unwrap_or_else(|_| {
            let message = "the queue was lost".to_owned();
            Err(CommError::QueuePanicked { group: self.group.name().to_owned(), message })
        })
    }

    /// Whether the result is there, so that `wait` would not wait. Takes the result if so.
    pub fn try_wait(self) -> Result<Result<T, CommError>, Self> {
        match self.result.try_recv() {
            Ok(result) => Ok(result),
            Err(_) => Err(self),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shardwise_device::SliceMut;

    #[test]
    fn operations_run_in_order_and_bring_buffers_back() {
        let sums = crate::thread::run(3, |group| {
            let queue = CommQueue::new(group.clone()).unwrap();
            let works: Vec<_> = (0..10)
                .map(|i| {
                    let mut buffer = vec![i as f32 + group.group_rank() as f32; 5];
                    queue.submit(move |group| group.all_reduce(SliceMut::of(&mut buffer)).map(|()| buffer))
                })
                .collect();
            works.into_iter().map(|work| work.wait().unwrap()[4]).collect::<Vec<_>>()
        });
        assert!(sums.iter().all(|row| row.iter().enumerate().all(|(i, &x)| x == 3.0 * i as f32 + 3.0)));
    }

    #[test]
    fn a_panic_in_the_queue_is_an_error_everywhere() {
        let errors = crate::thread::run(2, |group| {
            let queue = CommQueue::new(group.clone()).unwrap();
            let rank = group.group_rank();
            let work = queue.submit(move |group| {
                assert!(rank != 1, "no luck");
                group.barrier()
            });
            work.wait().unwrap_err().to_string()
        });
        assert_eq!(errors[0], "rank `1` gave up: a queued operation panicked: no luck");
        assert_eq!(errors[1], "a queued operation of group `world` panicked: no luck");
    }

    /// A receive that is posted ahead of a message that never comes: the thread that panics does not wait for it, and the other rank
    /// hears of the panic, not of a stall.
    #[test]
    fn a_rank_that_panics_does_not_wait_for_what_it_has_queued() {
        let options = crate::Options { deadline: Duration::from_secs(5), ..Default::default() };
        let told = std::sync::Mutex::new(None);
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            crate::thread::run_with(2, options, |group| {
                let messages = group.subgroup("messages", &[0, 1]).unwrap().expect("both are in it");
                let queue = CommQueue::new(messages).unwrap();
                if group.group_rank() == 0 {
                    let mut buffer = vec![0f32; 3];
                    let _posted = queue.submit(move |group| group.recv(SliceMut::of(&mut buffer), 1));
                    panic!("out of luck");
                }
                *told.lock().unwrap() = group.barrier().err();
            })
        }));
        assert_eq!(panic_message(&*outcome.unwrap_err()), "out of luck");
        let told = told.into_inner().unwrap();
        assert!(matches!(told, Some(CommError::GaveUp { rank: 0, .. })), "{told:?}");
    }
}
