//! Elements one at a time, for kernels in plain Rust.

use crate::Float;
use crate::simd::Scalar;

/// The elements in `f32`.
pub(crate) fn wide<T: Float>(x: &[T]) -> impl ExactSizeIterator<Item = f32> {
    // SAFETY: an element of a slice, and a scalar is one lane.
    x.iter().map(|x| unsafe { T::load(Scalar, x) })
}

/// Rounds `x` to `to`.
pub(crate) fn put<T: Float>(to: &mut T, x: f32) {
    // SAFETY: one element, and a scalar is one lane.
    unsafe { T::store(Scalar, to, x) }
}
