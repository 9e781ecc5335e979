//! Ten steps of other implementations, recorded by `scripts/golden/optimizers.py`.

use serde_json::Value;

use super::{ADAGRAD, ADAM, Compute, GRAD_SCALE, Kind, LION, Owned, Precision, SGD, Way, gradient, start};
use crate::Threads;
use crate::optimizer::{
    Adam, BiasCorrection, ComputeCopy, Direction, Lamb, Muon, Sgd, States, Tensors, WeightDecay,
    orthogonalize_on,
};

/// Ten steps in fp32, a few roundings of 2^-24 each, of numbers up to 1.2; both sides round, and not at the same places.
const TOLERANCE: f64 = 1e-6;
/// Of the second moment: relative.
const RELATIVE: f64 = 2e-6;

fn recorded() -> Value {
    serde_json::from_str(include_str!("../../../fixtures/optimizers.json")).unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

/// What the script keeps of an array.
fn sampled(x: &[f32]) -> Vec<f64> {
    let stride = match x.len() {
        0..=64 => 1,
        65..=100_000 => 331,
        _ => 15_991,
    };
    x.iter().step_by(stride).map(|&x| x.into()).collect()
}

#[track_caller]
fn check(what: &str, found: &[f32], expected: &Value, tolerance: impl Fn(f64) -> f64) {
    let (found, expected) = (sampled(found), numbers(expected));
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert!(
            (found - expected).abs() <= tolerance(expected),
            "{what}[{i}] is {found}, expected {expected}"
        );
    }
}

#[test]
fn element_wise_optimizers_agree_with_pytorch_and_deepspeed() {
    let recorded = recorded();
    for (name, kind, states) in [
        ("adamw", Kind::Adam(ADAM), &["exp_avg", "exp_avg_sq"][..]),
        ("adam", Kind::Adam(Adam { decay: WeightDecay::L2, ..ADAM }), &["exp_avg", "exp_avg_sq"]),
        ("sgd", Kind::PlainSgd(SGD), &[]),
        ("sgd_momentum", Kind::Sgd(SGD), &["momentum_buffer"]),
        (
            "sgd_nesterov",
            Kind::Sgd(Sgd { dampening: 0.0, direction: Direction::Nesterov, ..SGD }),
            &["momentum_buffer"],
        ),
        ("adagrad", Kind::Adagrad(ADAGRAD), &["sum"]),
        ("lion", Kind::Lion(LION), &["exp_avg"]),
    ] {
        let case = &recorded["cases"][name];
        assert_eq!(case["runs"].as_array().unwrap().len(), 4, "{name}");
        for run in case["runs"].as_array().unwrap() {
            let numel = run["shape"][0].as_u64().unwrap() as usize;
            let mut owned = Owned::new(numel, 0);
            if let Some(first) = case["hyper"]["initial_accumulator_value"].as_f64() {
                owned.states[0].fill(first as f32);
            }
            owned.steps(Way::best(), kind, Compute::None, Precision::F32, 10);
            let what = format!("{name}, {numel} elements");
            check(&what, owned.master(), &run["param"], |_| TOLERANCE);
            for (k, state) in states.iter().enumerate() {
                let tolerance = |x: f64| RELATIVE * x.abs().max(0.1);
                let tiny = |x: f64| RELATIVE * x.abs();
                let what = format!("{what}, {state}");
                match *state {
                    "exp_avg_sq" => check(&what, owned.state(k), &run["states"][state], tiny),
                    _ => check(&what, owned.state(k), &run["states"][state], tolerance),
                }
            }
        }
    }
}

#[test]
fn lamb_agrees_with_deepspeeds_kernel_also_in_parts() {
    let recorded = recorded();
    let case = &recorded["cases"]["lamb"];
    for run in case["runs"].as_array().unwrap() {
        let numel = run["shape"][0].as_u64().unwrap() as usize;
        for cut in [0, numel / 3] {
            let mut master: Vec<_> = (0..numel).map(start).collect();
            let (mut m, mut v) = (vec![0.0; numel], vec![0.0; numel]);
            for step in 1..=10 {
                let grad: Vec<_> = (0..numel).map(|i| gradient(i, step)).collect();
                let lamb = Lamb {
                    lr: 1e-2,
                    beta1: 0.9,
                    beta2: 0.999,
                    eps: 1e-6,
                    weight_decay: 0.1,
                    max_coeff: 10.0,
                    min_coeff: 0.01,
                    bias_correction: BiasCorrection::On,
                    step,
                };
                let mut norms = Default::default();
                for part in [0..cut, cut..numel] {
                    norms += lamb.moments_on(
                        Threads::ONE,
                        GRAD_SCALE,
                        &grad[part.clone()],
                        &master[part.clone()],
                        &mut m[part.clone()],
                        &mut v[part],
                    );
                }
                for part in [0..cut, cut..numel] {
                    let (m, v) = (&m[part.clone()], &v[part.clone()]);
                    lamb.apply_on(Threads::ONE, norms, &mut master[part], m, v, ComputeCopy::None);
                }
            }
            check("lamb", &master, &run["param"], |_| TOLERANCE);
            check("exp_avg", &m, &run["states"]["exp_avg"], |_| TOLERANCE);
            check("exp_avg_sq", &v, &run["states"]["exp_avg_sq"], |x| RELATIVE * x);
        }
    }
}

/// Ten steps of Muon from where the recorded ones start.
fn muon(shape: [usize; 2], direction: Direction) -> (Vec<f32>, Vec<f32>) {
    let numel = shape[0] * shape[1];
    let mut master: Vec<_> = (0..numel).map(start).collect();
    let (mut buffer, mut u) = (vec![0.0; numel], vec![0.0; numel]);
    let muon = Muon { lr: 1e-2, momentum: 0.95, direction, weight_decay: 0.1 };
    for step in 1..=10 {
        let grad: Vec<_> = (0..numel).map(|i| gradient(i, step)).collect();
        muon.momentum_on(Threads::ONE, GRAD_SCALE, &grad, &mut buffer, &mut u);
        orthogonalize_on(Threads::ONE, shape, 5, &mut u);
        let tensors = Tensors {
            grad: u[..].into(),
            master: &mut master,
            states: States::F32([]),
            compute: ComputeCopy::None,
        };
        muon.apply_on(Threads::ONE, shape, tensors);
    }
    (master, buffer)
}

#[test]
fn muon_agrees_with_deepspeed_in_fp32_and_with_pytorch_in_bf16() {
    let recorded = recorded();
    for (name, direction, tolerance) in [
        // An update moves an element by 0.01 of a number below 1.5, and a singular value near 0, which is rounding error
        // of the products, grows about 500-fold in five steps: 1e-6 of it.
        ("muon", Direction::Nesterov, 2e-5),
        ("muon_plain", Direction::Momentum, 2e-5),
        // The same with 8 bits: two digits of each update of 0.01 and less.
        ("muon_torch", Direction::Nesterov, 4e-3),
    ] {
        let runs = recorded["cases"][name]["runs"].as_array().unwrap();
        assert_eq!(runs.len(), 5);
        for run in runs {
            let shape = [0, 1].map(|side| run["shape"][side].as_u64().unwrap() as usize);
            let (master, buffer) = muon(shape, direction);
            let what = format!("{name}, {shape:?}");
            check(&what, &master, &run["param"], |_| tolerance);
            check(&what, &buffer, &run["states"]["momentum_buffer"], |_| TOLERANCE);
        }
    }
}
