//! Dropout, while a model learns.

use half::{bf16, f16};
use shardwise_kernels::dropout::Mask;
use shardwise_plan::zoo::SequenceParallel;
use shardwise_torch::function::link;
use shardwise_torch::{Kind, Tensor, TorchError, no_grad};

use super::gpu::{OnGpu, address, on_gpu};
use super::raw::{Fused, elements, elements_mut, fused_kind, threads};
use crate::{Context, EngineError, Randomness};
use shardwise_kernels::Float;

/// A place in a model where a share of the elements is dropped.
///
/// What is dropped follows from the run's seed, the place's name, the row's place in the run and the element's in the row. It
/// is the same whether a forward pass runs for the first or for the second time, and however a global batch is split. No
/// mask is kept for the backward pass.
#[derive(Debug, Clone)]
pub struct Dropout {
    name: String,
    rate: f64,
}

impl Dropout {
    /// Drops a share `rate` of the elements at the place `site` of the layer `layer`.
    ///
    /// # Panics
    /// If `rate` is not in `0.0..1.0`.
    pub fn new(layer: &str, site: &str, rate: f64) -> Self {
        assert!((0.0..1.0).contains(&rate), "a rate of `{rate}`");
        Dropout { name: format!("dropout {layer} {site}"), rate }
    }

    /// Whether elements are dropped in this pass.
    pub fn is_on(&self, context: &Context<'_>) -> bool {
        self.rate > 0.0 && context.random.is_some()
    }

    /// `x` with elements dropped and the others scaled up, or `x` as it is if the model does not learn.
    ///
    /// # Shapes
    /// - `x`: of any shape whose elements stand row by row of the micro-batch, such as `[rows, seq, width]`
    /// # Errors
    /// What libtorch says.
    pub fn apply(&self, context: &Context<'_>, x: &Tensor) -> Result<Tensor, EngineError> {
        self.apply_share(context, x, (0, 1))
    }

    /// [`Dropout::apply`] where `x` may be this tensor-parallel rank's equal share of each row, such as its heads: the `n`th of
    /// `degree` parts, one after the other. Put together, the ranks drop what one rank would.
    ///
    /// # Errors
    /// What libtorch says.
    pub fn apply_to_share(&self, context: &Context<'_>, x: &Tensor) -> Result<Tensor, EngineError> {
        let share = context.tensor.map_or((0, 1), |tensor| (tensor.rank(), tensor.degree()));
        self.apply_share(context, x, share)
    }

    /// [`Dropout::apply`] to what is between linear maps: with sequence parallelism a share of each row, else whole rows.
    ///
    /// # Errors
    /// What libtorch says.
    pub fn apply_to_residual(&self, context: &Context<'_>, x: &Tensor) -> Result<Tensor, EngineError> {
        match context.tensor {
            Some(tensor) if tensor.sequence() == SequenceParallel::On => self.apply_to_share(context, x),
            _ => self.apply(context, x),
        }
    }

    fn apply_share(
        &self,
        context: &Context<'_>,
        x: &Tensor,
        share: (usize, usize),
    ) -> Result<Tensor, EngineError> {
        let Some(random) = context.random.filter(|_| self.rate > 0.0) else { return Ok(x.shallow_clone()) };
        let mask = self.mask(random, x, share);
        if let Some(gpu) = on_gpu(context, &[x]) {
            return on_a_gpu(gpu, mask, x);
        }
        match fused_kind(&[x]) {
            Some(Kind::BFloat16) => fused::<bf16>(mask, x),
            Some(Kind::Half) => fused::<f16>(mask, x),
            Some(_) => fused::<f32>(mask, x),
            None => plain(mask, x),
        }
    }

    /// [`Dropout::apply`] in libtorch's own operations.
    ///
    /// # Errors
    /// What libtorch says.
    pub fn apply_plain(&self, context: &Context<'_>, x: &Tensor) -> Result<Tensor, EngineError> {
        match context.random {
            Some(random) if self.rate > 0.0 => plain(self.mask(random, x, (0, 1)), x),
            _ => Ok(x.shallow_clone()),
        }
    }

    fn mask(&self, random: Randomness, x: &Tensor, (nth, num_shares): (usize, usize)) -> Mask {
        let share_numel = x.numel() / random.num_rows.max(1);
        let row_numel = share_numel * num_shares;
        let first = random.first_row.wrapping_mul(row_numel as u64);
        let mask = Mask::new(random.seed, &self.name, first, self.rate);
        match num_shares {
            1 => mask,
            _ => mask.of_part(row_numel, nth * share_numel..(nth + 1) * share_numel),
        }
    }
}

fn on_a_gpu(gpu: OnGpu, mask: Mask, x: &Tensor) -> Result<Tensor, EngineError> {
    let weigh = move |x: &Tensor| -> Result<Tensor, TorchError> {
        let y = x.f_empty_like()?;
        gpu.run("dropout", &mask.cuda_apply(gpu.float, address(x), address(&y), x.numel() as u64))?;
        Ok(y)
    };
    let y = no_grad(|| weigh(x))?;
    link(&[x], &[&y], &[], move |args| match &args.grads[0] {
        Some(dy) => Ok(vec![Some(weigh(&dy.f_contiguous()?)?)]),
        None => Ok(vec![None]),
    })?;
    Ok(y)
}

fn plain(mask: Mask, x: &Tensor) -> Result<Tensor, EngineError> {
    let mut weights = Tensor::f_empty(x.size(), (Kind::Float, shardwise_torch::Device::Cpu))?;
    no_grad(|| mask.fill(threads(), elements_mut::<f32>(&mut weights)));
    let exact = if x.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let weights = weights.f_to_device(x.device())?.f_to_kind(exact)?;
    Ok(x.f_to_kind(exact)?.f_mul(&weights)?.f_to_kind(x.kind())?)
}

fn fused<T: Fused + Float>(mask: Mask, x: &Tensor) -> Result<Tensor, EngineError> {
    let weigh = move |x: &Tensor| -> Result<Tensor, TorchError> {
        let mut y = x.f_empty_like()?;
        mask.apply(threads(), elements::<T>(x), elements_mut::<T>(&mut y));
        Ok(y)
    };
    let y = no_grad(|| weigh(x))?;
    link(&[x], &[&y], &[], move |args| match &args.grads[0] {
        Some(dy) => Ok(vec![Some(weigh(&dy.f_contiguous()?)?)]),
        None => Ok(vec![None]),
    })?;
    Ok(y)
}
