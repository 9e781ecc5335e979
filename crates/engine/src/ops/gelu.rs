//! GELU after a linear map, as in GPT-2's MLP.

use shardwise_kernels::cuda::{GeluBackward, GeluForward};
use shardwise_torch::function::{Saved, link};
use shardwise_torch::{Kind, Tensor};

use super::gpu::{OnGpu, address, on_gpu};
use super::linear::conv1d;
use crate::{Context, EngineError};

/// `gelu(x @ weight + bias)` by GELU's tanh form, the matrix kept as in [`conv1d`].
///
/// On a GPU the bias is added where GELU is computed, of a product that is rounded before: its gradient comes from the pass that makes
/// the product's, not from another one over the same numbers.
///
/// # Shapes
/// - `x`: `[.., in]`; `weight`: `[in, out]`; `bias`: `[out]`
/// - returns `[.., out]`
/// # Errors
/// What libtorch says.
/// # Source
/// Gaussian Error Linear Units (arXiv:1606.08415).
pub fn conv1d_gelu(
    context: &Context<'_>,
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
) -> Result<Tensor, EngineError> {
    if on_gpu(context, &[x, weight, bias]).is_some() {
        let product = conv1d(context, x, weight, None)?;
        if let Some(gpu) = on_gpu(context, &[&product, bias]) {
            return on_a_gpu(gpu, &product, bias);
        }
        return Ok(product.f_add(bias)?.f_gelu("tanh")?);
    }
    Ok(conv1d(context, x, weight, Some(bias))?.f_gelu("tanh")?)
}

fn on_a_gpu(gpu: OnGpu, x: &Tensor, bias: &Tensor) -> Result<Tensor, EngineError> {
    const NAME: &str = "gelu";
    let width = bias.numel() as u64;
    let rows = x.numel() as u64 / width.max(1);
    let y = x.f_empty_like()?;
    let forward = GeluForward { x: address(x), bias: address(bias), out: address(&y), rows, width };
    gpu.run(NAME, &forward.launch(gpu.float))?;
    link(&[x, bias], &[&y], &[Saved::Input(x), Saved::Input(bias)], move |args| {
        let [x, bias] = &args.saved[..] else { return Ok(vec![None, None]) };
        let Some(dy) = &args.grads[0] else { return Ok(vec![None, None]) };
        let dy = dy.f_contiguous()?;
        let dx = x.f_empty_like()?;
        let num_partials = GeluBackward::num_partials(gpu.float, rows, width);
        let partials = Tensor::f_empty([num_partials as i64, width as i64], (Kind::Float, x.device()))?;
        let backward = GeluBackward {
            x: address(x),
            bias: address(bias),
            dy: address(&dy),
            dx: address(&dx),
            partial_dbias: address(&partials),
            rows,
            width,
        };
        gpu.run(NAME, &backward.launch(gpu.float))?;
        Ok(vec![Some(dx), Some(gpu.column_sums(NAME, &partials, width)?)])
    })?;
    Ok(y)
}
