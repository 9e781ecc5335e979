//! [`TensorParallel`]: the ranks that split each layer, as a layer sees them.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use shardwise_comm::{CommError, Group, ProcessGroup};
use shardwise_device::{Slice, SliceMut};
use shardwise_plan::zoo::SequenceParallel;
use shardwise_torch::{Tensor, TorchError};

use crate::home::Home;

/// The tensor-parallel ranks of a layer: how many there are, which one this is, what they keep between linear maps.
#[derive(Clone)]
pub struct TensorParallel {
    group: Group,
    sequence: SequenceParallel,
    home: Home,
    /// What went wrong between ranks in a backward pass: libtorch carries only its text.
    failure: Arc<Mutex<Option<CommError>>>,
    /// Time in collectives so far.
    nanoseconds: Arc<AtomicU64>,
}

impl TensorParallel {
    /// The ranks of `group`, whose tensors are at `home`.
    pub(crate) fn new(group: Group, sequence: SequenceParallel, home: Home) -> Self {
        TensorParallel { group, sequence, home, failure: Arc::default(), nanoseconds: Arc::default() }
    }

    /// How many ranks there are.
    pub fn degree(&self) -> usize {
        self.group.group_size()
    }

    /// Which of them this is.
    pub fn rank(&self) -> usize {
        self.group.group_rank()
    }

    /// What ranks keep between linear maps.
    pub fn sequence(&self) -> SequenceParallel {
        self.sequence
    }

    /// The same ranks, each with all tokens: samples of any length.
    pub fn with_all_tokens(&self) -> Self {
        TensorParallel { sequence: SequenceParallel::Off, ..self.clone() }
    }

    /// A contiguous tensor's elements.
    pub(crate) fn slice<'a>(&self, tensor: &'a Tensor) -> Slice<'a> {
        self.home.slice(tensor)
    }

    /// The elements of a contiguous tensor that nobody else has seen yet.
    pub(crate) fn slice_mut<'a>(&self, tensor: &'a mut Tensor) -> SliceMut<'a> {
        self.home.slice_mut(tensor)
    }

    /// Runs a collective of these ranks.
    pub(crate) fn run<T>(&self, call: impl FnOnce(&dyn ProcessGroup) -> T) -> T {
        self.timed(|| call(&*self.group))
    }

    /// Counts the time of a call as communication within layers.
    pub(crate) fn timed<T>(&self, call: impl FnOnce() -> T) -> T {
        let _still = self.home.stall();
        let start = Instant::now();
        let result = call();
        self.nanoseconds.fetch_add(start.elapsed().as_nanos() as u64, Ordering::Relaxed);
        result
    }

    /// Time in collectives so far.
    pub(crate) fn time(&self) -> Duration {
        Duration::from_nanos(self.nanoseconds.load(Ordering::Relaxed))
    }

    /// Keeps a failure of a backward pass, and gives libtorch its text.
    pub(crate) fn note(&self, error: CommError) -> TorchError {
        let message = error.to_string();
        *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
        TorchError::Shim { operation: "tensor parallelism", message }
    }

    /// The failure of a backward pass, if it was one between ranks.
    pub(crate) fn take_failure(&self) -> Option<CommError> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl fmt::Debug for TensorParallel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (rank, degree) = (self.rank(), self.degree());
        f.debug_struct("TensorParallel")
            .field("rank", &rank)
            .field("degree", &degree)
            .field("sequence", &self.sequence)
            .finish_non_exhaustive()
    }
}
