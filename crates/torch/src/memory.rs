//! libtorch's host memory: an allocator that keeps large blocks, and what it holds.

use std::sync::Once;

use crate::sys::{sw_install_allocator, sw_memory_stats, sw_release_cached, sw_reset_peak};

/// Bytes of large tensors (256 KiB and more) in host memory. Smaller ones are not counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryStats {
    /// In use by tensors now.
    pub live_bytes: usize,
    /// Kept for reuse now.
    pub cached_bytes: usize,
    /// The most that was in use since the start or [`reset_peak`].
    pub peak_live_bytes: usize,
    /// How often new memory was asked of the system; constant in steady state.
    pub num_mappings: usize,
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
        num_mappings: stats.num_mappings as usize,
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

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, Tensor};

    use super::*;

    #[test]
    fn large_blocks_are_reused_and_counted() {
        install();
        let before = stats();
        let tensor = Tensor::zeros([1 << 20], (Kind::Float, Device::Cpu));
        let during = stats();
        assert!(during.live_bytes >= before.live_bytes + (4 << 20), "{before:?} {during:?}");
        drop(tensor);
        let tensor = Tensor::ones([1 << 20], (Kind::Float, Device::Cpu));
        assert_eq!(stats().num_mappings, during.num_mappings, "the freed block was reused");
        assert_eq!(tensor.sum(Kind::Double).double_value(&[]), f64::from(1 << 20));
    }
}
