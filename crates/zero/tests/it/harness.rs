//! A model without layers: units of any sizes, whose first values and gradients are pure functions of names and numbers.

use std::error::Error;
use std::ops::Range;

use half::{bf16, f16};
use shardwise_comm::{Group, thread};
use shardwise_device::{Buffer, DType, Place, Slice};
use shardwise_plan::pattern::NamePattern;
use shardwise_plan::{Init, ParamSpec, UnitLayout, ZeroStage};
use shardwise_zero::{
    AdamOptions, BiasCorrection, Optimizer, ParamGroup, StepOutcome, StepReport, Zero, ZeroOptions,
};

pub const LR: f64 = 0.01;
pub const ADAM: AdamOptions = AdamOptions {
    beta1: 0.9,
    beta2: 0.99,
    eps: 1e-8,
    weight_decay: 0.1,
    bias_correction: BiasCorrection::On,
};

/// Every second parameter, see [`Model::layouts`].
pub fn biases_without_decay() -> Vec<ParamGroup> {
    vec![ParamGroup::no_decay(vec![NamePattern::new("*.bias")])]
}

/// Elements of each parameter of each unit, and which units are frozen.
#[derive(Debug, Clone)]
pub struct Model {
    pub units: Vec<Vec<usize>>,
    pub frozen: Vec<usize>,
}

impl Model {
    pub fn new(units: &[&[usize]]) -> Self {
        Model { units: units.iter().map(|sizes| sizes.to_vec()).collect(), frozen: Vec::new() }
    }

    /// Every second parameter is a bias, by name; the others are matrices if they can be, with sides up to 8.
    pub fn layouts(&self, num_shards: usize) -> Vec<UnitLayout> {
        let unit = |(index, sizes): (usize, &Vec<usize>)| {
            let name = format!("unit{index}");
            let key = |i: usize| format!("{i}.{}", if i.is_multiple_of(2) { "weight" } else { "bias" });
            let params = sizes.iter().enumerate();
            let shape = |i: usize, numel: usize| match numel.is_multiple_of(8) && numel > 0 {
                true if i.is_multiple_of(4) => vec![8, numel / 8],
                true if i.is_multiple_of(2) => vec![numel / 8, 8],
                _ => vec![numel],
            };
            let params = params
                .map(|(i, &numel)| ParamSpec::new(&name, &key(i), &shape(i, numel), Init::Zeros))
                .collect();
            UnitLayout::new(&name, !self.frozen.contains(&index), params, num_shards)
        };
        self.units.iter().enumerate().map(unit).collect()
    }

    pub fn zero(&self, options: &ZeroOptions, group: Group) -> Zero {
        Zero::new(self.layouts(group.group_size()), options.clone(), group, &mut fill).unwrap()
    }

    /// Runs `f` on every rank of a world with its part of this model.
    pub fn run<T: Send>(
        &self,
        world: usize,
        options: &ZeroOptions,
        f: impl Fn(&mut Zero) -> T + Sync,
    ) -> Vec<T> {
        thread::run(world, |group| f(&mut self.zero(options, group)))
    }
}

pub fn options(stage: ZeroStage, compute: DType) -> ZeroOptions {
    ZeroOptions { compute, ..ZeroOptions::new(stage, Optimizer::AdamW(ADAM)) }
}

pub fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

pub fn hash(name: &str, numbers: &[usize]) -> u64 {
    let name = name.bytes().fold(17, |hash, byte| mix(hash ^ u64::from(byte)));
    numbers.iter().fold(name, |hash, &number| mix(hash.wrapping_add(number as u64 + 1)))
}

/// A number of either sign and one of many magnitudes, so that the order of additions shows in a sum.
pub fn number(hash: u64) -> f32 {
    let magnitude = 2f32.powi((hash % 8) as i32 - 6);
    magnitude * ((hash >> 8) as f32 / (1u64 << 55) as f32 - 1.0)
}

/// First values.
pub fn fill(
    param: &ParamSpec,
    range: Range<usize>,
    out: &mut [f32],
) -> Result<(), Box<dyn Error + Send + Sync>> {
    out.iter_mut().zip(range).for_each(|(value, i)| *value = number(hash(&param.name, &[i])));
    Ok(())
}

/// The gradient of `param` in a micro-batch on a rank, exact in `compute`; now and then there is none.
pub fn gradient(param: &ParamSpec, compute: DType, [step, microbatch, rank]: [usize; 3]) -> Option<Vec<f32>> {
    let seed = hash(&param.name, &[step, microbatch, rank]);
    let value = |i: usize| rounded(number(mix(seed.wrapping_add(i as u64))), compute);
    (!seed.is_multiple_of(7)).then(|| (0..param.numel()).map(value).collect())
}

/// `x` rounded to `dtype`.
pub fn rounded(x: f32, dtype: DType) -> f32 {
    match dtype {
        DType::Bf16 => bf16::from_f32(x).to_f32(),
        DType::F16 => f16::from_f32(x).to_f32(),
        _ => x,
    }
}

/// `values` as a buffer of the compute type.
pub fn buffer(values: &[f32], compute: DType) -> Buffer {
    let mut buffer = Buffer::zeroed(compute, values.len(), Place::Cpu).unwrap();
    match compute {
        DType::F32 => buffer.typed_mut::<f32>().unwrap().copy_from_slice(values),
        DType::F16 => {
            let out = buffer.typed_mut::<f16>().unwrap();
            out.iter_mut().zip(values).for_each(|(out, &value)| *out = f16::from_f32(value));
        }
        _ => {
            let out = buffer.typed_mut::<bf16>().unwrap();
            out.iter_mut().zip(values).for_each(|(out, &value)| *out = bf16::from_f32(value));
        }
    }
    buffer
}

/// Whose gradient it is.
#[derive(Debug, Clone, Copy)]
pub struct At {
    pub rank: usize,
    pub microbatch: usize,
    pub unit: usize,
    pub slot: usize,
}

/// Changes one parameter's gradient of a micro-batch, before it is scaled.
pub type Change<'a> = dyn Fn(At, &mut Option<Vec<f32>>) + 'a;

/// Reduces one unit's gradients of a micro-batch; `change` may spoil them.
pub fn reduce(
    zero: &mut Zero,
    unit: usize,
    step: usize,
    microbatch: usize,
    change: &dyn Fn(usize, &mut Vec<f32>),
) {
    reduce_changed(zero, unit, step, microbatch, &|at, values| {
        if let Some(values) = values {
            change(at.rank, values);
        }
    });
}

/// [`reduce`], with a `change` that knows where it is. Gradients are times the loss scale, as an engine's are.
pub fn reduce_changed(zero: &mut Zero, unit: usize, step: usize, microbatch: usize, change: &Change<'_>) {
    let (rank, compute, scale) = (zero.group().group_rank(), zero.compute_dtype(), zero.loss_scale() as f32);
    let slots = zero.layout(unit).slots.iter().enumerate();
    let grads: Vec<Option<Buffer>> = slots
        .map(|(slot, s)| {
            let mut values = gradient(&s.param, compute, [step, microbatch, rank]);
            change(At { rank, microbatch, unit, slot }, &mut values);
            let scaled: Vec<_> = values?.into_iter().map(|x| x * scale).collect();
            Some(buffer(&scaled, compute))
        })
        .collect();
    if zero.compute_place() != Place::Cpu {
        return crate::gpu::reduce_on_gpu(zero, unit, microbatch, &grads);
    }
    let slices: Vec<Option<Slice<'_>>> = grads.iter().map(|grad| grad.as_ref().map(Buffer::view)).collect();
    zero.reduce(unit, microbatch, &slices).unwrap();
}

/// What a layer does with a gathered unit.
fn use_unit(zero: &mut Zero, unit: usize) {
    if zero.compute_place() != Place::Cpu {
        crate::gpu::use_on_gpu(zero, unit);
    }
}

/// What an engine does in a step: gathers forward, gathers and reduces backward, steps.
pub fn train_step(
    zero: &mut Zero,
    step: usize,
    accum: usize,
    change: &dyn Fn(usize, &mut Vec<f32>),
) -> StepReport {
    train_step_changed(zero, step, accum, &|at, values| {
        if let Some(values) = values {
            change(at.rank, values);
        }
    })
}

/// [`train_step`], with a `change` that knows where it is.
pub fn train_step_changed(zero: &mut Zero, step: usize, accum: usize, change: &Change<'_>) -> StepReport {
    let num_units = zero.layouts().len();
    for microbatch in 0..accum {
        for unit in 0..num_units {
            zero.gather(unit).unwrap();
            if unit + 1 < num_units {
                zero.prefetch(unit + 1).unwrap();
            }
            use_unit(zero, unit);
            zero.release(unit);
        }
        for unit in (0..num_units).rev() {
            zero.gather(unit).unwrap();
            if unit > 0 {
                zero.prefetch(unit - 1).unwrap();
            }
            use_unit(zero, unit);
            reduce_changed(zero, unit, step, microbatch, change);
            zero.release(unit);
        }
    }
    zero.step(LR, &[1.0]).unwrap()
}

/// As it is.
pub fn unchanged(_: usize, _: &mut Vec<f32>) {}

/// Everything that a run leaves behind, as bits.
#[derive(Debug, Clone, PartialEq)]
pub struct Trace {
    pub norms: Vec<u64>,
    pub outcomes: Vec<StepOutcome>,
    pub weights: Vec<(String, Vec<f32>)>,
    pub copies: Vec<Vec<u8>>,
}

/// Trains for `steps` and tells what came of it.
pub fn trace(zero: &mut Zero, steps: &[usize], accum: usize, change: &dyn Fn(usize, &mut Vec<f32>)) -> Trace {
    let reports: Vec<_> = steps.iter().map(|&step| train_step(zero, step, accum, change)).collect();
    let weights = weights(zero);
    let num_units = zero.layouts().len();
    let copies = (0..num_units).map(|unit| zero.compute_bytes(unit).unwrap()).collect();
    Trace {
        norms: reports.iter().map(|report| report.grad_norm.to_bits()).collect(),
        outcomes: reports.into_iter().map(|report| report.outcome).collect(),
        weights,
        copies,
    }
}

/// All parameters, whole, in fp32.
pub fn weights(zero: &mut Zero) -> Vec<(String, Vec<f32>)> {
    let mut all = Vec::new();
    zero.for_each_param::<shardwise_zero::ZeroError>(|param, values| {
        all.push((param.name.clone(), values.to_vec()));
        Ok(())
    })
    .unwrap();
    all
}

/// The ranks' common trace.
pub fn common(traces: Vec<Trace>) -> Trace {
    let mut traces = traces.into_iter();
    let first = traces.next().expect("a world has a rank");
    traces.for_each(|other| assert_eq!(other, first, "all ranks end alike"));
    first
}
