//! LayerNorm of rows, in plain Rust: what the CUDA kernels are held against. On the host layers use libtorch's.
//!
//! ```text
//! forward    r = 1 / sqrt(var(x) + eps)      out = (x - mean(x)) r weight + bias
//! backward   c = x - mean(x)     g = weight dy      dx = r (g - mean(g) - c r^2 mean(g c))
//!            dweight = sum over rows of dy c r      dbias = sum over rows of dy
//! ```
//!
//! Sums over a row are `f64`; the rest is `f32`, rounded once at the end. Sums over rows are in order.
//!
//! # Source
//! "Layer Normalization" (arXiv:1607.06450).

use crate::Float;
use crate::plain::{put, wide};

/// `out = (x - mean) / sqrt(var + eps) * weight + bias`, row by row; keeps the rows' means and factors for [`backward`].
///
/// # Shapes
/// - `x`, `out`: `[rows, width]`, contiguous
/// - `weight`, `bias`: `[width]`
/// - `means`, `factors`: `[rows]`
/// # Panics
/// If lengths do not match.
pub fn forward<T: Float>(
    x: &[T],
    weight: &[T],
    bias: &[T],
    eps: f32,
    out: &mut [T],
    means: &mut [f32],
    factors: &mut [f32],
) {
    let width = weight.len();
    assert_eq!(
        [x.len(), out.len()],
        [factors.len() * width; 2],
        "elements and room against rows and weights"
    );
    assert_eq!(bias.len(), width, "biases against weights");
    assert_eq!(means.len(), factors.len(), "means against factors");
    let weights = || wide(weight).zip(wide(bias));
    let rows = x.chunks_exact(width.max(1)).zip(out.chunks_exact_mut(width.max(1)));
    for ((x, out), (kept_mean, kept_factor)) in rows.zip(means.iter_mut().zip(factors)) {
        let mean = mean(wide(x).map(f64::from));
        let variance = self::mean(wide(x).map(|x| (f64::from(x) - mean).powi(2)));
        let (mean, factor) = (mean as f32, (1.0 / (variance + f64::from(eps)).sqrt()) as f32);
        (*kept_mean, *kept_factor) = (mean, factor);
        for ((out, x), (weight, bias)) in out.iter_mut().zip(wide(x)).zip(weights()) {
            put(out, ((x - mean) * factor).mul_add(weight, bias));
        }
    }
}

/// The gradients of [`forward`]. `dweight` and `dbias` are overwritten with the sums over all rows.
///
/// # Shapes
/// As [`forward`]; `dy`, `dx` like `x`, `dweight` and `dbias` like `weight`.
/// # Panics
/// If lengths do not match.
#[allow(clippy::too_many_arguments, reason = "each is an array of its own")]
pub fn backward<T: Float>(
    x: &[T],
    weight: &[T],
    means: &[f32],
    factors: &[f32],
    dy: &[T],
    dx: &mut [T],
    dweight: &mut [f32],
    dbias: &mut [f32],
) {
    let width = weight.len();
    assert_eq!(
        [x.len(), dy.len(), dx.len()],
        [factors.len() * width; 3],
        "elements against rows and weights"
    );
    assert_eq!([dweight.len(), dbias.len()], [width; 2], "weights against room for their gradients");
    assert_eq!(means.len(), factors.len(), "means against factors");
    dweight.fill(0.0);
    dbias.fill(0.0);
    let rows = x.chunks_exact(width.max(1)).zip(dy.chunks_exact(width.max(1)));
    let rows = rows.zip(dx.chunks_exact_mut(width.max(1))).zip(means.iter().zip(factors));
    for (((x, dy), dx), (&mean, &factor)) in rows {
        let centred = || wide(x).map(|x| x - mean);
        let weighted = || wide(weight).zip(wide(dy)).map(|(weight, dy)| weight * dy);
        let shift = self::mean(weighted().map(f64::from)) as f32;
        let dot = self::mean(weighted().zip(centred()).map(|(g, c)| f64::from(g) * f64::from(c))) as f32;
        let minus_pull = -(factor * factor * dot);
        for ((dx, c), g) in dx.iter_mut().zip(centred()).zip(weighted()) {
            put(dx, factor * c.mul_add(minus_pull, g - shift));
        }
        for (((dweight, dbias), c), dy) in dweight.iter_mut().zip(&mut *dbias).zip(centred()).zip(wide(dy)) {
            *dweight = (dy * factor).mul_add(c, *dweight);
            *dbias += dy;
        }
    }
}

fn mean(x: impl ExactSizeIterator<Item = f64>) -> f64 {
    let numel = x.len() as f64;
    x.sum::<f64>() / numel
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;
    use crate::testing::{Number, assert_close, normal, slope, wide};

    const EPS: f32 = 1e-5;
    /// Of `f32` arithmetic, beside the rounding of the result.
    const ARITHMETIC: f64 = 2e-6;
    /// Of the differences that stand for derivatives.
    const DIFFERENCES: f64 = 1e-8;

    fn normalized(x: &[f64]) -> Vec<f64> {
        let mean = x.iter().sum::<f64>() / x.len() as f64;
        let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / x.len() as f64;
        x.iter().map(|x| (x - mean) / (variance + f64::from(EPS)).sqrt()).collect()
    }

    fn near_the_formula<T: Number>(rows: usize, width: usize) {
        let [x, dy] = ["x", "dy"].map(|name| normal::<T>(name, rows * width, 1.5));
        let [weight, bias] = ["weight", "bias"].map(|name| normal::<T>(name, width, 1.0));
        let tolerance = T::ROUNDING + ARITHMETIC;
        let (mut out, mut means, mut factors) = (x.clone(), vec![0.5; rows], vec![0.5; rows]);
        forward(&x, &weight, &bias, EPS, &mut out, &mut means, &mut factors);
        let (wide_x, wide_dy, wide_weight, wide_bias) = (wide(&x), wide(&dy), wide(&weight), wide(&bias));
        let lines: Vec<Vec<f64>> = wide_x.chunks_exact(width).map(normalized).collect();
        let all = lines.concat();
        let expected: Vec<f64> =
            (0..x.len()).map(|i| all[i] * wide_weight[i % width] + wide_bias[i % width]).collect();
        assert_close("out", &out, &expected, tolerance, 1.0);

        let (mut dx, mut dweight, mut dbias) = (x.clone(), vec![0.5; width], vec![0.5; width]);
        backward(&x, &weight, &means, &factors, &dy, &mut dx, &mut dweight, &mut dbias);
        let mut expected = Vec::new();
        for (x, dy) in wide_x.chunks_exact(width).zip(wide_dy.chunks_exact(width)) {
            for j in 0..width {
                let at = |value: f64| -> f64 {
                    let mut moved = x.to_vec();
                    moved[j] = value;
                    let terms = normalized(&moved).into_iter().zip(&wide_weight).zip(dy);
                    terms.map(|((x, weight), dy)| x * weight * dy).sum()
                };
                expected.push(slope(at, x[j]));
            }
        }
        assert_close("dx", &dx, &expected, tolerance + DIFFERENCES, 1.0);
        let columns = |term: &dyn Fn(usize) -> f64| -> Vec<f64> {
            (0..width).map(|j| (0..rows).map(|row| term(row * width + j)).sum()).collect()
        };
        assert_close("dweight", &dweight, &columns(&|i| all[i] * wide_dy[i]), ARITHMETIC, 1.0);
        assert_close("dbias", &dbias, &columns(&|i| wide_dy[i]), ARITHMETIC, 1.0);
    }

    #[test]
    fn values_and_gradients_are_those_of_the_formula() {
        for (rows, width) in [(3, 3), (2, 16), (5, 33), (2, 131)] {
            near_the_formula::<f32>(rows, width);
            near_the_formula::<bf16>(rows, width);
            near_the_formula::<f16>(rows, width);
        }
    }

    #[test]
    fn nothing_is_fine() {
        forward::<f32>(&[], &[1.0; 3], &[0.0; 3], EPS, &mut [], &mut [], &mut []);
        let (mut dweight, mut dbias) = ([5.0; 3], [5.0; 3]);
        backward::<f32>(&[], &[1.0; 3], &[], &[], &[], &mut [], &mut dweight, &mut dbias);
        assert_eq!((dweight, dbias), ([0.0; 3], [0.0; 3]));
    }
}
