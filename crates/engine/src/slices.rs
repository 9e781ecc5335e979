//! Tensors as buffers, for collectives.

use std::ptr::NonNull;

use shardwise_device::{DType, Place, Slice, SliceMut};
use shardwise_torch::{Kind, Tensor};

/// The element type of a buffer that holds a tensor; none where buffers have no such type.
pub(crate) fn dtype_of(tensor: &Tensor) -> Option<DType> {
    match tensor.kind() {
        Kind::Float => Some(DType::F32),
        Kind::BFloat16 => Some(DType::Bf16),
        Kind::Half => Some(DType::F16),
        _ => None,
    }
}

/// A contiguous tensor's elements, in the memory of `place`. A GPU's are ordered by the stream that libtorch uses; no log is kept of
/// them.
///
/// # Panics
/// If the tensor is not contiguous, or no float of 16 or 32 bits.
pub(crate) fn slice_at(tensor: &Tensor, place: Place) -> Slice<'_> {
    let dtype = dtype(tensor);
    // SAFETY: a contiguous tensor of this type holds its elements from `data_ptr` on, for as long as it lives; nobody
    // writes to a tensor that is sent or summed.
    unsafe { Slice::from_raw(start(tensor), tensor.numel(), dtype, place) }
}

/// The elements of a contiguous tensor whose memory nobody else has seen yet.
///
/// # Panics
/// As [`slice_at`].
pub(crate) fn slice_mut_at(tensor: &mut Tensor, place: Place) -> SliceMut<'_> {
    let dtype = dtype(tensor);
    // SAFETY: as in `slice_at`; the callers have made its memory and nobody else reads or writes it now.
    unsafe { SliceMut::from_raw(start(tensor), tensor.numel(), dtype, place) }
}

fn dtype(tensor: &Tensor) -> DType {
    assert!(tensor.is_contiguous(), "a buffer is contiguous, this tensor has strides {:?}", tensor.stride());
    dtype_of(tensor).unwrap_or_else(|| panic!("no buffer has elements of {:?}", tensor.kind()))
}

fn start(tensor: &Tensor) -> NonNull<u8> {
    NonNull::new(tensor.data_ptr().cast()).unwrap_or(NonNull::<u64>::dangling().cast())
}
