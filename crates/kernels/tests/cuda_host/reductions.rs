//! Kernels that add up. Sums of squares have the CPU's bits; sums over a row are added in another order, so they and what follows from
//! them agree within [`SUM_ORDER`].

use half::{bf16, f16};
use shardwise_device::{Element, Slice};
use shardwise_kernels::cuda::{CrossEntropy, DevicePtr, FloatType, SumInOrder, SumsOfSquares};
use shardwise_kernels::norm::{self, BLOCK_NUMEL};
use shardwise_kernels::{Threads, cross_entropy};

use super::{Device, Float, Random, SameBits, host, in_both_orders};

/// How far sums of some thousand `f32` in another order may be apart, as a part of the largest result. Each addition rounds by
/// 6e-8 at most; errors of trees and of 32 or more lanes add up to a few of these.
pub const SUM_ORDER: f32 = 2e-6;

/// Holds `got` against `expected`: apart by the order of sums, and one unit in the last place of 16 bits.
pub fn assert_close<T: Float>(got: &[T], expected: &[T], what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}");
    let largest = expected.iter().map(|x| x.wide().abs()).fold(0.0, f32::max);
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        let (got, expected) = (got.wide(), expected.wide());
        let tolerance = SUM_ORDER * largest + T::ULP * expected.abs();
        assert!((got - expected).abs() <= tolerance, "{what}, element {i}: {got} for {expected}");
    }
}

fn sum_in_order(order: super::Order, sums: &mut Device<f64>) -> f64 {
    let mut total = Device::new(&[f64::NAN], 0);
    let call = SumInOrder { terms: sums.ptr(), total: total.ptr(), numel: sums.numel as u64 };
    host().launch(&call.launch(), order);
    total.get()[0]
}

fn check_norm<T: Float + Element>() {
    let mut random = Random(7);
    let bad = |mut x: Vec<T>, at: usize, value: f32| {
        x[at] = T::round(value);
        x
    };
    let mut cases: Vec<Vec<T>> = [0, 1, 31, 32, 33, 511, 512, 513, 4000]
        .into_iter()
        .chain([BLOCK_NUMEL - 1, BLOCK_NUMEL, BLOCK_NUMEL + 1, 6 * BLOCK_NUMEL + 777])
        .map(|numel| random.numbers(numel, 100.0))
        .collect();
    cases.push(bad(random.numbers(1000, 1.0), 999, f32::INFINITY));
    cases.push(bad(random.numbers(BLOCK_NUMEL + 5, 1.0), BLOCK_NUMEL + 4, f32::NAN));
    cases.push(random.any(3000));
    cases.push(Vec::new());
    let expected: Vec<f64> =
        cases.iter().map(|x| norm::sum_of_squares_of(Threads::ONE, Slice::of(x))).collect();
    let totals = |order, cases: &[Vec<T>], offset| {
        let mut devices: Vec<_> = cases.iter().map(|x| Device::new(x, offset)).collect();
        let arrays: Vec<_> = devices.iter_mut().map(|x| (x.ptr(), x.numel as u64)).collect();
        let num_blocks: u64 = arrays.iter().map(|(_, numel)| SumsOfSquares::num_blocks(*numel)).sum();
        let mut blocks = Device::new(&vec![f64::NAN; num_blocks as usize], 0);
        let mut totals = Device::new(&vec![f64::NAN; cases.len()], 0);
        for launch in SumsOfSquares::new(&arrays, blocks.ptr(), totals.ptr()).launches(T::TYPE) {
            host().launch(&launch, order);
        }
        totals.get()
    };
    for offset in [0, 1] {
        in_both_orders(|order| totals(order, &cases, offset)).assert_same(&expected, "all at once");
        for (x, expected) in cases.iter().zip(&expected) {
            let total = in_both_orders(|order| totals(order, std::slice::from_ref(x), offset));
            total.assert_same(&vec![*expected], &format!("{} elements", x.len()));
            assert_eq!(total[0].is_finite(), x.iter().all(|x| x.wide().is_finite()));
        }
    }
}

#[test]
fn sums_of_squares_are_the_cpus() {
    check_norm::<f32>();
    check_norm::<bf16>();
    check_norm::<f16>();
}

#[test]
fn sums_in_order_are_in_order() {
    let mut random = Random(8);
    for numel in [0, 1, 255, 256, 257, 1000] {
        let terms: Vec<f64> = (0..numel).map(|_| f64::from(random.unit()) * 1e10).collect();
        let expected = terms.iter().fold(0.0, |total, term| total + term);
        let total = in_both_orders(|order| sum_in_order(order, &mut Device::new(&terms, 1)));
        total.assert_same(&expected, &format!("{numel} terms"));
    }
}

/// Where gradients go.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Gradient {
    None,
    InPlace,
    Apart,
}

const SCALE: f32 = 0.25;

/// Losses, gradients (or the logits, untouched), and the first bad row.
fn softmax_rows<T: Float>(
    logits: &[T],
    targets: &[i64],
    gradient: Gradient,
    offset: usize,
) -> (Vec<f64>, Vec<T>, Vec<u64>) {
    in_both_orders(|order| {
        let rows = targets.len();
        let (mut x, mut targets) = (Device::new(logits, offset), Device::new(targets, 0));
        let mut apart = Device::new(logits, offset);
        let (mut losses, mut bad_row) = (Device::new(&vec![0f64; rows], 0), Device::new(&[u64::MAX], 0));
        let call = CrossEntropy {
            logits: x.ptr(),
            grad: match gradient {
                Gradient::None => DevicePtr::NULL,
                Gradient::InPlace => x.ptr(),
                Gradient::Apart => apart.ptr(),
            },
            targets: targets.ptr(),
            losses: losses.ptr(),
            bad_row: bad_row.ptr(),
            rows: rows as u64,
            classes: (logits.len() / rows) as u64,
            stride: (logits.len() / rows) as u64,
            scale: SCALE,
        };
        host().launch(&call.launch(T::TYPE), order);
        let (x, apart) = (x.get(), apart.get());
        if gradient != Gradient::InPlace {
            x.assert_same(&logits.to_vec(), "logits are read only");
        }
        (losses.get(), if gradient == Gradient::Apart { apart } else { x }, bad_row.get())
    })
}

fn check_cross_entropy<T: Float>() {
    let mut random = Random(10);
    for (rows, classes, offset, size) in [
        (1, 1, 0, 5.0),
        (3, 7, 0, 5.0),
        (4, 1000, 1, 30.0),
        (3, 8192, 0, 10.0),
        (2, 5003, 0, 1.0),
        (5, 64, 8, 100.0),
    ] {
        let logits: Vec<T> = random.numbers(rows * classes, size);
        let targets: Vec<i64> = (0..rows).map(|_| (random.bits() % classes as u64) as i64).collect();
        let what = format!("{rows} rows of {classes}");
        let mut expected = logits.clone();
        let total = cross_entropy::in_place(Threads::ONE, &mut expected, &targets, SCALE).unwrap();

        let (losses, grad, bad_row) = softmax_rows(&logits, &targets, Gradient::InPlace, offset);
        assert_eq!(bad_row, [u64::MAX]);
        assert_close(&grad, &expected, &what);
        let got = losses.iter().fold(0.0, |total, loss| total + loss);
        let tolerance = f64::from(SUM_ORDER) * rows as f64;
        assert!((got - total).abs() <= tolerance, "{what}: {got} for {total}");

        let apart = softmax_rows(&logits, &targets, Gradient::Apart, offset);
        apart.assert_same(&(losses.clone(), grad, bad_row.clone()), "apart");
        let loss_only = softmax_rows(&logits, &targets, Gradient::None, offset);
        loss_only.assert_same(&(losses, logits, bad_row), "the loss only");
    }
}

#[test]
fn cross_entropy_is_the_cpus_but_for_the_order_of_sums() {
    check_cross_entropy::<f32>();
    check_cross_entropy::<bf16>();
    check_cross_entropy::<f16>();
}

#[test]
fn rows_may_stand_apart() {
    const CLASSES: usize = 1003;
    const STRIDE: usize = 1024;
    let logits: Vec<bf16> = Random(12).numbers(3 * CLASSES, 4.0);
    let targets = [5i64, 1002, 77];
    let (losses, grad, _) = softmax_rows(&logits, &targets, Gradient::InPlace, 0);
    let gap = bf16::from_f32(1e9);
    let apart = |rows: &[bf16]| -> Vec<bf16> {
        let padded =
            rows.chunks_exact(CLASSES).flat_map(|row| row.iter().copied().chain([gap; STRIDE - CLASSES]));
        padded.collect()
    };
    let got = in_both_orders(|order| {
        let (mut x, mut targets) = (Device::new(&apart(&logits), 0), Device::new(&targets, 0));
        let (mut losses, mut bad_row) = (Device::new(&[0f64; 3], 0), Device::new(&[u64::MAX], 0));
        let call = CrossEntropy {
            logits: x.ptr(),
            grad: x.ptr(),
            targets: targets.ptr(),
            losses: losses.ptr(),
            bad_row: bad_row.ptr(),
            rows: 3,
            classes: CLASSES as u64,
            stride: STRIDE as u64,
            scale: SCALE,
        };
        host().launch(&call.launch(FloatType::Bf16), order);
        (losses.get(), x.get())
    });
    // Vectors are read where the first rows had none: sums differ in their order.
    assert_close(&got.1, &apart(&grad), "rows apart");
    assert!(got.0.iter().zip(&losses).all(|(a, b)| (a - b).abs() <= f64::from(SUM_ORDER)), "{got:?}");
}

#[test]
fn rows_without_probabilities_are_nan_and_spare_the_others() {
    const CLASSES: usize = 600;
    const INFINITY: f32 = f32::INFINITY;
    let plain: Vec<f32> = Random(11).numbers(CLASSES, 3.0);
    let with = |changes: &[(usize, f32)]| {
        let mut row = plain.clone();
        changes.iter().for_each(|&(at, x)| row[at] = x);
        row
    };
    let mut last_only = vec![-INFINITY; CLASSES];
    last_only[CLASSES - 1] = -3.0;
    let mut nan_in_nothing = vec![-INFINITY; CLASSES];
    nan_in_nothing[4] = f32::NAN;
    let rows = [
        plain.clone(),
        with(&[(0, -INFINITY), (1, -INFINITY), (5, -INFINITY)]),
        last_only,
        with(&[(3, INFINITY)]),
        with(&[(599, f32::NAN)]),
        vec![-INFINITY; CLASSES],
        nan_in_nothing,
        vec![f32::NAN; CLASSES],
    ];
    let targets = [7, 8, 599, 3, 0, 0, 1, 1];
    let (losses, grad, _) = softmax_rows(&rows.concat(), &targets, Gradient::Apart, 0);
    for (row, logits) in rows.iter().enumerate() {
        let mut expected = logits.clone();
        let loss = cross_entropy::in_place(Threads::ONE, &mut expected, &targets[row..=row], SCALE).unwrap();
        let grad = &grad[row * CLASSES..][..CLASSES];
        assert_eq!(loss.is_nan(), row >= 3, "row {row}");
        assert_eq!(losses[row].is_nan(), row >= 3, "row {row}");
        match row {
            3.. => assert!(grad.iter().chain(&expected).all(|x| x.is_nan()), "row {row}"),
            _ => {
                assert!((losses[row] - loss).abs() <= f64::from(SUM_ORDER), "row {row}");
                assert_close(grad, &expected, "row");
            }
        }
    }
}

#[test]
fn the_first_row_without_a_class_is_told_and_left_alone() {
    let logits: Vec<bf16> = Random(12).numbers(6 * 40, 3.0);
    let targets = [3, 0, 40, 39, -1, 5];
    let (losses, grad, bad_row) = softmax_rows(&logits, &targets, Gradient::InPlace, 0);
    assert_eq!(bad_row, [2]);
    for row in 0..6 {
        let bad = row == 2 || row == 4;
        assert_eq!(losses[row].is_nan(), bad, "row {row}");
        assert_eq!(grad[row * 40..][..40] == logits[row * 40..][..40], bad, "row {row}");
    }
}
