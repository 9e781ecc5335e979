//! Dropout on a device.

use super::launch::{Sealed, typed};
use super::{DevicePtr, FloatType, Launch, LaunchPlan, Params, Source};
use crate::dropout::{DeviceMask, Mask};

const DROPOUT: [&str; 3] = typed!("dropout");
pub(super) const ENTRIES: &[&[&str]] = &[&DROPOUT];

/// Parameters of [`Mask::cuda_apply`].
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Dropout {
    x: DevicePtr,
    out: DevicePtr,
    numel: u64,
    mask: DeviceMask,
}

impl Mask {
    /// The call for [`Mask::apply`] on a device, with the same bits: forward and backward.
    ///
    /// # Shapes
    /// - `x`: `[numel]` of type `float`
    /// - `out`: like `x`, written; may be `x` itself
    /// # Panics
    /// If the last index does not fit `u64`, or there are elements where the part of a row has none.
    pub fn cuda_apply(&self, float: FloatType, x: DevicePtr, out: DevicePtr, numel: u64) -> Launch<Dropout> {
        let plan = LaunchPlan::elements(numel, float.vector_numel());
        let params = Dropout { x, out, numel, mask: self.on_device(numel as usize) };
        Launch::new(Source::Dropout, float.pick(DROPOUT), plan, params)
    }
}

impl Sealed for Dropout {}
impl Params for Dropout {}
