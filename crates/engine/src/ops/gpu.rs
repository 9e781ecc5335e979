//! Tensors on a GPU, for our kernels there.
//!
//! Kernels run on the stream that libtorch uses, in order with its operations, so its memory needs no log: what it frees it gives to
//! later operations of the same stream only. Parameters are the engine's, between `begin_use` and `end_use`.

use std::sync::Arc;

use shardwise_kernels::cuda::{ColumnSums, DevicePtr, FloatType, Launch, Params};
use shardwise_kernels::processor::GpuProcessor;
use shardwise_torch::{Kind, Tensor, TorchError};

use super::raw::common_kind;
use crate::Context;

/// Where kernels run, and on what type.
#[derive(Debug, Clone)]
pub(super) struct OnGpu {
    pub gpu: Arc<GpuProcessor>,
    pub float: FloatType,
    pub kind: Kind,
}

/// The GPU of the context, if there is one and all tensors share a type that kernels have and are contiguous.
pub(super) fn on_gpu(context: &Context<'_>, tensors: &[&Tensor]) -> Option<OnGpu> {
    let gpu = context.gpu?;
    let kind = common_kind(tensors)?;
    let float = match kind {
        Kind::BFloat16 => FloatType::Bf16,
        Kind::Half => FloatType::F16,
        _ => FloatType::F32,
    };
    Some(OnGpu { gpu: gpu.clone(), float, kind })
}

impl OnGpu {
    /// Queues a kernel whose arrays are those of contiguous tensors ([`address`]) that live at least until this returns.
    pub fn run<P: Params>(&self, operation: &'static str, launch: &Launch<P>) -> Result<(), TorchError> {
        // SAFETY: the addresses are those of whole tensors of this GPU, of the shapes that the callers give; they are used in
        // the stream's order, by libtorch too.
        unsafe { self.gpu.run(launch, []) }
            .map_err(|error| TorchError::Own { operation, source: Box::new(error) })
    }

    /// The sums, rounded to the type here, of `width` columns of which each block of a kernel has made a part: `f32`, `[.., width]`.
    pub fn column_sums(
        &self,
        operation: &'static str,
        partials: &Tensor,
        width: u64,
    ) -> Result<Tensor, TorchError> {
        let sums = Tensor::f_empty([width as i64], (self.kind, partials.device()))?;
        let num_partials = partials.numel() as u64 / width.max(1);
        let add = ColumnSums { partials: address(partials), sums: address(&sums), num_partials, width };
        self.run(operation, &add.launch(self.float))?;
        Ok(sums)
    }
}

/// Where the elements of a matrix are whose rows stand apart, and how far.
pub(super) fn address_of_rows(tensor: &Tensor) -> (DevicePtr, u64) {
    let stride = tensor.stride();
    debug_assert!(tensor.dim() == 2 && (stride[1] == 1 || tensor.size()[1] <= 1), "rows of elements");
    (DevicePtr::new(tensor.data_ptr().addr() as u64), stride[0] as u64)
}

/// Where a contiguous tensor's elements are.
pub(super) fn address(tensor: &Tensor) -> DevicePtr {
    debug_assert!(tensor.is_contiguous(), "kernels take arrays");
    DevicePtr::new(tensor.data_ptr().addr() as u64)
}
