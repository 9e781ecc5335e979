//! LAMB's two passes on a device, with the bits of [`Lamb::moments_on`] and [`Lamb::apply_on`].
//!
//! Norms are pairs of `f64`, a [`SquaredNorms`](crate::optimizer::SquaredNorms) each. They stay on the device.

use super::launch::{Sealed, at_most};
use super::optimizer::copy_of;
use super::{DeviceCopy, DevicePtr, FloatType, Launch, LaunchPlan, Params, Source};
use crate::norm::BLOCK_NUMEL;
use crate::optimizer::{Lamb, lamb};

const MOMENTS: &str = "lamb_moments";
const NORMS: &str = "lamb_norms";
const ROW_SUMS: &str = "lamb_row_sums";
const APPLY: &str = "lamb_apply";
pub(super) const ENTRIES: &[&[&str]] = &[&[MOMENTS, NORMS, ROW_SUMS, APPLY]];

/// The arrays of the first pass, `numel` elements each.
#[derive(Debug, Clone, Copy)]
pub struct LambMomentBuffers {
    /// Gradient, `f32`, read.
    pub grad: DevicePtr,
    /// Parameters, `f32`, read.
    pub master: DevicePtr,
    /// `exp_avg` and `exp_avg_sq`, `f32`, updated.
    pub states: [DevicePtr; 2],
    /// `[LambNorms::num_blocks(numel)]` pairs, written: the squared norms of each block of elements.
    pub blocks: DevicePtr,
    /// Elements.
    pub numel: u64,
}

/// Parameters of [`Lamb::cuda_moments`].
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct LambMoments {
    grad: DevicePtr,
    master: DevicePtr,
    states: [DevicePtr; 2],
    blocks: DevicePtr,
    numel: u64,
    factors: lamb::Factors,
}

/// Adds the norms of blocks, in order.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct LambNorms {
    /// `[num_blocks]` pairs, read.
    pub blocks: DevicePtr,
    /// One pair, written.
    pub total: DevicePtr,
    /// [`LambNorms::num_blocks`] of the elements; maybe none.
    pub num_blocks: u64,
}

impl LambNorms {
    /// How many blocks `numel` elements have.
    pub const fn num_blocks(numel: u64) -> u64 {
        numel.div_ceil(BLOCK_NUMEL as u64)
    }

    /// The call.
    pub fn launch(self) -> Launch<Self> {
        let plan = LaunchPlan { grid: 1, block: 256, shared_bytes: 0 };
        Launch::new(Source::Lamb, NORMS, plan, self)
    }
}

/// Adds the rows of a table of norms, in order.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct LambRowSums {
    /// `[num_rows, width]` of `f64`, read.
    pub rows: DevicePtr,
    /// `[width]` of `f64`, written.
    pub sums: DevicePtr,
    /// Rows.
    pub num_rows: u64,
    /// Numbers of a row: two for each tensor.
    pub width: u64,
}

impl LambRowSums {
    /// The call.
    pub fn launch(self) -> Launch<Self> {
        Launch::new(Source::Lamb, ROW_SUMS, LaunchPlan::elements(self.width, 1), self)
    }
}

/// The arrays of the second pass, `numel` elements each, and where the norms of the whole tensor are.
#[derive(Debug, Clone, Copy)]
pub struct LambApplyBuffers {
    /// Parameters, `f32`, updated.
    pub master: DevicePtr,
    /// `exp_avg` and `exp_avg_sq`, `f32`, read.
    pub states: [DevicePtr; 2],
    /// 16-bit copy of the parameters, written.
    pub compute: DeviceCopy,
    /// Elements.
    pub numel: u64,
    /// The tensor's pair in the first row of a table.
    pub norms: DevicePtr,
    /// Rows of the table, which are added in order.
    pub num_rows: u64,
    /// Pairs of a row.
    pub row_numel: u64,
}

/// Parameters of [`Lamb::cuda_apply`].
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct LambApply {
    master: DevicePtr,
    states: [DevicePtr; 2],
    copy: DevicePtr,
    norms: DevicePtr,
    num_rows: u64,
    row_numel: u64,
    numel: u64,
    minus_rate: f64,
    max_coeff: f64,
    min_coeff: f64,
    copy_type: u32,
    factors: lamb::Factors,
}

impl Lamb {
    /// The call for [`Lamb::moments_on`] on a device; [`LambNorms`] adds what it leaves.
    pub fn cuda_moments(&self, grad_scale: f32, buffers: LambMomentBuffers) -> Launch<LambMoments> {
        let LambMomentBuffers { grad, master, states, blocks, numel } = buffers;
        // A warp for each block of elements: alone, so that a few hundred reach all of a device.
        let grid = at_most(LambNorms::num_blocks(numel), 1 << 20);
        let plan = LaunchPlan { grid, block: 32, shared_bytes: 0 };
        let factors = self.factors(grad_scale);
        Launch::new(Source::Lamb, MOMENTS, plan, LambMoments { grad, master, states, blocks, numel, factors })
    }

    /// The call for [`Lamb::apply_on`] on a device.
    ///
    /// # Panics
    /// If `step` is 0.
    pub fn cuda_apply(&self, buffers: LambApplyBuffers) -> Launch<LambApply> {
        let LambApplyBuffers { master, states, compute, numel, norms, num_rows, row_numel } = buffers;
        let (copy, copy_type) = copy_of(compute);
        let params = LambApply {
            master,
            states,
            copy,
            norms,
            num_rows,
            row_numel,
            numel,
            minus_rate: -self.rate(),
            max_coeff: self.max_coeff,
            min_coeff: self.min_coeff,
            copy_type,
            factors: self.factors(1.0),
        };
        let plan = LaunchPlan::elements(numel, FloatType::F32.vector_numel());
        Launch::new(Source::Lamb, APPLY, plan, params)
    }
}

impl Sealed for LambMoments {}
impl Params for LambMoments {}
impl Sealed for LambNorms {}
impl Params for LambNorms {}
impl Sealed for LambRowSums {}
impl Params for LambRowSums {}
impl Sealed for LambApply {}
impl Params for LambApply {}
