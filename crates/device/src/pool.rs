//! Buffers that come back.
//!
//! A pool hands out buffers and takes them back for the next caller of the same size, so that a step in steady
//! state allocates nothing. Contents of a reused buffer are what its last user left.

use std::collections::HashMap;

use crate::{Buffer, DType, DeviceError, Place};

/// Buffers by element type and size. Not shared: each rank has its own.
#[derive(Debug)]
pub struct BufferPool {
    place: Place,
    free: HashMap<(DType, usize), Vec<Buffer>>,
    stats: PoolStats,
}

/// What a pool holds and has held.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PoolStats {
    /// Bytes handed out now.
    pub live_bytes: usize,
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
        BufferPool { place, free: HashMap::new(), stats: PoolStats::default() }
    }

    /// A buffer of exactly `numel` elements; its contents are unspecified.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`] if a new one is needed and refused.
    pub fn take(&mut self, dtype: DType, numel: usize) -> Result<Buffer, DeviceError> {
        if let Some(buffer) = self.free.get_mut(&(dtype, numel)).and_then(Vec::pop) {
            self.stats.free_bytes -= buffer.num_bytes();
            self.stats.live_bytes += buffer.num_bytes();
            return Ok(buffer);
        }
        let buffer = Buffer::zeroed(dtype, numel, self.place)?;
        self.stats.num_allocations += 1;
        self.stats.live_bytes += buffer.num_bytes();
        self.stats.peak_bytes = self.stats.peak_bytes.max(self.stats.live_bytes + self.stats.free_bytes);
        Ok(buffer)
    }

    /// Gives a buffer back for reuse.
    pub fn give_back(&mut self, buffer: Buffer) {
        self.stats.live_bytes = self.stats.live_bytes.saturating_sub(buffer.num_bytes());
        self.stats.free_bytes += buffer.num_bytes();
        self.free.entry((buffer.dtype(), buffer.numel())).or_default().push(buffer);
    }

    /// Drops every waiting buffer, so that its pages go back to the system.
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
        pool.trim();
        assert_eq!(pool.stats().free_bytes, 0);
    }
}
