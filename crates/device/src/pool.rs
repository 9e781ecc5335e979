//! Buffers that come back.
//!
//! A pool hands out buffers and takes them back for the next caller of the same size, so that a step in steady
//! state allocates nothing. Contents of a reused buffer are what its last user left.
//!
//! A buffer of a GPU may come back while streams still use it. Its log comes with it, so the next user's work waits
//! on the GPU, and the host waits for nothing.

use std::collections::HashMap;

use crate::cuda::CudaError;
use crate::{Buffer, DType, DeviceError, Memory, Place};

/// Buffers by element type and size. Not shared: each rank has its own.
#[derive(Debug)]
pub struct BufferPool {
    source: Source,
    free: HashMap<(DType, usize), Vec<Buffer>>,
    stats: PoolStats,
}

/// Where new buffers come from.
#[derive(Debug)]
enum Source {
    Place(Place),
    Memory(Memory),
}

impl Source {
    fn allocate(&self, dtype: DType, numel: usize) -> Result<Buffer, DeviceError> {
        match self {
            Source::Place(place) => Buffer::zeroed(dtype, numel, *place),
            Source::Memory(memory) => Buffer::allocate(dtype, numel, memory),
        }
    }
}

/// What a pool holds and has held.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PoolStats {
    /// Bytes handed out now.
    pub live_bytes: usize,
    /// The most that was ever handed out.
    pub peak_live_bytes: usize,
    /// Bytes waiting for reuse now.
    pub free_bytes: usize,
    /// The most that was ever handed out and waiting together.
    pub peak_bytes: usize,
    /// How many buffers were allocated, not reused.
    pub num_allocations: usize,
}

impl BufferPool {
    /// An empty pool for one place.
    pub fn new(place: Place) -> Self {
        BufferPool { source: Source::Place(place), free: HashMap::new(), stats: PoolStats::default() }
    }

    /// An empty pool of the host's memory, pinned or not, or of a GPU's.
    pub fn of(memory: Memory) -> Self {
        BufferPool { source: Source::Memory(memory), free: HashMap::new(), stats: PoolStats::default() }
    }

    /// A buffer of exactly `numel` elements; its contents are unspecified.
    ///
    /// If a GPU or the host has no memory left to give its driver, what waits for reuse in other sizes is freed first.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`] or [`DeviceError::Cuda`] if a new one is needed and refused.
    pub fn take(&mut self, dtype: DType, numel: usize) -> Result<Buffer, DeviceError> {
        let reused = self.free.get_mut(&(dtype, numel)).and_then(Vec::pop);
        let buffer = match reused {
            Some(buffer) => {
                self.stats.free_bytes -= buffer.num_bytes();
                buffer
            }
            None => {
                let buffer = self.allocate(dtype, numel)?;
                self.stats.num_allocations += 1;
                buffer
            }
        };
        let stats = &mut self.stats;
        stats.live_bytes += buffer.num_bytes();
        stats.peak_live_bytes = stats.peak_live_bytes.max(stats.live_bytes);
        stats.peak_bytes = stats.peak_bytes.max(stats.live_bytes + stats.free_bytes);
        Ok(buffer)
    }

    fn allocate(&mut self, dtype: DType, numel: usize) -> Result<Buffer, DeviceError> {
        match self.source.allocate(dtype, numel) {
            Err(DeviceError::Cuda(CudaError::OutOfMemory { .. } | CudaError::OutOfPinnedMemory { .. }))
                if self.stats.free_bytes > 0 =>
            {
                self.trim();
                self.source.allocate(dtype, numel)
            }
            result => result,
        }
    }

    /// Gives a buffer back for reuse.
    pub fn give_back(&mut self, buffer: Buffer) {
        self.stats.live_bytes = self.stats.live_bytes.saturating_sub(buffer.num_bytes());
        self.stats.free_bytes += buffer.num_bytes();
        self.free.entry((buffer.dtype(), buffer.numel())).or_default().push(buffer);
    }

    /// Drops every waiting buffer, so that its memory goes back to where it came from.
    pub fn trim(&mut self) {
        self.free.clear();
        self.stats.free_bytes = 0;
    }

    /// What the pool holds now and held at most.
    pub fn stats(&self) -> PoolStats {
        self.stats
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steady_state_allocates_nothing() {
        let mut pool = BufferPool::new(Place::Cpu);
        for _ in 0..10 {
            let a = pool.take(DType::Bf16, 64).unwrap();
            let b = pool.take(DType::Bf16, 64).unwrap();
            pool.give_back(a);
            pool.give_back(b);
        }
        assert_eq!(pool.stats().num_allocations, 2);
        assert_eq!(pool.stats().peak_bytes, 256);
        assert_eq!(pool.stats().peak_live_bytes, 256);
        pool.trim();
        assert_eq!(pool.stats().free_bytes, 0);
    }
}
