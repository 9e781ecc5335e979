//! Sums of squares on a device: [`SumOfSquares`] for blocks of elements, then [`SumInOrder`] over the blocks.

use super::launch::{Sealed, at_most, typed};
use super::{DevicePtr, FloatType, Launch, LaunchPlan, Params, Source};
use crate::norm::BLOCK_NUMEL;

const SUM_OF_SQUARES: [&str; 3] = typed!("sum_of_squares");
const SUM_IN_ORDER: &str = "sum_in_order";
pub(super) const ENTRIES: &[&[&str]] = &[&SUM_OF_SQUARES, &[SUM_IN_ORDER]];

/// The sum of squares of each block of [`BLOCK_NUMEL`] elements: finite exactly when all its elements are.
///
/// [`SumInOrder`] of the sums has the bits of [`crate::norm::sum_of_squares`].
///
/// # Shapes
/// - `x`: `[numel]`, of the launch's type
/// - `sums`: `[num_sums(numel)]`, `f64`
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct SumOfSquares {
    /// Read.
    pub x: DevicePtr,
    /// Written.
    pub sums: DevicePtr,
    /// Elements.
    pub numel: u64,
}

impl SumOfSquares {
    /// How many sums `numel` elements have.
    pub const fn num_sums(numel: u64) -> u64 {
        numel.div_ceil(BLOCK_NUMEL as u64)
    }

    /// The call for elements of type `x`.
    pub fn launch(self, x: FloatType) -> Launch<Self> {
        // A warp for each: alone in its block, so that a few hundred reach all of a device.
        let plan =
            LaunchPlan { grid: at_most(Self::num_sums(self.numel), 1 << 20), block: 32, shared_bytes: 0 };
        Launch::new(Source::Norm, x.pick(SUM_OF_SQUARES), plan, self)
    }
}

/// `total = 0 + terms[0] + terms[1] + ...`, one after the other, in `f64`.
///
/// # Shapes
/// - `terms`: `[numel]`, `f64`
/// - `total`: one `f64`
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct SumInOrder {
    /// Read.
    pub terms: DevicePtr,
    /// Written.
    pub total: DevicePtr,
    /// Terms.
    pub numel: u64,
}

impl SumInOrder {
    /// The call.
    pub fn launch(self) -> Launch<Self> {
        let plan = LaunchPlan { grid: 1, block: 256, shared_bytes: 0 };
        Launch::new(Source::Norm, SUM_IN_ORDER, plan, self)
    }
}

impl Sealed for SumOfSquares {}
impl Params for SumOfSquares {}
impl Sealed for SumInOrder {}
impl Params for SumInOrder {}
