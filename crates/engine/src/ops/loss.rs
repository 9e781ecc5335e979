//! The loss of a language model's head, some rows at a time.
//!
//! The scores of all rows over the vocabulary may be the largest tensor of a step, and nobody needs them: the gradient of a
//! row's scores is known as soon as the scores are, and with it the gradients of the row and of the weight. So the forward
//! pass does it all, in the same memory for each chunk of rows:
//!
//! ```text
//! for each chunk:  scores = x W^T    loss += ..    scores <- d loss / d scores    dx = scores W    dW += scores^T x
//! backward:        (dx, dW) times the gradient of the loss
//! ```
//!
//! Where elements have 16 bits, each chunk's part of `dW` is rounded once and added in fp32, and the sum is rounded once.

use std::ops::Range;

use half::{bf16, f16};
use shardwise_device::{Slice, SliceMut};
use shardwise_kernels::cross_entropy::split::{self, RowStats};
use shardwise_kernels::cross_entropy::{self as kernel, TargetOutOfRange};
use shardwise_plan::memory::HeadShape;
use shardwise_torch::function::{Saved, link};
use shardwise_torch::tch::Reduction;
use shardwise_torch::{Kind, Tensor, TorchError, no_grad};

use super::gpu::on_gpu;
use super::loss_gpu;
use super::parallel::first_token;
use super::raw::{Fused, elements, elements_mut, fused_kind, ids, multiplies_in_f32, threads};
use crate::{Context, EngineError, TensorParallel};
use shardwise_kernels::Float;

/// Mean cross-entropy of the scores `x @ weight^T`, computed in f32 (or f64 where `x` is), as many rows at a time as
/// [`HeadShape::chunk_rows`] says.
///
/// # Shapes
/// - `x`: `[.., width]`; `weight`: `[classes, width]`; `target`: `[..]`, `i64`
/// - returns a scalar
/// # Errors
/// A target that is no class; what libtorch says.
pub fn linear_cross_entropy(
    context: &Context<'_>,
    x: &Tensor,
    weight: &Tensor,
    target: &Tensor,
) -> Result<Tensor, EngineError> {
    let options = LinearCrossEntropy { chunk_rows: context.head_chunk_rows, loss_scale: context.loss_scale };
    options.forward(context, x, weight, target)
}

/// [`linear_cross_entropy`] with its choices.
#[derive(Debug, Clone, Copy)]
pub struct LinearCrossEntropy {
    /// Rows to take at a time, or as many as the plan says.
    pub chunk_rows: Option<usize>,
    /// The gradient of the loss that the backward pass is expected to begin with. Gradients are rounded with it taken in; if
    /// another one comes, they are multiplied by what it is more.
    pub loss_scale: f64,
}

impl Default for LinearCrossEntropy {
    fn default() -> Self {
        LinearCrossEntropy { chunk_rows: None, loss_scale: 1.0 }
    }
}

impl LinearCrossEntropy {
    /// The loss, as [`linear_cross_entropy`].
    ///
    /// # Errors
    /// As there.
    pub fn forward(
        self,
        context: &Context<'_>,
        x: &Tensor,
        weight: &Tensor,
        target: &Tensor,
    ) -> Result<Tensor, EngineError> {
        self.of_part(context, x, weight, target, None)
    }

    /// The loss where tensor-parallel ranks have the scores of some classes each, if the context says so: the same on all of
    /// them. No rank holds all scores of a row.
    ///
    /// # Shapes
    /// - `x`: `[.., width]`, of [`enter`](super::enter); `weight`: `[classes of this rank, width]`; `target`: `[..]`, classes of
    ///   the whole `vocab_size`
    /// # Collective
    /// The tensor-parallel ranks.
    /// # Errors
    /// As [`linear_cross_entropy`]; a failed collective.
    pub fn forward_on(
        self,
        context: &Context<'_>,
        x: &Tensor,
        weight: &Tensor,
        vocab_size: usize,
        target: &Tensor,
    ) -> Result<Tensor, EngineError> {
        let part = context.tensor.filter(|tensor| tensor.degree() > 1).map(|tensor| {
            let first = first_token(vocab_size, tensor) as usize;
            ClassPart {
                tensor: tensor.clone(),
                classes: first..first + weight.size()[0] as usize,
                num_classes: vocab_size,
            }
        });
        self.of_part(context, x, weight, target, part)
    }

    fn of_part(
        self,
        context: &Context<'_>,
        x: &Tensor,
        weight: &Tensor,
        target: &Tensor,
        part: Option<ClassPart>,
    ) -> Result<Tensor, EngineError> {
        let target = target.f_contiguous()?;
        let (x, weight) = match context.gpu {
            Some(_) => (&x.f_contiguous()?, &weight.f_contiguous()?),
            None => (x, weight),
        };
        if let Some(gpu) = on_gpu(context, &[x, weight]) {
            return loss_gpu::forward(self, gpu, x, weight, &target, part);
        }
        if multiplies_in_f32(&[x, weight]) {
            let exact = |x: &Tensor| x.f_to_kind(Kind::Float);
            return self.fused::<f32>(&exact(x)?, &exact(weight)?, &target, part);
        }
        match (fused_kind(&[x, weight]), part) {
            (Some(Kind::BFloat16), part) => self.fused::<bf16>(x, weight, &target, part),
            (Some(Kind::Half), part) => self.fused::<f16>(x, weight, &target, part),
            (Some(_), part) => self.fused::<f32>(x, weight, &target, part),
            (None, None) => linear_cross_entropy_plain(x, weight, &target),
            (None, part) => {
                let exact = |x: &Tensor| x.f_contiguous()?.f_to_kind(Kind::Float);
                self.fused::<f32>(&exact(x)?, &exact(weight)?, &target, part)
            }
        }
    }

    pub(super) fn fused<T: Fused + Float>(
        self,
        x: &Tensor,
        weight: &Tensor,
        target: &Tensor,
        part: Option<ClassPart>,
    ) -> Result<Tensor, EngineError> {
        let width = weight.size()[1];
        let learns = [learns(x)?, learns(weight)?];
        let rows = no_grad(|| x.f_reshape([-1, width]))?;
        let shape = HeadShape {
            num_rows: rows.size()[0] as usize,
            width: width as usize,
            num_classes: match &part {
                Some(part) => part.most_classes(),
                None => weight.size()[0] as usize,
            },
            element_bytes: size_of::<T>(),
        };
        assert_eq!(ids(target).len(), shape.num_rows, "targets against rows");
        let chunk_rows =
            self.chunk_rows.unwrap_or_else(|| shape.chunk_rows()).clamp(1, shape.num_rows.max(1));
        let scale = (self.loss_scale / shape.num_rows as f64) as f32;
        let head = Head { rows, weight: weight.f_detach()?, targets: ids(target), shape, chunk_rows, part };
        let (total, grads) = no_grad(|| match learns {
            [false, false] => Ok((head.loss::<T>()?, [None, None])),
            _ => head.loss_and_grads::<T>(scale, learns),
        })?;
        let loss = Tensor::f_from_slice(&[(total / shape.num_rows as f64) as f32])?.f_squeeze()?;

        let made: Vec<Saved<'_>> = grads.iter().flatten().map(Saved::Input).collect();
        let (size, expected) = (x.size(), self.loss_scale);
        link(&[x, weight], &[&loss], &made, move |args| {
            let Some(dloss) = &args.grads[0] else { return Ok(vec![None, None]) };
            let more = dloss.f_double_value(&[])? / expected;
            let mut made = args.saved.iter();
            let mut next = |learns: bool, size: &[i64]| -> Result<Option<Tensor>, TorchError> {
                match if learns { made.next() } else { None } {
                    Some(grad) if more == 1.0 => Ok(Some(grad.f_view(size)?)),
                    Some(grad) => Ok(Some(grad.f_mul_scalar(more)?.f_view(size)?)),
                    None => Ok(None),
                }
            };
            Ok(vec![next(learns[0], &size)?, next(learns[1], &[-1, width])?])
        })?;
        Ok(loss)
    }
}

/// [`linear_cross_entropy`] in libtorch's own operations.
///
/// # Errors
/// What libtorch says, of a target out of range among others.
pub fn linear_cross_entropy_plain(
    x: &Tensor,
    weight: &Tensor,
    target: &Tensor,
) -> Result<Tensor, EngineError> {
    let logits = x.f_linear(weight, None::<Tensor>)?;
    let kind = if logits.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let scores = logits.f_view([-1, weight.size()[0]])?.f_to_kind(kind)?;
    Ok(scores.f_cross_entropy_loss(&target.f_reshape([-1])?, None::<Tensor>, Reduction::Mean, -100, 0.0)?)
}

/// Whether a graph would go on behind a tensor.
pub(super) fn learns(tensor: &Tensor) -> Result<bool, EngineError> {
    // What is computed from it knows, unlike the tensor itself and its views, whether graphs are made at all now.
    Ok(tensor.f_narrow(0, 0, 0)?.f_mul_scalar(1.0)?.requires_grad())
}

/// A head at work, without a graph.
struct Head<'a> {
    rows: Tensor,
    weight: Tensor,
    targets: &'a [i64],
    shape: HeadShape,
    chunk_rows: usize,
    part: Option<ClassPart>,
}

/// The classes that this rank has the scores of.
pub(super) struct ClassPart {
    pub tensor: TensorParallel,
    pub classes: Range<usize>,
    /// Of all ranks.
    pub num_classes: usize,
}

impl ClassPart {
    /// The most that a rank has: all take as many rows at a time.
    pub fn most_classes(&self) -> usize {
        self.num_classes.div_ceil(self.tensor.degree())
    }

    /// The softmax of each row over the classes of all ranks, and the sum of their losses.
    fn softmax<T: Fused + Float>(
        &self,
        scores: &Tensor,
        targets: &[i64],
    ) -> Result<(f64, Vec<kernel::Softmax>), EngineError> {
        let num_rows = targets.len();
        let mut own = vec![RowStats::EMPTY; num_rows];
        let (classes, num_classes) = (self.classes.clone(), self.num_classes);
        split::partial(threads(), elements::<T>(scores), targets, classes, num_classes, &mut own)?;
        let mut all = vec![RowStats::EMPTY; num_rows * self.tensor.degree()];
        let (own, out) = (RowStats::as_flat(&own), RowStats::as_flat_mut(&mut all));
        self.tensor.run(|group| group.all_gather(Slice::of(own), SliceMut::of(out)))?;
        Ok(split::combine(&all, num_rows))
    }
}

/// Gradients of the rows and of the weight, where they are wanted.
type Grads = [Option<Tensor>; 2];

impl Head<'_> {
    /// The sum of the rows' losses.
    fn loss<T: Fused + Float>(&self) -> Result<f64, EngineError> {
        self.sum_chunks::<T>(|_, scores, targets| match &self.part {
            Some(part) => Ok(part.softmax::<T>(scores, targets)?.0),
            None => Ok(kernel::loss_only(threads(), elements::<T>(scores), targets)?),
        })
    }

    /// The sum of the rows' losses, and the gradients of `scale` times that sum.
    fn loss_and_grads<T: Fused + Float>(
        &self,
        scale: f32,
        [rows_learn, weight_learns]: [bool; 2],
    ) -> Result<(f64, Grads), EngineError> {
        let drows = if rows_learn { Some(self.rows.f_empty_like()?) } else { None };
        let mut dweight = WeightGrad::<T>::new(self.chunk_rows >= self.shape.num_rows);
        let total = self.sum_chunks::<T>(|first, scores, targets| {
            let loss = match &self.part {
                Some(part) => {
                    let (loss, softmax) = part.softmax::<T>(scores, targets)?;
                    let classes = part.classes.clone();
                    split::gradients(threads(), elements_mut::<T>(scores), targets, classes, &softmax, scale);
                    loss
                }
                None => kernel::in_place(threads(), elements_mut::<T>(scores), targets, scale)?,
            };
            let num_rows = targets.len() as i64;
            if let Some(drows) = &drows {
                let _ = scores.f_mm_out(&drows.f_narrow(0, first, num_rows)?, &self.weight)?;
            }
            if weight_learns {
                dweight.add(scores, &self.rows.f_narrow(0, first, num_rows)?)?;
            }
            Ok(loss)
        })?;
        let dweight = if weight_learns { Some(dweight.finish(&self.weight)?) } else { None };
        Ok((total, [drows, dweight]))
    }

    /// Calls `visit` with each chunk's first row, its scores, which lie in the same memory every time, and its targets; adds up
    /// what it returns.
    fn sum_chunks<T: Fused>(
        &self,
        mut visit: impl FnMut(i64, &mut Tensor, &[i64]) -> Result<f64, EngineError>,
    ) -> Result<f64, EngineError> {
        let memory = self
            .rows
            .f_new_empty([self.chunk_rows as i64, self.weight.size()[0]], (T::KIND, self.rows.device()))?;
        let mut total = 0.0;
        for (chunk, targets) in self.targets.chunks(self.chunk_rows).enumerate() {
            let (first, num_rows) = (chunk * self.chunk_rows, targets.len() as i64);
            let mut scores = memory.f_narrow(0, 0, num_rows)?;
            let _ = self.rows.f_narrow(0, first as i64, num_rows)?.f_mm_out(&scores, &self.weight.f_tr()?)?;
            total += visit(first as i64, &mut scores, targets).map_err(|error| match error {
                EngineError::Target(error) => TargetOutOfRange { row: first + error.row, ..error }.into(),
                error => error,
            })?;
        }
        Ok(total)
    }
}

/// The gradient of the weight, a sum over chunks of rows.
struct WeightGrad<T> {
    is_one_chunk: bool,
    /// In the weight's type if there is one chunk, else in fp32.
    sum: Option<Tensor>,
    element: std::marker::PhantomData<T>,
}

/// Classes whose part of a chunk's gradient is made at a time: it goes into the sum from the cache.
const BLOCK_CLASSES: i64 = 2048;

impl<T: Fused + Float> WeightGrad<T> {
    fn new(is_one_chunk: bool) -> Self {
        WeightGrad { is_one_chunk, sum: None, element: std::marker::PhantomData }
    }

    /// Adds `dscores^T @ rows`.
    fn add(&mut self, dscores: &Tensor, rows: &Tensor) -> Result<(), EngineError> {
        let dscores = dscores.f_tr()?;
        if self.is_one_chunk {
            self.sum = Some(dscores.f_mm(rows)?);
            return Ok(());
        }
        if T::KIND == Kind::Float {
            match &mut self.sum {
                Some(sum) => drop(sum.f_addmm_(&dscores, rows)?),
                None => self.sum = Some(dscores.f_mm(rows)?),
            }
            return Ok(());
        }
        let size = [dscores.size()[0], rows.size()[1]];
        let is_first = self.sum.is_none();
        let sum = match self.sum.take() {
            Some(sum) => sum,
            None => Tensor::f_empty(size, (Kind::Float, rows.device()))?,
        };
        for first in (0..size[0]).step_by(BLOCK_CLASSES as usize) {
            let num_classes = BLOCK_CLASSES.min(size[0] - first);
            let part = dscores.f_narrow(0, first, num_classes)?.f_mm(rows)?;
            let mut sum = sum.f_narrow(0, first, num_classes)?;
            if is_first {
                sum.f_copy_(&part)?;
            } else {
                T::add_to(threads(), elements_mut::<f32>(&mut sum), elements::<T>(&part));
            }
        }
        self.sum = Some(sum);
        Ok(())
    }

    /// The sum in the type of the weight.
    fn finish(self, weight: &Tensor) -> Result<Tensor, EngineError> {
        match self.sum {
            Some(sum) => Ok(sum.f_to_kind(T::KIND)?),
            None => Ok(weight.f_zeros_like()?),
        }
    }
}
