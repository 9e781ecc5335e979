//! The arrays of an optimizer's step, wherever they lie.

use half::{bf16, f16};
use shardwise_device::cuda::Access;
use shardwise_device::{DType, DeviceError, Slice, SliceMut};

use crate::cuda::{DeviceCopy, DevicePtr, DeviceStates, FloatType, StepBuffers};
use crate::optimizer::{ComputeCopy, Gradient, Noise, States, Tensors};

/// The slices of one step, all of the same length.
#[derive(Debug)]
pub struct StepSlices<'a, const K: usize> {
    /// Gradient, `f32`, `bf16` or `f16`, read.
    pub grad: Slice<'a>,
    /// Parameters, `f32`, updated.
    pub master: SliceMut<'a>,
    /// The optimizer's states, updated: `f32`, or `bf16` with `noise`.
    pub states: [SliceMut<'a>; K],
    /// How `bf16` states are rounded.
    pub noise: Option<Noise>,
    /// 16-bit copy of the parameters, written; none where the model computes in fp32.
    pub compute: Option<SliceMut<'a>>,
}

impl<'a, const K: usize> StepSlices<'a, K> {
    /// For the host's kernels.
    ///
    /// # Errors
    /// A slice of another type than it should be, or elsewhere.
    pub(super) fn tensors(self) -> Result<Tensors<'a, K>, DeviceError> {
        let StepSlices { grad, master, states, noise, compute } = self;
        Ok(Tensors {
            grad: match grad.dtype() {
                DType::Bf16 => Gradient::Bf16(grad.typed()?),
                DType::F16 => Gradient::F16(grad.typed()?),
                _ => Gradient::F32(grad.typed()?),
            },
            master: master.typed()?,
            states: match noise {
                None => States::F32(all_typed::<f32, K>(states)?),
                Some(noise) => States::Bf16(all_typed::<bf16, K>(states)?, noise),
            },
            compute: match compute {
                None => ComputeCopy::None,
                Some(copy) if copy.dtype() == DType::F16 => ComputeCopy::F16(copy.typed::<f16>()?),
                Some(copy) => ComputeCopy::Bf16(copy.typed::<bf16>()?),
            },
        })
    }

    /// For a GPU's kernels.
    ///
    /// # Panics
    /// If lengths or types do not match.
    pub(super) fn buffers(&self) -> StepBuffers<K> {
        let numel = self.grad.numel();
        let pointer = |what: &str, slice: Slice<'_>, dtype: DType| {
            assert_eq!(
                (slice.numel(), slice.dtype()),
                (numel, dtype),
                "{what} of a step against its gradient"
            );
            pointer_of(slice)
        };
        let state_type = if self.noise.is_some() { DType::Bf16 } else { DType::F32 };
        let states = self.states.each_ref().map(|state| pointer("a state", state.as_slice(), state_type));
        StepBuffers {
            grad: pointer_of(self.grad),
            grad_type: FloatType::of(self.grad.dtype()).expect("a gradient of numbers"),
            master: pointer("the master weights", self.master.as_slice(), DType::F32),
            states: match self.noise {
                None => DeviceStates::F32(states),
                Some(noise) => DeviceStates::Bf16(states, noise),
            },
            compute: copy_at(self.compute.as_ref().map(|copy| {
                pointer("the copy", copy.as_slice(), copy.dtype());
                copy.as_slice()
            })),
            numel: numel as u64,
        }
    }

    /// What a step reads and writes.
    pub(super) fn uses(&self) -> impl Iterator<Item = (Slice<'_>, Access)> {
        let written = self.states.iter().chain([&self.master]).chain(&self.compute);
        written.map(|slice| (slice.as_slice(), Access::Write)).chain([(self.grad, Access::Read)])
    }
}

fn all_typed<T: shardwise_device::Element, const K: usize>(
    states: [SliceMut<'_>; K],
) -> Result<[&mut [T]; K], DeviceError> {
    let mut typed = Vec::with_capacity(K);
    for state in states {
        typed.push(state.typed::<T>()?);
    }
    Ok(typed.try_into().unwrap_or_else(|_| unreachable!("as many as before")))
}

/// Where a kernel writes the 16-bit copy.
///
/// # Panics
/// If it is of another type.
pub(super) fn copy_at(compute: Option<Slice<'_>>) -> DeviceCopy {
    match compute.map(|copy| (copy.dtype(), pointer_of(copy))) {
        None => DeviceCopy::None,
        Some((DType::Bf16, copy)) => DeviceCopy::Bf16(copy),
        Some((DType::F16, copy)) => DeviceCopy::F16(copy),
        Some((got, _)) => panic!("a copy of `{got}`, expected 16 bits"),
    }
}

/// The address of a GPU's memory, for a kernel.
pub(super) fn pointer_of(slice: Slice<'_>) -> DevicePtr {
    DevicePtr::new(slice.as_ptr().addr() as u64)
}
