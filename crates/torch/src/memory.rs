//! libtorch's host memory: an allocator that keeps what it has, and how much that is.

use std::sync::Once;

use crate::sys::{sw_install_allocator, sw_memory_stats, sw_release_cached, sw_reset_peak};

/// Bytes of large tensors (256 KiB and more) in host memory. Smaller ones are not counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryStats {
    /// In use by tensors now.
    pub live_bytes: usize,
    /// Touched before and kept for reuse now, at most.
    pub cached_bytes: usize,
    /// The most that was in use since the start or [`reset_peak`].
    pub peak_live_bytes: usize,
    /// Segments of address space; constant in steady state.
    pub num_segments: usize,
}

/// Makes libtorch use the keeping allocator, once for the process. Call before the first tensor; tensors made earlier
/// go on using the allocator they came from.
pub fn install() {
    static INSTALLED: Once = Once::new();
    // SAFETY: the allocator lives for ever; `Once` keeps two threads from installing it at the same time.
    INSTALLED.call_once(|| unsafe { sw_install_allocator() });
}

/// What the allocator holds; all zero before [`install`].
pub fn stats() -> MemoryStats {
    // SAFETY: reads counters under the allocator's lock.
    let stats = unsafe { sw_memory_stats() };
    MemoryStats {
        live_bytes: stats.live_bytes as usize,
        cached_bytes: stats.cached_bytes as usize,
        peak_live_bytes: stats.peak_live_bytes as usize,
        num_segments: stats.num_segments as usize,
    }
}

/// Starts the peak anew from what is in use now.
pub fn reset_peak() {
    // SAFETY: writes a counter under the allocator's lock.
    unsafe { sw_reset_peak() }
}

/// Gives all kept blocks back to the system.
pub fn release_cached() {
    // SAFETY: kept blocks belong to no tensor.
    unsafe { sw_release_cached() }
}
