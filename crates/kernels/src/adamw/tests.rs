use proptest::prelude::*;

use super::*;
use crate::parallel::PIECE_NUMEL;

const HYPER: AdamW = AdamW { lr: 1e-2, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1, step: 1 };

/// Owned state of a step. `offset` shifts every slice by another amount, so that none is aligned.
#[derive(Debug, Clone, PartialEq)]
struct Owned {
    numel: usize,
    offset: usize,
    grad: Vec<f32>,
    master: Vec<f32>,
    exp_avg: Vec<f32>,
    exp_avg_sq: Vec<f32>,
    bf16: Vec<bf16>,
    f16: Vec<f16>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Compute {
    None,
    Bf16,
    F16,
}

impl Owned {
    fn new(numel: usize, offset: usize) -> Self {
        let padded = numel + 5 * offset;
        Owned {
            numel,
            offset,
            grad: vec![0.0; padded],
            master: (0..padded).map(|i| wave(i, 0)).collect(),
            exp_avg: vec![0.0; padded],
            exp_avg_sq: vec![0.0; padded],
            bf16: vec![bf16::ZERO; padded],
            f16: vec![f16::ZERO; padded],
        }
    }

    fn state(&mut self, compute: Compute) -> State<'_> {
        let range = |k: usize| k * self.offset..k * self.offset + self.numel;
        State {
            grad: &self.grad[range(1)],
            master: &mut self.master[range(2)],
            exp_avg: &mut self.exp_avg[range(3)],
            exp_avg_sq: &mut self.exp_avg_sq[range(4)],
            compute: match compute {
                Compute::None => ComputeCopy::None,
                Compute::Bf16 => ComputeCopy::Bf16(&mut self.bf16[range(5)]),
                Compute::F16 => ComputeCopy::F16(&mut self.f16[range(5)]),
            },
        }
    }

    /// Ten steps with gradients that change.
    fn ten_steps(&mut self, isa: Isa, threads: Threads, store: Store, compute: Compute) {
        for step in 1..=10 {
            for (i, g) in self.grad.iter_mut().enumerate() {
                *g = wave(i, step) * GRAD_SIZE;
            }
            step_with(isa, threads, store, &AdamW { step, ..HYPER }, 0.25, self.state(compute));
        }
    }
}

const GRAD_SIZE: f32 = 0.1;

/// A number in -1..1 that looks random.
fn wave(i: usize, step: u64) -> f32 {
    let x = (i as u64 * 2_654_435_761 + step * 40_503).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (x >> 40) as f32 / (1 << 23) as f32 - 1.0
}

/// Ten steps of `f32` against `f64`: each rounds a few times by 2^-24 of the number, so 50 roundings at most meet.
const TEN_STEPS_TOLERANCE: f64 = 50.0 / (1 << 24) as f64;

#[test]
fn ten_steps_follow_the_algorithm_in_f64() {
    for numel in [1, 15, 64, 1_000_003, Store::STREAM_NUMEL + 3] {
        for isa in Isa::all() {
            let mut state = Owned::new(numel, 0);
            state.ten_steps(isa, Threads::ONE, Store::of_step(numel), Compute::Bf16);
            for i in 0..numel {
                let (p, m, v) = model_in_f64(i);
                let near = |x: f32, y: f64, size: f64| (f64::from(x) - y).abs() <= TEN_STEPS_TOLERANCE * size;
                assert!(
                    near(state.master[i], p, p.abs().max(0.1)),
                    "{isa:?}: p[{i}] {} for {p}",
                    state.master[i]
                );
                assert!(near(state.exp_avg[i], m, f64::from(GRAD_SIZE)), "{isa:?}: m[{i}] {m}");
                assert!(near(state.exp_avg_sq[i], v, v), "{isa:?}: v[{i}] {} for {v}", state.exp_avg_sq[i]);
                assert_eq!(state.bf16[i], bf16::from_f32(state.master[i]));
            }
        }
    }
}

/// Parameter and moments of element `i` after ten steps, as the paper writes the algorithm.
fn model_in_f64(i: usize) -> (f64, f64, f64) {
    let (mut p, mut m, mut v) = (f64::from(wave(i, 0)), 0.0, 0.0);
    let [lr, beta1, beta2, eps, weight_decay] =
        [HYPER.lr, HYPER.beta1, HYPER.beta2, HYPER.eps, HYPER.weight_decay].map(f64::from);
    for step in 1..=10 {
        let g = f64::from(wave(i, step as u64) * GRAD_SIZE) * 0.25;
        m = beta1 * m + (1.0 - beta1) * g;
        v = beta2 * v + (1.0 - beta2) * g * g;
        let m_hat = m / (1.0 - beta1.powi(step));
        let v_hat = v / (1.0 - beta2.powi(step));
        p -= lr * weight_decay * p;
        p -= lr * m_hat / (v_hat.sqrt() + eps);
    }
    (p, m, v)
}

/// PyTorch keeps `beta2` in `f64`; `1 - 0.999f32` differs from `1 - 0.999` by 1.3e-5 of it, and the second moment
/// with it. The bias correction takes the difference out again, so the parameters agree to rounding.
const PYTORCH_SECOND_MOMENT_TOLERANCE: f32 = 2e-5;
/// A few roundings of numbers up to 1.3, five steps.
const PYTORCH_TOLERANCE: f32 = 5e-7;

#[test]
fn five_steps_agree_with_pytorch() {
    let mut state = Owned::new(20, 0);
    for i in 0..20 {
        state.master[i] = (i as f32 - 9.0) / 8.0;
    }
    for step in 1..=5u64 {
        for i in 0..20 {
            state.grad[i] = ((i as u64 * 7 + step * 5) % 23) as f32 / 64.0 - 11.0 / 64.0;
        }
        let State { grad, master, exp_avg, exp_avg_sq, compute } = state.state(Compute::None);
        super::step(&AdamW { step, ..HYPER }, 1.0, grad, master, exp_avg, exp_avg_sq, compute);
    }
    for i in 0..20 {
        let (p, m, v) = (state.master[i], state.exp_avg[i], state.exp_avg_sq[i]);
        assert!((p - MASTER[i]).abs() <= PYTORCH_TOLERANCE, "p[{i}] {p} for {}", MASTER[i]);
        assert!((m - EXP_AVG[i]).abs() <= PYTORCH_TOLERANCE, "m[{i}] {m} for {}", EXP_AVG[i]);
        assert!(
            (v - EXP_AVG_SQ[i]).abs() <= PYTORCH_SECOND_MOMENT_TOLERANCE * v,
            "v[{i}] {v} for {}",
            EXP_AVG_SQ[i]
        );
    }
}

// From PyTorch 2.11.0:
//
// i = torch.arange(20, dtype=torch.float32)
// p = torch.nn.Parameter((i - 9) / 8)
// opt = torch.optim.AdamW([p], lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, foreach=False, fused=False)
// for step in range(1, 6):
//     p.grad = ((i * 7 + step * 5) % 23 - 11) / 64
//     opt.step()
// print(p, opt.state[p]["exp_avg"], opt.state[p]["exp_avg_sq"])
const MASTER: [f32; 20] = [
    -1.1029295,
    -1.0276631,
    -0.8722133,
    -0.7188415,
    -0.6247955,
    -0.5253869,
    -0.3451576,
    -0.23628788,
    -0.1438815,
    -0.017321285,
    0.13435248,
    0.2381729,
    0.36632064,
    0.5198226,
    0.6034603,
    0.7495388,
    0.8946759,
    0.99925286,
    1.0955197,
    1.2751539,
];
const EXP_AVG: [f32; 20] = [
    -3.6337515e-03,
    8.812658e-03,
    -1.7050004e-03,
    -1.6430937e-02,
    -3.984531e-03,
    1.1696249e-02,
    6.709376e-03,
    -1.678172e-02,
    -1.1009369e-03,
    1.7490782e-02,
    2.7648439e-03,
    -1.3898124e-02,
    4.6935948e-03,
    -1.0032345e-02,
    2.414063e-03,
    -8.103593e-03,
    1.31079685e-02,
    -1.0383124e-02,
    5.2976566e-03,
    3.1078127e-04,
];
const EXP_AVG_SQ: [f32; 20] = [
    5.2426818e-05,
    5.141534e-05,
    5.2098327e-05,
    6.0219834e-05,
    4.7535435e-05,
    5.331827e-05,
    6.0913255e-05,
    5.3401644e-05,
    4.748912e-05,
    6.0144746e-05,
    5.218511e-05,
    5.140608e-05,
    5.2343938e-05,
    5.510506e-05,
    4.825713e-05,
    5.4289234e-05,
    6.21559e-05,
    4.9250277e-05,
    4.9185433e-05,
    6.2107145e-05,
];

#[test]
fn every_instruction_set_and_number_of_threads_gives_the_same_bits() {
    let numel = 2 * PIECE_NUMEL + 4321;
    for compute in [Compute::None, Compute::Bf16, Compute::F16] {
        let mut reference = Owned::new(numel, 0);
        reference.ten_steps(Isa::SCALAR, Threads::ONE, Store::Cached, compute);
        for isa in Isa::all() {
            for (count, store) in [(1, Store::Streamed), (3, Store::Cached), (3, Store::Streamed)] {
                let mut state = Owned::new(numel, 0);
                state.ten_steps(isa, Threads::new(count).unwrap(), store, compute);
                assert!(state == reference, "{isa:?}, {count} threads, {compute:?}");
            }
        }
    }
}

proptest! {
    #[test]
    fn unaligned_slices_of_any_length_give_the_reference_and_touch_nothing_else(
        numel in 0usize..200,
        offset in 0usize..9,
        compute in prop_oneof![Just(Compute::None), Just(Compute::Bf16), Just(Compute::F16)],
    ) {
        let mut reference = Owned::new(numel, offset);
        let before = reference.clone();
        reference.ten_steps(Isa::SCALAR, Threads::ONE, Store::Cached, compute);
        for isa in Isa::all() {
            for store in [Store::Cached, Store::Streamed] {
                let mut state = Owned::new(numel, offset);
                state.ten_steps(isa, Threads::ONE, store, compute);
                prop_assert_eq!(&state, &reference);
            }
        }
        let inside = |k: usize, i: usize| (k * offset..k * offset + numel).contains(&i);
        for i in 0..before.master.len() {
            prop_assert!(inside(2, i) || reference.master[i] == before.master[i]);
            prop_assert!(inside(3, i) || reference.exp_avg[i] == 0.0);
            prop_assert!(inside(4, i) || reference.exp_avg_sq[i] == 0.0);
            prop_assert!((inside(5, i) && compute == Compute::Bf16) || reference.bf16[i] == bf16::ZERO);
            prop_assert!((inside(5, i) && compute == Compute::F16) || reference.f16[i] == f16::ZERO);
        }
    }

    /// Extreme gradients and states, subnormal and infinite numbers and NaN included, take the same way on every instruction set.
    #[test]
    fn any_numbers_give_the_reference(
        values in prop::collection::vec([prop::num::f32::ANY; 4], 1..70),
        step in 1u64..100_000,
    ) {
        let start = {
            let mut state = Owned::new(values.len(), 0);
            for (i, &[g, p, m, v]) in values.iter().enumerate() {
                (state.grad[i], state.master[i]) = (g, p);
                (state.exp_avg[i], state.exp_avg_sq[i]) = (m, v.abs());
            }
            state
        };
        let bits = |state: &Owned| -> Vec<u32> {
            let all = state.master.iter().chain(&state.exp_avg).chain(&state.exp_avg_sq);
            // Which NaN an operation on two makes is not defined.
            all.map(|x| if x.is_nan() { f32::NAN.to_bits() } else { x.to_bits() }).collect()
        };
        let mut reference = start.clone();
        step_with(Isa::SCALAR, Threads::ONE, Store::Cached, &AdamW { step, ..HYPER }, 0.5, reference.state(Compute::None));
        for isa in Isa::all() {
            let mut state = start.clone();
            step_with(isa, Threads::ONE, Store::Cached, &AdamW { step, ..HYPER }, 0.5, state.state(Compute::None));
            prop_assert_eq!(bits(&state), bits(&reference));
        }
    }
}

#[test]
fn padding_stays_zero() {
    let mut state = Owned::new(40, 0);
    state.master.fill(0.0);
    for step in 1..=3 {
        step_with(
            Isa::best(),
            Threads::ONE,
            Store::Cached,
            &AdamW { step, ..HYPER },
            1.0,
            state.state(Compute::Bf16),
        );
    }
    let zeros = state.master.iter().chain(&state.exp_avg).chain(&state.exp_avg_sq);
    assert!(zeros.chain(&[0.0]).all(|x| x.to_bits() == 0));
    assert!(state.bf16.iter().all(|x| x.to_bits() == 0));
}

#[test]
fn bias_corrections_of_early_and_late_steps() {
    for (base, exponent) in [(0.9, 1), (0.999, 1), (0.999, 7), (0.95, 1000), (0.999, 12_345)] {
        let expected = f64::powi(base, exponent);
        assert!((power(base, exponent as u64) - expected).abs() <= 1e-12 * expected, "{base}^{exponent}");
    }
    assert_eq!(power(0.999, u64::MAX), 0.0);
    assert_eq!(power(0.0, 1), 0.0);
}

#[test]
#[should_panic(expected = "counted from 1")]
fn step_zero_is_a_bug() {
    step_with(
        Isa::best(),
        Threads::ONE,
        Store::Cached,
        &AdamW { step: 0, ..HYPER },
        1.0,
        Owned::new(4, 0).state(Compute::None),
    );
}

#[test]
#[should_panic(expected = "compute copy against gradients")]
fn a_copy_of_another_length_is_a_bug() {
    let mut state = Owned::new(4, 0);
    let mut short = [bf16::ZERO; 3];
    let state = State { compute: ComputeCopy::Bf16(&mut short), ..state.state(Compute::None) };
    step_with(Isa::best(), Threads::ONE, Store::Cached, &HYPER, 1.0, state);
}
