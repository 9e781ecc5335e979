//! What `shardwise doctor` shows.

use std::path::Path;

use shardwise_device::cuda::{Inventory, PeerLink};
use shardwise_fake_gpu::FakeGpu;

#[test]
fn a_machine_without_a_driver_has_an_inventory() {
    let inventory = Inventory::take(Some(Path::new("/nowhere/libcuda.so.1")));
    assert!(inventory.gpus.is_empty());
    let text = inventory.to_string();
    assert!(text.starts_with("driver  none\nmissing no CUDA driver: could not load `/nowhere"), "{text}");
}

#[test]
fn an_old_driver_is_shown_with_its_version() {
    let fake = FakeGpu::lazy();
    fake.set_version(10010);
    let text = Inventory::take(Some(fake.path())).to_string();
    assert!(text.starts_with("driver  CUDA 10.1\nmissing the driver supports CUDA 10.1"), "{text}");
}

#[test]
fn gpus_and_links_are_listed() {
    let fake = FakeGpu::lazy();
    fake.set_devices(2);
    fake.set_device(0, "Fake H100", (9, 0), 80 << 30);
    fake.set_device(1, "Fake T4", (7, 5), 16 << 30);
    let inventory = Inventory::take(Some(fake.path()));
    assert_eq!(
        inventory.to_string(),
        "driver  CUDA 13.0\n\
         gpu 0   Fake H100, sm_90, 80.0 of 80.0 GiB free, 132 SMs, 0000:0F:00.0\n        \
         to 1: direct, atomics (rank 0)\n\
         gpu 1   Fake T4, sm_75, 16.0 of 16.0 GiB free, 132 SMs, 0000:10:00.0, no bf16: use fp16\n        \
         to 0: direct, atomics (rank 0)\n"
    );
    let json = serde_json::to_string(&inventory).unwrap();
    assert_eq!(serde_json::from_str::<Inventory>(&json).unwrap(), inventory);
    fake.assert_clean();
}

#[test]
fn a_gpu_that_cannot_be_used_is_listed_with_the_reason() {
    let fake = FakeGpu::lazy();
    fake.set_devices(2);
    fake.set_peers(false);
    fake.set_device(1, "Fake V100", (7, 0), 16 << 30);
    let inventory = Inventory::take(Some(fake.path()));
    assert_eq!(inventory.links[0], [PeerLink::Same, PeerLink::ThroughHost]);
    assert_eq!(inventory.gpus[0].problem, None);
    let text = inventory.to_string();
    assert!(text.contains("to 1: through host memory"), "{text}");
    assert!(text.contains("cannot be used: GPU `1` (`Fake V100`) is sm_70"), "{text}");
}
