//! Every rule against the same plain reference of itself, and against other implementations.

mod golden;
mod matrices;
mod same_bits;

use half::{bf16, f16};

use super::{
    Adagrad, Adam, BiasCorrection, ComputeCopy, Direction, Gradient, Lion, Noise, Rule, Sgd, States, Store,
    Tensors, WIDENED_NUMEL, WeightDecay, apply_with,
};
use crate::Threads;
use crate::isa::Isa;

const ADAM: Adam = Adam {
    lr: 1e-2,
    beta1: 0.9,
    beta2: 0.999,
    eps: 1e-8,
    weight_decay: 0.1,
    decay: WeightDecay::Decoupled,
    bias_correction: BiasCorrection::On,
    step: 1,
};
const SGD: Sgd = Sgd {
    lr: 1e-2,
    momentum: 0.9,
    dampening: 0.3,
    weight_decay: 0.1,
    direction: Direction::Momentum,
    step: 1,
};
const ADAGRAD: Adagrad = Adagrad { lr: 1e-2, lr_decay: 0.05, eps: 1e-10, weight_decay: 0.1, step: 1 };
const LION: Lion = Lion { lr: 1e-3, beta1: 0.9, beta2: 0.99, weight_decay: 0.1 };

/// Element-wise optimizers, to be tested alike.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Adam(Adam),
    Sgd(Sgd),
    PlainSgd(Sgd),
    Adagrad(Adagrad),
    Lion(Lion),
}

impl Kind {
    const ALL: [Kind; 7] = [
        Kind::Adam(ADAM),
        Kind::Adam(Adam { decay: WeightDecay::L2, bias_correction: BiasCorrection::Off, ..ADAM }),
        Kind::Sgd(SGD),
        Kind::Sgd(Sgd { direction: Direction::Nesterov, dampening: 0.0, ..SGD }),
        Kind::PlainSgd(SGD),
        Kind::Adagrad(ADAGRAD),
        Kind::Lion(LION),
    ];

    fn at_step(self, step: u64) -> Self {
        match self {
            Kind::Adam(adam) => Kind::Adam(Adam { step, ..adam }),
            Kind::Sgd(sgd) => Kind::Sgd(Sgd { step, ..sgd }),
            Kind::PlainSgd(sgd) => Kind::PlainSgd(Sgd { step, ..sgd }),
            Kind::Adagrad(adagrad) => Kind::Adagrad(Adagrad { step, ..adagrad }),
            Kind::Lion(lion) => Kind::Lion(lion),
        }
    }

    fn num_states(self) -> usize {
        match self {
            Kind::Adam(_) => 2,
            Kind::PlainSgd(_) => 0,
            _ => 1,
        }
    }
}

/// How a step is run.
#[derive(Debug, Clone, Copy)]
struct Way {
    isa: Isa,
    threads: Threads,
    store: Store,
}

impl Way {
    const REFERENCE: Way = Way { isa: Isa::SCALAR, threads: Threads::ONE, store: Store::Cached };

    fn best() -> Self {
        Way { isa: Isa::best(), ..Way::REFERENCE }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Compute {
    None,
    Bf16,
    F16,
}

/// Which type states have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Precision {
    F32,
    Bf16,
}

/// Owned state of a step. `offset` shifts every slice by another amount, so that none is aligned.
#[derive(Debug, Clone, PartialEq)]
struct Owned {
    numel: usize,
    offset: usize,
    grad: Vec<f32>,
    master: Vec<f32>,
    states: [Vec<f32>; 2],
    narrow_states: [Vec<bf16>; 2],
    bf16: Vec<bf16>,
    f16: Vec<f16>,
}

/// Values and gradients of the recorded runs; see `scripts/golden/optimizers.py`.
fn start(i: usize) -> f32 {
    ((i * 37) % 1009) as f32 / 512.0 - 504.0 / 512.0
}

fn gradient(i: usize, step: u64) -> f32 {
    (2 * ((i as u64 * 7919 + step * 104_729) % 2003)) as f32 / 2048.0 - 2003.0 / 2048.0
}

/// The recorded runs scale their gradients by as much.
const GRAD_SCALE: f32 = 0.25;
const SEED: u64 = 7;

impl Owned {
    fn new(numel: usize, offset: usize) -> Self {
        let padded = numel + 6 * offset;
        let zeros = || [vec![0.0; padded], vec![0.0; padded]];
        let mut owned = Owned {
            numel,
            offset,
            grad: vec![0.0; padded],
            master: vec![0.25; padded],
            states: zeros(),
            narrow_states: zeros().map(|zeros| zeros.into_iter().map(bf16::from_f32).collect()),
            bf16: vec![bf16::ZERO; padded],
            f16: vec![f16::ZERO; padded],
        };
        (0..numel).for_each(|i| owned.master[2 * offset + i] = start(i));
        owned
    }

    fn grads_of(&mut self, step: u64) {
        (0..self.numel).for_each(|i| self.grad[self.offset + i] = gradient(i, step));
    }

    fn master(&self) -> &[f32] {
        &self.master[2 * self.offset..][..self.numel]
    }

    fn state(&self, k: usize) -> &[f32] {
        &self.states[k][(3 + k) * self.offset..][..self.numel]
    }

    fn step(&mut self, way: Way, kind: Kind, compute: Compute, precision: Precision, noise: Noise) {
        match kind {
            Kind::Adam(adam) => match adam.decay {
                WeightDecay::Decoupled => {
                    self.with(way, adam.decoupled(GRAD_SCALE), compute, precision, noise)
                }
                WeightDecay::L2 => self.with(way, adam.l2(GRAD_SCALE), compute, precision, noise),
            },
            Kind::Sgd(sgd) => match sgd.direction {
                Direction::Momentum => self.with(way, sgd.factors(GRAD_SCALE), compute, precision, noise),
                Direction::Nesterov => {
                    self.with(way, super::sgd::Nesterov(sgd.factors(GRAD_SCALE)), compute, precision, noise)
                }
            },
            Kind::PlainSgd(sgd) => {
                self.with(way, super::sgd::Plain(sgd.factors(GRAD_SCALE)), compute, precision, noise)
            }
            Kind::Adagrad(adagrad) => self.with(way, adagrad.factors(GRAD_SCALE), compute, precision, noise),
            Kind::Lion(lion) => self.with(way, lion.factors(GRAD_SCALE), compute, precision, noise),
        }
    }

    fn with<const K: usize>(
        &mut self,
        way: Way,
        rule: impl Rule<K>,
        compute: Compute,
        precision: Precision,
        noise: Noise,
    ) {
        let (offset, numel) = (self.offset, self.numel);
        let range = |k: usize| k * offset..k * offset + numel;
        let mut index = 3..;
        let mut next = || range(index.next().unwrap());
        let states = match precision {
            Precision::F32 => {
                let mut states = self.states.iter_mut();
                States::F32(std::array::from_fn(|_| &mut states.next().unwrap()[next()]))
            }
            Precision::Bf16 => {
                let mut states = self.narrow_states.iter_mut();
                States::Bf16(std::array::from_fn(|_| &mut states.next().unwrap()[next()]), noise)
            }
        };
        let tensors = Tensors {
            grad: self.grad[range(1)].into(),
            master: &mut self.master[range(2)],
            states,
            compute: match compute {
                Compute::None => ComputeCopy::None,
                Compute::Bf16 => ComputeCopy::Bf16(&mut self.bf16[range(5)]),
                Compute::F16 => ComputeCopy::F16(&mut self.f16[range(5)]),
            },
        };
        apply_with(way.isa, way.threads, way.store, rule, tensors);
    }

    /// Steps with gradients that change.
    fn steps(&mut self, way: Way, kind: Kind, compute: Compute, precision: Precision, num_steps: u64) {
        for step in 1..=num_steps {
            self.grads_of(step);
            self.step(way, kind.at_step(step), compute, precision, Noise::new(SEED, "unit", step, 0));
        }
    }
}

#[test]
fn bias_corrections_of_early_and_late_steps() {
    for (base, exponent) in [(0.9, 1), (0.999, 1), (0.999, 7), (0.95, 1000), (0.999, 12_345)] {
        let expected = f64::powi(base, exponent);
        let power = super::power(base, exponent as u64);
        assert!((power - expected).abs() <= 1e-12 * expected, "{base}^{exponent}");
    }
    assert_eq!(super::power(0.999, u64::MAX), 0.0);
    assert_eq!(super::power(0.0, 1), 0.0);
    assert_eq!(BiasCorrection::Off.of(0.9, 1), 1.0);
}

#[test]
fn padding_stays_zero() {
    for kind in Kind::ALL {
        for precision in [Precision::F32, Precision::Bf16] {
            let mut owned = Owned::new(40, 0);
            owned.master.fill(0.0);
            for step in 1..=3 {
                owned.step(
                    Way::best(),
                    kind.at_step(step),
                    Compute::Bf16,
                    precision,
                    Noise::new(1, "u", step, 0),
                );
            }
            let wide = owned.master.iter().chain(owned.states.iter().flatten());
            assert!(wide.chain(&[0.0]).all(|x| x.to_bits() == 0), "{kind:?}");
            let narrow = owned.bf16.iter().chain(owned.narrow_states.iter().flatten());
            assert!(narrow.into_iter().all(|x| x.to_bits() == 0), "{kind:?}");
        }
    }
}

#[test]
fn steps_are_counted_from_1() {
    for kind in Kind::ALL {
        let step = || {
            let mut owned = Owned::new(4, 0);
            owned.step(Way::best(), kind.at_step(0), Compute::None, Precision::F32, Noise::new(1, "u", 1, 0));
        };
        let counts = !matches!(kind, Kind::Lion(_));
        assert_eq!(std::panic::catch_unwind(step).is_err(), counts, "{kind:?}");
    }
}

/// Around the elements that are widened together, and past them.
#[test]
fn a_gradient_in_16_bits_is_the_same_widened() {
    for numel in [0, 1, 17, WIDENED_NUMEL - 1, WIDENED_NUMEL, 3 * WIDENED_NUMEL + 5] {
        let narrow: Vec<bf16> = (0..numel).map(|i| bf16::from_f32(gradient(i, 1))).collect();
        let halves: Vec<f16> = narrow.iter().map(|x| f16::from_f32(x.to_f32())).collect();
        let wide: Vec<f32> = narrow.iter().map(|x| x.to_f32()).collect();
        let wide_halves: Vec<f32> = halves.iter().map(|x| x.to_f32()).collect();
        let pairs = [
            (Gradient::Bf16(&narrow), Gradient::F32(&wide)),
            (Gradient::F16(&halves), Gradient::F32(&wide_halves)),
        ];
        for (narrow, wide) in pairs {
            for precision in [Precision::F32, Precision::Bf16] {
                let run = |grad: Gradient<'_>, isa: Isa| {
                    let (mut master, mut copy) = (vec![0.5; numel], vec![bf16::ZERO; numel]);
                    let (mut m, mut v) = (vec![0.1; numel], vec![0.2; numel]);
                    let (mut low_m, mut low_v) =
                        (vec![bf16::from_f32(0.1); numel], vec![bf16::from_f32(0.2); numel]);
                    let states = match precision {
                        Precision::F32 => States::F32([&mut m[..], &mut v]),
                        Precision::Bf16 => {
                            States::Bf16([&mut low_m[..], &mut low_v], Noise::new(SEED, "unit", 3, 29))
                        }
                    };
                    let compute = ComputeCopy::Bf16(&mut copy);
                    let tensors = Tensors { grad, master: &mut master, states, compute };
                    apply_with(isa, Threads::ONE, Store::Cached, ADAM.decoupled(GRAD_SCALE), tensors);
                    (master, copy, m, v, low_m, low_v)
                };
                for isa in Isa::all() {
                    assert!(run(narrow, isa) == run(wide, isa), "{numel} elements, {precision:?}");
                }
            }
        }
    }
}

#[test]
#[should_panic(expected = "compute copy against gradients")]
fn a_copy_of_another_length_is_a_bug() {
    let mut owned = Owned::new(4, 0);
    let mut short = [bf16::ZERO; 3];
    let [m, v] = &mut owned.states;
    let tensors = Tensors {
        grad: owned.grad[..].into(),
        master: &mut owned.master,
        states: States::F32([m, v]),
        compute: ComputeCopy::Bf16(&mut short),
    };
    ADAM.step_on(Threads::ONE, 1.0, tensors);
}
