//! Where arithmetic on buffers is done: by the host's threads, or on a GPU's stream.
//!
//! [`Processor`] has one method for each thing that is done to a buffer of model state, and takes [`Slice`]s, which say where they lie.
//! Both kinds give the same bits. On the host a method returns when it is done. On a GPU it returns when the work is
//! queued; buffers log their uses, so whoever comes next waits for what it has to ([`shardwise_device::cuda`]).

mod error;
mod gpu;
mod host;
mod lamb;
mod step;

use std::sync::Arc;

use shardwise_device::{Memory, Slice, SliceMut};

use crate::Threads;
use crate::optimizer::{Adagrad, Adam, Lion, Sgd};

pub use error::ProcessorError;
pub use gpu::{GpuProcessor, MachineCode};
pub use lamb::{LambApplySlices, LambMomentSlices, NormColumn};
pub use step::StepSlices;

/// What computes on buffers. A clone is the same processor.
///
/// Slices that must match in length or type and do not are a caller's bug, and panic. Slices that lie elsewhere are
/// errors.
#[derive(Debug, Clone)]
pub enum Processor {
    /// So many threads of the host.
    Host(Threads),
    /// A stream of a GPU.
    Gpu(Arc<GpuProcessor>),
}

/// A piece of what [`Processor::pack`] lays out.
#[derive(Debug, Clone, Copy)]
pub enum Piece<'a> {
    /// These elements.
    Data(Slice<'a>),
    /// So many zeros.
    Zeros(usize),
}

impl Piece<'_> {
    /// Elements of this piece.
    pub fn numel(&self) -> usize {
        match self {
            Piece::Data(slice) => slice.numel(),
            Piece::Zeros(numel) => *numel,
        }
    }
}

impl Processor {
    /// The memory it computes on.
    pub fn memory(&self) -> Memory {
        match self {
            Processor::Host(_) => Memory::Host,
            Processor::Gpu(gpu) => Memory::Gpu(gpu.gpu().clone()),
        }
    }

    /// Memory of the host from and to which this processor's is copied while both go on.
    pub fn staging_memory(&self) -> Memory {
        match self {
            Processor::Host(_) => Memory::Host,
            Processor::Gpu(gpu) => Memory::Pinned(gpu.gpu().clone()),
        }
    }

    /// Writes zeros.
    ///
    /// # Errors
    /// Memory that is elsewhere; what a GPU says.
    pub fn zero(&self, into: SliceMut<'_>) -> Result<(), ProcessorError> {
        match self {
            Processor::Host(_) => host::zero(into),
            Processor::Gpu(gpu) => gpu.zero(into),
        }
    }

    /// `to = from * factor`, rounded once: a cast where the types differ.
    ///
    /// # Errors
    /// As [`Processor::zero`].
    pub fn scale(&self, from: Slice<'_>, factor: f32, to: SliceMut<'_>) -> Result<(), ProcessorError> {
        match self {
            Processor::Host(threads) => host::scale(*threads, from, factor, to),
            Processor::Gpu(gpu) => gpu.pack(&[Piece::Data(from)], factor, to),
        }
    }

    /// Writes the pieces, times `factor`, one after the other to `to`, which they fill.
    ///
    /// # Errors
    /// As [`Processor::zero`].
    pub fn pack(&self, pieces: &[Piece<'_>], factor: f32, to: SliceMut<'_>) -> Result<(), ProcessorError> {
        match self {
            Processor::Host(threads) => host::pack(*threads, pieces, factor, to),
            Processor::Gpu(gpu) => gpu.pack(pieces, factor, to),
        }
    }

    /// Adds the pieces, one after the other, to `sum`.
    ///
    /// # Errors
    /// As [`Processor::zero`].
    pub fn accumulate(&self, pieces: &[Piece<'_>], sum: SliceMut<'_>) -> Result<(), ProcessorError> {
        match self {
            Processor::Host(threads) => host::accumulate(*threads, pieces, sum),
            Processor::Gpu(gpu) => gpu.accumulate(pieces, sum),
        }
    }

    /// Adds terms of as many elements as `sum` has, in their order in f32, and rounds once: sums over ranks, as
    /// [`crate::reduce::sum_in_order`].
    ///
    /// # Shapes
    /// - `terms`: all terms, each `stride` elements after the one before; what is between them is not read
    /// - `sum`: of the terms' type, or f32
    ///
    /// # Errors
    /// As [`Processor::zero`].
    pub fn sum_ranks(
        &self,
        terms: Slice<'_>,
        stride: usize,
        sum: SliceMut<'_>,
    ) -> Result<(), ProcessorError> {
        match self {
            Processor::Host(_) => host::sum_ranks(terms, stride, sum),
            Processor::Gpu(gpu) => gpu.sum_ranks(terms, stride, sum),
        }
    }

    /// The sum of squares of each of `parts`, in f64: finite exactly when all its elements are. Waits for them.
    ///
    /// # Errors
    /// As [`Processor::zero`].
    pub fn sums_of_squares(&self, parts: &[Slice<'_>]) -> Result<Vec<f64>, ProcessorError> {
        match self {
            Processor::Host(threads) => host::sums_of_squares(*threads, parts),
            Processor::Gpu(gpu) => gpu.sums_of_squares(parts),
        }
    }

    /// Copies between this processor's memory and the host's, either way, and waits.
    ///
    /// # Errors
    /// As [`Processor::zero`].
    pub fn copy(&self, from: Slice<'_>, into: SliceMut<'_>) -> Result<(), ProcessorError> {
        match self {
            Processor::Host(_) => host::copy(from, into),
            Processor::Gpu(gpu) => gpu.copy(from, into),
        }
    }

    /// A step of Adam or AdamW, as [`Adam::step_on`].
    ///
    /// # Errors
    /// As [`Processor::zero`].
    pub fn adam(
        &self,
        adam: &Adam,
        grad_scale: f32,
        slices: StepSlices<'_, 2>,
    ) -> Result<(), ProcessorError> {
        match self {
            Processor::Host(threads) => {
                adam.step_on(*threads, grad_scale, slices.tensors()?);
                Ok(())
            }
            Processor::Gpu(gpu) => gpu.step(slices, |buffers| adam.cuda_step(grad_scale, buffers)),
        }
    }

    /// A step of SGD with momentum, as [`Sgd::step_on`].
    ///
    /// # Errors
    /// As [`Processor::zero`].
    pub fn sgd(&self, sgd: &Sgd, grad_scale: f32, slices: StepSlices<'_, 1>) -> Result<(), ProcessorError> {
        match self {
            Processor::Host(threads) => {
                sgd.step_on(*threads, grad_scale, slices.tensors()?);
                Ok(())
            }
            Processor::Gpu(gpu) => gpu.step(slices, |buffers| sgd.cuda_step(grad_scale, buffers)),
        }
    }

    /// A step of SGD without momentum, as [`Sgd::plain_step_on`].
    ///
    /// # Errors
    /// As [`Processor::zero`].
    pub fn plain_sgd(
        &self,
        sgd: &Sgd,
        grad_scale: f32,
        slices: StepSlices<'_, 0>,
    ) -> Result<(), ProcessorError> {
        match self {
            Processor::Host(threads) => {
                sgd.plain_step_on(*threads, grad_scale, slices.tensors()?);
                Ok(())
            }
            Processor::Gpu(gpu) => gpu.step(slices, |buffers| sgd.cuda_plain_step(grad_scale, buffers)),
        }
    }

    /// A step of Lion, as [`Lion::step_on`].
    ///
    /// # Errors
    /// As [`Processor::zero`].
    pub fn lion(
        &self,
        lion: &Lion,
        grad_scale: f32,
        slices: StepSlices<'_, 1>,
    ) -> Result<(), ProcessorError> {
        match self {
            Processor::Host(threads) => {
                lion.step_on(*threads, grad_scale, slices.tensors()?);
                Ok(())
            }
            Processor::Gpu(gpu) => gpu.step(slices, |buffers| lion.cuda_step(grad_scale, buffers)),
        }
    }

    /// A step of Adagrad, as [`Adagrad::step_on`].
    ///
    /// # Errors
    /// As [`Processor::zero`].
    pub fn adagrad(
        &self,
        adagrad: &Adagrad,
        grad_scale: f32,
        slices: StepSlices<'_, 1>,
    ) -> Result<(), ProcessorError> {
        match self {
            Processor::Host(threads) => {
                adagrad.step_on(*threads, grad_scale, slices.tensors()?);
                Ok(())
            }
            Processor::Gpu(gpu) => gpu.step(slices, |buffers| adagrad.cuda_step(grad_scale, buffers)),
        }
    }
}

/// How many terms of as many elements as `sum` has stand in `terms`, `stride` elements apart.
///
/// # Panics
/// If that is no whole number of terms, or they overlap.
fn num_terms(terms: Slice<'_>, stride: usize, sum: Slice<'_>) -> usize {
    let (numel, per_term) = (sum.numel(), stride.max(1));
    let rest = terms.numel().checked_sub(numel).filter(|rest| rest.is_multiple_of(per_term));
    let whole = numel <= stride || rest == Some(0);
    match rest {
        Some(rest) if whole => rest / per_term + 1,
        _ => panic!("`{}` elements are no terms of `{numel}` each, `{stride}` apart", terms.numel()),
    }
}

impl From<Threads> for Processor {
    fn from(threads: Threads) -> Self {
        Processor::Host(threads)
    }
}
