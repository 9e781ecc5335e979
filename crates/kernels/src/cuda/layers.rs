//! Operations of layers on a device. Fields are the parameters of the kernel, in its order; pointers are to arrays of the launch's
//! type unless said otherwise.

use super::launch::{Sealed, at_most, typed};
use super::{DevicePtr, FloatType, Launch, LaunchPlan, Params, Source};

const RMS_NORM_FORWARD: [&str; 3] = typed!("rms_norm_forward");
const RMS_NORM_BACKWARD: [&str; 3] = typed!("rms_norm_backward");
const ADD_RMS_NORM_FORWARD: [&str; 3] = typed!("add_rms_norm_forward");
const ADD_RMS_NORM_BACKWARD: [&str; 3] = typed!("add_rms_norm_backward");
const RMS_NORM_WEIGHT_GRAD: &str = "rms_norm_weight_grad";
const ROTATE: [&str; 3] = typed!("rotate");
const SWIGLU_FORWARD: [&str; 3] = typed!("swiglu_forward");
const SWIGLU_BACKWARD: [&str; 3] = typed!("swiglu_backward");
const CROSS_ENTROPY: [&str; 3] = typed!("cross_entropy");

pub(super) const RMS_NORM_ENTRIES: &[&[&str]] = &[
    &RMS_NORM_FORWARD,
    &RMS_NORM_BACKWARD,
    &ADD_RMS_NORM_FORWARD,
    &ADD_RMS_NORM_BACKWARD,
    &[RMS_NORM_WEIGHT_GRAD],
];
pub(super) const ROTARY_ENTRIES: &[&[&str]] = &[&ROTATE];
pub(super) const SWIGLU_ENTRIES: &[&[&str]] = &[&SWIGLU_FORWARD, &SWIGLU_BACKWARD];
pub(super) const CROSS_ENTROPY_ENTRIES: &[&[&str]] = &[&CROSS_ENTROPY];

/// Threads for a row of some thousand elements.
const ROW_THREADS: u64 = 256;

/// [`crate::rms_norm::forward`]; a row's factor differs from it in rounding.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct RmsNormForward {
    /// `[rows, width]`.
    pub x: DevicePtr,
    /// `[width]`.
    pub weight: DevicePtr,
    /// `[rows, width]`, written.
    pub out: DevicePtr,
    /// `[rows]` of `f32`, written: for the backward pass.
    pub inv_rms: DevicePtr,
    /// Rows.
    pub rows: u64,
    /// Elements of a row.
    pub width: u64,
    /// Added to the mean of squares.
    pub eps: f32,
}

impl RmsNormForward {
    /// The call for elements of type `float`.
    pub fn launch(self, float: FloatType) -> Launch<Self> {
        let plan = LaunchPlan::rows(self.rows, self.width, float.vector_numel(), ROW_THREADS);
        Launch::new(Source::RmsNorm, float.pick(RMS_NORM_FORWARD), plan, self)
    }
}

/// [`crate::rms_norm::backward`], but for the gradient of the weight, which [`RmsNormWeightGrad`] adds up. Sums differ in
/// rounding.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct RmsNormBackward {
    /// `[rows, width]`.
    pub x: DevicePtr,
    /// `[width]`.
    pub weight: DevicePtr,
    /// `[rows]` of `f32`, from the forward pass.
    pub inv_rms: DevicePtr,
    /// `[rows, width]`.
    pub dy: DevicePtr,
    /// `[rows, width]`, written.
    pub dx: DevicePtr,
    /// `[num_partials(rows), width]` of `f32`, written.
    pub partial_dweight: DevicePtr,
    /// Rows.
    pub rows: u64,
    /// Elements of a row.
    pub width: u64,
}

impl RmsNormBackward {
    /// Blocks, each of which adds up the gradients of its rows.
    const MAX_PARTIALS: u64 = 512;
    /// Rows up to here have their sums in shared memory: `MAX_SHARED_WIDTH` of the kernel.
    const MAX_SHARED_WIDTH: u64 = 10240;

    /// Rows of `partial_dweight`.
    pub const fn num_partials(rows: u64) -> u64 {
        if rows < Self::MAX_PARTIALS { if rows == 0 { 1 } else { rows } } else { Self::MAX_PARTIALS }
    }

    /// The call for elements of type `float`.
    pub fn launch(self, float: FloatType) -> Launch<Self> {
        Launch::new(Source::RmsNorm, float.pick(RMS_NORM_BACKWARD), self.plan(float), self)
    }

    fn plan(&self, float: FloatType) -> LaunchPlan {
        let plan = LaunchPlan::rows(self.rows, self.width, float.vector_numel(), ROW_THREADS);
        let shared_width = if self.width <= Self::MAX_SHARED_WIDTH { self.width } else { 0 };
        LaunchPlan {
            grid: Self::num_partials(self.rows) as u32,
            shared_bytes: shared_width as u32 * size_of::<f32>() as u32,
            ..plan
        }
    }
}

// A block may have 48 KiB without permission, and needs a little beside.
const _: () = assert!(RmsNormBackward::MAX_SHARED_WIDTH * 4 <= 47 << 10);

/// [`crate::rms_norm::fused::forward`]: the sum bit for bit; a row's factor differs in rounding.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct AddRmsNormForward {
    /// `[rows, width]`.
    pub x: DevicePtr,
    /// `[rows, width]`.
    pub residual: DevicePtr,
    /// `[rows, width]`, written: `x + residual`; may be either of them.
    pub sum: DevicePtr,
    /// `[width]`.
    pub weight: DevicePtr,
    /// `[rows, width]`, written: the sum, normalized.
    pub out: DevicePtr,
    /// `[rows]` of `f32`, written: for the backward pass.
    pub inv_rms: DevicePtr,
    /// Rows.
    pub rows: u64,
    /// Elements of a row.
    pub width: u64,
    /// Added to the mean of squares.
    pub eps: f32,
}

impl AddRmsNormForward {
    /// The call for elements of type `float`.
    pub fn launch(self, float: FloatType) -> Launch<Self> {
        let plan = LaunchPlan::rows(self.rows, self.width, float.vector_numel(), ROW_THREADS);
        Launch::new(Source::RmsNorm, float.pick(ADD_RMS_NORM_FORWARD), plan, self)
    }
}

/// [`crate::rms_norm::fused::backward`], but for the gradient of the weight, which [`RmsNormWeightGrad`] adds up. Sums differ in
/// rounding.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct AddRmsNormBackward {
    /// Of the norm, whose `x` is the sum. Its `dx` is the gradient of the sum, and so of both that were added.
    pub norm: RmsNormBackward,
    /// `[rows, width]`: the gradient of the sum from where else it was used; may be `dx`.
    pub dsum: DevicePtr,
}

impl AddRmsNormBackward {
    /// The call for elements of type `float`.
    pub fn launch(self, float: FloatType) -> Launch<Self> {
        Launch::new(Source::RmsNorm, float.pick(ADD_RMS_NORM_BACKWARD), self.norm.plan(float), self)
    }
}

/// Adds the partial gradients of the weight, from [`RmsNormBackward`] or [`AddRmsNormBackward`].
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct RmsNormWeightGrad {
    /// `[num_partials, width]` of `f32`.
    pub partial_dweight: DevicePtr,
    /// `[width]` of `f32`, written.
    pub dweight: DevicePtr,
    /// [`RmsNormBackward::num_partials`].
    pub num_partials: u64,
    /// Elements of a row.
    pub width: u64,
}

impl RmsNormWeightGrad {
    /// The call.
    pub fn launch(self) -> Launch<Self> {
        const COLUMNS: u64 = 32;
        let plan = LaunchPlan {
            grid: at_most(self.width.div_ceil(COLUMNS), i32::MAX as u64),
            block: 256,
            shared_bytes: 0,
        };
        Launch::new(Source::RmsNorm, RMS_NORM_WEIGHT_GRAD, plan, self)
    }
}

/// [`crate::rotary::rotate`], bit for bit.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Rotate {
    /// `[rows, heads, 2 * half]`.
    pub x: DevicePtr,
    /// Like `x`, written; may be `x` itself.
    pub out: DevicePtr,
    /// `[seq, half]` of `f32`.
    pub cos: DevicePtr,
    /// `[seq, half]` of `f32`.
    pub sin: DevicePtr,
    /// Sequences times positions.
    pub rows: u64,
    /// Positions of a sequence.
    pub seq: u64,
    /// Heads at a position.
    pub heads: u32,
    /// Half the coordinates of a head; `heads * half` fits 32 bits.
    pub half: u32,
    /// Of the sines: 1, or -1 to turn back.
    pub sign: f32,
}

impl Rotate {
    /// The call for elements of type `float`.
    ///
    /// # Panics
    /// If `heads * half` does not fit 32 bits, or `seq` is 0 with rows to turn.
    pub fn launch(self, float: FloatType) -> Launch<Self> {
        let planes = u64::from(self.heads) * u64::from(self.half);
        assert!(planes <= u64::from(u32::MAX), "planes of a position are counted in 32 bits");
        assert!(self.rows == 0 || self.seq > 0, "rows are positions of sequences");
        let plan = LaunchPlan::rows(self.rows, planes, float.vector_numel(), ROW_THREADS);
        Launch::new(Source::Rotary, float.pick(ROTATE), plan, self)
    }
}

/// [`crate::swiglu::forward`], bit for bit.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct SwigluForward {
    /// `[numel]`.
    pub gate: DevicePtr,
    /// `[numel]`.
    pub up: DevicePtr,
    /// `[numel]`, written; may be one of the others.
    pub out: DevicePtr,
    /// Elements.
    pub numel: u64,
}

impl SwigluForward {
    /// The call for elements of type `float`.
    pub fn launch(self, float: FloatType) -> Launch<Self> {
        let plan = LaunchPlan::elements(self.numel, float.vector_numel());
        Launch::new(Source::Swiglu, float.pick(SWIGLU_FORWARD), plan, self)
    }
}

/// [`crate::swiglu::backward`], bit for bit.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct SwigluBackward {
    /// `[numel]`.
    pub gate: DevicePtr,
    /// `[numel]`.
    pub up: DevicePtr,
    /// `[numel]`.
    pub dy: DevicePtr,
    /// `[numel]`, written; may be `gate`, `up` or `dy`.
    pub dgate: DevicePtr,
    /// `[numel]`, written; may be another of them.
    pub dup: DevicePtr,
    /// Elements.
    pub numel: u64,
}

impl SwigluBackward {
    /// The call for elements of type `float`.
    pub fn launch(self, float: FloatType) -> Launch<Self> {
        let plan = LaunchPlan::elements(self.numel, float.vector_numel());
        Launch::new(Source::Swiglu, float.pick(SWIGLU_BACKWARD), plan, self)
    }
}

/// [`crate::cross_entropy::forward_backward`], [`in_place`](crate::cross_entropy::in_place) or
/// [`loss_only`](crate::cross_entropy::loss_only), row by row; sums differ in rounding.
///
/// A row whose target is no class has the loss NaN and no gradient, and lowers `bad_row`, so the caller finds out
/// without a pass of its own.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct CrossEntropy {
    /// `[rows, classes]`, rows [`stride`](Self::stride) apart.
    pub logits: DevicePtr,
    /// As `logits`, written; may be `logits`; none for the loss only.
    pub grad: DevicePtr,
    /// `[rows]` of `i64`.
    pub targets: DevicePtr,
    /// `[rows]` of `f64`, written; [`super::SumInOrder`] adds them as the CPU does.
    pub losses: DevicePtr,
    /// One `u64`: the caller's `u64::MAX`, lowered to the first row whose target is no class.
    pub bad_row: DevicePtr,
    /// Rows.
    pub rows: u64,
    /// Classes.
    pub classes: u64,
    /// Elements from a row of logits to the next, at least `classes`. A multiple of 16 bytes is fast, whatever the number of classes.
    pub stride: u64,
    /// Of gradients.
    pub scale: f32,
}

impl CrossEntropy {
    /// The call for elements of type `float`.
    pub fn launch(self, float: FloatType) -> Launch<Self> {
        let plan = LaunchPlan::rows(self.rows, self.classes, float.vector_numel(), 512);
        Launch::new(Source::CrossEntropy, float.pick(CROSS_ENTROPY), plan, self)
    }
}

macro_rules! params {
    ($($name:ty),*) => { $(
        impl Sealed for $name {}
        impl Params for $name {}
    )* };
}
params!(
    AddRmsNormForward,
    AddRmsNormBackward,
    RmsNormForward,
    RmsNormBackward,
    RmsNormWeightGrad,
    Rotate,
    SwigluForward,
    SwigluBackward,
    CrossEntropy
);
