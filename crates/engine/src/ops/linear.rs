//! Linear maps.
//!
//! On a processor that has no arithmetic in a 16-bit type ([`super::multiplies`]) libtorch multiplies matrices of it element by element, some
//! sixty times slower than f32. There the product is made in f32, of copies that last as long as the product, and rounded once.
//!
//! Where the gradients of matrices wait ([`crate::Context::deferred`]), the backward pass is ours too.

use shardwise_torch::function::{Saved, link};
use shardwise_torch::{Device, Kind, Tensor, TorchError, no_grad};

use super::raw::multiplies_in_f32;
use crate::deferred::{Form, Shelf};
use crate::{Context, EngineError};

/// `x @ weight^T + bias`.
///
/// # Shapes
/// - `x`: `[.., in]`; `weight`: `[out, in]`; `bias`: `[out]`
/// - returns `[.., out]`
/// # Errors
/// What libtorch says.
pub fn linear(
    context: &Context<'_>,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Tensor, EngineError> {
    match shelf(context, weight) {
        None if !multiplies_in_f32(&[x, weight]) => Ok(map(Form::OutIn, x, weight, bias)?),
        shelf => own(Form::OutIn, shelf, x, weight, bias),
    }
}

/// `x @ weight + bias`: a linear map whose matrix is kept the other way round, as GPT-2's are.
///
/// # Shapes
/// - `x`: `[.., in]`; `weight`: `[in, out]`; `bias`: `[out]`
/// - returns `[.., out]`
/// # Errors
/// What libtorch says.
pub fn conv1d(
    context: &Context<'_>,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Tensor, EngineError> {
    match shelf(context, weight) {
        None if !multiplies_in_f32(&[x, weight]) => Ok(map(Form::InOut, x, weight, bias)?),
        shelf => own(Form::InOut, shelf, x, weight, bias),
    }
}

/// Where the factors of the gradient of `weight` go, if it waits.
fn shelf(context: &Context<'_>, weight: &Tensor) -> Option<Shelf> {
    context.deferred.filter(|_| weight.requires_grad()).map(|deferred| deferred.shelf(weight))
}

/// A linear map with a backward pass of our own.
fn own(
    form: Form,
    shelf: Option<Shelf>,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Tensor, EngineError> {
    let y = no_grad(|| match multiplies_in_f32(&[x, weight]) {
        true => map_in_f32(form, x, weight, bias),
        false => map(form, x, weight, bias),
    })?;
    let inputs: Vec<&Tensor> = [x, weight].into_iter().chain(bias).collect();
    let num_inputs = inputs.len();
    link(&inputs, &[&y], &[Saved::Input(x), Saved::Input(weight)], move |args| {
        let mut grads: Vec<Option<Tensor>> = (0..num_inputs).map(|_| None).collect();
        let ([x, weight], Some(dy)) = (&args.saved[..], &args.grads[0]) else { return Ok(grads) };
        let is_wanted = |input: usize| args.wanted.get(input).copied().unwrap_or(false);
        let kind = x.kind();
        if is_wanted(0) {
            let dx = match form {
                Form::OutIn => product(&rows(dy)?, weight)?,
                Form::InOut => product(&rows(dy)?, &weight.f_tr()?)?,
            };
            grads[0] = Some(dx.f_to_kind(kind)?.f_view(x.size().as_slice())?);
        }
        match &shelf {
            _ if is_wanted(1) => grads[1] = Some(weight_grad(form, x, dy)?),
            Some(shelf) => shelf.put(form, x, dy)?,
            None => {}
        }
        if is_wanted(2) {
            let sum = rows(dy)?.f_sum_dim_intlist([0].as_slice(), false, Kind::Float)?;
            grads[2] = Some(sum.f_to_kind(kind)?);
        }
        Ok(grads)
    })?;
    Ok(y)
}

/// A linear map by libtorch.
fn map(form: Form, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor, TorchError> {
    match (form, bias) {
        (Form::OutIn, bias) => Ok(x.f_linear(weight, bias)?),
        // A GPU's product adds the bias before it rounds, and saves a pass.
        (Form::InOut, Some(bias)) if x.device() != Device::Cpu => {
            let mut size = x.size();
            let y = bias.f_addmm(&rows(x)?, weight)?;
            size.pop();
            size.push(weight.size()[1]);
            Ok(y.f_view(size.as_slice())?)
        }
        (Form::InOut, Some(bias)) => Ok(x.f_matmul(weight)?.f_add(bias)?),
        (Form::InOut, None) => Ok(x.f_matmul(weight)?),
    }
}

/// The same, rounded once at the end.
fn map_in_f32(form: Form, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor, TorchError> {
    let exact = |x: &Tensor| x.f_to_kind(Kind::Float);
    let bias = bias.map(exact).transpose()?;
    Ok(map(form, &exact(x)?, &exact(weight)?, bias.as_ref())?.f_to_kind(x.kind())?)
}

/// The gradient of a linear map's matrix.
pub(crate) fn weight_grad(form: Form, x: &Tensor, dy: &Tensor) -> Result<Tensor, TorchError> {
    let (x, dy) = (rows(x)?, rows(dy)?);
    let grad = match form {
        Form::OutIn => product(&dy.f_tr()?, &x)?,
        Form::InOut => product(&x.f_tr()?, &dy)?,
    };
    Ok(grad.f_to_kind(x.kind())?)
}

/// `[.., width]` as `[rows, width]`.
fn rows(x: &Tensor) -> Result<Tensor, TorchError> {
    Ok(x.f_reshape([-1, x.size()[x.dim() - 1]])?)
}

/// `a @ b`, in f32 where the processor is slow at the elements' own type.
fn product(a: &Tensor, b: &Tensor) -> Result<Tensor, TorchError> {
    if multiplies_in_f32(&[a, b]) {
        return Ok(a.f_to_kind(Kind::Float)?.f_mm(&b.f_to_kind(Kind::Float)?)?);
    }
    Ok(a.f_mm(b)?)
}
