//! Operations of layers on a device. Fields are the parameters of the kernel, in its order; pointers are to arrays of the launch's
//! type unless said otherwise.

use super::launch::{Sealed, typed};
use super::{DevicePtr, FloatType, Launch, LaunchPlan, Params, Source};

const ROTATE: [&str; 3] = typed!("rotate");
const SWIGLU_FORWARD: [&str; 3] = typed!("swiglu_forward");
const SWIGLU_BACKWARD: [&str; 3] = typed!("swiglu_backward");
const CROSS_ENTROPY: [&str; 3] = typed!("cross_entropy");

pub(super) const ROTARY_ENTRIES: &[&[&str]] = &[&ROTATE];
pub(super) const SWIGLU_ENTRIES: &[&[&str]] = &[&SWIGLU_FORWARD, &SWIGLU_BACKWARD];
pub(super) const CROSS_ENTROPY_ENTRIES: &[&[&str]] = &[&CROSS_ENTROPY];

/// Threads for a row of some thousand elements.
const ROW_THREADS: u64 = 256;

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
/// [`loss_only`](crate::cross_entropy::loss_only), row by row; sums differ in rounding, and
/// a GPU's exponentials by some 1e-7.
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
params!(Rotate, SwigluForward, SwigluBackward, CrossEntropy);
