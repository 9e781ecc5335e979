//! Optimizer steps: the CPU's bits, in fp32 and with states that are rounded at random.

use half::{bf16, f16};
use shardwise_kernels::Threads;
use shardwise_kernels::cuda::{DeviceCopy, DeviceStates, FloatType, Launch, Params, StepBuffers};
use shardwise_kernels::optimizer::{
    Adagrad, Adam, BiasCorrection, ComputeCopy, Direction, Lion, Noise, Sgd, States, Tensors, WeightDecay,
};

use super::{Device, Float, Random, SameBits, host, in_both_orders};

const GRAD_SCALE: f32 = 0.37;

#[derive(Debug, Clone, Copy)]
enum Copy16 {
    None,
    Bf16,
    F16,
}

/// A step's arrays.
#[derive(Debug, Clone)]
struct Arrays {
    grad: Vec<f32>,
    master: Vec<f32>,
    /// As many as there may be; second moments and sums of squares are the last, and not negative.
    states: [Vec<f32>; 2],
}

impl Arrays {
    /// States are as bf16 has them, so they serve both types.
    fn random(random: &mut Random, numel: usize) -> Self {
        let in_bf16 = |x: Vec<bf16>| x.into_iter().map(bf16::to_f32).collect();
        let mean: Vec<f32> = in_bf16(random.numbers(numel, 0.1));
        let square = in_bf16(random.numbers(numel, 0.1)).into_iter().map(|x: f32| x.abs()).collect();
        Arrays { grad: random.any(numel), master: random.numbers(numel, 2.0), states: [mean, square] }
    }
}

/// Parameters, states widened, and the copy widened.
type After = (Vec<f32>, Vec<Vec<f32>>, Vec<f32>);

/// Runs `cpu` and the call that `cuda` makes on the same arrays, in all types of states and copies.
fn check<const K: usize, P: Params>(
    what: &str,
    states: [usize; K],
    cpu: impl Fn(Tensors<'_, K>),
    cuda: impl Fn(StepBuffers<K>) -> Launch<P>,
) {
    let mut random = Random(5);
    // Around vectors, groups of 64 random words, blocks.
    let cases = [
        (1, 0, 0),
        (3, 0, 63),
        (5, 1, 1),
        (64, 0, 64),
        (65, 4, 5),
        (200, 2, 1000),
        (1024, 8, 0),
        (5001, 0, 77),
    ];
    for (numel, offset, first) in cases {
        let arrays = Arrays::random(&mut random, numel);
        for copy in [Copy16::None, Copy16::Bf16, Copy16::F16] {
            for noise in [None, Some(Noise::new(42, "layers.0.weight", 7, first))] {
                let expected = on_cpu(&arrays, states, copy, noise, &cpu);
                let got = in_both_orders(|order| {
                    on_host(&arrays, states, copy, noise, offset, |buffers| {
                        host().launch(&cuda(buffers), order)
                    })
                });
                got.assert_same(&expected, &format!("{what}, {numel} elements, {copy:?}, {noise:?}"));
            }
        }
    }
}

fn on_cpu<const K: usize>(
    arrays: &Arrays,
    states: [usize; K],
    copy: Copy16,
    noise: Option<Noise>,
    step: impl Fn(Tensors<'_, K>),
) -> After {
    let numel = arrays.grad.len();
    let mut master = arrays.master.clone();
    let mut wide = states.map(|state| arrays.states[state].clone());
    let mut narrow = states.map(|state| narrowed::<bf16>(&arrays.states[state]));
    let (mut to_bf16, mut to_f16) = (vec![bf16::ZERO; numel], vec![f16::ZERO; numel]);
    let states = match noise {
        None => States::F32(wide.each_mut().map(|state| &mut state[..])),
        Some(noise) => States::Bf16(narrow.each_mut().map(|state| &mut state[..]), noise),
    };
    let compute = match copy {
        Copy16::None => ComputeCopy::None,
        Copy16::Bf16 => ComputeCopy::Bf16(&mut to_bf16),
        Copy16::F16 => ComputeCopy::F16(&mut to_f16),
    };
    step(Tensors { grad: arrays.grad[..].into(), master: &mut master, states, compute });
    let states = match noise {
        None => wide.to_vec(),
        Some(_) => narrow.iter().map(|state| widened(state)).collect(),
    };
    (master, states, copied(copy, &to_bf16, &to_f16))
}

fn on_host<const K: usize>(
    arrays: &Arrays,
    states: [usize; K],
    copy: Copy16,
    noise: Option<Noise>,
    offset: usize,
    launch: impl Fn(StepBuffers<K>),
) -> After {
    let numel = arrays.grad.len();
    let mut grad = Device::new(&arrays.grad, offset);
    let mut master = Device::new(&arrays.master, offset);
    let mut wide = states.map(|state| Device::new(&arrays.states[state], offset));
    let mut narrow = states.map(|state| Device::new(&narrowed::<bf16>(&arrays.states[state]), offset));
    let mut to_bf16 = Device::new(&vec![bf16::ZERO; numel], offset);
    let mut to_f16 = Device::new(&vec![f16::ZERO; numel], offset);
    launch(StepBuffers {
        grad: grad.ptr(),
        grad_type: FloatType::F32,
        master: master.ptr(),
        states: match noise {
            None => DeviceStates::F32(wide.each_mut().map(Device::ptr)),
            Some(noise) => DeviceStates::Bf16(narrow.each_mut().map(Device::ptr), noise),
        },
        compute: match copy {
            Copy16::None => DeviceCopy::None,
            Copy16::Bf16 => DeviceCopy::Bf16(to_bf16.ptr()),
            Copy16::F16 => DeviceCopy::F16(to_f16.ptr()),
        },
        numel: numel as u64,
    });
    grad.get().assert_same(&arrays.grad, "gradients are read only");
    let states = match noise {
        None => wide.map(Device::get).to_vec(),
        Some(_) => narrow.map(|state| widened(&state.get())).to_vec(),
    };
    (master.get(), states, copied(copy, &to_bf16.get(), &to_f16.get()))
}

fn copied(copy: Copy16, to_bf16: &[bf16], to_f16: &[f16]) -> Vec<f32> {
    let untouched = |zero: bool| assert!(zero, "only the copy that was asked for is written");
    untouched(matches!(copy, Copy16::Bf16) || to_bf16.iter().all(|x| x.to_bits() == 0));
    untouched(matches!(copy, Copy16::F16) || to_f16.iter().all(|x| x.to_bits() == 0));
    match copy {
        Copy16::None => Vec::new(),
        Copy16::Bf16 => widened(to_bf16),
        Copy16::F16 => widened(to_f16),
    }
}

fn widened<T: Float>(x: &[T]) -> Vec<f32> {
    x.iter().map(|x| x.wide()).collect()
}

fn narrowed<T: Float>(x: &[f32]) -> Vec<T> {
    x.iter().map(|&x| T::round(x)).collect()
}

#[test]
fn adam_and_adamw_are_the_cpus() {
    for decay in [WeightDecay::Decoupled, WeightDecay::L2] {
        for (bias_correction, step) in
            [(BiasCorrection::On, 1), (BiasCorrection::On, 1000), (BiasCorrection::Off, 2)]
        {
            let (lr, beta1, beta2, eps, weight_decay) = (1e-2, 0.9, 0.95, 1e-8, 0.1);
            let adam = Adam { lr, beta1, beta2, eps, weight_decay, decay, bias_correction, step };
            check(
                &format!("{adam:?}"),
                [0, 1],
                |tensors| adam.step_on(Threads::ONE, GRAD_SCALE, tensors),
                |buffers| adam.cuda_step(GRAD_SCALE, buffers),
            );
        }
    }
}

#[test]
fn sgd_is_the_cpus() {
    for direction in [Direction::Momentum, Direction::Nesterov] {
        for step in [1, 2] {
            let sgd = Sgd { lr: 0.1, momentum: 0.9, dampening: 0.2, weight_decay: 0.01, direction, step };
            check(
                &format!("{sgd:?}"),
                [0],
                |tensors| sgd.step_on(Threads::ONE, GRAD_SCALE, tensors),
                |buffers| sgd.cuda_step(GRAD_SCALE, buffers),
            );
            check(
                &format!("plain {sgd:?}"),
                [],
                |tensors| sgd.plain_step_on(Threads::ONE, GRAD_SCALE, tensors),
                |buffers| sgd.cuda_plain_step(GRAD_SCALE, buffers),
            );
        }
    }
}

#[test]
fn lion_is_the_cpus() {
    let lion = Lion { lr: 1e-3, beta1: 0.9, beta2: 0.99, weight_decay: 0.1 };
    check(
        "lion",
        [0],
        |tensors| lion.step_on(Threads::ONE, GRAD_SCALE, tensors),
        |buffers| lion.cuda_step(GRAD_SCALE, buffers),
    );
}

#[test]
fn adagrad_is_the_cpus() {
    let adagrad = Adagrad { lr: 1e-2, lr_decay: 0.01, eps: 1e-10, weight_decay: 0.1, step: 3 };
    check(
        "adagrad",
        [1],
        |tensors| adagrad.step_on(Threads::ONE, GRAD_SCALE, tensors),
        |buffers| adagrad.cuda_step(GRAD_SCALE, buffers),
    );
}

#[test]
fn no_elements_are_a_step_too() {
    let lion = Lion { lr: 1e-3, beta1: 0.9, beta2: 0.99, weight_decay: 0.1 };
    for noise in [None, Some(Noise::new(1, "x", 1, 100))] {
        let arrays = Arrays { grad: vec![], master: vec![], states: [vec![], vec![]] };
        let launch = |buffers| host().launch(&lion.cuda_step(1.0, buffers), super::Order::Forwards);
        on_host(&arrays, [0], Copy16::Bf16, noise, 0, launch)
            .assert_same(&(vec![], vec![vec![]], vec![]), "nothing");
    }
}
