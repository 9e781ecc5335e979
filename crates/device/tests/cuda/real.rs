//! The same on a real GPU. Ignored unless asked for: `cargo test -p shardwise-device --test cuda -- --ignored`.

use crate::programs::{call, run};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use shardwise_device::cuda::{Driver, Inventory, Timing};
use shardwise_device::{Buffer, BufferPool, DType, Memory};
use shardwise_fake_gpu::stream;

#[test]
#[ignore = "needs a GPU"]
fn the_inventory_of_this_machine() {
    let inventory = Inventory::take(None);
    println!("{inventory}");
    assert_eq!(inventory.missing, None);
    assert!(inventory.gpus.iter().all(|gpu| gpu.problem.is_none() && gpu.free_bytes.is_some()));
}

#[test]
#[ignore = "needs a GPU"]
fn programs_do_what_they_say() {
    let driver = Driver::load(None).unwrap();
    let second = u32::from(driver.num_gpus() > 1);
    // Held, so that no program makes and destroys a context: that takes longer than the programs.
    let _held = [driver.open(0).unwrap(), driver.open(second).unwrap()];
    let mut runner = TestRunner::new(ProptestConfig {
        cases: 64,
        max_shrink_iters: 20,
        failure_persistence: None,
        ..Default::default()
    });
    runner
        .run(&prop::collection::vec(call(), 1..200), |calls| {
            run([driver.open(0).unwrap(), driver.open(second).unwrap()], calls);
            Ok(())
        })
        .unwrap();
}

/// Copies of 64 MiB that take a while: here a missing wait would show.
#[test]
#[ignore = "needs a GPU"]
fn large_copies_wait_for_each_other() {
    const NUMEL: usize = 16 << 20;
    let gpu = Driver::load(None).unwrap().open(0).unwrap();
    let (up, across, down) = (stream(&gpu), stream(&gpu), stream(&gpu));
    let (start, end) = (gpu.event(Timing::Timed).unwrap(), gpu.event(Timing::Timed).unwrap());
    let mut host = BufferPool::of(Memory::Pinned(gpu.clone()));
    let mut device = BufferPool::of(Memory::Gpu(gpu.clone()));
    let new = |memory| Buffer::allocate(DType::F32, NUMEL, &memory).unwrap();
    let mut back = new(Memory::Pinned(gpu.clone()));
    for step in 0..20 {
        let mut from = host.take(DType::F32, NUMEL).unwrap();
        from.typed_mut::<f32>().unwrap().fill(step as f32);
        let (mut a, mut b) =
            (device.take(DType::F32, NUMEL).unwrap(), device.take(DType::F32, NUMEL).unwrap());
        start.record(&up).unwrap();
        up.copy(from.view(), a.view_mut()).unwrap();
        end.record(&up).unwrap();
        across.copy(a.view(), b.view_mut()).unwrap();
        down.copy(b.view(), back.view_mut()).unwrap();
        host.give_back(from);
        device.give_back(a);
        device.give_back(b);
        assert!(back.typed::<f32>().unwrap().iter().all(|&x| x == step as f32), "step {step}");
    }
    assert_eq!((host.stats().num_allocations, device.stats().num_allocations), (1, 2));
    let bytes_per_s = (NUMEL * 4) as f32 / (end.elapsed_ms(&start).unwrap() / 1e3);
    println!("pinned memory to the GPU: {:.1} GB/s", bytes_per_s / 1e9);
    gpu.synchronize().unwrap();
    assert_eq!(gpu.take_lost_error(), None);
}
