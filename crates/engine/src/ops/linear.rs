//! Linear maps.
//!
//! A processor that has no arithmetic in 16-bit floats multiplies f16 matrices element by element in libtorch, some twenty times
//! slower than f32. There the product is made in f32, of copies that last as long as the product, and rounded once.

use shardwise_torch::function::{Saved, link};
use shardwise_torch::{Kind, Tensor, TorchError, no_grad};

use super::raw::multiplies_in_f32;
use crate::EngineError;

/// `x @ weight^T + bias`.
///
/// # Shapes
/// - `x`: `[.., in]`; `weight`: `[out, in]`; `bias`: `[out]`
/// - returns `[.., out]`
/// # Errors
/// What libtorch says.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor, EngineError> {
    if multiplies_in_f32(&[x, weight]) {
        return in_f32(x, &weight.f_tr()?, bias);
    }
    Ok(x.f_linear(weight, bias)?)
}

/// `x @ weight + bias`: a linear map whose matrix is kept the other way round, as GPT-2's are.
///
/// # Shapes
/// - `x`: `[.., in]`; `weight`: `[in, out]`; `bias`: `[out]`
/// - returns `[.., out]`
/// # Errors
/// What libtorch says.
pub fn conv1d(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor, EngineError> {
    if multiplies_in_f32(&[x, weight]) {
        return in_f32(x, weight, bias);
    }
    let y = x.f_matmul(weight)?;
    match bias {
        Some(bias) => Ok(y.f_add(bias)?),
        None => Ok(y),
    }
}

/// `x @ weight + bias` by f32 arithmetic, with `weight` `[in, out]` a view of a parameter or a parameter.
fn in_f32(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor, EngineError> {
    let rows = |x: &Tensor| -> Result<Tensor, TorchError> {
        Ok(x.f_reshape([-1, x.size()[x.dim() - 1]])?.f_to_kind(Kind::Float)?)
    };
    let y = no_grad(|| -> Result<Tensor, TorchError> {
        let y = rows(x)?.f_mm(&weight.f_to_kind(Kind::Float)?)?;
        let y = match bias {
            Some(bias) => y.f_add(bias)?,
            None => y,
        };
        let mut size = x.size();
        *size.last_mut().expect("a linear map's input has a dimension") = weight.size()[1];
        Ok(y.f_to_kind(x.kind())?.f_view(size.as_slice())?)
    })?;
    let inputs: Vec<&Tensor> = [x, weight].into_iter().chain(bias).collect();
    let num_inputs = inputs.len();
    link(&inputs, &[&y], &[Saved::Input(x), Saved::Input(weight)], move |args| {
        let nothing = || Ok((0..num_inputs).map(|_| None).collect());
        let [x, weight] = &args.saved[..] else { return nothing() };
        let Some(dy) = &args.grads[0] else { return nothing() };
        let dy = rows(dy)?;
        let wanted = |input: usize| args.wanted.get(input).copied().unwrap_or(false);
        let mut grads: Vec<Option<Tensor>> = Vec::with_capacity(num_inputs);
        grads.push(match wanted(0) {
            true => {
                let dx = dy.f_mm(&weight.f_to_kind(Kind::Float)?.f_tr()?)?;
                Some(dx.f_to_kind(x.kind())?.f_view(x.size().as_slice())?)
            }
            false => None,
        });
        grads.push(match wanted(1) {
            true => Some(rows(x)?.f_tr()?.f_mm(&dy)?.f_to_kind(weight.kind())?),
            false => None,
        });
        if num_inputs == 3 {
            grads.push(match wanted(2) {
                true => Some(dy.f_sum_dim_intlist([0].as_slice(), false, Kind::Float)?.f_to_kind(x.kind())?),
                false => None,
            });
        }
        Ok(grads)
    })?;
    Ok(y)
}
