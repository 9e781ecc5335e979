//! Sums of squares on a device, of many arrays at once, and sums in order.

use super::launch::{Sealed, at_most, typed};
use super::{DevicePtr, FloatType, Launch, LaunchPlan, Params, Source};
use crate::norm::BLOCK_NUMEL;

const SUM_OF_SQUARES: [&str; 3] = typed!("sum_of_squares");
const SUM_BLOCKS_IN_ORDER: &str = "sum_blocks_in_order";
const SUM_IN_ORDER: &str = "sum_in_order";
pub(super) const ENTRIES: &[&[&str]] = &[&SUM_OF_SQUARES, &[SUM_BLOCKS_IN_ORDER, SUM_IN_ORDER]];

/// Arrays of a launch.
const MAX_ARRAYS: usize = 64;

#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Squared {
    x: DevicePtr,
    numel: u64,
    /// Blocks of the arrays before this one.
    first_block: u64,
}

/// The sums of squares of up to 64 arrays of one type, each with the bits of [`crate::norm::sum_of_squares`]: finite exactly when all
/// elements of the array are. Two launches: the sums of blocks of [`BLOCK_NUMEL`] elements, then those of arrays.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct SumsOfSquares {
    blocks: DevicePtr,
    totals: DevicePtr,
    num_blocks: u64,
    num_arrays: u32,
    arrays: [Squared; MAX_ARRAYS],
}

impl SumsOfSquares {
    /// Arrays of a launch.
    pub const MAX_ARRAYS: usize = MAX_ARRAYS;

    /// How many sums of blocks `numel` elements have.
    pub const fn num_blocks(numel: u64) -> u64 {
        numel.div_ceil(BLOCK_NUMEL as u64)
    }

    /// Of `arrays`, each an address and a number of elements.
    ///
    /// # Shapes
    /// - `blocks`: `f64`, written, one for each block of each array
    /// - `totals`: `f64`, written, one for each array
    /// # Panics
    /// For more than [`Self::MAX_ARRAYS`] arrays.
    pub fn new(arrays: &[(DevicePtr, u64)], blocks: DevicePtr, totals: DevicePtr) -> Self {
        assert!(arrays.len() <= MAX_ARRAYS, "`{}` arrays, at most `{MAX_ARRAYS}` go at once", arrays.len());
        const NOTHING: Squared = Squared { x: DevicePtr::NULL, numel: 0, first_block: u64::MAX };
        let num_arrays = arrays.len() as u32;
        let mut sums =
            SumsOfSquares { blocks, totals, num_blocks: 0, num_arrays, arrays: [NOTHING; MAX_ARRAYS] };
        for (place, &(x, numel)) in sums.arrays.iter_mut().zip(arrays) {
            *place = Squared { x, numel, first_block: sums.num_blocks };
            sums.num_blocks += Self::num_blocks(numel);
        }
        sums
    }

    /// The calls, one after the other, for elements of type `x`. The first is absent if there are no elements.
    pub fn launches(self, x: FloatType) -> impl Iterator<Item = Launch<Self>> {
        // A warp for each block: alone in its block of threads, so that a few hundred reach all of a device.
        let squares = LaunchPlan { grid: at_most(self.num_blocks, 1 << 20), block: 32, shared_bytes: 0 };
        let totals =
            LaunchPlan { grid: at_most(u64::from(self.num_arrays), 1 << 20), block: 256, shared_bytes: 0 };
        let of_blocks =
            (self.num_blocks > 0).then(|| Launch::new(Source::Norm, x.pick(SUM_OF_SQUARES), squares, self));
        let of_arrays =
            (self.num_arrays > 0).then(|| Launch::new(Source::Norm, SUM_BLOCKS_IN_ORDER, totals, self));
        of_blocks.into_iter().chain(of_arrays)
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

impl Sealed for SumsOfSquares {}
impl Params for SumsOfSquares {}
impl Sealed for SumInOrder {}
impl Params for SumInOrder {}

// What a kernel's parameters may take on every device.
const _: () = assert!(size_of::<SumsOfSquares>() <= 4096);
