//! GELU by its tanh form, of a linear map's output and its bias, in plain Rust: what the CUDA kernels are held against. On the host layers
//! use libtorch's.
//!
//! ```text
//! v = x + bias      u = sqrt(2 / pi) (v + 0.044715 v^3)      s = sigmoid(2 u)
//! forward    out = v (1 + tanh(u)) / 2 = v s
//! backward   dx = dy (s + v s (1 - s) (2 u)')       dbias = sum over rows of dx, before it is rounded
//! ```
//!
//! Arithmetic is `f32`, rounded once at the end. Sums over rows are in order.
//!
//! # Source
//! "Gaussian Error Linear Units" (arXiv:1606.08415), the approximation that GPT-2 takes.

use crate::Float;
use crate::plain::{put, wide};
use crate::simd::Scalar;
use crate::simd::exp::exp;

/// `2 sqrt(2 / pi)`.
const TWICE_SQRT_2_PI: f32 = 1.595_769_2;
/// `2 sqrt(2 / pi) 0.044715`.
const OF_CUBE: f32 = 0.071_354_814;

/// `out = gelu(x + bias)`, row by row.
///
/// # Shapes
/// - `x`, `out`: `[rows, width]`, contiguous
/// - `bias`: `[width]`
/// # Panics
/// If lengths do not match.
pub fn forward<T: Float>(x: &[T], bias: &[T], out: &mut [T]) {
    let width = bias.len();
    assert_eq!(x.len(), out.len(), "elements against room for results");
    assert!(x.is_empty() || x.len().is_multiple_of(width), "elements against rows of biases");
    for (x, out) in x.chunks_exact(width.max(1)).zip(out.chunks_exact_mut(width.max(1))) {
        for ((out, x), bias) in out.iter_mut().zip(wide(x)).zip(wide(bias)) {
            let x = x + bias;
            put(out, x * sigmoid_of_2u(x, x * x));
        }
    }
}

/// The gradients of [`forward`]. `dbias` is overwritten with the sum over all rows.
///
/// # Shapes
/// As [`forward`]; `dy`, `dx` like `x`, `dbias` like `bias`.
/// # Panics
/// If lengths do not match.
pub fn backward<T: Float>(x: &[T], bias: &[T], dy: &[T], dx: &mut [T], dbias: &mut [f32]) {
    let width = bias.len();
    assert_eq!([dy.len(), dx.len()], [x.len(); 2], "gradients against elements");
    assert_eq!(dbias.len(), width, "biases against room for their gradients");
    assert!(x.is_empty() || x.len().is_multiple_of(width), "elements against rows of biases");
    dbias.fill(0.0);
    let rows = x.chunks_exact(width.max(1)).zip(dy.chunks_exact(width.max(1)));
    for ((x, dy), dx) in rows.zip(dx.chunks_exact_mut(width.max(1))) {
        let grads = dx.iter_mut().zip(&mut *dbias);
        for ((((dx, dbias), x), bias), dy) in grads.zip(wide(x)).zip(wide(bias)).zip(wide(dy)) {
            let x = x + bias;
            let (x2, s) = (x * x, sigmoid_of_2u(x, x * x));
            let slope = (x * s * (1.0 - s)).mul_add((3.0 * OF_CUBE).mul_add(x2, TWICE_SQRT_2_PI), s);
            put(dx, dy * slope);
            *dbias += dy * slope;
        }
    }
}

fn sigmoid_of_2u(x: f32, x2: f32) -> f32 {
    let [e] = exp(Scalar, [x * (-OF_CUBE).mul_add(x2, -TWICE_SQRT_2_PI)]);
    1.0 / (1.0 + e)
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;
    use crate::testing::{Number, assert_close, normal, slope, wide};

    /// Of `f32` arithmetic, beside the rounding of the result.
    const ARITHMETIC: f64 = 2e-6;
    /// Of the differences that stand for derivatives.
    const DIFFERENCES: f64 = 1e-8;

    fn gelu(x: f64) -> f64 {
        let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
        0.5 * x * (1.0 + u.tanh())
    }

    fn near_the_formula<T: Number>() {
        let (rows, width) = (7, 131);
        let [x, dy] = ["x", "dy"].map(|name| normal::<T>(name, rows * width, 2.0));
        let bias = normal::<T>("bias", width, 1.0);
        let sums: Vec<f64> =
            wide(&x).iter().zip(wide(&bias).iter().cycle()).map(|(x, bias)| x + bias).collect();
        let mut out = x.clone();
        forward(&x, &bias, &mut out);
        let expected: Vec<f64> = sums.iter().map(|&x| gelu(x)).collect();
        assert_close("out", &out, &expected, T::ROUNDING + ARITHMETIC, 0.1);

        let (mut dx, mut dbias) = (x.clone(), vec![0.5; width]);
        backward(&x, &bias, &dy, &mut dx, &mut dbias);
        let expected: Vec<f64> = sums.iter().zip(wide(&dy)).map(|(&x, dy)| slope(gelu, x) * dy).collect();
        assert_close("dx", &dx, &expected, T::ROUNDING + ARITHMETIC + DIFFERENCES, 0.5);
        let columns: Vec<f64> = (0..width).map(|j| expected.iter().skip(j).step_by(width).sum()).collect();
        assert_close("dbias", &dbias, &columns, ARITHMETIC + DIFFERENCES, 4.0);
    }

    #[test]
    fn values_and_gradients_are_those_of_the_formula() {
        near_the_formula::<f32>();
        near_the_formula::<bf16>();
        near_the_formula::<f16>();
    }

    #[test]
    fn far_from_zero_it_is_nothing_or_everything() {
        let x = [-1e4f32, -30.0, 0.0, 30.0, 1e4];
        let mut out = [7.0; 5];
        forward(&x, &[0.0; 5], &mut out);
        assert_eq!(out, [0.0, 0.0, 0.0, 30.0, 1e4]);
        let (mut dx, mut dbias) = ([7.0; 5], [7.0; 5]);
        backward(&x, &[0.0; 5], &[1.0; 5], &mut dx, &mut dbias);
        assert_eq!(dx, [0.0, 0.0, 0.5, 1.0, 1.0]);
        assert_eq!(dbias, dx);
    }

    #[test]
    fn nothing_is_fine() {
        forward::<bf16>(&[], &[], &mut []);
        let mut dbias = [5.0; 3];
        backward::<f32>(&[], &[0.0; 3], &[], &mut [], &mut dbias);
        assert_eq!(dbias, [0.0; 3]);
    }
}
