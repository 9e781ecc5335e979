//! Rotary positions: each pair of elements of a head turns by an angle that grows with the position.
//!
//! Pairs are `(i, i + head_dim / 2)`, as in Hugging Face's Llama.

use shardwise_plan::zoo::RopeScaling;
use shardwise_torch::{Device, Kind, Tensor};

use crate::EngineError;

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

/// Cosines and sines of all angles.
#[derive(Debug)]
pub struct RotaryTable {
    cos: Tensor,
    sin: Tensor,
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
        let tensor = |values: &[f64]| -> Result<Tensor, EngineError> {
            let table = Tensor::f_from_slice(values)?.f_view([num_positions as i64, half as i64])?;
            Ok(table.f_to_device(Device::Cpu)?)
        };
        Ok(RotaryTable { cos: tensor(&cos)?, sin: tensor(&sin)? })
    }
}

impl RotaryTable {
    /// Turns every head of `x` by its position.
    ///
    /// # Shapes
    /// - `x`: `[batch, heads, seq, head_dim]`, `seq` at most the table's positions
    /// # Errors
    /// What libtorch says.
    pub fn rotate(&self, x: &Tensor) -> Result<Tensor, EngineError> {
        let (kind, seq) = (x.kind(), x.size()[2]);
        let exact = if kind == Kind::Double { Kind::Double } else { Kind::Float };
        let cos = self.cos.f_narrow(0, 0, seq)?.f_to_kind(exact)?;
        let sin = self.sin.f_narrow(0, 0, seq)?.f_to_kind(exact)?;
        let halves = x.f_to_kind(exact)?.f_chunk(2, -1)?;
        let (low, high) = (&halves[0], &halves[1]);
        let turned_low = low.f_mul(&cos)?.f_sub(&high.f_mul(&sin)?)?;
        let turned_high = high.f_mul(&cos)?.f_add(&low.f_mul(&sin)?)?;
        Ok(Tensor::f_cat(&[turned_low, turned_high], -1)?.f_to_kind(kind)?)
    }
}
