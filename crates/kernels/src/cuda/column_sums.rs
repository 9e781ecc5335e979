//! Sums of columns of which each block of another kernel has made a part: gradients of weights and biases.

use super::launch::{Sealed, at_most, typed};
use super::{DevicePtr, FloatType, Launch, LaunchPlan, Params, Source};

const COLUMN_SUMS: [&str; 3] = typed!("column_sums");
pub(super) const ENTRIES: &[&[&str]] = &[&COLUMN_SUMS];

/// Adds the parts in an order that depends on their number alone, in `f32`, rounded once.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ColumnSums {
    /// `[num_partials, width]` of `f32`.
    pub partials: DevicePtr,
    /// `[width]` of the launch's type, written.
    pub sums: DevicePtr,
    /// Parts of each sum.
    pub num_partials: u64,
    /// Columns.
    pub width: u64,
}

impl ColumnSums {
    /// The call for sums of type `float`.
    pub fn launch(self, float: FloatType) -> Launch<Self> {
        const COLUMNS: u64 = 32;
        let plan = LaunchPlan {
            grid: at_most(self.width.div_ceil(COLUMNS), i32::MAX as u64),
            block: 256,
            shared_bytes: 0,
        };
        Launch::new(Source::ColumnSums, float.pick(COLUMN_SUMS), plan, self)
    }
}

impl Sealed for ColumnSums {}
impl Params for ColumnSums {}
