//! Cross-entropy over a split vocabulary: what ranks tell each other agrees but for the order of sums, and what follows from it has
//! the CPU's bits.

use half::{bf16, f16};
use shardwise_kernels::Threads;
use shardwise_kernels::cross_entropy::split::{self, RowStats};
use shardwise_kernels::cuda::{SplitCombine, SplitGradients, SplitPartial, SumInOrder};

use super::reductions::{SUM_ORDER, assert_close};
use super::{Device, Float, Random, SameBits, host, in_both_orders};

const SCALE: f32 = 0.25;

/// Rows of logits, cut by classes.
struct Case<T> {
    logits: Vec<T>,
    targets: Vec<i64>,
    num_classes: usize,
    /// Where parts begin, and the end.
    cuts: Vec<usize>,
    offset: usize,
}

impl<T: Float> Case<T> {
    fn rows(&self) -> u64 {
        self.targets.len() as u64
    }

    fn parts(&self) -> impl Iterator<Item = std::ops::Range<usize>> {
        self.cuts.windows(2).map(|cut| cut[0]..cut[1])
    }

    fn of_part(&self, classes: &std::ops::Range<usize>) -> Vec<T> {
        self.logits.chunks_exact(self.num_classes).flat_map(|row| &row[classes.clone()]).copied().collect()
    }

    /// What each rank tells the others, and the first bad row.
    fn partial(&self, classes: &std::ops::Range<usize>) -> (Vec<f32>, Vec<u64>) {
        let own = self.of_part(classes);
        in_both_orders(|order| {
            let (mut x, mut targets) = (Device::new(&own, self.offset), Device::new(&self.targets, 0));
            let mut out = Device::new(&vec![9f32; self.targets.len() * RowStats::NUMEL], 0);
            let mut bad_row = Device::new(&[u64::MAX], 0);
            let call = SplitPartial {
                logits: x.ptr(),
                targets: targets.ptr(),
                out: out.ptr(),
                bad_row: bad_row.ptr(),
                rows: self.rows(),
                width: classes.len() as u64,
                stride: classes.len() as u64,
                first_class: classes.start as u64,
                num_classes: self.num_classes as u64,
            };
            host().launch(&call.launch(T::TYPE), order);
            x.get().assert_same(&own, "logits are read only");
            (out.get(), bad_row.get())
        })
    }

    /// Whole rows' softmax as bytes, losses and their sum, of `parts`.
    fn combine(&self, parts: &[f32]) -> (Vec<u64>, Vec<f64>, Vec<f64>) {
        in_both_orders(|order| {
            let rows = self.targets.len();
            let mut parts = Device::new(parts, 0);
            let mut softmax = Device::new(&vec![0u64; rows * SplitCombine::ROW_BYTES / 8], 0);
            let (mut losses, mut total) = (Device::new(&vec![0f64; rows], 0), Device::new(&[0f64], 0));
            let num_parts = self.cuts.len() as u64 - 1;
            let call = SplitCombine {
                parts: parts.ptr(),
                softmax: softmax.ptr(),
                losses: losses.ptr(),
                num_parts,
                rows: self.rows(),
            };
            host().launch(&call.launch(), order);
            let add = SumInOrder { terms: losses.ptr(), total: total.ptr(), numel: self.rows() };
            host().launch(&add.launch(), order);
            let mut softmax = softmax.get();
            // A sum, a maximum, and four bytes that mean nothing.
            softmax.iter_mut().skip(1).step_by(2).for_each(|word| *word &= u64::from(u32::MAX));
            (softmax, losses.get(), total.get())
        })
    }

    fn gradients(&self, classes: &std::ops::Range<usize>, softmax: &[u64]) -> Vec<T> {
        in_both_orders(|order| {
            let mut x = Device::new(&self.of_part(classes), self.offset);
            let (mut targets, mut softmax) = (Device::new(&self.targets, 0), Device::new(softmax, 0));
            let call = SplitGradients {
                logits: x.ptr(),
                targets: targets.ptr(),
                softmax: softmax.ptr(),
                rows: self.rows(),
                width: classes.len() as u64,
                stride: classes.len() as u64,
                first_class: classes.start as u64,
                num_classes: self.num_classes as u64,
                scale: SCALE,
            };
            host().launch(&call.launch(T::TYPE), order);
            x.get()
        })
    }

    fn check(&self, what: &str) {
        let rows = self.targets.len();
        let (mut on_cpu, mut on_device) = (Vec::new(), Vec::new());
        for classes in self.parts() {
            let mut stats = vec![RowStats::EMPTY; rows];
            let own = self.of_part(&classes);
            let (targets, range) = (&self.targets, classes.clone());
            split::partial(Threads::ONE, &own, targets, range, self.num_classes, &mut stats).unwrap();
            let (told, bad_row) = self.partial(&classes);
            assert_eq!(bad_row, [u64::MAX]);
            for (got, expected) in RowStats::from_flat(&told).iter().zip(&stats) {
                got.max.assert_same(&expected.max, what);
                got.target.assert_same(&expected.target, what);
                let close = (got.sum - expected.sum).abs() <= SUM_ORDER * expected.sum;
                assert!(
                    close || (got.sum.is_nan() && expected.sum.is_nan()),
                    "{what}: {got:?}, {expected:?}"
                );
            }
            on_cpu.extend(stats);
            on_device.extend(told);
        }
        // Of the same parts, the same bits.
        let (expected_total, expected_rows) = split::combine(&on_cpu, rows);
        let (softmax, _, total) = self.combine(RowStats::as_flat(&on_cpu));
        total[0].assert_same(&expected_total, what);
        let (whole, _, total) = self.combine(&on_device);
        let tolerance = f64::from(SUM_ORDER) * rows as f64;
        // The loss of a target that is masked is infinite.
        match expected_total.is_finite() {
            true => assert!((total[0] - expected_total).abs() <= tolerance, "{what}: {total:?}"),
            false => total[0].assert_same(&expected_total, what),
        }
        for classes in self.parts() {
            let mut expected = self.of_part(&classes);
            let range = classes.clone();
            split::gradients(Threads::ONE, &mut expected, &self.targets, range, &expected_rows, SCALE);
            self.gradients(&classes, &softmax).assert_same(&expected, what);
            if expected.iter().all(|x| x.wide().is_finite()) {
                assert_close(&self.gradients(&classes, &whole), &expected, what);
            }
        }
    }
}

fn check<T: Float>() {
    let mut random = Random(13);
    for (rows, num_classes, cuts, offset, size) in [
        (1, 1, vec![0, 1], 0, 5.0),
        (3, 7, vec![0, 3, 3, 7], 0, 5.0),
        (4, 1000, vec![0, 500, 1000], 1, 30.0),
        (3, 8192, vec![0, 4096, 8192], 0, 10.0),
        (2, 5003, vec![0, 8, 1003, 5000, 5003], 0, 1.0),
        (40, 64, vec![0, 16, 32, 48, 64], 8, 100.0),
    ] {
        let logits = random.numbers(rows * num_classes, size);
        let targets = (0..rows).map(|_| (random.bits() % num_classes as u64) as i64).collect();
        let what = format!("{rows} rows of {num_classes} at {cuts:?}");
        Case::<T> { logits, targets, num_classes, cuts, offset }.check(&what);
    }
}

#[test]
fn a_split_vocabulary_is_the_cpus_but_for_the_order_of_sums() {
    check::<f32>();
    check::<bf16>();
    check::<f16>();
}

#[test]
fn masked_parts_infinities_and_nan_are_the_cpus() {
    const CLASSES: usize = 96;
    let mut rows: Vec<Vec<f32>> = (0..8).map(|_| Random(14).numbers(CLASSES, 3.0)).collect();
    rows[1][..32].fill(f32::NEG_INFINITY);
    rows[2][32..].fill(f32::NEG_INFINITY);
    rows[3].fill(f32::NEG_INFINITY);
    rows[4][40] = f32::INFINITY;
    rows[5][95] = f32::NAN;
    rows[6][..32].fill(f32::NEG_INFINITY);
    rows[6][7] = f32::NAN;
    for (row, logits) in rows.into_iter().enumerate() {
        let case =
            Case { logits, targets: vec![50], num_classes: CLASSES, cuts: vec![0, 32, 64, 96], offset: 0 };
        case.check(&format!("row {row}"));
    }
}

#[test]
fn the_first_row_without_a_class_is_told_and_left_alone() {
    let logits: Vec<bf16> = Random(15).numbers(6 * 40, 3.0);
    let targets = vec![3, 0, 40, 39, -1, 5];
    let case = Case { logits, targets, num_classes: 40, cuts: vec![0, 24, 40], offset: 0 };
    let mut told = Vec::new();
    for classes in case.parts() {
        let (stats, bad_row) = case.partial(&classes);
        assert_eq!(bad_row, [2], "all ranks see it");
        told.extend(stats);
    }
    let (softmax, losses, _) = case.combine(&told);
    for classes in case.parts() {
        let (before, after) = (case.of_part(&classes), case.gradients(&classes, &softmax));
        for (row, loss) in losses.iter().enumerate() {
            let bad = row == 2 || row == 4;
            assert_eq!(loss.is_nan(), bad, "row {row}");
            let at = row * classes.len()..(row + 1) * classes.len();
            assert_eq!(before[at.clone()] == after[at], bad, "row {row}");
        }
    }
}
