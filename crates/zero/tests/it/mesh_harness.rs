//! A small transformer's parameters on a mesh of ranks: cut over tensor ranks, with a table that two pipeline stages hold.
//!
//! Gradients are those of samples, whatever rank sees them, so any mesh can be held against one rank that sees all.

use std::collections::{BTreeMap, HashSet};

use shardwise_comm::{Group, thread};
use shardwise_device::{Buffer, Slice};
use shardwise_plan::layout::units_on_stage;
use shardwise_plan::mesh::{Axis, Coordinates, Mesh};
use shardwise_plan::pipeline::{StageCut, Stages};
use shardwise_plan::{Init, LayerSpec, ParamSpec, SplitUnits, TensorSplit};
use shardwise_zero::{Groups, Placement, StepReport, Zero, ZeroError, ZeroOptions};

use crate::harness::{LR, buffer, fill, hash, mix, number, rounded, weights};

pub const TABLE: &str = "embed.table";

fn layer(name: &str, params: &[(&str, &[usize], Option<TensorSplit>)]) -> LayerSpec {
    let spec = |&(key, shape, split): &(&str, &[usize], Option<TensorSplit>)| ParamSpec {
        split,
        ..ParamSpec::new(name, key, shape, Init::Zeros)
    };
    LayerSpec { name: name.to_owned(), params: params.iter().map(spec).collect() }
}

/// Embedding, two blocks, and a head with the embedding's table. Nine tokens: tensor ranks have tables of different sizes.
pub fn layers() -> Vec<LayerSpec> {
    let heads = |dim| Some(TensorSplit::of(dim, SplitUnits::Heads(4)).blocks(3));
    let shared = Some(TensorSplit::of(0, SplitUnits::SharedHeads(1)));
    let block = |name: &str| {
        layer(
            name,
            &[
                ("norm", &[8], None),
                ("qkv", &[8, 24], heads(1)),
                ("qkv_bias", &[24], heads(0)),
                ("shared", &[6, 8], shared),
                ("out", &[8, 8], Some(TensorSplit::OUT_IN_ROW)),
                ("out_bias", &[8], None),
                ("frozen", &[8], None),
            ],
        )
    };
    let embed =
        layer("embed", &[("table", &[9, 8], Some(TensorSplit::VOCABULARY)), ("positions", &[5, 8], None)]);
    let mut head = layer("head", &[("norm", &[8], None)]);
    head.params.push(ParamSpec { key: "proj".to_owned(), ..embed.params[0].clone() });
    vec![embed, block("block0"), block("block1"), head]
}

fn is_frozen(name: &str) -> bool {
    name.ends_with("frozen")
}

/// What gradients are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Numbers {
    /// Integers over 64, so few and small that all their sums and squares are exact, in every type: no order shows.
    Exact,
    /// Of many magnitudes: every order shows.
    Rough,
}

/// Whose gradient it is: of a parameter's use in a layer, for a sample.
#[derive(Debug, Clone, Copy)]
pub struct Use<'a> {
    pub layer: &'a str,
    pub param: &'a str,
    pub sample: usize,
}

/// Changes the whole gradient of one use.
pub type Spoil<'a> = dyn Fn(Use<'_>, &mut [f32]) + Sync + 'a;

pub fn unspoilt(_: Use<'_>, _: &mut [f32]) {}

/// One rank's part of the model.
pub struct Rank {
    pub zero: Zero,
    pub mesh: Mesh,
    pub at: Coordinates,
    pub numbers: Numbers,
    layers: Vec<LayerSpec>,
    /// Those of this stage.
    own_layers: Vec<usize>,
    /// Over the stages, for the table's gradient.
    stages: Option<Group>,
    accum: usize,
}

/// Runs `f` on every rank of a mesh.
pub fn run<T: Send>(
    mesh: Mesh,
    options: &ZeroOptions,
    numbers: Numbers,
    f: impl Fn(&mut Rank) -> T + Sync,
) -> Vec<T> {
    thread::run(mesh.world_size(), |world| f(&mut Rank::new(mesh, options, numbers, world).unwrap()))
}

impl Rank {
    pub fn new(mesh: Mesh, options: &ZeroOptions, numbers: Numbers, world: Group) -> Result<Self, ZeroError> {
        let (layers, at) = (layers(), mesh.coordinates(world.group_rank()));
        let own_of = |name: &str, groups: Vec<Vec<usize>>| {
            // All are made, by all ranks; the own one is kept.
            let join = |own: Option<Group>, ranks: &Vec<usize>| own.or(world.subgroup(name, ranks).unwrap());
            groups.iter().fold(None, join)
        };
        let [data, tensor] = [Axis::Data, Axis::Tensor].map(|axis| {
            own_of(&format!("{axis:?}"), mesh.groups(axis)).expect("every rank is in a group of each axis")
        });
        let stages = Stages::new(&layers, &[], &StageCut::Uniform, mesh.degree(Axis::Pipeline), 1).unwrap();
        let own_layers: Vec<usize> = stages.layers_of(at.pipeline).collect();
        let degree = mesh.degree(Axis::Tensor);
        let shared = stages.shared_params(&layers);
        let holders = |ranks: Vec<usize>| -> Vec<usize> {
            shared[0].stages.iter().map(|&stage| ranks[stage]).collect()
        };
        let table_stages = match shared.is_empty() {
            true => None,
            false => own_of("table", mesh.groups(Axis::Pipeline).into_iter().map(holders).collect()),
        };
        let names: HashSet<String> = shared.iter().map(|param| param.name.clone()).collect();
        let local: Vec<_> = own_layers.iter().map(|&i| layers[i].local(degree, at.tensor).unwrap()).collect();
        let units = units_on_stage(&local, &names, mesh.degree(Axis::Data), is_frozen);
        let own_params = own_layers.iter().flat_map(|&i| &layers[i].params);
        let placement = Placement {
            tensor_replicas: own_params
                .filter(|param| param.is_spoken_for(degree, at.tensor))
                .map(|param| param.name.clone())
                .collect(),
            stage_replicas: shared
                .iter()
                .filter(|param| param.stages[0] != at.pipeline)
                .map(|param| param.name.clone())
                .collect(),
            catalogue: catalogue(&layers),
        };
        let whole = |param: &ParamSpec| spec(&layers, &param.name);
        let groups = match mesh.degree(Axis::Data) == mesh.world_size() {
            true => Groups::from(world),
            false => Groups { data, tensor, world },
        };
        let mut fill_local = |param: &ParamSpec, range: std::ops::Range<usize>, out: &mut [f32]| {
            for (of_whole, of_local) in whole(param).whole_runs(degree, at.tensor, range.clone())? {
                let place = of_local.start - range.start..of_local.end - range.start;
                fill(whole(param), of_whole, &mut out[place])?;
            }
            Ok(())
        };
        let zero = Zero::on_mesh(units, options.clone(), groups, placement, &mut fill_local)?;
        let accum = options.grad_accum_steps;
        Ok(Rank { zero, mesh, at, numbers, own_layers, stages: table_stages, accum, layers })
    }

    /// One parameter's gradient of a micro-batch on this rank: the sum over its uses here, cut.
    fn gradient(&self, param: &ParamSpec, step: usize, microbatch: usize, spoil: &Spoil<'_>) -> Vec<f32> {
        let whole = spec(&self.layers, &param.name);
        let sample = microbatch * self.mesh.degree(Axis::Data) + self.at.data;
        let mut sum = vec![0f32; whole.numel()];
        for &i in &self.own_layers {
            let LayerSpec { name, params } = &self.layers[i];
            if !params.iter().any(|used| used.name == param.name) {
                continue;
            }
            let seed = hash(&param.name, &[i, step, sample]);
            let value = |i: usize| match (self.numbers, mix(seed.wrapping_add(i as u64))) {
                (Numbers::Exact, bits) => ((bits % 63) as f32 - 31.0) / 64.0,
                (Numbers::Rough, bits) => number(bits),
            };
            let mut values: Vec<f32> = (0..whole.numel()).map(value).collect();
            spoil(Use { layer: name, param: &param.name, sample }, &mut values);
            sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
        }
        let mut local = vec![0.0; param.numel()];
        let degree = self.mesh.degree(Axis::Tensor);
        for (of_whole, of_local) in whole.whole_runs(degree, self.at.tensor, 0..param.numel()).unwrap() {
            local[of_local].copy_from_slice(&sum[of_whole]);
        }
        local
    }

    /// Reduces the gradients of one micro-batch.
    pub fn reduce(&mut self, step: usize, microbatch: usize, spoil: &Spoil<'_>) {
        let (compute, scale) = (self.zero.compute_dtype(), self.zero.loss_scale() as f32);
        let num_units = self.zero.layouts().len();
        for unit in (0..num_units).rev() {
            self.zero.gather(unit).unwrap();
            let slots = self.zero.layout(unit).slots.iter();
            let grads: Vec<Buffer> = slots
                .map(|slot| {
                    let values = self.gradient(&slot.param, step, microbatch, spoil);
                    buffer(&values.iter().map(|x| rounded(*x, compute) * scale).collect::<Vec<_>>(), compute)
                })
                .collect();
            let slices: Vec<Option<Slice<'_>>> = grads.iter().map(|grad| Some(grad.view())).collect();
            self.zero.reduce(unit, microbatch, &slices).unwrap();
            self.zero.release(unit);
        }
    }

    /// The unit of the table, where stages share it.
    pub fn table(&self) -> Option<usize> {
        self.zero.layouts().position(|layout| layout.name == TABLE)
    }

    /// The stages that hold the table.
    pub fn stages(&self) -> Option<&Group> {
        self.stages.as_ref()
    }

    /// What an engine does in a step.
    pub fn train_step(&mut self, step: usize, spoil: &Spoil<'_>) -> StepReport {
        (0..self.accum).for_each(|microbatch| self.reduce(step, microbatch, spoil));
        if let Some(stages) = &self.stages {
            let unit = self.table().expect("a unit of its own");
            self.zero.all_reduce_gradient(unit, stages).unwrap();
        }
        let has_loss = self.at.pipeline + 1 == self.mesh.degree(Axis::Pipeline) && self.at.tensor == 0;
        self.zero.step(LR, &[f64::from(u8::from(has_loss))]).unwrap()
    }

    /// Trains for some steps and tells what is here then.
    pub fn train(&mut self, num_steps: usize) -> Part {
        let reports: Vec<_> = (0..num_steps).map(|step| self.train_step(step, &unspoilt)).collect();
        assert!(reports.iter().all(|report| report.outcome.is_applied()));
        assert!(reports.iter().all(|report| report.sums == [self.mesh.degree(Axis::Data) as f64]));
        let norms = reports.iter().map(|report| report.grad_norm).collect();
        Part { mesh: self.mesh, at: self.at, norms, weights: weights(&mut self.zero) }
    }
}

/// Layer and name of every parameter; a tied one is there twice.
pub fn catalogue(layers: &[LayerSpec]) -> Vec<(String, String)> {
    let of = |layer: &LayerSpec| {
        let names = layer.params.iter().map(|param| param.name.clone());
        names.map(|name| (layer.name.clone(), name)).collect::<Vec<_>>()
    };
    layers.iter().flat_map(of).collect()
}

/// The whole parameter.
pub fn spec<'a>(layers: &'a [LayerSpec], name: &str) -> &'a ParamSpec {
    let mut all = layers.iter().flat_map(|layer| &layer.params);
    all.find(|param| param.name == name).expect("a parameter of the model")
}

/// What one rank has after training.
pub struct Part {
    mesh: Mesh,
    at: Coordinates,
    norms: Vec<f64>,
    weights: Vec<(String, Vec<f32>)>,
}

/// The whole model after training.
#[derive(Debug, Clone, PartialEq)]
pub struct Whole {
    pub norms: Vec<f64>,
    pub weights: BTreeMap<String, Vec<f32>>,
}

/// Puts parts together. Ranks that have the same elements must have the same bits.
#[track_caller]
pub fn whole(parts: &[Part], what: &str) -> Whole {
    let layers = layers();
    let mut all: BTreeMap<String, Vec<Option<f32>>> = BTreeMap::new();
    for part in parts {
        assert_eq!(part.norms, parts[0].norms, "{what}: all ranks have one norm");
        for (name, values) in &part.weights {
            let (spec, degree) = (spec(&layers, name), part.mesh.degree(Axis::Tensor));
            let place = all.entry(name.clone()).or_insert_with(|| vec![None; spec.numel()]);
            for (of_whole, of_local) in spec.whole_runs(degree, part.at.tensor, 0..values.len()).unwrap() {
                for (place, &value) in place[of_whole].iter_mut().zip(&values[of_local]) {
                    let before = place.replace(value);
                    assert!(
                        before.is_none_or(|before| before.to_bits() == value.to_bits()),
                        "{what}: {:?} has `{name}` otherwise: {value}, {before:?}",
                        part.at
                    );
                }
            }
        }
    }
    assert_eq!(all.len(), catalogue(&layers).len() - 1, "every parameter is somewhere");
    let full = |(name, values): (String, Vec<Option<f32>>)| {
        (name, values.into_iter().map(|value| value.expect("every element is somewhere")).collect())
    };
    Whole { norms: parts[0].norms.clone(), weights: all.into_iter().map(full).collect() }
}

/// Trains on a mesh and puts the model together.
#[track_caller]
pub fn trained(mesh: Mesh, options: &ZeroOptions, numbers: Numbers, num_steps: usize) -> Whole {
    let what = format!("{mesh:?}, stage {}, {:?}, {}", options.stage, options.overlap, options.compute);
    whole(&run(mesh, options, numbers, |rank| rank.train(num_steps)), &what)
}

/// One rank that sees the samples of all data ranks of `mesh`.
pub fn trained_on_one(mesh: Mesh, options: &ZeroOptions, numbers: Numbers, num_steps: usize) -> Whole {
    let grad_accum_steps = options.grad_accum_steps * mesh.degree(Axis::Data);
    let options =
        ZeroOptions { grad_accum_steps, overlap: shardwise_zero::Overlap::Inline, ..options.clone() };
    trained(Mesh::new(1, 1, 1).unwrap(), &options, numbers, num_steps)
}

/// The farthest that two models are apart in a weight.
pub fn apart(a: &Whole, b: &Whole) -> f32 {
    let pairs = a.weights.values().flatten().zip(b.weights.values().flatten());
    pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Ranks of a mesh, by degrees.
pub fn mesh(pipeline: usize, data: usize, tensor: usize) -> Mesh {
    Mesh::new(pipeline * data * tensor, pipeline, tensor).unwrap()
}
