//! The gated activation of Llama's MLP.

use half::{bf16, f16};
use shardwise_kernels::cuda::{SwigluBackward, SwigluForward};
use shardwise_kernels::swiglu as kernel;
use shardwise_torch::function::{Saved, link};
use shardwise_torch::{Kind, Tensor, no_grad};

use super::gpu::{OnGpu, address, on_gpu};
use super::raw::{Fused, elements, elements_mut, fused_kind, threads};
use crate::{Context, EngineError};
use shardwise_kernels::Float;

/// `silu(gate) * up`.
///
/// # Errors
/// What libtorch says.
/// # Source
/// GLU Variants Improve Transformer (arXiv:2002.05202).
pub fn swiglu(context: &Context<'_>, gate: &Tensor, up: &Tensor) -> Result<Tensor, EngineError> {
    if let Some(gpu) = on_gpu(context, &[gate, up]) {
        return on_a_gpu(gpu, gate, up);
    }
    match fused_kind(&[gate, up]) {
        Some(Kind::BFloat16) => fused::<bf16>(gate, up),
        Some(Kind::Half) => fused::<f16>(gate, up),
        Some(_) => fused::<f32>(gate, up),
        None => swiglu_plain(gate, up),
    }
}

/// [`swiglu`] in libtorch's own operations.
///
/// # Errors
/// What libtorch says.
pub fn swiglu_plain(gate: &Tensor, up: &Tensor) -> Result<Tensor, EngineError> {
    Ok(gate.f_silu()?.f_mul(up)?)
}

fn on_a_gpu(gpu: OnGpu, gate: &Tensor, up: &Tensor) -> Result<Tensor, EngineError> {
    const NAME: &str = "swiglu";
    let numel = gate.numel() as u64;
    let y = gate.f_empty_like()?;
    let forward = SwigluForward { gate: address(gate), up: address(up), out: address(&y), numel };
    gpu.run(NAME, &forward.launch(gpu.float))?;
    link(&[gate, up], &[&y], &[Saved::Input(gate), Saved::Input(up)], move |args| {
        let [gate, up] = &args.saved[..] else { return Ok(vec![None, None]) };
        let Some(dy) = &args.grads[0] else { return Ok(vec![None, None]) };
        let dy = dy.f_contiguous()?;
        let (dgate, dup) = (gate.f_empty_like()?, up.f_empty_like()?);
        let backward = SwigluBackward {
            gate: address(gate),
            up: address(up),
            dy: address(&dy),
            dgate: address(&dgate),
            dup: address(&dup),
            numel,
        };
        gpu.run(NAME, &backward.launch(gpu.float))?;
        Ok(vec![Some(dgate), Some(dup)])
    })?;
    Ok(y)
}

fn fused<T: Fused + Float>(gate: &Tensor, up: &Tensor) -> Result<Tensor, EngineError> {
    let mut y = gate.f_empty_like()?;
    no_grad(|| kernel::forward(threads(), elements::<T>(gate), elements::<T>(up), elements_mut::<T>(&mut y)));
    link(&[gate, up], &[&y], &[Saved::Input(gate), Saved::Input(up)], |args| {
        let [gate, up] = &args.saved[..] else { return Ok(vec![None, None]) };
        let Some(dy) = &args.grads[0] else { return Ok(vec![None, None]) };
        let dy = dy.f_contiguous()?;
        let (mut dgate, mut dup) = (gate.f_empty_like()?, up.f_empty_like()?);
        kernel::backward(
            threads(),
            elements::<T>(gate),
            elements::<T>(up),
            elements::<T>(&dy),
            elements_mut::<T>(&mut dgate),
            elements_mut::<T>(&mut dup),
        );
        Ok(vec![Some(dgate), Some(dup)])
    })?;
    Ok(y)
}
