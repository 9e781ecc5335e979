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
        // Other tests allocate meanwhile, but never this much.
        let segments = stats().num_segments;
        for _ in 0..1000 {
            let tensor = Tensor::ones([1 << 20], (Kind::Float, Device::Cpu));
            assert_eq!(tensor.get(0).double_value(&[]), 1.0);
        }
        assert_eq!(stats().num_segments, segments, "freed blocks were reused");
    }

    /// Random allocations and frees: no two live tensors share memory, and freed neighbours join again.
    #[test]
    fn blocks_split_and_join() {
        install();
        let mut live: Vec<(Tensor, f32)> = Vec::new();
        let mut state = 1u64;
        for i in 0..2000 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let random = (state >> 33) as usize;
            if live.len() > 20 || (random.is_multiple_of(3) && !live.is_empty()) {
                let (tensor, value) = live.swap_remove(random % live.len());
                assert_eq!(tensor.min().double_value(&[]), f64::from(value));
                assert_eq!(tensor.max().double_value(&[]), f64::from(value));
            } else {
                let numel = (1 << 16) + random % (1 << 19);
                live.push((Tensor::full([numel as i64], i as f64, (Kind::Float, Device::Cpu)), i as f32));
            }
        }
        drop(live);
        release_cached();
        assert!(stats().num_segments <= 2, "{:?}", stats());
    }
}
