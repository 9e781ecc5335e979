//! libtorch's CUDA is loaded when asked for, or it is said what is missing. A process of its own: once loaded, it stays.

// Helpers of tests may unwrap as tests may.
#![allow(clippy::unwrap_used)]

use shardwise_torch::{Device, Kind, Tensor, TorchError, cuda};

/// What a machine answers depends on what it has: libtorch without CUDA's libraries, with them but without a GPU, or with one. Each has
/// its answer, and the CPU goes on working.
#[test]
fn cuda_is_there_or_it_is_said_what_is_missing() {
    let loaded = cuda::load(0);
    match &loaded {
        Ok(()) => assert!(cuda::memory(0).is_ok(), "a GPU's allocator tells its memory"),
        Err(TorchError::NoSuchGpu { ordinal: 0, num_gpus: 0 }) => {}
        Err(TorchError::NoCuda { message }) => assert!(message.contains(".so"), "{message}"),
        Err(other) => panic!("{other}"),
    }
    if matches!(loaded, Err(TorchError::NoSuchGpu { .. })) {
        // Its operations are there all the same, and have looked for a driver.
        let made = Tensor::f_zeros([1], (Kind::Float, Device::Cuda(0)));
        let error = made.unwrap_err().to_string();
        assert!(error.contains("NVIDIA"), "{error}");
    }
    if let Err(error) = &loaded {
        assert!(error.hint().is_some(), "{error}");
        println!("{error}\nhint: {}", error.hint().unwrap());
    }
    let ones = Tensor::ones([3, 3], (Kind::Float, Device::Cpu));
    assert_eq!(ones.matmul(&ones).sum(Kind::Float).double_value(&[]), 27.0);
}

#[test]
fn libtorch_is_found_where_it_was_loaded_from() {
    let folder = shardwise_torch::library_folder().unwrap();
    assert!(folder.join("libtorch_cpu.so").is_file(), "{}", folder.display());
}
