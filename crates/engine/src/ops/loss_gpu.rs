//! The loss of a language model's head on a GPU: chunk by chunk as on the host ([`super::LinearCrossEntropy`]), and nothing waits
//! for a number.
//!
//! Losses of rows are summed where they are, and the gradient of the loss is taken in where it is. A target that is no class makes the loss
//! not a number. Where ranks have the scores of some classes each, the softmax is put together from a maximum, a sum and the target's
//! score of each rank, in libtorch's operations.

use shardwise_kernels::cuda::{CrossEntropy, DevicePtr, SumInOrder};
use shardwise_plan::memory::HeadShape;
use shardwise_torch::function::{Saved, link};
use shardwise_torch::{Kind, Tensor, no_grad};

use super::gpu::{OnGpu, address};
use super::loss::{ClassPart, LinearCrossEntropy, learns};
use crate::EngineError;

/// Classes whose part of a chunk's gradient is made at a time, where sums over chunks are in fp32.
const BLOCK_CLASSES: i64 = 16384;

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
        let mut next = |wanted: bool, size: &[i64]| match if wanted { made.next() } else { None } {
            Some(grad) => Ok(Some(grad.f_mul(&more)?.f_view(size)?)),
            None => Ok(None),
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

/// Where a head's sums are.
struct Sums {
    /// `[rows]`, `f64`.
    losses: Tensor,
    /// `[1]`, `i64`: all bits set, or the first row whose target is no class.
    bad_row: Tensor,
}

impl Head {
    /// The mean loss, and the gradients of rows and weight that are wanted.
    fn loss_and_grads(
        &self,
        [rows_learn, weight_learns]: [bool; 2],
    ) -> Result<(Tensor, [Option<Tensor>; 2]), EngineError> {
        let device = self.rows.device();
        let num_rows = self.targets.numel() as i64;
        let sums = Sums {
            losses: Tensor::f_empty([num_rows], (Kind::Double, device))?,
            bad_row: Tensor::f_full([1], -1, (Kind::Int64, device))?,
        };
        let memory = Tensor::f_empty([self.chunk_rows, self.weight.size()[0]], (self.gpu.kind, device))?;
        let drows = if rows_learn { Some(self.rows.f_empty_like()?) } else { None };
        let mut dweight = None;
        let mut first = 0;
        while first < num_rows {
            let count = self.chunk_rows.min(num_rows - first);
            let rows = self.rows.f_narrow(0, first, count)?;
            let mut scores = memory.f_narrow(0, 0, count)?;
            let _ = rows.f_mm_out(&scores, &self.weight.f_tr()?)?;
            self.losses(&mut scores, first, &sums, rows_learn || weight_learns)?;
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
        let sum = SumInOrder { terms: address(&sums.losses), total: address(&total), numel: num_rows as u64 };
        self.gpu.run("cross_entropy", &sum.launch())?;
        let loss = total.f_div_scalar(num_rows as f64)?.f_to_kind(Kind::Float)?.f_squeeze()?;
        Ok((loss, [drows, dweight]))
    }

    /// Writes the losses of the rows from `first` on, and the gradients of their scores in place of the scores.
    fn losses(
        &self,
        scores: &mut Tensor,
        first: i64,
        sums: &Sums,
        is_learning: bool,
    ) -> Result<(), EngineError> {
        let (rows, classes) = scores.size2()?;
        let targets = self.targets.f_narrow(0, first, rows)?;
        let losses = sums.losses.f_narrow(0, first, rows)?;
        if let Some(part) = &self.part {
            return part.losses_plain(scores, &targets, &losses, is_learning.then_some(self.scale));
        }
        let call = CrossEntropy {
            logits: address(scores),
            grad: if is_learning { address(scores) } else { DevicePtr::NULL },
            targets: address(&targets),
            losses: address(&losses),
            bad_row: address(&sums.bad_row),
            rows: rows as u64,
            classes: classes as u64,
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
    fn losses_plain(
        &self,
        scores: &mut Tensor,
        targets: &Tensor,
        losses: &Tensor,
        scale: Option<f64>,
    ) -> Result<(), EngineError> {
        let (rows, classes) = scores.size2()?;
        let exact = scores.f_to_kind(Kind::Float)?;
        let local = targets.f_sub_scalar(self.classes.start as i64)?;
        let is_own = local.f_ge(0)?.f_logical_and(&local.f_lt(classes)?)?;
        let float = (Kind::Float, scores.device());
        let (highest, sum, of_target) = if classes == 0 {
            let none = Tensor::f_full([rows], f64::NEG_INFINITY, float)?;
            (none, Tensor::f_zeros([rows], float)?, Tensor::f_zeros([rows], float)?)
        } else {
            let highest = exact.f_amax([-1i64].as_slice(), false)?;
            let sum = exact.f_sub(&highest.f_unsqueeze(1)?)?.f_exp()?;
            let sum = sum.f_sum_dim_intlist([-1i64].as_slice(), false, Kind::Float)?;
            let at = local.f_clamp(0, classes - 1)?.f_unsqueeze(1)?;
            let of_target = exact.f_gather(1, &at, false)?.f_squeeze_dim(1)?;
            let zero = Tensor::f_zeros([rows], float)?;
            (highest, sum, of_target.f_where_self(&is_own, &zero)?)
        };
        let own = Tensor::f_stack(&[highest, sum, of_target], 0)?.f_contiguous()?;
        let degree = self.tensor.degree() as i64;
        let mut all = Tensor::f_empty([degree, 3, rows], float)?;
        self.tensor
            .run(|group| group.all_gather(self.tensor.slice(&own), self.tensor.slice_mut(&mut all)))?;
        let of_ranks = |which: i64| all.f_select(1, which);
        let highest = of_ranks(0)?.f_amax([0i64].as_slice(), false)?;
        let weights = of_ranks(0)?.f_sub(&highest)?.f_exp()?;
        let sum = of_ranks(1)?.f_mul(&weights)?.f_sum_dim_intlist([0i64].as_slice(), false, Kind::Float)?;
        let target = of_ranks(2)?.f_sum_dim_intlist([0i64].as_slice(), false, Kind::Float)?;
        let loss = sum.f_log()?.f_add(&highest)?.f_sub(&target)?;
        let _ = losses.shallow_clone().f_copy_(&loss)?;
        if let Some(scale) = scale {
            let mut grad = exact.f_sub(&highest.f_unsqueeze(1)?)?.f_exp()?.f_div(&sum.f_unsqueeze(1)?)?;
            if classes > 0 {
                let at = local.f_clamp(0, classes - 1)?.f_unsqueeze(1)?;
                let less = is_own.f_to_kind(Kind::Float)?.f_neg()?.f_unsqueeze(1)?;
                let _ = grad.f_scatter_add_(1, &at, &less)?;
            }
            scores.f_copy_(&grad.f_mul_scalar(scale)?)?;
        }
        Ok(())
    }
}
