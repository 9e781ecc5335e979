//! Optimizer steps on a device: what [`Adam::step_on`] and its like do, with the same bits.

use super::launch::Sealed;
use super::{DevicePtr, FloatType, Launch, LaunchPlan, Params, Source};
use crate::optimizer::{Adagrad, Adam, Direction, Lion, Noise, Sgd, WeightDecay, adagrad, adam, lion, sgd};

/// The names of a kernel for each type of states.
macro_rules! states {
    ($stem:literal) => {
        [concat!($stem, "_f32"), concat!($stem, "_bf16")]
    };
}

const ADAMW: [&str; 2] = states!("adamw");
const ADAM_L2: [&str; 2] = states!("adam_l2");
const SGD_MOMENTUM: [&str; 2] = states!("sgd_momentum");
const SGD_NESTEROV: [&str; 2] = states!("sgd_nesterov");
const SGD_PLAIN: &str = "sgd_plain";
const LION: [&str; 2] = states!("lion");
const ADAGRAD: [&str; 2] = states!("adagrad");
pub(super) const ENTRIES: &[&[&str]] =
    &[&ADAMW, &ADAM_L2, &SGD_MOMENTUM, &SGD_NESTEROV, &[SGD_PLAIN], &LION, &ADAGRAD];

/// An optimizer's `K` states of each element.
#[derive(Debug, Clone, Copy)]
pub enum DeviceStates<const K: usize> {
    /// `f32`.
    F32([DevicePtr; K]),
    /// `bf16`, rounded at random by the draws of the CPU.
    Bf16([DevicePtr; K], Noise),
}

/// Where the 16-bit copy of the new parameters goes.
#[derive(Debug, Clone, Copy)]
pub enum DeviceCopy {
    /// The model computes in fp32: no copy.
    None,
    /// Rounded to bf16.
    Bf16(DevicePtr),
    /// Rounded to f16.
    F16(DevicePtr),
}

/// The arrays of one step, `numel` elements each.
#[derive(Debug, Clone, Copy)]
pub struct StepBuffers<const K: usize> {
    /// Gradient, read.
    pub grad: DevicePtr,
    /// Its type; in 16 bits it is widened on the way.
    pub grad_type: FloatType,
    /// Parameters, `f32`, updated.
    pub master: DevicePtr,
    /// The optimizer's states, updated.
    pub states: DeviceStates<K>,
    /// 16-bit copy of the parameters, written.
    pub compute: DeviceCopy,
    /// Elements of each.
    pub numel: u64,
}

/// A step's parameters; `R` are the factors of a rule.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Step<R> {
    grad: DevicePtr,
    master: DevicePtr,
    states: [DevicePtr; 2],
    copy: DevicePtr,
    numel: u64,
    noise: Noise,
    copy_type: u32,
    grad_type: u32,
    rule: R,
}

macro_rules! steps {
    ($($(#[$doc:meta])* $name:ident($factors:ty),)*) => { $(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy)]
        #[repr(transparent)]
        pub struct $name(Step<$factors>);
        impl Sealed for $name {}
        impl Params for $name {}
    )* };
}
steps! {
    /// Parameters of a step of Adam or AdamW.
    AdamStep(adam::L2),
    /// Parameters of a step of SGD.
    SgdStep(sgd::Factors),
    /// Parameters of a step of Lion.
    LionStep(lion::Factors),
    /// Parameters of a step of Adagrad.
    AdagradStep(adagrad::Factors),
}

impl<const K: usize> StepBuffers<K> {
    fn step<R: Copy, P: Params>(
        self,
        names: [&'static str; 2],
        rule: R,
        params: impl FnOnce(Step<R>) -> P,
    ) -> Launch<P> {
        const { assert!(K <= 2, "a word has bits for two states") };
        let (name, pointers, noise, plan) = match self.states {
            DeviceStates::F32(states) => {
                let per_thread = FloatType::F32.vector_numel();
                (names[0], states, Noise::UNUSED, LaunchPlan::elements(self.numel, per_thread))
            }
            DeviceStates::Bf16(states, noise) => {
                (names[1], states, noise, LaunchPlan::elements(draws(noise.first(), self.numel), 1))
            }
        };
        let mut states = [DevicePtr::NULL; 2];
        states[..K].copy_from_slice(&pointers);
        let (copy, copy_type) = copy_of(self.compute);
        let StepBuffers { grad, grad_type, master, numel, .. } = self;
        let grad_type = match grad_type {
            FloatType::F32 => 0,
            FloatType::Bf16 => 1,
            FloatType::F16 => 2,
        };
        let step = Step { grad, master, states, copy, numel, noise, copy_type, grad_type, rule };
        Launch::new(Source::Optimizer, name, plan, params(step))
    }
}

/// Where a copy goes, and the number of its type in the sources.
pub(super) fn copy_of(compute: DeviceCopy) -> (DevicePtr, u32) {
    match compute {
        DeviceCopy::None => (DevicePtr::NULL, 0),
        DeviceCopy::Bf16(copy) => (copy, 1),
        DeviceCopy::F16(copy) => (copy, 2),
    }
}

/// Blocks of random words for elements `first..first + numel`: a thread draws one.
fn draws(first: u64, numel: u64) -> u64 {
    const GROUP_NUMEL: u64 = 64;
    const GROUP_BLOCKS: u64 = 16;
    match numel {
        0 => 0,
        _ => ((first + (numel - 1)) / GROUP_NUMEL - first / GROUP_NUMEL + 1) * GROUP_BLOCKS,
    }
}

impl Adam {
    /// The call for [`Adam::step_on`] on a device.
    ///
    /// # Panics
    /// If `step` is 0.
    pub fn cuda_step(&self, grad_scale: f32, buffers: StepBuffers<2>) -> Launch<AdamStep> {
        match self.decay {
            WeightDecay::Decoupled => {
                let rule = adam::L2 { adam: self.decoupled(grad_scale), weight_decay: 0.0 };
                buffers.step(ADAMW, rule, AdamStep)
            }
            WeightDecay::L2 => buffers.step(ADAM_L2, self.l2(grad_scale), AdamStep),
        }
    }
}

impl Sgd {
    /// The call for [`Sgd::step_on`] on a device.
    ///
    /// # Panics
    /// If `step` is 0.
    pub fn cuda_step(&self, grad_scale: f32, buffers: StepBuffers<1>) -> Launch<SgdStep> {
        let names = match self.direction {
            Direction::Momentum => SGD_MOMENTUM,
            Direction::Nesterov => SGD_NESTEROV,
        };
        buffers.step(names, self.factors(grad_scale), SgdStep)
    }

    /// The call for [`Sgd::plain_step_on`] on a device. There are no states, so their type makes no difference.
    ///
    /// # Panics
    /// If `step` is 0.
    pub fn cuda_plain_step(&self, grad_scale: f32, buffers: StepBuffers<0>) -> Launch<SgdStep> {
        let buffers = StepBuffers { states: DeviceStates::F32([]), ..buffers };
        buffers.step([SGD_PLAIN; 2], self.factors(grad_scale), SgdStep)
    }
}

impl Lion {
    /// The call for [`Lion::step_on`] on a device.
    pub fn cuda_step(&self, grad_scale: f32, buffers: StepBuffers<1>) -> Launch<LionStep> {
        buffers.step(LION, self.factors(grad_scale), LionStep)
    }
}

impl Adagrad {
    /// The call for [`Adagrad::step_on`] on a device.
    ///
    /// # Panics
    /// If `step` is 0.
    pub fn cuda_step(&self, grad_scale: f32, buffers: StepBuffers<1>) -> Launch<AdagradStep> {
        buffers.step(ADAGRAD, self.factors(grad_scale), AdagradStep)
    }
}
