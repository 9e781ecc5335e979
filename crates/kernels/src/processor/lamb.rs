//! LAMB's two passes, wherever the state lies.
//!
//! Between them stand the norms of whole tensors, which may take an exchange: they are kept as bytes in a table in the processor's memory,
//! so on a GPU no pass waits for the host.

use std::sync::PoisonError;

use half::{bf16, f16};
use shardwise_device::cuda::Access;
use shardwise_device::{Buffer, DType, Memory, Slice, SliceMut};

use super::gpu::GpuProcessor;
use super::step::{copy_at, pointer_of};
use super::{Processor, ProcessorError};
use crate::Threads;
use crate::cuda::{DevicePtr, LambApplyBuffers, LambMomentBuffers, LambNorms, LambRowSums};
use crate::optimizer::{ComputeCopy, Lamb, SquaredNorms};

/// Bytes of a tensor's norms in a table.
const PAIR: usize = SquaredNorms::NUM_BYTES;

/// The slices of the first pass, all but the norms of the same length.
#[derive(Debug)]
pub struct LambMomentSlices<'a> {
    /// Gradient, `f32`, read.
    pub grad: Slice<'a>,
    /// Parameters, `f32`, read.
    pub master: Slice<'a>,
    /// `exp_avg` and `exp_avg_sq`, `f32`, updated.
    pub states: [SliceMut<'a>; 2],
    /// The bytes of one [`SquaredNorms`], written: those of this part of a tensor.
    pub norms: SliceMut<'a>,
}

/// The slices of the second pass, all of the same length, and the norms.
#[derive(Debug)]
pub struct LambApplySlices<'a> {
    /// Parameters, `f32`, updated.
    pub master: SliceMut<'a>,
    /// `exp_avg` and `exp_avg_sq`, `f32`, read.
    pub states: [Slice<'a>; 2],
    /// 16-bit copy of the parameters, written; none where the model computes in fp32.
    pub compute: Option<SliceMut<'a>>,
    /// Of the whole tensor.
    pub norms: NormColumn<'a>,
}

/// A tensor's norms in a table of several tensors', with a row for each part that tensors are in: the sum of its column.
#[derive(Debug, Clone, Copy)]
pub struct NormColumn<'a> {
    /// `[num_rows, tensors]` of [`SquaredNorms`], as bytes.
    pub table: Slice<'a>,
    /// Rows, which are added in order.
    pub num_rows: usize,
    /// The tensor's place in a row.
    pub tensor: usize,
}

impl NormColumn<'_> {
    fn row_bytes(&self) -> usize {
        let row_bytes = row_bytes(self.table, self.num_rows);
        assert!(
            (self.tensor + 1) * PAIR <= row_bytes,
            "tensor `{}` of a row of {row_bytes} bytes",
            self.tensor
        );
        row_bytes
    }
}

/// # Panics
/// If `table` is not `num_rows` rows of norms.
fn row_bytes(table: Slice<'_>, num_rows: usize) -> usize {
    let numel = table.numel();
    let is_whole = table.dtype() == DType::U8 && num_rows > 0 && numel.is_multiple_of(num_rows * PAIR);
    assert!(is_whole, "`{numel}` elements of `{}` as {num_rows} rows of norms", table.dtype());
    numel / num_rows
}

impl Processor {
    /// LAMB's first pass, as [`Lamb::moments_on`].
    ///
    /// # Errors
    /// As [`Processor::zero`].
    pub fn lamb_moments(
        &self,
        lamb: &Lamb,
        grad_scale: f32,
        slices: LambMomentSlices<'_>,
    ) -> Result<(), ProcessorError> {
        assert_eq!((slices.norms.numel(), slices.norms.dtype()), (PAIR, DType::U8), "room for norms");
        match self {
            Processor::Host(threads) => moments(*threads, lamb, grad_scale, slices),
            Processor::Gpu(gpu) => gpu.lamb_moments(lamb, grad_scale, slices),
        }
    }

    /// LAMB's second pass, as [`Lamb::apply_on`].
    ///
    /// # Errors
    /// As [`Processor::zero`].
    pub fn lamb_apply(&self, lamb: &Lamb, slices: LambApplySlices<'_>) -> Result<(), ProcessorError> {
        slices.norms.row_bytes();
        match self {
            Processor::Host(threads) => apply(*threads, lamb, slices),
            Processor::Gpu(gpu) => gpu.lamb_apply(lamb, slices),
        }
    }

    /// Adds the rows of a table of norms, in order: each tensor's to its place in `sums`.
    ///
    /// # Errors
    /// As [`Processor::zero`].
    pub fn add_norms(
        &self,
        table: Slice<'_>,
        num_rows: usize,
        sums: SliceMut<'_>,
    ) -> Result<(), ProcessorError> {
        assert_eq!((sums.numel(), sums.dtype()), (row_bytes(table, num_rows), DType::U8), "room for sums");
        match self {
            Processor::Host(_) => add_norms(table, num_rows, sums),
            Processor::Gpu(gpu) => gpu.add_norms(table, num_rows, sums),
        }
    }
}

fn moments(
    threads: Threads,
    lamb: &Lamb,
    grad_scale: f32,
    slices: LambMomentSlices<'_>,
) -> Result<(), ProcessorError> {
    let LambMomentSlices { grad, master, states: [exp_avg, exp_avg_sq], norms } = slices;
    let into = norms.host_bytes()?;
    let (grad, master) = (grad.typed()?, master.typed()?);
    let norms = lamb.moments_on(threads, grad_scale, grad, master, exp_avg.typed()?, exp_avg_sq.typed()?);
    into.copy_from_slice(&norms.to_bytes());
    Ok(())
}

fn apply(threads: Threads, lamb: &Lamb, slices: LambApplySlices<'_>) -> Result<(), ProcessorError> {
    let LambApplySlices { master, states: [exp_avg, exp_avg_sq], compute, norms } = slices;
    let NormColumn { table, num_rows, tensor } = norms;
    let whole = sum_of_column(table.host_bytes()?, norms.row_bytes(), num_rows, tensor);
    let compute = match compute {
        None => ComputeCopy::None,
        Some(copy) if copy.dtype() == DType::F16 => ComputeCopy::F16(copy.typed::<f16>()?),
        Some(copy) => ComputeCopy::Bf16(copy.typed::<bf16>()?),
    };
    lamb.apply_on(threads, whole, master.typed()?, exp_avg.typed()?, exp_avg_sq.typed()?, compute);
    Ok(())
}

fn add_norms(table: Slice<'_>, num_rows: usize, sums: SliceMut<'_>) -> Result<(), ProcessorError> {
    let (row_bytes, table) = (row_bytes(table, num_rows), table.host_bytes()?);
    for (tensor, sum) in sums.host_bytes()?.chunks_exact_mut(PAIR).enumerate() {
        sum.copy_from_slice(&sum_of_column(table, row_bytes, num_rows, tensor).to_bytes());
    }
    Ok(())
}

fn sum_of_column(table: &[u8], row_bytes: usize, num_rows: usize, tensor: usize) -> SquaredNorms {
    let mut sum = SquaredNorms::default();
    for row in 0..num_rows {
        let at = row * row_bytes + tensor * PAIR;
        sum += SquaredNorms::from_bytes(table[at..at + PAIR].try_into().expect("as many bytes"));
    }
    sum
}

impl GpuProcessor {
    fn lamb_moments(
        &self,
        lamb: &Lamb,
        grad_scale: f32,
        slices: LambMomentSlices<'_>,
    ) -> Result<(), ProcessorError> {
        let LambMomentSlices { grad, master, states: [exp_avg, exp_avg_sq], norms } = slices;
        let (exp_avg, exp_avg_sq) = (exp_avg.as_slice(), exp_avg_sq.as_slice());
        let numel = grad.numel();
        let address = |what, slice| self.array(what, slice, DType::F32, numel);
        let (grad_, master_) = (address("the gradient", grad)?, address("the master weights", master)?);
        let states = [address("a state", exp_avg)?, address("a state", exp_avg_sq)?];
        self.require_here(norms.as_slice())?;
        let num_blocks = LambNorms::num_blocks(numel as u64);
        // Locked until both calls are queued: then the next to use the blocks comes after them on the stream.
        let mut kept = self.norm_blocks.lock().unwrap_or_else(PoisonError::into_inner);
        let num_bytes = num_blocks as usize * PAIR;
        let blocks = match &mut *kept {
            Some(blocks) if blocks.numel() >= num_bytes => blocks,
            blocks => {
                let memory = Memory::Gpu(self.gpu().clone());
                blocks.insert(Buffer::allocate(DType::U8, num_bytes, &memory)?)
            }
        };
        let blocks = blocks.view_mut().into_range(0..num_bytes);
        let (blocks, total) = (blocks.as_slice(), norms.as_slice());
        let (blocks_, total_) = (pointer_of(blocks), pointer_of(total));
        let buffers =
            LambMomentBuffers { grad: grad_, master: master_, states, blocks: blocks_, numel: numel as u64 };
        let add = LambNorms { blocks: blocks_, total: total_, num_blocks };
        // SAFETY: the arrays have `numel` elements of the kernel's types (`array`) and lie on this GPU; states are borrowed to be
        // written. As many pairs are written as there are blocks of elements; then they are read, and one is written.
        unsafe {
            if numel > 0 {
                let uses = [
                    (grad, Access::Read),
                    (master, Access::Read),
                    (exp_avg, Access::Write),
                    (exp_avg_sq, Access::Write),
                    (blocks, Access::Write),
                ];
                self.run(&lamb.cuda_moments(grad_scale, buffers), uses)?;
            }
            self.run(&add.launch(), [(blocks, Access::Read), (total, Access::Write)])
        }
    }

    fn lamb_apply(&self, lamb: &Lamb, slices: LambApplySlices<'_>) -> Result<(), ProcessorError> {
        let LambApplySlices { master, states: [exp_avg, exp_avg_sq], compute, norms } = slices;
        let (master, compute) = (master.as_slice(), compute.as_ref().map(SliceMut::as_slice));
        let numel = master.numel();
        let address = |what, slice| self.array(what, slice, DType::F32, numel);
        let master_ = address("the master weights", master)?;
        let states = [address("a state", exp_avg)?, address("a state", exp_avg_sq)?];
        if let Some(copy) = compute {
            self.array("the copy", copy, copy.dtype(), numel)?;
        }
        self.require_here(norms.table)?;
        let NormColumn { table, num_rows, tensor } = norms;
        let buffers = LambApplyBuffers {
            master: master_,
            states,
            compute: copy_at(compute),
            numel: numel as u64,
            norms: DevicePtr::new(pointer_of(table).address() + (tensor * PAIR) as u64),
            num_rows: num_rows as u64,
            row_numel: (norms.row_bytes() / PAIR) as u64,
        };
        if numel == 0 {
            return Ok(());
        }
        let read = [exp_avg, exp_avg_sq, table].map(|slice| (slice, Access::Read));
        let written = [Some(master), compute].into_iter().flatten().map(|slice| (slice, Access::Write));
        // SAFETY: the arrays have `numel` elements of the kernel's types (`array`, `copy_at`) and lie on this GPU; parameters and copy
        // are borrowed to be written. The tensor's pair is in each of the table's rows (`row_bytes`).
        unsafe { self.run(&lamb.cuda_apply(buffers), read.into_iter().chain(written)) }
    }

    fn add_norms(&self, table: Slice<'_>, num_rows: usize, sums: SliceMut<'_>) -> Result<(), ProcessorError> {
        let sums = sums.as_slice();
        self.require_here(table)?;
        self.require_here(sums)?;
        if sums.numel() == 0 {
            return Ok(());
        }
        let add = LambRowSums {
            rows: pointer_of(table),
            sums: pointer_of(sums),
            num_rows: num_rows as u64,
            width: (sums.numel() / size_of::<f64>()) as u64,
        };
        // SAFETY: the table has so many rows as long as `sums` (asserted by the caller), which is borrowed to be written.
        unsafe { self.run(&add.launch(), [(table, Access::Read), (sums, Access::Write)]) }
    }

    /// The address of an array of a call.
    ///
    /// # Panics
    /// If it has another length or type than it should have.
    fn array(
        &self,
        what: &str,
        slice: Slice<'_>,
        dtype: DType,
        numel: usize,
    ) -> Result<DevicePtr, ProcessorError> {
        assert_eq!((slice.numel(), slice.dtype()), (numel, dtype), "{what} of a step against the others");
        self.require_here(slice)?;
        Ok(pointer_of(slice))
    }
}
