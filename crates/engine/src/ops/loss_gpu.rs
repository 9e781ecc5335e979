//! The loss of a language model's head on a GPU: chunk by chunk as on the host ([`super::LinearCrossEntropy`]), and nothing waits
//! for a number.
//!
//! Losses of rows are summed where they are, and the gradient of the loss is taken in where it is. A target that is no class makes the loss
//! not a number.

use shardwise_kernels::cuda::{
    CrossEntropy, DevicePtr, SplitCombine, SplitGradients, SplitPartial, SumInOrder,
};
use shardwise_plan::memory::HeadShape;
use shardwise_torch::function::{Saved, link};
use shardwise_torch::{Kind, Tensor, TorchError, no_grad};

use super::gpu::{OnGpu, address, address_of_rows};
use super::loss::{ClassPart, LinearCrossEntropy, learns};
use crate::EngineError;

/// Classes whose part of a chunk's gradient is made at a time, where sums over chunks are in fp32.
const BLOCK_CLASSES: i64 = 16384;

/// Elements that a row of scores is a multiple of.
const ROW_ALIGNMENT: usize = 64;

/// The loss of contiguous `x` and `weight`, as [`LinearCrossEntropy::forward`].
pub(super) fn forward(
    options: LinearCrossEntropy,
    gpu: OnGpu,
    x: &Tensor,
    weight: &Tensor,
    target: &Tensor,
    part: Option<ClassPart>,
) -> Result<Tensor, EngineError> {
    let width = weight.size()[1];
    let wanted = [learns(x)?, learns(weight)?];
    let rows = no_grad(|| x.f_reshape([-1, width]))?;
    let num_rows = rows.size()[0];
    let shape = HeadShape {
        num_rows: num_rows as usize,
        width: width as usize,
        num_classes: match &part {
            Some(part) => part.most_classes(),
            None => weight.size()[0] as usize,
        },
        element_bytes: gpu.kind.elt_size_in_bytes(),
    };
    let chunk_rows = options.chunk_rows.unwrap_or_else(|| shape.chunk_rows_on_gpu());
    let chunk_rows = chunk_rows.clamp(1, shape.num_rows.max(1)) as i64;
    let scale = options.loss_scale / num_rows as f64;
    let targets = target.f_reshape([-1])?;
    let head = Head { gpu, rows, weight: weight.f_detach()?, targets, chunk_rows, scale, part };
    let (loss, made) = no_grad(|| head.loss_and_grads(wanted))?;

    let saved: Vec<Saved<'_>> = made.iter().flatten().map(Saved::Input).collect();
    let (size, expected) = (x.size(), options.loss_scale);
    link(&[x, weight], &[&loss], &saved, move |args| {
        let Some(dloss) = &args.grads[0] else { return Ok(vec![None, None]) };
        // Multiplied in any case: to look whether it is 1 would be to wait.
        let more = dloss.f_div_scalar(expected)?;
        let mut made = args.saved.iter();
        let mut next = |wanted: bool, size: &[i64]| -> Result<Option<Tensor>, TorchError> {
            match if wanted { made.next() } else { None } {
                Some(grad) => Ok(Some(grad.f_mul(&more)?.f_view(size)?)),
                None => Ok(None),
            }
        };
        Ok(vec![next(wanted[0], &size)?, next(wanted[1], &[-1, width])?])
    })?;
    Ok(loss)
}

/// A head at work, without a graph.
struct Head {
    gpu: OnGpu,
    rows: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk_rows: i64,
    /// Of gradients.
    scale: f64,
    part: Option<ClassPart>,
}

/// What some rows of a head are for, and where their losses go.
struct Rows {
    /// `[rows]`, `i64`.
    targets: Tensor,
    /// `[rows]`, `f64`.
    losses: Tensor,
    /// `[1]`, `i64`: all bits set, or the first row whose target is no class.
    bad_row: Tensor,
}

impl Rows {
    fn narrow(&self, first: i64, count: i64) -> Result<Rows, EngineError> {
        Ok(Rows {
            targets: self.targets.f_narrow(0, first, count)?,
            losses: self.losses.f_narrow(0, first, count)?,
            bad_row: self.bad_row.shallow_clone(),
        })
    }
}

impl Head {
    /// The mean loss, and the gradients of rows and weight that are wanted.
    fn loss_and_grads(
        &self,
        [rows_learn, weight_learns]: [bool; 2],
    ) -> Result<(Tensor, [Option<Tensor>; 2]), EngineError> {
        let device = self.rows.device();
        let num_rows = self.targets.numel() as i64;
        let all = Rows {
            targets: self.targets.shallow_clone(),
            losses: Tensor::f_empty([num_rows], (Kind::Double, device))?,
            bad_row: Tensor::f_full([1], -1, (Kind::Int64, device))?,
        };
        // Rows begin at whole lines of memory, whatever the vocabulary: matrix products are several times slower else.
        let num_classes = self.weight.size()[0];
        let stride = (num_classes as usize).max(1).next_multiple_of(ROW_ALIGNMENT) as i64;
        let memory = Tensor::f_empty([self.chunk_rows, stride], (self.gpu.kind, device))?;
        let memory = memory.f_narrow(1, 0, num_classes)?;
        let drows = if rows_learn { Some(self.rows.f_empty_like()?) } else { None };
        let mut dweight = None;
        let mut first = 0;
        while first < num_rows {
            let count = self.chunk_rows.min(num_rows - first);
            let rows = self.rows.f_narrow(0, first, count)?;
            let scores = memory.f_narrow(0, 0, count)?;
            let _ = rows.f_mm_out(&scores, &self.weight.f_tr()?)?;
            self.losses(&scores, &all.narrow(first, count)?, rows_learn || weight_learns)?;
            if let Some(drows) = &drows {
                let _ = scores.f_mm_out(&drows.f_narrow(0, first, count)?, &self.weight)?;
            }
            if weight_learns {
                self.add_weight_grad(&mut dweight, &scores, &rows)?;
            }
            first += count;
        }
        let dweight = match dweight {
            Some(sum) => Some(sum.f_to_kind(self.gpu.kind)?),
            None if weight_learns => Some(self.weight.f_zeros_like()?),
            None => None,
        };
        let total = Tensor::f_empty([1], (Kind::Double, device))?;
        let sum = SumInOrder { terms: address(&all.losses), total: address(&total), numel: num_rows as u64 };
        self.gpu.run("cross_entropy", &sum.launch())?;
        let loss = total.f_div_scalar(num_rows as f64)?.f_to_kind(Kind::Float)?.f_squeeze()?;
        Ok((loss, [drows, dweight]))
    }

    /// Writes the losses of some rows, and the gradients of their scores in place of the scores.
    fn losses(&self, scores: &Tensor, rows: &Rows, is_learning: bool) -> Result<(), EngineError> {
        if let Some(part) = &self.part {
            return part.losses(&self.gpu, scores, rows, is_learning.then_some(self.scale));
        }
        let (num_rows, classes) = scores.size2()?;
        let (logits, stride) = address_of_rows(scores);
        let call = CrossEntropy {
            logits,
            grad: if is_learning { logits } else { DevicePtr::NULL },
            targets: address(&rows.targets),
            losses: address(&rows.losses),
            bad_row: address(&rows.bad_row),
            rows: num_rows as u64,
            classes: classes as u64,
            stride,
            scale: self.scale as f32,
        };
        Ok(self.gpu.run("cross_entropy", &call.launch(self.gpu.float))?)
    }

    /// Adds `dscores^T @ rows`: in the weight's type if there is one chunk, else in fp32.
    fn add_weight_grad(
        &self,
        sum: &mut Option<Tensor>,
        dscores: &Tensor,
        rows: &Tensor,
    ) -> Result<(), EngineError> {
        let dscores = dscores.f_tr()?;
        if self.chunk_rows >= self.targets.numel() as i64 {
            *sum = Some(dscores.f_mm(rows)?);
            return Ok(());
        }
        if self.gpu.kind == Kind::Float {
            match sum {
                Some(sum) => drop(sum.f_addmm_(&dscores, rows)?),
                None => *sum = Some(dscores.f_mm(rows)?),
            }
            return Ok(());
        }
        let num_classes = dscores.size()[0];
        let is_first = sum.is_none();
        let size = [num_classes, rows.size()[1]];
        let into = match sum.take() {
            Some(sum) => sum,
            None => Tensor::f_empty(size, (Kind::Float, rows.device()))?,
        };
        for first in (0..num_classes).step_by(BLOCK_CLASSES as usize) {
            let count = BLOCK_CLASSES.min(num_classes - first);
            let part = dscores.f_narrow(0, first, count)?.f_mm(rows)?;
            let mut into = into.f_narrow(0, first, count)?;
            if is_first {
                into.f_copy_(&part)?;
            } else {
                let _ = into.f_add_(&part)?;
            }
        }
        *sum = Some(into);
        Ok(())
    }
}

impl ClassPart {
    /// The losses of rows of which this rank has the scores of some classes, and, with a scale, the gradients of the scores in place.
    ///
    /// # Collective
    /// The tensor-parallel ranks.
    fn losses(
        &self,
        gpu: &OnGpu,
        scores: &Tensor,
        rows: &Rows,
        scale: Option<f64>,
    ) -> Result<(), EngineError> {
        const NAME: &str = "cross_entropy over ranks";
        let (num_rows, width) = scores.size2()?;
        let float = (Kind::Float, scores.device());
        let own = Tensor::f_empty([num_rows, 3], float)?;
        let (logits, stride) = address_of_rows(scores);
        let partial = SplitPartial {
            logits,
            targets: address(&rows.targets),
            out: address(&own),
            bad_row: address(&rows.bad_row),
            rows: num_rows as u64,
            width: width as u64,
            stride,
            first_class: self.classes.start as u64,
            num_classes: self.num_classes as u64,
        };
        gpu.run(NAME, &partial.launch(gpu.float))?;
        let degree = self.tensor.degree();
        let mut all = Tensor::f_empty([degree as i64, num_rows, 3], float)?;
        self.tensor
            .run(|group| group.all_gather(self.tensor.slice(&own), self.tensor.slice_mut(&mut all)))?;
        let row_bytes = SplitCombine::ROW_BYTES as i64;
        let softmax = Tensor::f_empty([num_rows, row_bytes], (Kind::Uint8, scores.device()))?;
        let combine = SplitCombine {
            parts: address(&all),
            softmax: address(&softmax),
            losses: address(&rows.losses),
            num_parts: degree as u64,
            rows: num_rows as u64,
        };
        gpu.run(NAME, &combine.launch())?;
        let Some(scale) = scale else { return Ok(()) };
        let gradients = SplitGradients {
            logits,
            targets: address(&rows.targets),
            softmax: address(&softmax),
            rows: num_rows as u64,
            width: width as u64,
            stride,
            first_class: self.classes.start as u64,
            num_classes: self.num_classes as u64,
            scale: scale as f32,
        };
        Ok(gpu.run(NAME, &gradients.launch(gpu.float))?)
    }
}
