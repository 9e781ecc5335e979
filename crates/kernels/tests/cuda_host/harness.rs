//! The host sees what is wrong with a kernel.

use shardwise_kernels::cuda::{DevicePtr, LaunchPlan, Source};

use super::{Device, Order, host};

#[repr(C)]
struct Broken {
    out: DevicePtr,
    numel: u64,
}

/// Runs a broken kernel on 64 threads.
fn broken(name: &str, order: Order) -> Result<Vec<u32>, String> {
    let mut out = Device::new(&[9u32; 64], 0);
    let params = Broken { out: out.ptr(), numel: 64 };
    let plan = LaunchPlan { grid: 1, block: 64, shared_bytes: 256 };
    let address = (&raw const params).cast();
    host().launch_raw(name, plan, address, size_of::<Broken>(), order).map(|()| out.get())
}

#[test]
fn a_missing_barrier_shows_in_the_order_of_threads() {
    let orders = [Order::Forwards, Order::Backwards].map(|order| broken("broken_race", order).unwrap());
    assert_ne!(orders[0], orders[1]);
}

#[test]
fn faults_of_a_device_are_faults() {
    let fault = |name| broken(name, Order::Forwards).unwrap_err();
    assert_eq!(fault("broken_barrier"), "threads of a block went different ways around a barrier");
    assert_eq!(fault("broken_shuffle"), "threads of a block went different ways around a barrier");
    assert_eq!(fault("broken_shared"), "a block wrote beyond its shared memory");
    assert_eq!(fault("broken_alignment"), "a store is not aligned");
}

#[test]
fn launches_that_a_device_refuses_are_refused() {
    let params = Broken { out: DevicePtr::NULL, numel: 0 };
    for (grid, block, shared_bytes) in [(0, 32, 0), (1, 0, 0), (1, 33, 0), (1, 1056, 0), (1, 32, 49_153)] {
        let plan = LaunchPlan { grid, block, shared_bytes };
        let address = (&raw const params).cast();
        let refused = host()
            .launch_raw("broken_race", plan, address, size_of::<Broken>(), Order::Forwards)
            .unwrap_err();
        assert_eq!(refused, "a launch that a device refuses");
    }
}

#[test]
#[should_panic(expected = "wrote beside an array")]
fn guards_are_watched() {
    let mut array = Device::new(&[1f32; 5], 1);
    let outside = array.start + 5 * 4 + 1;
    array.bytes_mut()[outside] = 0;
    array.get();
}

#[test]
fn every_kernel_is_there() {
    for name in Source::ALL.into_iter().flat_map(Source::entries) {
        assert!(host().0.structure_bytes(name).is_some(), "{name}");
    }
}
