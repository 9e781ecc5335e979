//! Where a rank's tensors are: on the host, or on its GPU.
//!
//! libtorch names a device, buffers a place, and work on a GPU goes to one stream: that of the [`GpuProcessor`] which the sharded
//! state has, and which libtorch is told to use (`shardwise_torch::cuda::use_stream`). So what layers compute, and what is
//! done to their parameters and gradients, is in order without a wait.

use std::sync::Arc;

use shardwise_device::cuda::{SpanGuard, StallGuard};
use shardwise_device::{DeviceError, Place, Slice, SliceMut};
use shardwise_kernels::processor::GpuProcessor;
use shardwise_torch::{Device, Tensor, cuda};
use shardwise_zero::ZeroError;

use crate::slices::{slice_at, slice_mut_at};
use crate::{EngineError, EngineOptions};

/// Where tensors are.
#[derive(Debug, Clone)]
pub(crate) struct Home {
    pub device: Device,
    pub place: Place,
    /// What runs our kernels there.
    pub gpu: Option<Arc<GpuProcessor>>,
}

impl Home {
    /// # Errors
    /// [`EngineError::NoProcessor`] if libtorch would compute on a GPU whose memory and stream the state does not have.
    pub fn new(options: &EngineOptions) -> Result<Self, EngineError> {
        let gpu = options.zero.gpu.clone();
        let ordinal = gpu.as_ref().map(|gpu| gpu.gpu().ordinal());
        let device = options.device;
        match (device, ordinal) {
            (Device::Cuda(wanted), ordinal) if ordinal.map(|ordinal| ordinal as usize) != Some(wanted) => {
                return Err(EngineError::NoProcessor { device: format!("{device:?}") });
            }
            _ => {}
        }
        let place = ordinal.map_or(Place::Cpu, |ordinal| Place::Cuda { ordinal });
        Ok(Home { device, place, gpu })
    }

    /// A tensor of the host's, here. On a GPU the copy is queued, from pinned memory, and nothing waits for it.
    pub fn bring(&self, tensor: &Tensor) -> Result<Tensor, EngineError> {
        match self.device {
            Device::Cuda(ordinal) if tensor.device() == Device::Cpu => {
                Ok(cuda::upload(tensor, ordinal as u32)?)
            }
            _ => Ok(tensor.f_to_device(self.device)?),
        }
    }

    /// Covers what libtorch queues until the guard goes, for timelines. Nothing on the host.
    pub fn span(&self, name: impl FnOnce() -> String) -> Result<Option<SpanGuard<'_>>, EngineError> {
        let Some(gpu) = &self.gpu else { return Ok(None) };
        let span = gpu.stream().span(name).map_err(|error| ZeroError::from(DeviceError::from(error)))?;
        Ok(Some(span))
    }

    /// Has a GPU measure for how long it has nothing to do, as this thread waits for other ranks. What cannot be measured is left out.
    pub fn stall(&self) -> Option<StallGuard<'_>> {
        self.gpu.as_ref().and_then(|gpu| gpu.stream().stall().ok())
    }

    /// A contiguous tensor's elements, as [`slice_at`].
    pub fn slice<'a>(&self, tensor: &'a Tensor) -> Slice<'a> {
        slice_at(tensor, self.place)
    }

    /// The elements of a tensor that nobody else has seen yet, as [`slice_mut_at`].
    pub fn slice_mut<'a>(&self, tensor: &'a mut Tensor) -> SliceMut<'a> {
        slice_mut_at(tensor, self.place)
    }
}
