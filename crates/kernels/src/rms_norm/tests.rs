use half::{bf16, f16};
use proptest::prelude::*;

use super::*;
use crate::parallel::PIECE_NUMEL;
use crate::testing::{Number, assert_close, bits, normal, slope, ways, wide};

const EPS: f32 = 1e-5;
/// Of `f32` arithmetic, beside the rounding of the result, on rows of up to 1000.
const ARITHMETIC: f64 = 2e-6;
/// Of the differences that stand for derivatives.
const DIFFERENCES: f64 = 1e-8;

fn run_forward<T: Number>(isa: Isa, threads: Threads, x: &[T], weight: &[T]) -> (Vec<T>, Vec<f32>) {
    let mut out = vec![T::of(0.5); x.len()];
    let mut inv_rms = vec![0.5; x.len() / weight.len()];
    forward_with(isa, threads, x, weight, EPS, &mut out, &mut inv_rms);
    (out, inv_rms)
}

fn run_backward<T: Number>(
    isa: Isa,
    threads: Threads,
    x: &[T],
    weight: &[T],
    inv_rms: &[f32],
    dy: &[T],
) -> (Vec<T>, Vec<f32>) {
    let mut dx = vec![T::of(0.5); x.len()];
    let mut dweight = vec![0.5; weight.len()];
    backward_with(isa, threads, x, weight, inv_rms, dy, &mut dx, &mut dweight);
    (dx, dweight)
}

fn inverse_rms(x: &[f64]) -> f64 {
    let squares: f64 = x.iter().map(|x| x * x).sum();
    1.0 / (squares / x.len() as f64 + f64::from(EPS)).sqrt()
}

/// What a row's gradient is the derivative of.
fn objective(x: &[f64], weight: &[f64], dy: &[f64]) -> f64 {
    let factor = inverse_rms(x);
    x.iter().zip(weight).zip(dy).map(|((x, weight), dy)| x * factor * weight * dy).sum()
}

fn near_the_formula<T: Number>(rows: usize, width: usize) {
    let [x, dy] = ["x", "dy"].map(|name| normal::<T>(name, rows * width, 1.5));
    let weight = normal::<T>("weight", width, 1.0);
    let (wide_x, wide_weight, wide_dy) = (wide(&x), wide(&weight), wide(&dy));
    let tolerance = T::ROUNDING + ARITHMETIC;
    let lines = || wide_x.chunks_exact(width).zip(wide_dy.chunks_exact(width));

    let (out, inv_rms) = run_forward(Isa::best(), Threads::ONE, &x, &weight);
    let factors: Vec<f64> = lines().map(|(x, _)| inverse_rms(x)).collect();
    assert_close("inv_rms", &inv_rms, &factors, ARITHMETIC, 0.0);
    let expected: Vec<f64> =
        (0..x.len()).map(|i| wide_x[i] * factors[i / width] * wide_weight[i % width]).collect();
    assert_close("out", &out, &expected, tolerance, 0.1);

    let (dx, dweight) = run_backward(Isa::best(), Threads::ONE, &x, &weight, &inv_rms, &dy);
    let mut expected = Vec::new();
    for (x, dy) in lines() {
        for j in 0..width {
            let at = |value: f64| {
                let mut moved = x.to_vec();
                moved[j] = value;
                objective(&moved, &wide_weight, dy)
            };
            expected.push(slope(at, x[j]));
        }
    }
    assert_close("dx", &dx, &expected, tolerance + DIFFERENCES, 1.0);
    let of_weight = |j: usize| -> f64 {
        (0..rows).map(|row| wide_x[row * width + j] * factors[row] * wide_dy[row * width + j]).sum()
    };
    let expected: Vec<f64> = (0..width).map(of_weight).collect();
    assert_close("dweight", &dweight, &expected, ARITHMETIC, 1.0);
}

#[test]
fn values_and_gradients_are_those_of_the_formula() {
    for (rows, width) in [(3, 3), (2, 16), (5, 33), (4, 64), (2, 131)] {
        near_the_formula::<f32>(rows, width);
        near_the_formula::<bf16>(rows, width);
        near_the_formula::<f16>(rows, width);
    }
}

#[test]
fn threads_and_instruction_sets_do_not_change_a_bit() {
    let (rows, width) = (2011, 333);
    assert!(rows * width > 2 * PIECE_NUMEL);
    let [x, dy] = ["x", "dy"].map(|name| normal::<bf16>(name, rows * width, 1.5));
    let weight = normal::<bf16>("weight", width, 1.0);
    let (out, inv_rms) = run_forward(Isa::best(), Threads::ONE, &x, &weight);
    let (dx, dweight) = run_backward(Isa::best(), Threads::ONE, &x, &weight, &inv_rms, &dy);
    for (isa, threads) in ways() {
        let (others, other_factors) = run_forward(isa, threads, &x, &weight);
        assert!(bits(&others) == bits(&out) && other_factors == inv_rms, "{isa:?}, {threads:?}");
        let (other_dx, other_dweight) = run_backward(isa, threads, &x, &weight, &inv_rms, &dy);
        assert!(bits(&other_dx) == bits(&dx) && other_dweight == dweight, "{isa:?}, {threads:?}");
    }
}

/// Block by block of rows, as documented.
#[test]
fn the_gradient_of_the_weight_is_added_in_the_documented_order() {
    let (rows, width) = (2011, 333);
    let [x, dy] = ["x", "dy"].map(|name| normal::<f32>(name, rows * width, 1.0));
    let weight = normal::<f32>("weight", width, 1.0);
    let (_, inv_rms) = run_forward(Isa::best(), Threads::ONE, &x, &weight);
    let (_, dweight) = run_backward(Isa::best(), Threads::ONE, &x, &weight, &inv_rms, &dy);
    let block_rows = PIECE_NUMEL / width;
    #[allow(clippy::needless_range_loop)] // a column of two matrices
    for j in 0..width {
        let mut total = 0f32;
        for block in (0..rows).step_by(block_rows) {
            let sum = (block..rows.min(block + block_rows)).fold(0f32, |sum, row| {
                let i = row * width + j;
                (dy[i] * inv_rms[row]).mul_add(x[i], sum)
            });
            total += sum;
        }
        assert_eq!(dweight[j].to_bits(), total.to_bits());
    }
}

#[test]
fn rows_of_zeros_large_rows_and_nan() {
    let width = 40;
    let mut x = vec![0.0; 3 * width];
    x[width..2 * width].fill(1e18);
    x[2 * width + 7] = f32::NAN;
    let (out, inv_rms) = run_forward(Isa::best(), Threads::ONE, &x, &vec![1.0; width]);
    assert!(out[..width].iter().all(|&y| y == 0.0));
    assert_close("large", &out[width..2 * width], &vec![1.0; width], ARITHMETIC, 0.0);
    assert!(out[2 * width..].iter().all(|y| y.is_nan()) && inv_rms[2].is_nan());
    let (dx, dweight) =
        run_backward(Isa::best(), Threads::ONE, &x, &vec![1.0; width], &inv_rms, &vec![1.0; 3 * width]);
    assert!(dx[..2 * width].iter().all(|dx| dx.is_finite()));
    assert!(dx[2 * width..].iter().all(|dx| dx.is_nan()) && dweight[7].is_nan());
}

#[test]
fn nothing_is_fine() {
    forward::<f32>(Threads::ONE, &[], &[1.0; 3], EPS, &mut [], &mut []);
    let mut dweight = [5.0; 3];
    backward::<f32>(Threads::ONE, &[], &[1.0; 3], &[], &[], &mut [], &mut dweight);
    assert_eq!(dweight, [0.0; 3]);
    let mut inv_rms = [1.0; 2];
    forward::<bf16>(Threads::ONE, &[], &[], EPS, &mut [], &mut inv_rms);
    backward::<bf16>(Threads::ONE, &[], &[], &inv_rms, &[], &mut [], &mut []);
}

#[test]
#[should_panic(expected = "rows and weights")]
fn rows_of_another_width_panic() {
    forward(Threads::ONE, &[0.0; 7], &[1.0; 3], EPS, &mut [0.0; 7], &mut [0.0; 2]);
}

proptest! {
    #[test]
    fn any_numbers_of_any_shape_give_the_reference(
        rows in 0usize..5, width in 1usize..200,
        seed in prop::collection::vec([prop::num::f32::ANY; 2], 6),
    ) {
        let [mut x, mut dy] = ["x", "dy"].map(|name| normal::<f32>(name, rows * width, 1.0));
        let weight = normal::<f32>("weight", width, 1.0);
        let stride = (rows * width).div_ceil(seed.len()).max(1);
        for (i, number) in (0..rows * width).step_by(stride).zip(seed) {
            (x[i], dy[i]) = (number[0], number[1]);
        }
        let (out, inv_rms) = run_forward(Isa::SCALAR, Threads::ONE, &x, &weight);
        let (dx, dweight) = run_backward(Isa::SCALAR, Threads::ONE, &x, &weight, &inv_rms, &dy);
        for isa in Isa::all() {
            let (others, factors) = run_forward(isa, Threads::ONE, &x, &weight);
            prop_assert_eq!(bits(&others), bits(&out));
            prop_assert_eq!(bits(&factors), bits(&inv_rms));
            let (other_dx, other_dweight) = run_backward(isa, Threads::ONE, &x, &weight, &inv_rms, &dy);
            prop_assert_eq!(bits(&other_dx), bits(&dx));
            prop_assert_eq!(bits(&other_dweight), bits(&dweight));
        }
    }
}
