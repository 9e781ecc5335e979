//! GELU of a linear map's output and its bias on a device. Fields are the parameters of the kernel, in its order; pointers are to arrays
//! of the launch's type unless said otherwise.

use super::launch::{Sealed, WARP, typed};
use super::{DevicePtr, FloatType, Launch, LaunchPlan, Params, Source};

const FORWARD: [&str; 3] = typed!("gelu_forward");
const BACKWARD: [&str; 3] = typed!("gelu_backward");
pub(super) const ENTRIES: &[&[&str]] = &[&FORWARD, &BACKWARD];

/// Rows that a block takes at a time: `TURNS` of the kernel.
const TURNS: u64 = 8;
/// Blocks, of which a device has several rounds to do, so that the last one costs little.
const MANY_BLOCKS: u64 = 3072;
/// Parts of a column's sum: where there are many columns, blocks are enough without more.
const MAX_SPLITS: u64 = 256;

/// Blocks for each cut of the columns, and how the rows are cut.
fn tiles_and_splits(float: FloatType, rows: u64, width: u64) -> (u64, u64) {
    assert!(width <= u64::from(u32::MAX), "columns are counted in 32 bits");
    let tiles = width.div_ceil(WARP * float.vector_numel()).max(1);
    (tiles, MANY_BLOCKS.div_ceil(tiles).min(rows.div_ceil(TURNS)).clamp(1, MAX_SPLITS))
}

fn plan(float: FloatType, rows: u64, width: u64) -> LaunchPlan {
    let (tiles, splits) = tiles_and_splits(float, rows, width);
    LaunchPlan { grid: (tiles * splits) as u32, block: (TURNS * WARP) as u32, shared_bytes: 0 }
}

/// [`crate::gelu::forward`]; a GPU's exponential and division are good to some 1e-6.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct GeluForward {
    /// `[rows, width]`.
    pub x: DevicePtr,
    /// `[width]`.
    pub bias: DevicePtr,
    /// `[rows, width]`, written; may be `x`.
    pub out: DevicePtr,
    /// Rows.
    pub rows: u64,
    /// Elements of a row.
    pub width: u64,
}

impl GeluForward {
    /// The call for elements of type `float`.
    ///
    /// # Panics
    /// If a row has more elements than are counted in 32 bits.
    pub fn launch(self, float: FloatType) -> Launch<Self> {
        Launch::new(Source::Gelu, float.pick(FORWARD), plan(float, self.rows, self.width), self)
    }
}

/// [`crate::gelu::backward`], but for the bias' gradient, of which it makes parts for [`super::ColumnSums`].
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct GeluBackward {
    /// `[rows, width]`.
    pub x: DevicePtr,
    /// `[width]`.
    pub bias: DevicePtr,
    /// `[rows, width]`.
    pub dy: DevicePtr,
    /// `[rows, width]`, written; may be `dy` or `x`.
    pub dx: DevicePtr,
    /// `[num_partials, width]` of `f32`, written.
    pub partial_dbias: DevicePtr,
    /// Rows.
    pub rows: u64,
    /// Elements of a row.
    pub width: u64,
}

impl GeluBackward {
    /// Parts of the bias' gradient.
    ///
    /// # Panics
    /// If a row has more elements than are counted in 32 bits.
    pub fn num_partials(float: FloatType, rows: u64, width: u64) -> u64 {
        tiles_and_splits(float, rows, width).1
    }

    /// The call for elements of type `float`.
    ///
    /// # Panics
    /// If a row has more elements than are counted in 32 bits.
    pub fn launch(self, float: FloatType) -> Launch<Self> {
        Launch::new(Source::Gelu, float.pick(BACKWARD), plan(float, self.rows, self.width), self)
    }
}

impl Sealed for GeluForward {}
impl Params for GeluForward {}
impl Sealed for GeluBackward {}
impl Params for GeluBackward {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_many_and_parts_of_sums_few() {
        let of = |rows, width| {
            (plan(FloatType::Bf16, rows, width).grid, tiles_and_splits(FloatType::Bf16, rows, width))
        };
        assert_eq!(of(16_384, 3072), (3072, (12, 256)));
        assert_eq!(of(9, 3072), (24, (12, 2)));
        assert_eq!(of(1 << 20, 1 << 20), (4096, (4096, 1)));
        assert_eq!(of(0, 0), (1, (1, 1)));
        assert_eq!(of(5000, 300), (512, (2, 256)));
    }
}
