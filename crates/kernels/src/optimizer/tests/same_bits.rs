//! Every way to run a rule gives the bits of the plain one.

use half::bf16;
use proptest::prelude::*;

use super::{Compute, GRAD_SCALE, Kind, Owned, Precision, Store, Way, gradient};
use crate::Threads;
use crate::isa::Isa;
use crate::optimizer::{Adam, ComputeCopy, Noise, States, Tensors};
use crate::parallel::PIECE_NUMEL;

const PRECISIONS: [Precision; 2] = [Precision::F32, Precision::Bf16];

#[test]
fn every_instruction_set_and_number_of_threads_gives_the_same_bits() {
    let numel = 2 * PIECE_NUMEL + 4321;
    for kind in Kind::ALL {
        for precision in PRECISIONS {
            let mut reference = Owned::new(numel, 0);
            reference.steps(Way::REFERENCE, kind, Compute::Bf16, precision, 2);
            for isa in Isa::all() {
                for (count, store) in [(1, Store::Streamed), (3, Store::Cached), (3, Store::Streamed)] {
                    let threads = Threads::new(count).unwrap();
                    let mut owned = Owned::new(numel, 0);
                    owned.steps(Way { isa, threads, store }, kind, Compute::Bf16, precision, 2);
                    assert!(owned == reference, "{kind:?}, {isa:?}, {count} threads, {precision:?}");
                }
            }
        }
    }
}

fn bits(owned: &Owned) -> Vec<u32> {
    let wide = owned.master.iter().chain(owned.states.iter().flatten()).copied();
    let narrow = owned.narrow_states.iter().flatten().map(|x| x.to_f32());
    // Which NaN an operation on two makes is not defined.
    wide.chain(narrow).map(|x| if x.is_nan() { f32::NAN.to_bits() } else { x.to_bits() }).collect()
}

proptest! {
    #[test]
    fn unaligned_slices_of_any_length_give_the_reference_and_touch_nothing_else(
        numel in 0usize..200,
        offset in 0usize..9,
        kind in prop::sample::select(Kind::ALL.to_vec()),
        compute in prop::sample::select(vec![Compute::None, Compute::Bf16, Compute::F16]),
        precision in prop::sample::select(PRECISIONS.to_vec()),
    ) {
        let before = Owned::new(numel, offset);
        let mut reference = before.clone();
        reference.steps(Way::REFERENCE, kind, compute, precision, 10);
        for isa in Isa::all() {
            for store in [Store::Cached, Store::Streamed] {
                let mut owned = before.clone();
                owned.steps(Way { isa, store, ..Way::REFERENCE }, kind, compute, precision, 10);
                prop_assert_eq!(&owned, &reference);
            }
        }
        let inside = |k: usize, i: usize| (k * offset..k * offset + numel).contains(&i);
        for i in 0..before.master.len() {
            prop_assert!(inside(2, i) || reference.master[i] == before.master[i]);
            for k in 0..2 {
                prop_assert!(inside(3 + k, i) || reference.states[k][i] == 0.0);
                prop_assert!(inside(3 + k, i) || reference.narrow_states[k][i] == bf16::ZERO);
                prop_assert!(k < kind.num_states() || reference.states[k][i] == 0.0);
            }
            prop_assert!((inside(5, i) && compute == Compute::Bf16) || reference.bf16[i] == bf16::ZERO);
            prop_assert!((inside(5, i) && compute == Compute::F16) || reference.f16[i].to_bits() == 0);
        }
        let copies = reference.bf16[5 * offset..][..numel].iter();
        let rounded = copies.zip(reference.master()).all(|(copy, &x)| *copy == bf16::from_f32(x));
        prop_assert!(rounded || compute != Compute::Bf16);
    }

    /// Extreme gradients and states, subnormal and infinite numbers and NaN included, take the same way on every instruction set.
    #[test]
    fn any_numbers_give_the_reference(
        values in prop::collection::vec([prop::num::f32::ANY; 4], 1..70),
        step in 1u64..100_000,
    ) {
        let mut start = Owned::new(values.len(), 0);
        for (i, &[g, p, m, v]) in values.iter().enumerate() {
            (start.grad[i], start.master[i]) = (g, p);
            (start.states[0][i], start.states[1][i]) = (m, v.abs());
            (start.narrow_states[0][i], start.narrow_states[1][i]) = (bf16::from_f32(m), bf16::from_f32(v.abs()));
        }
        for kind in Kind::ALL {
            for precision in PRECISIONS {
                let run = |isa| {
                    let mut owned = start.clone();
                    let way = Way { isa, ..Way::REFERENCE };
                    owned.step(way, kind.at_step(step), Compute::None, precision, Noise::new(1, "u", step, 0));
                    bits(&owned)
                };
                let reference = run(Isa::SCALAR);
                for isa in Isa::all() {
                    prop_assert_eq!(run(isa), reference.clone(), "{:?}, {:?}", kind, precision);
                }
            }
        }
    }

    /// States in bf16 do not depend on how an array is cut: over ranks, say.
    #[test]
    fn random_rounding_follows_the_element_not_the_slice(numel in 1usize..300, cut in 0usize..300) {
        let cut = cut.min(numel);
        let grad: Vec<f32> = (0..numel).map(|i| gradient(i, 1)).collect();
        let run = |parts: &[std::ops::Range<usize>]| {
            let mut master = vec![0.5; numel];
            let (mut m, mut v) = (vec![bf16::ZERO; numel], vec![bf16::ZERO; numel]);
            for step in 1..=3 {
                for part in parts {
                    let noise = Noise::new(3, "unit", step, 1000 + part.start as u64);
                    let states = States::Bf16([&mut m[part.clone()], &mut v[part.clone()]], noise);
                    let (grad, master) = (&grad[part.clone()], &mut master[part.clone()]);
                    let tensors = Tensors { grad: grad.into(), master, states, compute: ComputeCopy::None };
                    Adam { step, ..super::ADAM }.step_on(Threads::ONE, GRAD_SCALE, tensors);
                }
            }
            (master, m, v)
        };
        prop_assert_eq!(run(&[0..cut, cut..numel]), run(std::slice::from_ref(&(0..numel))));
    }
}

/// A mean that decays slowly stands still in bf16 rounded to nearest; at random it follows the fp32 one on average.
#[test]
fn states_in_bf16_follow_those_in_fp32() {
    let kind = Kind::Adam(Adam { weight_decay: 0.0, ..super::ADAM });
    let (numel, num_steps) = (20_000, 100);
    let mut wide = Owned::new(numel, 0);
    wide.steps(Way::best(), kind, Compute::None, Precision::F32, num_steps);
    let mut narrow = Owned::new(numel, 0);
    narrow.steps(Way::best(), kind, Compute::None, Precision::Bf16, num_steps);
    for k in 0..2 {
        let mean = |x: &mut dyn Iterator<Item = f32>| x.map(f64::from).sum::<f64>() / numel as f64;
        let wide_mean = mean(&mut wide.states[k].iter().copied());
        let narrow_mean = mean(&mut narrow.narrow_states[k].iter().map(|x| x.to_f32()));
        let size = mean(&mut wide.states[k].iter().map(|x| x.abs()));
        assert!((wide_mean - narrow_mean).abs() <= 1e-3 * size, "state {k}: {narrow_mean} for {wide_mean}");
    }
    let worst = wide.master.iter().zip(&narrow.master).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst <= 0.1, "parameters are {worst} apart after {num_steps} steps of up to 0.01");
}
