//! Numbers between `f32` and the bytes of a file.
//!
//! Widening is exact. Narrowing rounds to nearest, ties to even; a finite number that would become infinite is
//! refused, because a weight lost that way is found only much later.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::FileDType;

/// A finite number, at this place in the slice, that does not fit.
#[derive(Debug, PartialEq)]
pub(crate) struct DoesNotFit {
    pub element: usize,
    pub value: f64,
    /// The type that cannot hold it.
    pub dtype: FileDType,
}

/// Scratch memory for file bytes, aligned for every element type.
pub(crate) struct Scratch(Vec<u64>);

impl Scratch {
    /// Large enough that system calls cost nothing, small enough to stay in a core's cache.
    pub(crate) const MAX_BYTES: usize = 256 * 1024;

    /// Room for `num_bytes`, or for [`Scratch::MAX_BYTES`] if that is less.
    pub(crate) fn new(num_bytes: usize) -> Self {
        Scratch(vec![0; num_bytes.min(Self::MAX_BYTES).div_ceil(8)])
    }

    /// The first `num_bytes` of it.
    pub(crate) fn bytes_mut(&mut self, num_bytes: usize) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.0)[..num_bytes]
    }

    fn typed<T: bytemuck::Pod>(&self, numel: usize) -> &[T] {
        &bytemuck::cast_slice(&self.0)[..numel]
    }

    fn typed_mut<T: bytemuck::Pod>(&mut self, numel: usize) -> &mut [T] {
        &mut bytemuck::cast_slice_mut(&mut self.0)[..numel]
    }

    /// Widens or narrows the `out.len()` elements of `dtype` in it to `f32`.
    ///
    /// # Panics
    /// If `dtype` is not convertible: the caller has checked it.
    pub(crate) fn decode(&self, dtype: FileDType, out: &mut [f32]) -> Result<(), DoesNotFit> {
        match dtype {
            FileDType::F32 => out.copy_from_slice(self.typed(out.len())),
            FileDType::F16 => self.typed::<f16>(out.len()).convert_to_f32_slice(out),
            FileDType::Bf16 => self.typed::<bf16>(out.len()).convert_to_f32_slice(out),
            FileDType::F64 => {
                let values = self.typed::<f64>(out.len());
                for (element, (out, &value)) in out.iter_mut().zip(values).enumerate() {
                    *out = value as f32;
                    if out.is_infinite() && value.is_finite() {
                        return Err(DoesNotFit { element, value, dtype: FileDType::F32 });
                    }
                }
            }
            other => unreachable!("the caller refuses `{other}`"),
        }
        Ok(())
    }

    /// Fills its beginning with `values` as elements of `dtype`.
    ///
    /// # Panics
    /// If `dtype` is not convertible: the caller has checked it.
    pub(crate) fn encode(&mut self, dtype: FileDType, values: &[f32]) -> Result<(), DoesNotFit> {
        let numel = values.len();
        let lost = match dtype {
            FileDType::F32 => {
                self.typed_mut(numel).copy_from_slice(values);
                None
            }
            FileDType::F64 => {
                for (out, &value) in self.typed_mut::<f64>(numel).iter_mut().zip(values) {
                    *out = f64::from(value);
                }
                None
            }
            FileDType::F16 => {
                let out = self.typed_mut::<f16>(numel);
                out.convert_from_f32_slice(values);
                out.iter().zip(values).position(|(out, value)| out.is_infinite() && value.is_finite())
            }
            FileDType::Bf16 => {
                let out = self.typed_mut::<bf16>(numel);
                out.convert_from_f32_slice(values);
                out.iter().zip(values).position(|(out, value)| out.is_infinite() && value.is_finite())
            }
            other => unreachable!("the caller refuses `{other}`"),
        };
        match lost {
            Some(element) => Err(DoesNotFit { element, value: f64::from(values[element]), dtype }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finite_number_never_becomes_infinite() {
        let mut scratch = Scratch::new(64);
        let too_large = |dtype, value: f32| DoesNotFit { element: 1, value: value.into(), dtype };
        let f16_error = scratch.encode(FileDType::F16, &[65504.0, 65520.0]).unwrap_err();
        assert_eq!(f16_error, too_large(FileDType::F16, 65520.0));
        let bf16_error = scratch.encode(FileDType::Bf16, &[f32::INFINITY, f32::MAX]).unwrap_err();
        assert_eq!(bf16_error, too_large(FileDType::Bf16, f32::MAX));

        scratch.typed_mut::<f64>(2).copy_from_slice(&[f64::INFINITY, 1e300]);
        let f64_error = scratch.decode(FileDType::F64, &mut [0.0; 2]).unwrap_err();
        assert_eq!(f64_error, DoesNotFit { element: 1, value: 1e300, dtype: FileDType::F32 });
    }

    #[test]
    fn halves_round_to_nearest_even() {
        let mut scratch = Scratch::new(64);
        // 1 + 2^-8 lies in the middle of two bf16 numbers, 1 + 3 * 2^-8 in the middle of the next two.
        let values = [1.0 + 2f32.powi(-8), 1.0 + 3.0 * 2f32.powi(-8)];
        scratch.encode(FileDType::Bf16, &values).unwrap();
        let mut back = [0.0; 2];
        scratch.decode(FileDType::Bf16, &mut back).unwrap();
        assert_eq!(back, [1.0, 1.0 + 2f32.powi(-6)]);
    }
}
