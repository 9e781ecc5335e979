//! Short words for what tests do all the time.

use shardwise_device::cuda::{Gpu, Module, Priority, Stream};
use shardwise_device::{Buffer, DType, Memory, SliceMut};

/// What the fake takes for a CUBIN with kernels of these names: its own, or those of the tree.
pub fn cubin(kernels: &[&str]) -> Vec<u8> {
    let mut image = vec![0; 64];
    image[..6].copy_from_slice(b"\x7fELF\x02\x01");
    image[18] = 190;
    for kernel in kernels {
        image.extend_from_slice(kernel.as_bytes());
        image.push(0);
    }
    image.push(0);
    image
}

/// A module with kernels of these names.
pub fn module(gpu: &Gpu, kernels: &[&str]) -> Module {
    // SAFETY: what the fake takes for a CUBIN.
    unsafe { gpu.load_module("test", &cubin(kernels)) }.unwrap()
}

/// A stream.
pub fn stream(gpu: &Gpu) -> Stream {
    gpu.stream(Priority::Normal).unwrap()
}

/// Zeros in the GPU's memory.
pub fn on_gpu(gpu: &Gpu, numel: usize) -> Buffer {
    Buffer::allocate(DType::F32, numel, &Memory::Gpu(gpu.clone())).unwrap()
}

/// Numbers in pinned memory.
pub fn pinned(gpu: &Gpu, values: &[f32]) -> Buffer {
    let mut buffer = Buffer::allocate(DType::F32, values.len(), &Memory::Pinned(gpu.clone())).unwrap();
    buffer.typed_mut().unwrap().copy_from_slice(values);
    buffer
}

/// What a buffer of a GPU holds once all streams are through with it.
pub fn values(gpu: &Gpu, buffer: &Buffer) -> Vec<f32> {
    let mut out = vec![0f32; buffer.numel()];
    stream(gpu).copy_and_wait(buffer.view(), SliceMut::of(&mut out)).unwrap();
    out
}
