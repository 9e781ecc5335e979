use half::{bf16, f16};
use proptest::prelude::*;

use super::*;
use crate::parallel::PIECE_NUMEL;
use crate::testing::{Number, assert_close, bits, normal, slope, ways, wide};

/// Of `f32` arithmetic on probabilities, beside the rounding of the result.
const ARITHMETIC: f64 = 1e-6;
/// Of a row's loss: of the sum of `f32` exponentials, mostly.
const LOSS: f64 = 1e-6;
const SCALE: f32 = 0.37;

fn run<T: Number>(isa: Isa, threads: Threads, logits: &[T], targets: &[i64]) -> (f64, Vec<T>) {
    let mut grad = vec![T::of(0.5); logits.len()];
    let loss = rows_with(isa, threads, targets, SCALE, Logits::Apart(logits, &mut grad)).unwrap();
    (loss, grad)
}

fn targets(rows: usize, classes: usize) -> Vec<i64> {
    (0..rows).map(|row| (row * 7919 % classes) as i64).collect()
}

fn row_loss(x: &[f64], target: usize) -> f64 {
    let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    x.iter().map(|x| (x - max).exp()).sum::<f64>().ln() + max - x[target]
}

/// Losses and gradients of the definition.
fn expected(logits: &[f64], targets: &[i64]) -> (f64, Vec<f64>) {
    let classes = logits.len() / targets.len();
    let mut loss = 0.0;
    let mut grad = Vec::new();
    for (x, &target) in logits.chunks_exact(classes).zip(targets) {
        loss += row_loss(x, target as usize);
        for (class, _) in x.iter().enumerate() {
            let probability = (-row_loss(x, class)).exp();
            let hot = if class as i64 == target { 1.0 } else { 0.0 };
            grad.push((probability - hot) * f64::from(SCALE));
        }
    }
    (loss, grad)
}

fn near_the_definition<T: Number>(rows: usize, classes: usize, std: f32) {
    let logits = normal::<T>("logits", rows * classes, std);
    let targets = targets(rows, classes);
    let (loss, grad) = run(Isa::best(), Threads::ONE, &logits, &targets);
    let (expected_loss, expected_grad) = expected(&wide(&logits), &targets);
    let error = (loss - expected_loss).abs();
    assert!(error <= LOSS * expected_loss.max(rows as f64), "{loss} for {expected_loss}");
    assert_close("grad", &grad, &expected_grad, T::ROUNDING + ARITHMETIC, 0.1);
}

#[test]
fn losses_and_gradients_are_those_of_the_definition() {
    for (rows, classes) in [(1, 1), (3, 2), (2, 31), (4, 64), (3, 100), (2, 1027)] {
        for std in [0.1, 3.0, 1e4] {
            near_the_definition::<f32>(rows, classes, std);
            near_the_definition::<bf16>(rows, classes, std);
        }
        near_the_definition::<f16>(rows, classes, 3.0);
    }
}

/// More than one block of exponentials, an end that is no whole vector, and as many classes as real models have.
#[test]
fn long_rows() {
    near_the_definition_of_long_rows(2, 2 * BLOCK_NUMEL + 77);
    near_the_definition_of_long_rows(1, 128_256);
}

fn near_the_definition_of_long_rows(rows: usize, classes: usize) {
    let logits = normal::<f32>("logits", rows * classes, 2.0);
    let targets = targets(rows, classes);
    let (loss, grad) = run(Isa::best(), Threads::ONE, &logits, &targets);
    let wide = wide(&logits);
    let losses: Vec<f64> =
        wide.chunks_exact(classes).zip(&targets).map(|(x, &target)| row_loss(x, target as usize)).collect();
    let expected_loss: f64 = losses.iter().sum();
    assert!((loss - expected_loss).abs() < LOSS * expected_loss);
    for (row, (x, grad)) in wide.chunks_exact(classes).zip(grad.chunks_exact(classes)).enumerate() {
        let target = targets[row] as usize;
        let ln_sum = losses[row] + x[target];
        for class in 0..classes {
            let hot = if class == target { 1.0 } else { 0.0 };
            let expected = ((x[class] - ln_sum).exp() - hot) * f64::from(SCALE);
            let error = (f64::from(grad[class]) - expected).abs();
            assert!(error <= 2.0 * ARITHMETIC * expected.abs(), "class {class}");
        }
    }
}

#[test]
fn the_gradient_is_the_derivative_of_the_loss() {
    let (classes, target) = (37, 5);
    let logits = normal::<f32>("logits", classes, 2.0);
    let (_, grad) = run(Isa::best(), Threads::ONE, &logits, &[target as i64]);
    let x = wide(&logits);
    let slopes: Vec<f64> = (0..classes)
        .map(|class| {
            let at = |value: f64| {
                let mut moved = x.clone();
                moved[class] = value;
                row_loss(&moved, target) * f64::from(SCALE)
            };
            slope(at, x[class])
        })
        .collect();
    assert_close("grad", &grad, &slopes, ARITHMETIC, 0.01);
}

#[test]
fn threads_instruction_sets_and_places_do_not_change_a_bit() {
    let (rows, classes) = (201, 3333);
    assert!(rows * classes > 2 * PIECE_NUMEL);
    let logits = normal::<bf16>("logits", rows * classes, 3.0);
    let targets = targets(rows, classes);
    let (loss, grad) = run(Isa::best(), Threads::ONE, &logits, &targets);
    for (isa, threads) in ways() {
        let (other_loss, other_grad) = run(isa, threads, &logits, &targets);
        assert_eq!(other_loss.to_bits(), loss.to_bits(), "{isa:?}, {threads:?}");
        assert!(bits(&other_grad) == bits(&grad), "{isa:?}, {threads:?}");
    }
    for threads in [Threads::ONE, Threads::new(3).unwrap()] {
        assert_eq!(loss_only(threads, &logits, &targets).unwrap().to_bits(), loss.to_bits());
        let mut place = logits.clone();
        assert_eq!(in_place(threads, &mut place, &targets, SCALE).unwrap().to_bits(), loss.to_bits());
        assert!(bits(&place) == bits(&grad));
        assert_eq!(forward_backward(threads, &logits, &targets, SCALE, &mut place).unwrap(), loss);
        assert!(bits(&place) == bits(&grad));
    }
}

#[test]
fn masked_classes_have_no_gradient() {
    let classes = 50;
    let mut logits = vec![f32::NEG_INFINITY; 2 * classes];
    (logits[3], logits[49], logits[classes + 20]) = (1e4, 1e4, -1e4);
    let (loss, grad) = run(Isa::best(), Threads::ONE, &logits, &[3, 20]);
    assert!((loss - 2f64.ln()).abs() < LOSS);
    for (i, &grad) in grad.iter().enumerate() {
        let expected = match i {
            3 => -SCALE / 2.0,
            49 => SCALE / 2.0,
            _ => 0.0,
        };
        assert_eq!(grad, expected, "element {i}");
    }
    // A masked target: an infinite loss, and still a gradient.
    let (loss, grad) = run(Isa::best(), Threads::ONE, &logits, &[4, 20]);
    assert_eq!((loss, grad[4]), (f64::INFINITY, -SCALE));
}

#[test]
fn rows_that_have_no_softmax_are_nan_and_others_are_not() {
    let classes = 40;
    for bad in
        [vec![f32::NAN], vec![f32::INFINITY], vec![f32::NEG_INFINITY; classes], vec![f32::NAN; classes]]
    {
        for at in [0, 17, classes - 1] {
            let at = if bad.len() == 1 { at } else { 0 };
            let mut logits = normal::<f32>("logits", 2 * classes, 1.0);
            logits[at..at + bad.len()].copy_from_slice(&bad);
            for isa in Isa::all() {
                let (loss, grad) = run(isa, Threads::ONE, &logits, &[3, 20]);
                assert!(loss.is_nan());
                assert!(grad[..classes].iter().all(|x| x.is_nan()), "{bad:?} at {at}");
                assert!(grad[classes..].iter().all(|x| x.is_finite()));
            }
        }
    }
}

#[test]
fn a_target_that_is_no_class_is_an_error_and_nothing_is_written() {
    for target in [4, -1, -100, i64::MAX, i64::MIN] {
        let mut logits = [0.5; 12];
        let error = in_place(Threads::ONE, &mut logits, &[0, target, 9], 1.0).unwrap_err();
        assert_eq!(error, TargetOutOfRange { row: 1, target, num_classes: 4 });
        assert_eq!(logits, [0.5; 12]);
    }
    let error = loss_only::<f32>(Threads::ONE, &[0.0; 8], &[3, 4]).unwrap_err();
    assert_eq!(error.to_string(), "target `4` of row `1` is none of the `4` classes");
    assert!(loss_only::<f32>(Threads::ONE, &[], &[0]).is_err());
}

#[test]
fn nothing_is_fine() {
    assert_eq!(in_place::<f32>(Threads::ONE, &mut [], &[], 1.0), Ok(0.0));
    assert_eq!(loss_only::<bf16>(Threads::ONE, &[], &[]), Ok(0.0));
}

#[test]
#[should_panic(expected = "rows of classes")]
fn rows_of_different_lengths_panic() {
    let _ = loss_only(Threads::ONE, &[0.0; 7], &[0, 1]);
}

proptest! {
    #[test]
    fn any_numbers_of_any_shape_give_the_reference(
        rows in 1usize..4, classes in 1usize..300, std in 0.1f32..100.0,
        seed in prop::collection::vec(prop::num::f32::ANY, 0..5),
    ) {
        let mut logits = normal::<f32>("logits", rows * classes, std);
        let stride = (rows * classes).div_ceil(seed.len().max(1));
        for (x, number) in logits.iter_mut().step_by(stride).zip(seed) {
            *x = number;
        }
        let targets = targets(rows, classes);
        let (loss, grad) = run(Isa::SCALAR, Threads::ONE, &logits, &targets);
        for isa in Isa::all() {
            let (other_loss, other_grad) = run(isa, Threads::ONE, &logits, &targets);
            prop_assert_eq!(bits(&other_grad), bits(&grad));
            prop_assert!(other_loss.to_bits() == loss.to_bits() || (other_loss.is_nan() && loss.is_nan()));
        }
    }
}
