use half::{bf16, f16};
use proptest::prelude::*;

use super::*;
use crate::parallel::PIECE_NUMEL;
use crate::testing::{Number, assert_close, bits, normal, ways, wide};

/// Of `f32` arithmetic, beside the rounding of the result, where the parts of a sum are about 1.
const ARITHMETIC: f64 = 2e-7;

/// `[cos, sin]` of angles as a model makes them.
fn tables(shape: Shape) -> [Vec<f32>; 2] {
    let half = shape.head_dim / 2;
    let angle = |i: usize| (i / half) as f64 * 10_000f64.powf((i % half) as f64 / -(half as f64));
    let angles = (0..shape.seq * half).map(angle);
    [angles.clone().map(|x| x.cos() as f32).collect(), angles.map(|x| x.sin() as f32).collect()]
}

fn run<T: Number>(isa: Isa, threads: Threads, direction: Direction, x: &[T], shape: Shape) -> Vec<T> {
    let [cos, sin] = tables(shape);
    let mut out = vec![T::of(0.5); x.len()];
    rotate_with(isa, threads, direction, x, &mut out, Angles { cos: &cos, sin: &sin, shape });
    out
}

/// The definition, element by element.
fn expected(direction: Direction, x: &[f64], shape: Shape) -> Vec<f64> {
    let [cos, sin] = tables(shape);
    let half = shape.head_dim / 2;
    let turn = |i: usize| {
        let (coordinate, position) = (i % shape.head_dim, i / shape.head_dim / shape.heads % shape.seq);
        let angle = position * half + coordinate % half;
        let other = if coordinate < half { -x[i + half] } else { x[i - half] };
        let sign = if direction == Direction::Forward { 1.0 } else { -1.0 };
        x[i] * f64::from(cos[angle]) + sign * other * f64::from(sin[angle])
    };
    (0..x.len()).map(turn).collect()
}

fn near_the_definition<T: Number>(shape: Shape) {
    let x = normal::<T>("x", shape.numel(), 1.0);
    for direction in [Direction::Forward, Direction::Inverse] {
        let out = run(Isa::best(), Threads::ONE, direction, &x, shape);
        let expected = expected(direction, &wide(&x), shape);
        assert_close("out", &out, &expected, T::ROUNDING + ARITHMETIC, 1.0);
    }
}

#[test]
fn values_are_those_of_the_definition() {
    for head_dim in [2, 6, 16, 34, 64, 128, 150] {
        let shape = Shape { batch: 2, seq: 5, heads: 3, head_dim };
        near_the_definition::<f32>(shape);
        near_the_definition::<bf16>(shape);
        near_the_definition::<f16>(shape);
    }
}

/// `<R x, y> = <x, R' y>`: what makes the inverse the gradient, and `R' R x = x`, what makes it the inverse.
#[test]
fn the_inverse_is_the_transpose_and_turns_back() {
    let shape = Shape { batch: 2, seq: 7, heads: 2, head_dim: 70 };
    let [x, y] = ["x", "y"].map(|name| normal::<f32>(name, shape.numel(), 1.0));
    let turned = run(Isa::best(), Threads::ONE, Direction::Forward, &x, shape);
    let back = run(Isa::best(), Threads::ONE, Direction::Inverse, &y, shape);
    let dot = |a: &[f32], b: &[f32]| -> f64 { wide(a).iter().zip(wide(b)).map(|(a, b)| a * b).sum() };
    assert!((dot(&turned, &y) - dot(&x, &back)).abs() < 1e-4);
    let again = run(Isa::best(), Threads::ONE, Direction::Inverse, &turned, shape);
    assert_close("x", &again, &wide(&x), 4.0 * ARITHMETIC, 1.0);
}

#[test]
fn threads_and_instruction_sets_do_not_change_a_bit() {
    let shape = Shape { batch: 3, seq: 331, heads: 5, head_dim: 130 };
    assert!(shape.numel() > 2 * PIECE_NUMEL);
    let x = normal::<bf16>("x", shape.numel(), 1.0);
    for direction in [Direction::Forward, Direction::Inverse] {
        let reference = bits(&run(Isa::best(), Threads::ONE, direction, &x, shape));
        for (isa, threads) in ways() {
            assert!(bits(&run(isa, threads, direction, &x, shape)) == reference, "{isa:?}, {threads:?}");
        }
    }
}

#[test]
fn nan_and_nothing() {
    let shape = Shape { batch: 1, seq: 1, heads: 1, head_dim: 4 };
    let mut out = [0.0; 4];
    rotate(
        Threads::ONE,
        Direction::Forward,
        &[f32::NAN, 1.0, 2.0, 3.0],
        &mut out,
        &[1.0; 2],
        &[0.5; 2],
        shape,
    );
    assert!(out[0].is_nan() && out[2].is_nan() && !out[1].is_nan() && !out[3].is_nan());
    for shape in [
        Shape { batch: 0, ..shape },
        Shape { seq: 0, ..shape },
        Shape { heads: 0, ..shape },
        Shape { head_dim: 0, ..shape },
    ] {
        let angles = vec![1.0; shape.seq * shape.head_dim / 2];
        rotate::<f32>(Threads::ONE, Direction::Forward, &[], &mut [], &angles, &angles, shape);
    }
}

#[test]
#[should_panic(expected = "come in pairs")]
fn an_odd_head_panics() {
    let shape = Shape { batch: 1, seq: 1, heads: 1, head_dim: 3 };
    rotate(Threads::ONE, Direction::Forward, &[0.0; 3], &mut [0.0; 3], &[1.0], &[0.0], shape);
}

proptest! {
    #[test]
    fn any_numbers_of_any_shape_give_the_reference(
        batch in 1usize..3, seq in 1usize..4, heads in 1usize..4, half in 1usize..80,
        seed in prop::collection::vec(prop::num::f32::ANY, 8),
    ) {
        let shape = Shape { batch, seq, heads, head_dim: 2 * half };
        let mut x = normal::<f32>("x", shape.numel(), 1.0);
        let stride = shape.numel().div_ceil(seed.len());
        for (x, number) in x.iter_mut().step_by(stride).zip(seed) {
            *x = number;
        }
        for direction in [Direction::Forward, Direction::Inverse] {
            let reference = bits(&run(Isa::SCALAR, Threads::ONE, direction, &x, shape));
            for isa in Isa::all() {
                prop_assert_eq!(&bits(&run(isa, Threads::ONE, direction, &x, shape)), &reference);
            }
        }
    }
}
