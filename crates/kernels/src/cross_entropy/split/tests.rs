use half::{bf16, f16};
use proptest::prelude::*;

use super::*;
use crate::cross_entropy::{in_place, loss_only};
use crate::parallel::PIECE_NUMEL;
use crate::testing::{Number, assert_close, bits, normal, ways, wide};

/// Of sums of exponentials that are added in another order and travel as `f32`, relative.
const SUMS: f64 = 5e-7;
const SCALE: f32 = 0.37;

fn targets(rows: usize, classes: usize) -> Vec<i64> {
    (0..rows).map(|row| (row * 7919 % classes) as i64).collect()
}

/// Whole rows cut before each of `cuts`, which are not decreasing.
fn parts(num_classes: usize, cuts: &[usize]) -> Vec<Range<usize>> {
    let starts = std::iter::once(0).chain(cuts.iter().copied());
    starts.zip(cuts.iter().copied().chain([num_classes])).map(|(start, end)| start..end).collect()
}

fn columns<T: Copy>(logits: &[T], num_classes: usize, part: &Range<usize>) -> Vec<T> {
    logits.chunks_exact(num_classes).flat_map(|row| &row[part.clone()]).copied().collect()
}

/// What ranks make of their parts, put together: the loss, and the gradients of whole rows.
fn run<T: Number>(
    isa: Isa,
    threads: Threads,
    logits: &[T],
    targets: &[i64],
    parts: &[Range<usize>],
) -> (f64, Vec<T>) {
    let num_classes = logits.len() / targets.len();
    let mut all = vec![RowStats { max: 7.0, sum: 7.0, target: 7.0 }; parts.len() * targets.len()];
    for (part, out) in parts.iter().zip(all.chunks_exact_mut(targets.len())) {
        let own = columns(logits, num_classes, part);
        partial_with(isa, threads, &own, targets, part.clone(), num_classes, out).unwrap();
    }
    let (loss, rows) = combine_with(isa, &all, targets.len());
    let mut grad = logits.to_vec();
    for part in parts.iter().filter(|part| !part.is_empty()) {
        let mut own = columns(logits, num_classes, part);
        gradients_with(isa, threads, &mut own, targets, part.clone(), &rows, SCALE);
        for (row, own) in grad.chunks_exact_mut(num_classes).zip(own.chunks_exact(part.len())) {
            row[part.clone()].copy_from_slice(own);
        }
    }
    (loss, grad)
}

fn near_the_whole<T: Smallest>(rows: usize, num_classes: usize, std: f32, cuts: &[usize]) {
    let logits = normal::<T>("logits", rows * num_classes, std);
    let targets = targets(rows, num_classes);
    let mut expected = logits.clone();
    let expected_loss = in_place(Threads::ONE, &mut expected, &targets, SCALE).unwrap();
    let (loss, grad) = run(Isa::best(), Threads::ONE, &logits, &targets, &parts(num_classes, cuts));
    assert!((loss - expected_loss).abs() <= SUMS * rows as f64, "{loss} for {expected_loss}");
    // Where rounding turns, neighbours: apart by twice its error. A target's gradient is a difference from the scale; the
    // others' errors are relative to themselves, or to the smallest normal number.
    assert_close("grad", &grad, &wide(&expected), 2.0 * T::ROUNDING + SUMS, f64::from(SCALE));
    let mut others = [grad, expected];
    for grad in &mut others {
        for (row, &target) in grad.chunks_exact_mut(num_classes).zip(&targets) {
            row[target as usize] = T::of(0.0);
        }
    }
    assert_close("other classes", &others[0], &wide(&others[1]), 2.0 * T::ROUNDING + SUMS, T::SMALLEST);
}

trait Smallest: Number {
    /// The smallest number whose neighbours are as near as its size says.
    const SMALLEST: f64;
}

impl Smallest for f32 {
    const SMALLEST: f64 = f32::MIN_POSITIVE as f64;
}

impl Smallest for bf16 {
    const SMALLEST: f64 = f32::MIN_POSITIVE as f64;
}

impl Smallest for f16 {
    const SMALLEST: f64 = 1.0 / (1u64 << 14) as f64;
}

#[test]
fn parts_put_together_are_the_whole() {
    for (num_classes, cuts) in [
        (1, vec![]),
        (2, vec![1]),
        (100, vec![50]),
        (101, vec![34, 68]),
        (100, vec![0, 97]),
        (131, vec![7, 8, 131]),
        (1027, vec![256, 512, 768]),
    ] {
        for std in [0.1, 3.0, 1e4] {
            near_the_whole::<f32>(3, num_classes, std, &cuts);
            near_the_whole::<bf16>(3, num_classes, std, &cuts);
        }
        near_the_whole::<f16>(3, num_classes, 3.0, &cuts);
        near_the_whole::<f16>(3, num_classes, 1e4, &cuts);
    }
}

/// More than one block of exponentials in a part, and as many classes as real models have.
#[test]
fn parts_of_large_vocabularies() {
    for cuts in [vec![], vec![64_128], vec![42_752, 85_504], vec![32_064, 64_128, 128_255]] {
        near_the_whole::<f32>(2, 128_256, 3.0, &cuts);
        near_the_whole::<bf16>(2, 128_256, 3.0, &cuts);
        near_the_whole::<f16>(2, 50_257, 3.0, &cuts.iter().map(|cut| cut / 3).collect::<Vec<_>>());
    }
}

fn one_part_is_the_whole<T: Number>(num_classes: usize) {
    let logits = normal::<T>("logits", 5 * num_classes, 3.0);
    let targets = targets(5, num_classes);
    let mut expected = logits.clone();
    let expected_loss = in_place(Threads::ONE, &mut expected, &targets, SCALE).unwrap();
    for parts in [parts(num_classes, &[]), parts(num_classes, &[num_classes]), parts(num_classes, &[0])] {
        let (loss, grad) = run(Isa::best(), Threads::ONE, &logits, &targets, &parts);
        assert_eq!(loss.to_bits(), expected_loss.to_bits(), "{parts:?}");
        assert!(bits(&grad) == bits(&expected), "{parts:?}");
    }
    assert_eq!(loss_only(Threads::ONE, &logits, &targets).unwrap().to_bits(), expected_loss.to_bits());
}

#[test]
fn one_part_of_a_block_has_the_bits_of_the_whole() {
    for num_classes in [1, 33, 1027, BLOCK_NUMEL] {
        one_part_is_the_whole::<f32>(num_classes);
        one_part_is_the_whole::<bf16>(num_classes);
        one_part_is_the_whole::<f16>(num_classes);
    }
}

#[test]
fn threads_and_instruction_sets_do_not_change_a_bit() {
    let (rows, num_classes) = (201, 3333);
    assert!(rows * num_classes > 2 * PIECE_NUMEL);
    let logits = normal::<bf16>("logits", rows * num_classes, 3.0);
    let targets = targets(rows, num_classes);
    let parts = parts(num_classes, &[100, 100]);
    let (loss, grad) = run(Isa::SCALAR, Threads::ONE, &logits, &targets, &parts);
    for (isa, threads) in ways() {
        let (other_loss, other_grad) = run(isa, threads, &logits, &targets, &parts);
        assert_eq!(other_loss.to_bits(), loss.to_bits(), "{isa:?}, {threads:?}");
        assert!(bits(&other_grad) == bits(&grad), "{isa:?}, {threads:?}");
    }
}

#[test]
fn parts_whose_classes_are_all_masked() {
    let (mut logits, num_classes) = (vec![f32::NEG_INFINITY; 120], 60);
    (logits[3], logits[19], logits[60 + 50]) = (1e4, 1e4, -1e4);
    let parts = parts(num_classes, &[20, 40]);
    for isa in Isa::all() {
        let (loss, grad) = run(isa, Threads::ONE, &logits, &[3, 50], &parts);
        assert!((loss - 2f64.ln()).abs() < SUMS);
        for (i, &grad) in grad.iter().enumerate() {
            let expected = match i {
                3 => -SCALE / 2.0,
                19 => SCALE / 2.0,
                _ => 0.0,
            };
            assert_eq!(grad, expected, "element {i}");
        }
        // A masked target: an infinite loss, and still a gradient.
        let (loss, grad) = run(isa, Threads::ONE, &logits, &[30, 50], &parts);
        assert_eq!((loss, grad[30]), (f64::INFINITY, -SCALE));
    }
}

#[test]
fn rows_that_have_no_softmax_are_nan_on_every_rank_and_others_are_not() {
    let num_classes = 60;
    let bad = [vec![f32::NAN], vec![f32::INFINITY], vec![f32::NAN; 20], vec![f32::NEG_INFINITY; 60]];
    for (bad, at) in bad.iter().zip([25, 59, 20, 0]) {
        let mut logits = normal::<f32>("logits", 2 * num_classes, 1.0);
        logits[at..at + bad.len()].copy_from_slice(bad);
        for isa in Isa::all() {
            let (loss, grad) = run(isa, Threads::ONE, &logits, &[3, 20], &parts(num_classes, &[20, 40]));
            assert!(loss.is_nan());
            assert!(grad[..num_classes].iter().all(|x| x.is_nan()), "{bad:?} at {at}");
            assert!(grad[num_classes..].iter().all(|x| x.is_finite()));
        }
    }
    // Not a number among masked ones.
    let mut logits = vec![f32::NEG_INFINITY; 60];
    (logits[3], logits[25]) = (1.0, f32::NAN);
    let (loss, grad) = run(Isa::best(), Threads::ONE, &logits, &[3], &parts(60, &[20, 40]));
    assert!(loss.is_nan() && grad.iter().all(|x| x.is_nan()));
}

#[test]
fn a_target_that_is_no_class_is_the_same_error_on_every_rank() {
    for target in [10, -1, i64::MAX, i64::MIN] {
        for classes in [0..4, 4..10, 10..10] {
            let logits = vec![0.5f32; 2 * classes.len()];
            let mut out = [RowStats::EMPTY; 2];
            let error = partial(Threads::ONE, &logits, &[5, target], classes, 10, &mut out).unwrap_err();
            assert_eq!(error, TargetOutOfRange { row: 1, target, num_classes: 10 });
            assert_eq!(out, [RowStats::EMPTY; 2]);
        }
    }
}

#[test]
fn a_rank_tells_its_maximum_its_sum_and_its_target() {
    let mut out = [RowStats::EMPTY; 2];
    let logits = [1.0f32, 1.0, -3.0, 2.0, f32::NEG_INFINITY, f32::NEG_INFINITY];
    partial(Threads::ONE, &logits, &[7, 6], 5..8, 10, &mut out).unwrap();
    assert_eq!((out[0].max, out[0].target), (1.0, -3.0));
    assert!((f64::from(out[0].sum) - 2.0 - (-4f64).exp()).abs() < SUMS);
    assert_eq!(out[1], RowStats { max: 2.0, sum: 1.0, target: f32::NEG_INFINITY });
    partial::<f32>(Threads::ONE, &[], &[7, 6], 8..8, 10, &mut out).unwrap();
    assert_eq!(out, [RowStats::EMPTY; 2]);
}

#[test]
fn rows_travel_as_flat_numbers() {
    let mut rows = [RowStats { max: 1.0, sum: 2.0, target: 3.0 }, RowStats::EMPTY];
    let numbers = [1.0, 2.0, 3.0, f32::NEG_INFINITY, 0.0, 0.0];
    assert_eq!(RowStats::as_flat(&rows), numbers);
    assert_eq!(RowStats::from_flat(&numbers), rows);
    RowStats::as_flat_mut(&mut rows)[4] = 5.0;
    assert_eq!(rows[1].sum, 5.0);
    assert_eq!(RowStats::from_flat(&[]), []);
}

#[test]
fn nothing_is_fine() {
    assert_eq!(partial::<f32>(Threads::ONE, &[], &[], 0..4, 10, &mut []), Ok(()));
    assert_eq!(combine(&[], 0), (0.0, Vec::new()));
    gradients::<bf16>(Threads::ONE, &mut [], &[], 0..4, &[], 1.0);
    gradients::<bf16>(Threads::ONE, &mut [], &[3], 4..4, &combine(&[RowStats::EMPTY], 1).1, 1.0);
}

#[test]
#[should_panic(expected = "`5` parts of `2` rows")]
fn parts_of_some_rows_panic() {
    combine(&[RowStats::EMPTY; 5], 2);
}

#[test]
#[should_panic(expected = "`4..11` of `10`")]
fn classes_beyond_the_vocabulary_panic() {
    let _ = partial(Threads::ONE, &[0.5f32; 7], &[0], 4..11, 10, &mut [RowStats::EMPTY]);
}

proptest! {
    #[test]
    fn any_parts_are_the_whole(
        rows in 1usize..4, num_classes in 1usize..300, std in 0.1f32..100.0,
        cuts in prop::collection::vec(0usize..301, 0..4),
    ) {
        let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut % (num_classes + 1)).collect();
        cuts.sort_unstable();
        near_the_whole::<f32>(rows, num_classes, std, &cuts);
        near_the_whole::<bf16>(rows, num_classes, std, &cuts);
    }
}
