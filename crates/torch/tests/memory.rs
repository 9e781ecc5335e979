//! The keeping allocator, in a process of its own: what it holds is one count for the whole process.

use std::sync::{Mutex, MutexGuard, PoisonError};

use shardwise_torch::memory::{install, release_cached, stats};
use tch::{Device, Kind, Tensor};

/// Tests run side by side; these count what only one of them may move.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

#[test]
fn large_blocks_are_reused_and_counted() {
    let _alone = alone();
    install();
    let before = stats();
    let tensor = Tensor::zeros([1 << 20], (Kind::Float, Device::Cpu));
    let during = stats();
    assert!(during.live_bytes >= before.live_bytes + (4 << 20), "{before:?} {during:?}");
    drop(tensor);
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
    let _alone = alone();
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
