use half::{bf16, f16};
use proptest::prelude::*;

use super::*;
use crate::parallel::PIECE_NUMEL;
use crate::testing::{Number, assert_close, bits, normal, slope, ways, wide};

/// Of `f32` arithmetic, beside the rounding of the result: an exponential, a division and a few products.
const ARITHMETIC: f64 = 4e-7;
/// Of `f16` results below its normal numbers.
const TINY: f64 = 1.0 / (1u64 << 25) as f64;
/// Of the differences that stand for derivatives.
const DIFFERENCES: f64 = 1e-9;

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

fn run_forward<T: Number>(isa: Isa, threads: Threads, gate: &[T], up: &[T]) -> Vec<T> {
    let mut out = vec![T::of(0.5); gate.len()];
    forward_with(isa, threads, gate, up, &mut out);
    out
}

fn run_backward<T: Number>(isa: Isa, threads: Threads, gate: &[T], up: &[T], dy: &[T]) -> [Vec<T>; 2] {
    let (mut dgate, mut dup) = (vec![T::of(0.5); gate.len()], vec![T::of(0.5); gate.len()]);
    backward_with(isa, threads, Backward { gate, up, dy, dgate: &mut dgate, dup: &mut dup });
    [dgate, dup]
}

fn near_the_formula<T: Number>() {
    let numel = 1003;
    let [gate, up, dy] = ["gate", "up", "dy"].map(|name| normal::<T>(name, numel, 4.0));
    let tolerance = T::ROUNDING + ARITHMETIC;

    let expected: Vec<f64> = wide(&gate).iter().zip(wide(&up)).map(|(&g, u)| silu(g) * u).collect();
    assert_close("out", &run_forward(Isa::best(), Threads::ONE, &gate, &up), &expected, tolerance, 1e-3);

    let [dgate, dup] = run_backward(Isa::best(), Threads::ONE, &gate, &up, &dy);
    let inputs = || wide(&gate).into_iter().zip(wide(&up)).zip(wide(&dy));
    // The two terms of the slope may cancel, and `1 - sigmoid`, which is as exact as 1, is multiplied by the gate.
    for (got, ((g, u), dy)) in wide(&dgate).into_iter().zip(inputs()) {
        let expected = slope(silu, g) * u * dy;
        let bound = T::ROUNDING * expected.abs()
            + (ARITHMETIC * (1.0 + g.abs()) + DIFFERENCES) * (u * dy).abs()
            + TINY;
        assert!((got - expected).abs() <= bound, "dgate: {got} for {expected}");
    }
    let expected: Vec<f64> = inputs().map(|((g, _), dy)| silu(g) * dy).collect();
    assert_close("dup", &dup, &expected, tolerance, 1e-3);
}

#[test]
fn values_and_gradients_are_those_of_the_formula() {
    near_the_formula::<f32>();
    near_the_formula::<bf16>();
    near_the_formula::<f16>();
}

#[test]
fn threads_and_instruction_sets_do_not_change_a_bit() {
    let numel = 2 * PIECE_NUMEL + 77;
    let [gate, up, dy] = ["gate", "up", "dy"].map(|name| normal::<bf16>(name, numel, 4.0));
    let out = bits(&run_forward(Isa::best(), Threads::ONE, &gate, &up));
    let grads = run_backward(Isa::best(), Threads::ONE, &gate, &up, &dy).map(|grad| bits(&grad));
    for (isa, threads) in ways() {
        assert!(bits(&run_forward(isa, threads, &gate, &up)) == out, "{isa:?}, {threads:?}");
        let others = run_backward(isa, threads, &gate, &up, &dy).map(|grad| bits(&grad));
        assert!(others == grads, "{isa:?}, {threads:?}");
    }
}

#[test]
fn the_ends_of_the_range() {
    let gate = [1e4, -1e4, 3e38, -3e38, -100.0, 0.0, -0.0, f32::NAN];
    let [out, dup] = [
        run_forward(Isa::best(), Threads::ONE, &gate, &[1.0; 8]),
        run_backward(Isa::best(), Threads::ONE, &gate, &[1.0; 8], &[1.0; 8])[1].clone(),
    ];
    for y in [out, dup] {
        assert_eq!(y[..7], [1e4, 0.0, 3e38, 0.0, 0.0, 0.0, 0.0]);
        assert!(y[7].is_nan());
    }
    let [dgate, _] = run_backward(Isa::best(), Threads::ONE, &gate, &[1.0; 8], &[1.0; 8]);
    assert_eq!(dgate[..7], [1.0, 0.0, 1.0, 0.0, 0.0, 0.5, 0.5]);
    assert!(dgate[7].is_nan());
}

#[test]
fn nothing_is_fine() {
    forward::<f32>(Threads::ONE, &[], &[], &mut []);
    backward::<bf16>(Threads::ONE, &[], &[], &[], &mut [], &mut []);
}

#[test]
#[should_panic(expected = "room for results")]
fn lengths_that_differ_panic() {
    forward(Threads::ONE, &[0.0; 3], &[0.0; 3], &mut [0.0; 2]);
}

proptest! {
    #[test]
    fn any_numbers_of_any_length_give_the_reference(
        values in prop::collection::vec([prop::num::f32::ANY; 3], 0..300),
        skip in 0usize..9,
    ) {
        let skip = skip.min(values.len());
        let [gate, up, dy] = [0, 1, 2].map(|k| values.iter().map(|x| x[k]).collect::<Vec<f32>>());
        let (gate, up, dy) = (&gate[skip..], &up[skip..], &dy[skip..]);
        let out = bits(&run_forward(Isa::SCALAR, Threads::ONE, gate, up));
        let grads = run_backward(Isa::SCALAR, Threads::ONE, gate, up, dy).map(|grad| bits(&grad));
        for isa in Isa::all() {
            prop_assert_eq!(&bits(&run_forward(isa, Threads::ONE, gate, up)), &out);
            let others = run_backward(isa, Threads::ONE, gate, up, dy).map(|grad| bits(&grad));
            prop_assert_eq!(&others, &grads);
        }
    }
}
