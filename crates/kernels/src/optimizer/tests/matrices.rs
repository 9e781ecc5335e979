//! LAMB and Muon: what threads, instruction sets and shapes do not change.

use half::bf16;
use proptest::prelude::*;

use crate::isa::Isa;
use crate::optimizer::{BiasCorrection, ComputeCopy, Lamb, SquaredNorms, orthogonalize_on};
use crate::parallel::PIECE_NUMEL;
use crate::testing::{normal, ways};
use crate::{Threads, norm};

const LAMB: Lamb = Lamb {
    lr: 1e-2,
    beta1: 0.9,
    beta2: 0.999,
    eps: 1e-6,
    weight_decay: 0.1,
    max_coeff: 10.0,
    min_coeff: 0.01,
    bias_correction: BiasCorrection::On,
    step: 3,
};

/// Bits of everything that a LAMB step writes.
fn lamb(isa: Isa, threads: Threads, numel: usize) -> (SquaredNorms, Vec<u32>, Vec<bf16>) {
    let (grad, mut master) = (normal::<f32>("grad", numel, 1.0), normal::<f32>("master", numel, 1.0));
    let mut m = normal::<f32>("m", numel, 0.1);
    let mut v: Vec<f32> = normal::<f32>("v", numel, 0.1).into_iter().map(f32::abs).collect();
    let mut copy = vec![bf16::ZERO; numel];
    let norms = LAMB.moments_with(isa, threads, 0.5, &grad, &master, [&mut m, &mut v]);
    LAMB.apply_with(isa, threads, norms, &mut master, [&m, &v], ComputeCopy::Bf16(&mut copy));
    assert!(copy.iter().zip(&master).all(|(copy, &x)| *copy == bf16::from_f32(x)));
    (norms, [master, m, v].concat().into_iter().map(f32::to_bits).collect(), copy)
}

#[test]
fn lamb_has_the_same_bits_everywhere() {
    for numel in [1, 31, 100, 65_536, PIECE_NUMEL + 70_001] {
        let reference = lamb(Isa::SCALAR, Threads::ONE, numel);
        for (isa, threads) in ways() {
            assert!(lamb(isa, threads, numel) == reference, "{isa:?}, {threads:?}, {numel} elements");
        }
    }
}

#[test]
fn lamb_norms_are_those_of_the_parameter_and_of_its_update() {
    let numel = 70_001;
    let (norms, _, _) = lamb(Isa::best(), Threads::ONE, numel);
    let param = norm::sum_of_squares(&normal::<f32>("master", numel, 1.0));
    assert!((norms.param - param).abs() <= 1e-12 * param);
    assert!(norms.update > 0.0);
}

#[test]
fn trust_ratios_are_clamped_and_one_without_norms() {
    let ratio = |param: f64, update: f64| LAMB.trust_ratio(SquaredNorms { param, update });
    assert_eq!([ratio(0.0, 4.0), ratio(4.0, 0.0), ratio(0.0, 0.0)], [1.0; 3]);
    assert_eq!([ratio(4.0, 1.0), ratio(1e9, 1.0), ratio(1.0, 1e9)], [2.0, 10.0, 0.01]);
}

/// `o oᵀ` or `oᵀ o`, whichever is smaller, of a `rows` x `cols` matrix.
fn gram(o: &[f32], rows: usize, cols: usize) -> Vec<f64> {
    let side = rows.min(cols);
    let at = |i: usize, k: usize| f64::from(if rows <= cols { o[i * cols + k] } else { o[k * cols + i] });
    let entry = |n: usize| (0..rows.max(cols)).map(|k| at(n / side, k) * at(n % side, k)).sum();
    (0..side * side).map(entry).collect()
}

#[test]
fn an_orthogonalized_matrix_is_nearly_orthogonal() {
    for (rows, cols) in [(40, 300), (300, 40), (7, 9), (1, 50), (50, 1), (130, 520)] {
        let mut matrix = normal::<f32>("w", rows * cols, 3.0);
        orthogonalize_on(Threads::ONE, [rows, cols], 5, &mut matrix);
        let side = rows.min(cols);
        let gram = gram(&matrix, rows, cols);
        // Singular values end between 0.68 and 1.14: squares in 0.46..1.3. Their sum is the trace, the sum of their squares that
        // of all entries.
        let trace: f64 = (0..side).map(|i| gram[i * side + i]).sum::<f64>() / side as f64;
        let squares = gram.iter().map(|x| x * x).sum::<f64>() / side as f64;
        assert!((0.46..1.31).contains(&trace), "{rows} x {cols}: mean squared singular value {trace}");
        let spread = squares - trace * trace;
        assert!(spread <= 0.25 * (1.31f64 - 0.46).powi(2), "{rows} x {cols}: spread {spread}");
    }
}

#[test]
fn zeros_stay_zero_and_nothing_stays_nothing() {
    let mut zeros = vec![0.0; 12];
    orthogonalize_on(Threads::ONE, [3, 4], 5, &mut zeros);
    assert_eq!(zeros, [0.0; 12]);
    for shape in [[0, 4], [4, 0], [0, 0]] {
        orthogonalize_on(Threads::ONE, shape, 5, &mut []);
    }
}

/// More rows than go into one call, so that threads share a product.
#[test]
fn threads_do_not_change_an_orthogonalized_matrix() {
    for shape in [[300, 150], [150, 300], [257, 257]] {
        let with = |threads| {
            let mut matrix = normal::<f32>("w", shape[0] * shape[1], 1.0);
            orthogonalize_on(threads, shape, 5, &mut matrix);
            matrix.into_iter().map(f32::to_bits).collect::<Vec<_>>()
        };
        let one = with(Threads::ONE);
        for count in [2, 3] {
            assert!(with(Threads::new(count).unwrap()) == one, "{shape:?}, {count} threads");
        }
    }
}

proptest! {
    /// A matrix and its transpose have the same singular vectors.
    #[test]
    fn a_transposed_matrix_gives_the_transposed_result(rows in 1usize..20, cols in 1usize..20) {
        let matrix = normal::<f32>("w", rows * cols, 1.0);
        let transpose = |x: &[f32], rows: usize, cols: usize| -> Vec<f32> {
            (0..rows * cols).map(|n| x[n % rows * cols + n / rows]).collect()
        };
        let mut turned = transpose(&matrix, rows, cols);
        let mut straight = matrix;
        orthogonalize_on(Threads::ONE, [rows, cols], 5, &mut straight);
        orthogonalize_on(Threads::ONE, [cols, rows], 5, &mut turned);
        for (a, b) in transpose(&straight, rows, cols).iter().zip(&turned) {
            // Rounding errors along singular vectors of nearly no length grow about 500-fold.
            prop_assert!((a - b).abs() <= 1e-3, "{a} and {b}");
        }
    }
}
