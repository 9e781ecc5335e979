//! RMS norm and LayerNorm by our kernels on a GPU, alone and beside a residual.

use shardwise_kernels::cuda::{
    AddNormBackward, AddNormForward, DevicePtr, NormBackward, NormForward, RowNorm,
};
use shardwise_torch::function::{Saved, link};
use shardwise_torch::{Kind, Tensor, TorchError};

use super::gpu::{OnGpu, address, on_gpu};
use crate::{Context, EngineError};

/// A norm over the last dimension, on a GPU: LayerNorm if it has a bias, else RMS norm.
#[derive(Debug)]
pub(super) struct NormOnGpu<'a> {
    kernels: Kernels,
    weight: &'a Tensor,
    bias: Option<&'a Tensor>,
    eps: f32,
}

impl<'a> NormOnGpu<'a> {
    /// The norm of rows like those of `xs`, if kernels take them all.
    pub fn of(
        context: &Context<'_>,
        xs: &[&Tensor],
        weight: &'a Tensor,
        bias: Option<&'a Tensor>,
        eps: f64,
    ) -> Option<Self> {
        let tensors: Vec<&Tensor> = xs.iter().copied().chain([weight]).chain(bias).collect();
        let gpu = on_gpu(context, &tensors)?;
        let norm = if bias.is_some() { RowNorm::Layer } else { RowNorm::Rms };
        let width = weight.numel() as u64;
        let kernels = Kernels { gpu, norm, rows: xs[0].numel() as u64 / width.max(1), width };
        Some(NormOnGpu { kernels, weight, bias, eps: eps as f32 })
    }

    /// The norm of `x`.
    pub fn norm(self, x: &Tensor) -> Result<Tensor, EngineError> {
        let (out, stats) = self.forward(x, None)?;
        self.link(&[x], &[&out], Saved::Input(x), &stats, |grads| (None, grads[0].as_ref()))?;
        Ok(out)
    }

    /// `x` for a residual, and its norm: the gradients of both are added within the norm's backward pass.
    pub fn fork(self, x: &Tensor) -> Result<[Tensor; 2], EngineError> {
        let (out, stats) = self.forward(x, None)?;
        // A tensor of its own, over the same memory: nobody writes to either.
        let same = x.f_detach()?;
        self.link(&[x], &[&same, &out], Saved::Input(x), &stats, both)?;
        Ok([same, out])
    }

    /// `x + residual` and its norm.
    pub fn add(self, x: &Tensor, residual: &Tensor) -> Result<[Tensor; 2], EngineError> {
        let sum = x.f_empty_like()?;
        let (out, stats) = self.forward(x, Some([residual, &sum]))?;
        self.link(&[x, residual], &[&sum, &out], Saved::Output(&sum), &stats, both)?;
        Ok([sum, out])
    }

    /// The norm of `x`, or of `x + residual`, which is written to the second of `added`; and what is kept of each row.
    fn forward(&self, x: &Tensor, added: Option<[&Tensor; 2]>) -> Result<(Tensor, Tensor), TorchError> {
        let Kernels { gpu, norm, rows, width } = &self.kernels;
        let out = x.f_empty_like()?;
        let stats = Tensor::f_empty([norm.num_sums() as i64, *rows as i64], (Kind::Float, x.device()))?;
        let (factors, means) = self.kernels.stats(&stats);
        let forward = NormForward {
            x: address(x),
            weight: address(self.weight),
            bias: self.bias.map_or(DevicePtr::NULL, address),
            out: address(&out),
            factors,
            means,
            rows: *rows,
            width: *width,
            eps: self.eps,
        };
        match added {
            None => gpu.run(NAME, &forward.launch(*norm, gpu.float))?,
            Some([residual, sum]) => {
                let add = AddNormForward { norm: forward, residual: address(residual), sum: address(sum) };
                gpu.run(NAME, &add.launch(*norm, gpu.float))?;
            }
        }
        Ok((out, stats))
    }

    /// Links `outputs` to `xs`, which all have the gradient of what was `normalized`, and to the norm's parameters. `of_grads` says
    /// which of the outputs' gradients are those of what was normalized and of its norm.
    fn link(
        self,
        xs: &[&Tensor],
        outputs: &[&Tensor],
        normalized: Saved<'_>,
        stats: &Tensor,
        of_grads: fn(&[Option<Tensor>]) -> Grads<'_>,
    ) -> Result<(), TorchError> {
        let NormOnGpu { kernels, weight, bias, .. } = self;
        let inputs: Vec<&Tensor> = xs.iter().copied().chain([weight]).chain(bias).collect();
        let (num_xs, num_inputs) = (xs.len(), inputs.len());
        let saved = [normalized, Saved::Input(weight), Saved::Input(stats)];
        link(&inputs, outputs, &saved, move |args| {
            let mut grads: Vec<Option<Tensor>> = (0..num_inputs).map(|_| None).collect();
            let [x, weight, stats] = &args.saved[..] else { return Ok(grads) };
            let (dsum, dy) = of_grads(&args.grads);
            let dx = match dy {
                Some(dy) => {
                    let (dx, of_params) = kernels.backward([x, weight, stats], dy, dsum)?;
                    grads[num_xs..]
                        .iter_mut()
                        .zip(of_params)
                        .for_each(|(grad, of_param)| *grad = Some(of_param));
                    Some(dx)
                }
                None => dsum.map(Tensor::shallow_clone),
            };
            grads[..num_xs].iter_mut().for_each(|grad| *grad = dx.as_ref().map(Tensor::shallow_clone));
            Ok(grads)
        })
    }
}

const NAME: &str = "norm";

/// The gradients of what was normalized and of its norm.
type Grads<'t> = (Option<&'t Tensor>, Option<&'t Tensor>);

/// Of a residual and of its norm.
fn both(grads: &[Option<Tensor>]) -> Grads<'_> {
    (grads[0].as_ref(), grads[1].as_ref())
}

/// Which kernels run, and on what shape.
#[derive(Debug, Clone)]
struct Kernels {
    gpu: OnGpu,
    norm: RowNorm,
    rows: u64,
    width: u64,
}

impl Kernels {
    /// Where the rows' factors are, and LayerNorm's means.
    fn stats(&self, stats: &Tensor) -> (DevicePtr, DevicePtr) {
        let factors = address(stats);
        let means = match self.norm {
            RowNorm::Rms => DevicePtr::NULL,
            RowNorm::Layer => DevicePtr::new(factors.address() + self.rows * size_of::<f32>() as u64),
        };
        (factors, means)
    }

    /// The gradient of `x`, with that from where else it was used added, and those of the parameters.
    fn backward(
        &self,
        [x, weight, stats]: [&Tensor; 3],
        dy: &Tensor,
        dsum: Option<&Tensor>,
    ) -> Result<(Tensor, Vec<Tensor>), TorchError> {
        let Kernels { gpu, norm, rows, width } = self;
        let dy = dy.f_contiguous()?;
        let dsum = dsum.map(Tensor::f_contiguous).transpose()?;
        let dx = x.f_empty_like()?;
        let num_partials = norm.num_partials(gpu.float, *rows, *width);
        let num_sums = norm.num_sums();
        let size = [num_partials, num_sums, *width].map(|size| size as i64);
        let partials = Tensor::f_empty(size, (Kind::Float, x.device()))?;
        let (factors, means) = self.stats(stats);
        let backward = NormBackward {
            x: address(x),
            weight: address(weight),
            factors,
            means,
            dy: address(&dy),
            dx: address(&dx),
            partials: address(&partials),
            rows: *rows,
            width: *width,
        };
        match &dsum {
            None => gpu.run(NAME, &backward.launch(*norm, gpu.float))?,
            Some(dsum) => {
                let add = AddNormBackward { norm: backward, dsum: address(dsum) };
                gpu.run(NAME, &add.launch(*norm, gpu.float))?;
            }
        }
        let of_params =
            gpu.column_sums(NAME, &partials, num_sums * width)?.f_view([num_sums as i64, *width as i64])?;
        Ok((dx, of_params.f_unbind(0)?))
    }
}
