//! Rotary positions: each pair of elements of a head turns by an angle that grows with the position.
//!
//! Pairs are `(i, i + head_dim / 2)`, as in Hugging Face's Llama.

use std::cell::OnceCell;
use std::sync::Arc;

use half::{bf16, f16};
use shardwise_kernels::cuda::Rotate;
use shardwise_kernels::rotary as kernel;
use shardwise_plan::zoo::RopeScaling;
use shardwise_torch::function::link;
use shardwise_torch::{Device, Kind, Tensor, TorchError, no_grad};

use super::gpu::{OnGpu, address, on_gpu};
use super::raw::{Fused, elements, elements_mut, fused_kind, threads};
use crate::{Context, EngineError};
use shardwise_kernels::Float;

/// What the angles depend on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rotary {
    /// Width of one head, even.
    pub head_dim: usize,
    /// Base of the angles.
    pub theta: f64,
    /// Stretching for long sequences.
    pub scaling: Option<RopeScaling>,
}

/// Cosines and sines of all angles, in f64 and in f32.
#[derive(Debug)]
pub struct RotaryTable {
    cos: Tensor,
    sin: Tensor,
    cos_f32: Arc<[f32]>,
    sin_f32: Arc<[f32]>,
    /// Both in f32 where heads are turned on a GPU.
    on_gpu: OnceCell<[Tensor; 2]>,
}

impl Rotary {
    /// The angle by which pair `i` turns from one position to the next.
    ///
    /// # Source
    /// RoFormer (arXiv:2104.09864); Llama 3's scaling interpolates between stretched and plain angles over a band of
    /// wavelengths.
    fn frequency(&self, i: usize) -> f64 {
        let plain = self.theta.powf(-2.0 * i as f64 / self.head_dim as f64);
        let Some(scaling) = self.scaling else { return plain };
        let wavelength = 2.0 * std::f64::consts::PI / plain;
        let original = scaling.original_max_position_embeddings as f64;
        let (low, high) = (scaling.low_freq_factor, scaling.high_freq_factor);
        // 0 at the long end of the band and beyond, 1 at the short end.
        let smooth = ((original / wavelength - low) / (high - low)).clamp(0.0, 1.0);
        (1.0 - smooth) * plain / scaling.factor + smooth * plain
    }

    /// Tables for positions below `num_positions`.
    ///
    /// # Errors
    /// What libtorch says.
    pub fn table(&self, num_positions: usize) -> Result<RotaryTable, EngineError> {
        let half = self.head_dim / 2;
        let frequencies: Vec<_> = (0..half).map(|i| self.frequency(i)).collect();
        let angles = (0..num_positions).flat_map(|p| frequencies.iter().map(move |f| p as f64 * f));
        let (cos, sin): (Vec<f64>, Vec<f64>) = angles.map(|angle| (angle.cos(), angle.sin())).unzip();
        let narrow = |values: &[f64]| values.iter().map(|&value| value as f32).collect();
        let (cos_f32, sin_f32) = (narrow(&cos), narrow(&sin));
        let tensor = |values: &[f64]| -> Result<Tensor, EngineError> {
            Ok(Tensor::f_from_slice(values)?.f_view([num_positions as i64, 1, half as i64])?)
        };
        let (cos, sin) = (tensor(&cos)?, tensor(&sin)?);
        Ok(RotaryTable { cos, sin, cos_f32, sin_f32, on_gpu: OnceCell::new() })
    }
}

impl RotaryTable {
    /// Turns every head of `x` by its position.
    ///
    /// # Shapes
    /// - `x`: `[batch, seq, heads, head_dim]`, `seq` at most the table's positions
    /// # Errors
    /// What libtorch says.
    pub fn rotate(&self, context: &Context<'_>, x: &Tensor) -> Result<Tensor, EngineError> {
        if let Some(gpu) = on_gpu(context, &[x]) {
            return self.on_a_gpu(gpu, x);
        }
        match fused_kind(&[x]) {
            Some(Kind::BFloat16) => self.fused::<bf16>(x),
            Some(Kind::Half) => self.fused::<f16>(x),
            Some(_) => self.fused::<f32>(x),
            None => self.rotate_plain(x),
        }
    }

    /// [`RotaryTable::rotate`] in libtorch's own operations.
    ///
    /// # Errors
    /// What libtorch says.
    pub fn rotate_plain(&self, x: &Tensor) -> Result<Tensor, EngineError> {
        let (kind, seq) = (x.kind(), x.size()[1]);
        let exact = if kind == Kind::Double { Kind::Double } else { Kind::Float };
        let cos = self.cos.f_narrow(0, 0, seq)?.f_to_device(x.device())?.f_to_kind(exact)?;
        let sin = self.sin.f_narrow(0, 0, seq)?.f_to_device(x.device())?.f_to_kind(exact)?;
        let halves = x.f_to_kind(exact)?.f_chunk(2, -1)?;
        let (low, high) = (&halves[0], &halves[1]);
        let turned_low = low.f_mul(&cos)?.f_sub(&high.f_mul(&sin)?)?;
        let turned_high = high.f_mul(&cos)?.f_add(&low.f_mul(&sin)?)?;
        Ok(Tensor::f_cat(&[turned_low, turned_high], -1)?.f_to_kind(kind)?)
    }

    /// Cosines and sines on the device of the first head that was turned there: a table is of one model.
    fn tables_on(&self, device: Device) -> Result<&[Tensor; 2], EngineError> {
        if let Some(tables) = self.on_gpu.get() {
            return Ok(tables);
        }
        let there = |values: &[f32]| Tensor::f_from_slice(values)?.f_to_device(device);
        let tables = [there(&self.cos_f32)?, there(&self.sin_f32)?];
        Ok(self.on_gpu.get_or_init(|| tables))
    }

    fn on_a_gpu(&self, gpu: OnGpu, x: &Tensor) -> Result<Tensor, EngineError> {
        let (batch, seq, heads, head_dim) = x.size4()?;
        let [cos, sin] = self.tables_on(x.device())?.each_ref().map(Tensor::shallow_clone);
        let turn = move |sign: f32, x: &Tensor| -> Result<Tensor, TorchError> {
            let y = x.f_empty_like()?;
            let rotate = Rotate {
                x: address(x),
                out: address(&y),
                cos: address(&cos),
                sin: address(&sin),
                rows: (batch * seq) as u64,
                seq: seq as u64,
                heads: heads as u32,
                half: (head_dim / 2) as u32,
                sign,
            };
            gpu.run("rotary", &rotate.launch(gpu.float))?;
            Ok(y)
        };
        let y = no_grad(|| turn(1.0, x))?;
        link(&[x], &[&y], &[], move |args| match &args.grads[0] {
            // The transpose of a turn is the turn back.
            Some(dy) => Ok(vec![Some(turn(-1.0, &dy.f_contiguous()?)?)]),
            None => Ok(vec![None]),
        })?;
        Ok(y)
    }

    fn fused<T: Fused + Float>(&self, x: &Tensor) -> Result<Tensor, EngineError> {
        let (batch, seq, heads, head_dim) = x.size4()?;
        let shape = kernel::Shape {
            batch: batch as usize,
            seq: seq as usize,
            heads: heads as usize,
            head_dim: head_dim as usize,
        };
        let used = shape.seq * shape.head_dim / 2;
        let (cos, sin) = (self.cos_f32.clone(), self.sin_f32.clone());
        let turn = move |direction, x: &Tensor| -> Result<Tensor, TorchError> {
            let mut y = x.f_empty_like()?;
            let (x, out) = (elements::<T>(x), elements_mut::<T>(&mut y));
            kernel::rotate(threads(), direction, x, out, &cos[..used], &sin[..used], shape);
            Ok(y)
        };
        let y = no_grad(|| turn(kernel::Direction::Forward, x))?;
        link(&[x], &[&y], &[], move |args| match &args.grads[0] {
            // The transpose of a turn is the turn back.
            Some(dy) => Ok(vec![Some(turn(kernel::Direction::Inverse, &dy.f_contiguous()?)?)]),
            None => Ok(vec![None]),
        })?;
        Ok(y)
    }
}
