//! A tensor over memory that moves.
//!
//! A layer's parameters are views of one flat buffer which the engine owns. A graph kept for the backward pass holds
//! those views, and with ZeRO-3 the memory goes away between forward and backward: the storage under all views is
//! pointed at nothing, and later at wherever the parameters were gathered again. Values must be the same by then; no
//! view may be read in between.

use std::ptr::NonNull;

use shardwise_device::DType;
use tch::{Device, Tensor};

use crate::sys::{check, raw, sw_set_storage};
use crate::{TorchError, kind_of};

/// A one-dimensional tensor over borrowed, movable memory of the host or of a GPU.
#[derive(Debug)]
pub struct FlatTensor {
    tensor: Tensor,
    num_bytes: usize,
}

impl FlatTensor {
    /// A tensor of `numel` elements at `ptr`, in the memory of `device`.
    ///
    /// # Safety
    /// `ptr` must be aligned and valid for `numel` elements of `dtype` there whenever the tensor or a view of it is used,
    /// until [`FlatTensor::point_to`] names another place or [`FlatTensor::forget_memory`] none.
    ///
    /// # Errors
    /// What libtorch says.
    pub unsafe fn new(
        ptr: NonNull<u8>,
        numel: usize,
        dtype: DType,
        device: Device,
    ) -> Result<Self, TorchError> {
        // SAFETY: the caller vouches for the memory.
        let tensor =
            unsafe { Tensor::f_from_blob(ptr.as_ptr(), &[numel as i64], &[1], kind_of(dtype), device)? };
        Ok(FlatTensor { tensor, num_bytes: numel * dtype.size_bytes() })
    }

    /// The whole buffer as a tensor.
    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    /// A view of `numel` elements from `offset` with the given shape, as a leaf that shares the moving storage.
    ///
    /// # Errors
    /// What libtorch says: a range outside the buffer, a shape of another size.
    pub fn leaf(&self, offset: usize, shape: &[i64], requires_grad: bool) -> Result<Tensor, TorchError> {
        let numel: i64 = shape.iter().product();
        let view = self.tensor.f_narrow(0, offset as i64, numel)?.f_view(shape)?;
        Ok(view.f_detach()?.f_set_requires_grad(requires_grad)?)
    }

    /// Points this tensor and all its views at `ptr`.
    ///
    /// # Safety
    /// As for [`FlatTensor::new`]. If a graph over views of this tensor is alive, the memory must hold the values
    /// that its forward pass saw.
    ///
    /// # Errors
    /// What libtorch says.
    pub unsafe fn point_to(&mut self, ptr: NonNull<u8>) -> Result<(), TorchError> {
        // SAFETY: the storage does not own its memory (it came from a pointer), and the caller vouches for the new.
        let message = unsafe { sw_set_storage(raw(&self.tensor), ptr.as_ptr().cast(), self.num_bytes) };
        check("set storage", message)
    }

    /// Points this tensor and all its views at nothing: a use before the next `point_to` is our bug.
    ///
    /// # Errors
    /// What libtorch says.
    pub fn forget_memory(&mut self) -> Result<(), TorchError> {
        // SAFETY: no memory is named; sizes stay, so a stray use faults at once instead of reading other values.
        let message = unsafe { sw_set_storage(raw(&self.tensor), std::ptr::null_mut(), self.num_bytes) };
        check("release storage", message)
    }
}

#[cfg(test)]
mod tests {
    use shardwise_device::{Buffer, Place};

    use super::*;
    use crate::autograd::grad;

    /// The heart of ZeRO-3: the graph survives its parameters leaving and coming back elsewhere.
    #[test]
    fn backward_sees_parameters_gathered_at_another_address() {
        let weights: Vec<f32> = (0..12).map(|i| i as f32 * 0.25 - 1.0).collect();
        let mut first = Buffer::zeroed(DType::F32, 16, Place::Cpu).unwrap();
        first.typed_mut::<f32>().unwrap()[4..].copy_from_slice(&weights);
        // SAFETY: `first` outlives every use before `forget_memory`.
        let mut flat = unsafe { FlatTensor::new(first.as_ptr(), 16, DType::F32, Device::Cpu) }.unwrap();
        let w = flat.leaf(4, &[3, 4], true).unwrap();
        let x = Tensor::from_slice(&[1f32, -2.0, 3.0, 0.5]).view([1, 4]).set_requires_grad(true);
        let y = x.matmul(&w.tr()).relu();
        let ones = y.ones_like();
        let expected = {
            let again = x.matmul(&w.tr()).relu();
            grad(&[&again], &[Some(&ones)], &[&x, &w]).unwrap()
        };

        flat.forget_memory().unwrap();
        first.typed_mut::<f32>().unwrap().fill(f32::NAN);
        let mut second = Buffer::zeroed(DType::F32, 16, Place::Cpu).unwrap();
        second.typed_mut::<f32>().unwrap()[4..].copy_from_slice(&weights);
        // SAFETY: `second` outlives the tensor and holds the same values.
        unsafe { flat.point_to(second.as_ptr()) }.unwrap();

        let found = grad(&[&y], &[Some(&ones)], &[&x, &w]).unwrap();
        for (a, b) in expected.iter().zip(&found) {
            assert_eq!(a.as_ref().unwrap(), b.as_ref().unwrap());
        }
    }
}
