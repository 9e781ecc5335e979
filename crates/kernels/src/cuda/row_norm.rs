//! RMS norm and LayerNorm on a device, alone or fused with the addition of a residual. Fields are the parameters of the kernel, in its
//! order; pointers are to arrays of the launch's type unless said otherwise.
//!
//! A backward pass leaves the gradients of weight and bias in parts, one for each block of its grid; [`super::ColumnSums`] adds them.

use super::launch::{Sealed, WARP, at_most, typed};
use super::{DevicePtr, FloatType, Launch, LaunchPlan, Params, Source};

/// The kernels of a norm.
struct Entries {
    forward: [&'static str; 3],
    backward: [&'static str; 3],
    add_forward: [&'static str; 3],
    add_backward: [&'static str; 3],
}

impl Entries {
    const fn all(&self) -> [&[&'static str]; 4] {
        [&self.forward, &self.backward, &self.add_forward, &self.add_backward]
    }
}

const RMS_NORM: &Entries = &Entries {
    forward: typed!("rms_norm_forward"),
    backward: typed!("rms_norm_backward"),
    add_forward: typed!("add_rms_norm_forward"),
    add_backward: typed!("add_rms_norm_backward"),
};
const LAYER_NORM: &Entries = &Entries {
    forward: typed!("layer_norm_forward"),
    backward: typed!("layer_norm_backward"),
    add_forward: typed!("add_layer_norm_forward"),
    add_backward: typed!("add_layer_norm_backward"),
};
pub(super) const RMS_NORM_ENTRIES: &[&[&str]] = &RMS_NORM.all();
pub(super) const LAYER_NORM_ENTRIES: &[&[&str]] = &LAYER_NORM.all();

/// Threads for a row of some thousand elements: the kernel's too (`threads_of_row`).
const ROW_THREADS: u64 = 256;

/// Which normalization.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowNorm {
    /// [`crate::rms_norm`].
    Rms,
    /// [`crate::layer_norm`].
    Layer,
}

impl RowNorm {
    /// Blocks of a backward pass, each of which adds up the gradients of its rows.
    const MAX_PARTIALS: u64 = 512;
    /// Sums up to here are in shared memory: `MAX_SHARED_SUMS` of the kernel.
    const MAX_SHARED_SUMS: u64 = 10240;
    /// Threads of a block of a backward pass, which takes several rows at a time if they are narrow: with the registers that a thread
    /// has (`BUSY_KERNEL`), the blocks fit a large device all at once.
    const BACKWARD_THREADS: u64 = 288;

    /// Sums over rows that each column has: the gradient of the weight, and LayerNorm's of the bias.
    pub const fn num_sums(self) -> u64 {
        match self {
            RowNorm::Rms => 1,
            RowNorm::Layer => 2,
        }
    }

    /// Parts of these sums that a backward pass makes.
    ///
    /// # Panics
    /// If a row has more elements than are counted in 32 bits.
    pub fn num_partials(self, float: FloatType, rows: u64, width: u64) -> u64 {
        self.backward_plan(float, rows, width).grid.into()
    }

    fn backward_plan(self, float: FloatType, rows: u64, width: u64) -> LaunchPlan {
        assert!(width <= u64::from(u32::MAX) / 4, "elements of a row are counted in 32 bits");
        let of_row = LaunchPlan::rows(rows, width, float.vector_numel(), ROW_THREADS);
        // `sums_of_row` of the kernel.
        let sums = self.num_sums() * width.next_multiple_of(WARP * float.vector_numel());
        let fit = Self::MAX_SHARED_SUMS.checked_div(sums).unwrap_or(1);
        let at_a_time = (Self::BACKWARD_THREADS / u64::from(of_row.block)).min(fit).max(1);
        let shared_sums = if fit == 0 { 0 } else { at_a_time * sums };
        LaunchPlan {
            grid: at_most(rows.div_ceil(at_a_time), Self::MAX_PARTIALS),
            block: of_row.block * at_a_time as u32,
            shared_bytes: shared_sums as u32 * size_of::<f32>() as u32,
        }
    }

    fn entries(self) -> &'static Entries {
        match self {
            RowNorm::Rms => RMS_NORM,
            RowNorm::Layer => LAYER_NORM,
        }
    }

    fn launch<P: Params>(
        self,
        of_each: [&'static str; 3],
        float: FloatType,
        plan: LaunchPlan,
        params: P,
    ) -> Launch<P> {
        let source = match self {
            RowNorm::Rms => Source::RmsNorm,
            RowNorm::Layer => Source::LayerNorm,
        };
        Launch::new(source, float.pick(of_each), plan, params)
    }
}

// A block may have 48 KiB without permission, and needs a little beside.
const _: () = assert!(RowNorm::MAX_SHARED_SUMS * 4 <= 47 << 10);

/// [`crate::rms_norm::forward`] or [`crate::layer_norm::forward`]; what is kept of a row differs in rounding.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct NormForward {
    /// `[rows, width]`.
    pub x: DevicePtr,
    /// `[width]`.
    pub weight: DevicePtr,
    /// `[width]`, LayerNorm's.
    pub bias: DevicePtr,
    /// `[rows, width]`, written.
    pub out: DevicePtr,
    /// `[rows]` of `f32`, written: for the backward pass.
    pub factors: DevicePtr,
    /// `[rows]` of `f32`, written by LayerNorm: likewise.
    pub means: DevicePtr,
    /// Rows.
    pub rows: u64,
    /// Elements of a row.
    pub width: u64,
    /// Added to the mean of squares.
    pub eps: f32,
}

impl NormForward {
    /// The call for elements of type `float`.
    pub fn launch(self, norm: RowNorm, float: FloatType) -> Launch<Self> {
        norm.launch(norm.entries().forward, float, self.plan(float), self)
    }

    fn plan(&self, float: FloatType) -> LaunchPlan {
        LaunchPlan::rows(self.rows, self.width, float.vector_numel(), ROW_THREADS)
    }
}

/// [`crate::rms_norm::fused::forward`], or a sum and its LayerNorm: the sum bit for bit, the rest as [`NormForward`].
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct AddNormForward {
    /// Of the norm, whose `x` is added to the residual.
    pub norm: NormForward,
    /// `[rows, width]`.
    pub residual: DevicePtr,
    /// `[rows, width]`, written: what is normalized; may be either of those added.
    pub sum: DevicePtr,
}

impl AddNormForward {
    /// The call for elements of type `float`.
    pub fn launch(self, norm: RowNorm, float: FloatType) -> Launch<Self> {
        norm.launch(norm.entries().add_forward, float, self.norm.plan(float), self)
    }
}

/// [`crate::rms_norm::backward`] or [`crate::layer_norm::backward`], but for the gradients of weight and bias, of which it makes
/// parts. Sums differ in rounding.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct NormBackward {
    /// `[rows, width]`.
    pub x: DevicePtr,
    /// `[width]`.
    pub weight: DevicePtr,
    /// `[rows]` of `f32`, from the forward pass.
    pub factors: DevicePtr,
    /// `[rows]` of `f32`, from LayerNorm's forward pass.
    pub means: DevicePtr,
    /// `[rows, width]`.
    pub dy: DevicePtr,
    /// `[rows, width]`, written.
    pub dx: DevicePtr,
    /// `[RowNorm::num_partials, RowNorm::num_sums, width]` of `f32`, written: of the weight, then of the bias.
    pub partials: DevicePtr,
    /// Rows.
    pub rows: u64,
    /// Elements of a row.
    pub width: u64,
}

impl NormBackward {
    /// The call for elements of type `float`.
    ///
    /// # Panics
    /// If a row has more elements than are counted in 32 bits.
    pub fn launch(self, norm: RowNorm, float: FloatType) -> Launch<Self> {
        let plan = norm.backward_plan(float, self.rows, self.width);
        norm.launch(norm.entries().backward, float, plan, self)
    }
}

/// [`NormBackward`] of a tensor that is used elsewhere too, such as a sum from [`AddNormForward`].
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct AddNormBackward {
    /// Of the norm, whose `x` is the sum. Its `dx` is the gradient of the sum, and so of both that were added.
    pub norm: NormBackward,
    /// `[rows, width]`: the gradient of the sum from where else it was used; may be `dx`.
    pub dsum: DevicePtr,
}

impl AddNormBackward {
    /// The call for elements of type `float`.
    ///
    /// # Panics
    /// If a row has more elements than are counted in 32 bits.
    pub fn launch(self, norm: RowNorm, float: FloatType) -> Launch<Self> {
        let plan = norm.backward_plan(float, self.norm.rows, self.norm.width);
        norm.launch(norm.entries().add_backward, float, plan, self)
    }
}

macro_rules! params {
    ($($name:ty),*) => { $(
        impl Sealed for $name {}
        impl Params for $name {}
    )* };
}
params!(NormForward, AddNormForward, NormBackward, AddNormBackward);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn narrow_rows_share_a_block_within_its_shared_memory() {
        let plan = |norm: RowNorm, rows, width| {
            let plan = norm.backward_plan(FloatType::Bf16, rows, width);
            (plan.grid, plan.block, plan.shared_bytes)
        };
        assert_eq!(plan(RowNorm::Layer, 16_384, 768), (512, 3 * 96, 3 * 2 * 768 * 4));
        assert_eq!(plan(RowNorm::Layer, 16_384, 800), (512, 2 * 128, 2 * 2 * 1024 * 4));
        assert_eq!(plan(RowNorm::Rms, 16_384, 4096), (512, 256, 4096 * 4));
        assert_eq!(plan(RowNorm::Layer, 7, 768).0, 3);
        assert_eq!(plan(RowNorm::Layer, 9, 5120), (9, 256, 40 << 10));
        assert_eq!(plan(RowNorm::Layer, 9, 5121), (9, 256, 0));
        assert_eq!(plan(RowNorm::Rms, 0, 0), (1, 32, 0));
    }
}
