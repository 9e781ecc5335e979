//! Cross-entropy over a split vocabulary on a device: what [`crate::cross_entropy::split`] does, with one exchange in the middle.
//!
//! ```text
//! SplitPartial ── all-gather of RowStats ── SplitCombine ─► SplitGradients
//! ```

use super::launch::{Sealed, typed};
use super::{DevicePtr, FloatType, Launch, LaunchPlan, Params, Source};

const PARTIAL: [&str; 3] = typed!("cross_entropy_partial");
const COMBINE: &str = "cross_entropy_combine";
const GRADIENTS: [&str; 3] = typed!("cross_entropy_gradients");
pub(super) const ENTRIES: &[&[&str]] = &[&PARTIAL, &[COMBINE], &GRADIENTS];

/// Threads for a row of some ten thousand classes.
const ROW_THREADS: u64 = 512;

/// [`crate::cross_entropy::split::partial`]; sums differ in rounding.
///
/// A row whose target is no class lowers `bad_row`, as in [`super::CrossEntropy`]; its loss comes out NaN on all ranks.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct SplitPartial {
    /// `[rows, width]` of the launch's type.
    pub logits: DevicePtr,
    /// `[rows]` of `i64`, classes of the whole.
    pub targets: DevicePtr,
    /// `[rows]` of [`RowStats`](crate::cross_entropy::split::RowStats), written: three `f32` each.
    pub out: DevicePtr,
    /// One `u64`: the caller's `u64::MAX`, lowered to the first row whose target is no class.
    pub bad_row: DevicePtr,
    /// Rows.
    pub rows: u64,
    /// Classes that this device has; maybe none.
    pub width: u64,
    /// Elements from a row to the next, at least `width`.
    pub stride: u64,
    /// The first of them.
    pub first_class: u64,
    /// Classes of the whole.
    pub num_classes: u64,
}

impl SplitPartial {
    /// The call for logits of type `float`.
    pub fn launch(self, float: FloatType) -> Launch<Self> {
        let plan = LaunchPlan::rows(self.rows, self.width, float.vector_numel(), ROW_THREADS);
        Launch::new(Source::CrossEntropySplit, float.pick(PARTIAL), plan, self)
    }
}

/// [`crate::cross_entropy::split::combine`], row by row, bit for bit.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct SplitCombine {
    /// `[num_parts, rows]` of [`RowStats`](crate::cross_entropy::split::RowStats).
    pub parts: DevicePtr,
    /// `[rows]` of [`ROW_BYTES`](Self::ROW_BYTES) each, written: for [`SplitGradients`].
    pub softmax: DevicePtr,
    /// `[rows]` of `f64`, written; [`super::SumInOrder`] adds them as the CPU does.
    pub losses: DevicePtr,
    /// Ranks.
    pub num_parts: u64,
    /// Rows.
    pub rows: u64,
}

impl SplitCombine {
    /// Bytes of what is known of a row.
    pub const ROW_BYTES: usize = 16;

    /// The call.
    pub fn launch(self) -> Launch<Self> {
        let plan = LaunchPlan::elements(self.rows, 1);
        Launch::new(Source::CrossEntropySplit, COMBINE, plan, self)
    }
}

/// [`crate::cross_entropy::split::gradients`], but for a GPU's exponentials. A row whose target is no class is left as it is.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct SplitGradients {
    /// `[rows, width]` of the launch's type, overwritten by their gradients.
    pub logits: DevicePtr,
    /// `[rows]` of `i64`, classes of the whole.
    pub targets: DevicePtr,
    /// `[rows]`, from [`SplitCombine`].
    pub softmax: DevicePtr,
    /// Rows.
    pub rows: u64,
    /// Classes that this device has.
    pub width: u64,
    /// Elements from a row to the next, at least `width`.
    pub stride: u64,
    /// The first of them.
    pub first_class: u64,
    /// Classes of the whole.
    pub num_classes: u64,
    /// Of gradients.
    pub scale: f32,
}

impl SplitGradients {
    /// The call for logits of type `float`.
    pub fn launch(self, float: FloatType) -> Launch<Self> {
        let plan = LaunchPlan::rows(self.rows, self.width, float.vector_numel(), ROW_THREADS);
        Launch::new(Source::CrossEntropySplit, float.pick(GRADIENTS), plan, self)
    }
}

impl Sealed for SplitPartial {}
impl Params for SplitPartial {}
impl Sealed for SplitCombine {}
impl Params for SplitCombine {}
impl Sealed for SplitGradients {}
impl Params for SplitGradients {}
