//! What tensor-parallel ranks do between linear maps: differentiable collectives.
//!
//! A pair of linear maps, the first cut by its outputs and the second by its inputs, needs its input on every rank before, and
//! the sum of what the ranks have made after. What is between pairs (residuals, norms) every rank has whole, or, with
//! sequence parallelism, its share of the tokens:
//!
//! ```text
//!                       forward                                backward
//! all tokens   enter    nothing                                sum the gradient
//!              leave    sum                                    nothing
//! its tokens   enter    all-gather the tokens                  reduce-scatter the gradient
//!              leave    reduce-scatter to its tokens           all-gather the gradient
//! ```
//! With sequence parallelism the gathered tokens are kept for the backward pass by the linear map that they go into, where the source
//! gathers them again: two tensors a block as large as without, and no communication more.
//!
//! Sums are made in rank order in fp32 and rounded once. Without tensor parallelism all of this is the identity.
//!
//! # Source
//! Megatron-LM (arXiv:1909.08053) section 3; sequence parallelism (arXiv:2205.05198) section 4.2.2.

use shardwise_comm::{CommError, Part};
use shardwise_plan::zoo::SequenceParallel;
use shardwise_torch::function::link;
use shardwise_torch::tch::TchError;
use shardwise_torch::{Device, Tensor, TorchError, no_grad};

use super::linear::{conv1d, linear};
use super::raw::ids;
use crate::{Context, EngineError, TensorParallel};

/// Why a collective in a graph failed.
enum Failed {
    Comm(CommError),
    Torch(TorchError),
}

impl From<CommError> for Failed {
    fn from(error: CommError) -> Self {
        Failed::Comm(error)
    }
}

impl From<TorchError> for Failed {
    fn from(error: TorchError) -> Self {
        Failed::Torch(error)
    }
}

impl From<TchError> for Failed {
    fn from(error: TchError) -> Self {
        Failed::Torch(error.into())
    }
}

impl From<Failed> for EngineError {
    fn from(failed: Failed) -> Self {
        match failed {
            Failed::Comm(error) => error.into(),
            Failed::Torch(error) => error.into(),
        }
    }
}

/// A collective on a tensor.
type Collective = fn(&TensorParallel, &Tensor) -> Result<Tensor, Failed>;

/// The ranks that split the layer, if there are any.
fn ranks<'a>(context: &Context<'a>) -> Option<&'a TensorParallel> {
    context.tensor.filter(|tensor| tensor.degree() > 1)
}

/// Links `forward(x)` to `x` through a collective of the gradient.
fn collective(
    tensor: &TensorParallel,
    x: &Tensor,
    forward: Collective,
    backward: Collective,
) -> Result<Tensor, EngineError> {
    let y = no_grad(|| forward(tensor, x))?;
    let tensor = tensor.clone();
    link(&[x], &[&y], &[], move |args| {
        let Some(dy) = &args.grads[0] else { return Ok(vec![None]) };
        match backward(&tensor, dy) {
            Ok(dx) => Ok(vec![Some(dx)]),
            Err(Failed::Comm(error)) => Err(tensor.note(error)),
            Err(Failed::Torch(error)) => Err(error),
        }
    })?;
    Ok(y)
}

/// What linear maps cut by their outputs are given: `x` on every rank, whole.
///
/// # Shapes
/// - `x`: `[batch, seq, width]`, with sequence parallelism `[batch, seq / degree, width]`
/// - returns `[batch, seq, width]`
/// # Collective
/// The tensor-parallel ranks, with sequence parallelism and in the backward pass.
/// # Errors
/// A failed collective.
pub fn enter(context: &Context<'_>, x: &Tensor) -> Result<Tensor, EngineError> {
    let Some(tensor) = ranks(context) else { return Ok(x.shallow_clone()) };
    match tensor.sequence() {
        SequenceParallel::Off => collective(tensor, x, same, sum),
        SequenceParallel::On => collective(tensor, x, gather_tokens, scatter_tokens),
    }
}

/// The sum of what the ranks' linear maps, cut by their inputs, have made.
///
/// # Shapes
/// - `x`: `[batch, seq, width]`
/// - returns the same, with sequence parallelism `[batch, seq / degree, width]`
/// # Collective
/// The tensor-parallel ranks.
/// # Errors
/// [`EngineError::TokensNotDivisible`], a failed collective.
pub fn leave(context: &Context<'_>, x: &Tensor) -> Result<Tensor, EngineError> {
    let Some(tensor) = ranks(context) else { return Ok(x.shallow_clone()) };
    match tensor.sequence() {
        SequenceParallel::Off => collective(tensor, x, sum, same),
        SequenceParallel::On => {
            let (num_tokens, degree) = (x.size()[1] as usize, tensor.degree());
            if !num_tokens.is_multiple_of(degree) {
                return Err(EngineError::TokensNotDivisible { num_tokens, degree });
            }
            collective(tensor, x, scatter_tokens, gather_tokens)
        }
    }
}

/// [`linear`] by a matrix cut by its inputs; the bias is whole and added once.
///
/// # Shapes
/// - `x`: `[batch, seq, in / degree]`; `weight`: `[out, in / degree]`; `bias`: `[out]`
/// - returns as [`leave`]
/// # Errors
/// As [`leave`].
pub fn row_linear(
    context: &Context<'_>,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Tensor, EngineError> {
    if ranks(context).is_none() {
        return linear(context, x, weight, bias);
    }
    add(leave(context, &linear(context, x, weight, None)?)?, bias)
}

/// [`conv1d`] by a matrix cut by its inputs; the bias is whole and added once.
///
/// # Shapes
/// As [`row_linear`], but `weight`: `[in / degree, out]`
/// # Errors
/// As [`leave`].
pub fn row_conv1d(
    context: &Context<'_>,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Tensor, EngineError> {
    if ranks(context).is_none() {
        return conv1d(context, x, weight, bias);
    }
    add(leave(context, &conv1d(context, x, weight, None)?)?, bias)
}

fn add(x: Tensor, bias: Option<&Tensor>) -> Result<Tensor, EngineError> {
    match bias {
        Some(bias) => Ok(x.f_add(bias)?),
        None => Ok(x),
    }
}

/// Rows of a table that is cut by tokens: each rank looks up its own, and they are put together.
///
/// # Shapes
/// - `table`: `[tokens of this rank, width]`; `tokens`: `[batch, seq]`, `i64`
/// - returns as [`leave`]
/// # Errors
/// [`EngineError::NoSuchToken`], on all ranks; as [`leave`].
pub fn embedding(
    context: &Context<'_>,
    table: &Tensor,
    vocab_size: usize,
    tokens: &Tensor,
) -> Result<Tensor, EngineError> {
    let Some(tensor) = ranks(context) else {
        return Ok(Tensor::f_embedding(table, tokens, -1, false, false)?);
    };
    let tokens = tokens.f_contiguous()?;
    // A token of no rank would be a row of zeros. What goes to a GPU was looked at before.
    let on_host = if tokens.device() == Device::Cpu { ids(&tokens) } else { &[] };
    if let Some(&token) = on_host.iter().find(|&&token| token < 0 || token as usize >= vocab_size) {
        return Err(EngineError::NoSuchToken { token, vocab_size });
    }
    let num_rows = table.size()[0];
    let own = if num_rows == 0 {
        // Zeros that hang on the table: the backward pass meets the other ranks' here too.
        let (batch, seq) = tokens.size2()?;
        table
            .f_sum_dim_intlist([0].as_slice(), false, table.kind())?
            .f_expand([batch, seq, table.size()[1]], false)?
    } else {
        let first = first_token(vocab_size, tensor);
        let local = tokens.f_sub_scalar(first)?;
        let is_own = local.f_ge(0)?.f_logical_and(&local.f_lt(num_rows)?)?;
        let rows = Tensor::f_embedding(table, &local.f_clamp(0, num_rows - 1)?, -1, false, false)?;
        rows.f_mul(&is_own.f_unsqueeze(-1)?.f_to_kind(table.kind())?)?
    };
    leave(context, &own)
}

/// The first token of this rank's part of a vocabulary.
pub(super) fn first_token(vocab_size: usize, tensor: &TensorParallel) -> i64 {
    (tensor.rank() * vocab_size.div_ceil(tensor.degree())).min(vocab_size) as i64
}

/// This rank's positions of `x`, where ranks share the tokens.
///
/// # Shapes
/// - `x`: `[seq, ..]`; returns `[seq, ..]`, with sequence parallelism `[seq / degree, ..]`
/// # Errors
/// What libtorch says.
pub fn own_positions(context: &Context<'_>, x: &Tensor) -> Result<Tensor, EngineError> {
    match ranks(context).filter(|tensor| tensor.sequence() == SequenceParallel::On) {
        None => Ok(x.shallow_clone()),
        Some(tensor) => {
            let num_positions = x.size()[0] / tensor.degree() as i64;
            Ok(x.f_narrow(0, tensor.rank() as i64 * num_positions, num_positions)?)
        }
    }
}

/// The scores of all ranks' classes, where a head is cut by classes. No gradient goes through it.
///
/// # Shapes
/// - `x`: `[.., classes of this rank]`; returns `[.., vocab_size]`
/// # Errors
/// A failed collective.
pub fn gather_classes(context: &Context<'_>, x: &Tensor, vocab_size: usize) -> Result<Tensor, EngineError> {
    let Some(tensor) = ranks(context) else { return Ok(x.shallow_clone()) };
    let most = vocab_size.div_ceil(tensor.degree()) as i64;
    Ok(no_grad(|| -> Result<Tensor, Failed> {
        let own = x.f_constant_pad_nd([0, most - x.size()[x.dim() - 1]])?.f_contiguous()?;
        let mut size = vec![tensor.degree() as i64];
        size.extend(own.size());
        let mut all = own.f_new_empty(size, (own.kind(), own.device()))?;
        tensor.run(|group| group.all_gather(tensor.slice(&own), tensor.slice_mut(&mut all)))?;
        let parts = all.f_unbind(0)?;
        Ok(Tensor::f_cat(&parts, -1)?.f_narrow(-1, 0, vocab_size as i64)?.f_contiguous()?)
    })?)
}

fn same(_: &TensorParallel, x: &Tensor) -> Result<Tensor, Failed> {
    // A tensor of its own, over the same memory: nobody writes to either.
    Ok(x.f_detach()?)
}

fn sum(tensor: &TensorParallel, x: &Tensor) -> Result<Tensor, Failed> {
    let mut y = x.f_contiguous()?.f_detach_copy()?;
    tensor.run(|group| group.all_reduce(tensor.slice_mut(&mut y)))?;
    Ok(y)
}

/// `[batch, seq / degree, width]` to `[batch, seq, width]`.
fn gather_tokens(tensor: &TensorParallel, x: &Tensor) -> Result<Tensor, Failed> {
    let own = x.f_contiguous()?;
    let (batch, seq, width) = own.size3()?;
    let degree = tensor.degree() as i64;
    let mut all = own.f_new_empty([degree, batch, seq, width], (own.kind(), own.device()))?;
    tensor.run(|group| group.all_gather(tensor.slice(&own), tensor.slice_mut(&mut all)))?;
    Ok(all.f_transpose(0, 1)?.f_reshape([batch, degree * seq, width])?)
}

/// The sum of the ranks' `[batch, seq, width]`, of which each gets its `[batch, seq / degree, width]`.
fn scatter_tokens(tensor: &TensorParallel, x: &Tensor) -> Result<Tensor, Failed> {
    let x = x.f_contiguous()?;
    let (batch, seq, width) = x.size3()?;
    let degree = tensor.degree() as i64;
    let own = seq / degree;
    let mut sum = x.f_new_empty([batch, own, width], (x.kind(), x.device()))?;
    let all = tensor.slice(&x);
    // For each rank its tokens of every sample, where they are.
    let part = |rank: i64, row: i64| {
        let start = ((row * seq + rank * own) * width) as usize;
        Part::Data(all.range(start..start + (own * width) as usize))
    };
    let parts: Vec<Part<'_>> = (0..degree)
        .flat_map(|rank| (0..batch).map(move |row| (rank, row)))
        .map(|(rank, row)| part(rank, row))
        .collect();
    tensor.run(|group| group.reduce_scatter(&parts, tensor.slice_mut(&mut sum)))?;
    Ok(sum)
}
