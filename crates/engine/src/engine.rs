//! [`Engine`]: a model and its state on one rank.

use std::collections::HashMap;
use std::error::Error;
use std::iter::successors;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use shardwise_comm::{Group, ProcessGroup};
use shardwise_device::DeviceError;
use shardwise_plan::pattern::matches_pattern;
use shardwise_plan::pipeline::{Action, loss_turn};
use shardwise_plan::zoo::SequenceParallel;
use shardwise_plan::{ActivationPolicy, ActivationRules, LayerSpec, ParamSpec};
use shardwise_torch::{Device, FlatTensor, Tensor, memory};
use shardwise_zero::{Groups, Zero, ZeroError, ZeroOptions};

use crate::binding::{Binding, bind};
use crate::gradients::PartialGradient;
use crate::home::Home;
use crate::parked::Garage;
use crate::source::ParamSource;
use crate::stage::{PipelineOptions, Stage};
use crate::transport::Transport;
use crate::{EngineError, Layer, Ranks, TensorParallel};

/// What a caller chooses.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// Sharding, precision, optimizer.
    pub zero: ZeroOptions,
    /// Parameters that are not trained, as patterns in which `*` stands for any run of characters.
    pub frozen: Vec<String>,
    /// What becomes of each layer's activations between forward and backward: time for memory, the same bits.
    pub activations: ActivationRules,
    /// Rows whose scores over the vocabulary a head holds at a time; `None` leaves it to the head.
    pub head_chunk_rows: Option<usize>,
    /// The seed of the random numbers that training draws, which are those of dropout.
    pub seed: u64,
    /// How pipeline stages share the layers and run them.
    pub pipeline: PipelineOptions,
    /// What tensor-parallel ranks keep between linear maps.
    pub sequence: SequenceParallel,
    /// Where layers run. On a GPU it is that of `zero.gpu`, whose stream libtorch has been told to use. The host beside such a
    /// processor is for tests, in which its memory stands in for a GPU's.
    pub device: Device,
}

impl EngineOptions {
    /// All parameters are trained, all activations kept.
    pub fn new(zero: ZeroOptions) -> Self {
        EngineOptions {
            zero,
            frozen: Vec::new(),
            activations: ActivationRules::default(),
            head_chunk_rows: None,
            seed: 0,
            pipeline: PipelineOptions::default(),
            sequence: SequenceParallel::Off,
            device: Device::Cpu,
        }
    }
}

/// One rank of a training run: a model and this rank's part of its state.
///
/// A rank holds the layers of its pipeline stage, and of each its tensor rank's part; of that, ZeRO keeps a shard for each
/// data-parallel rank.
pub struct Engine {
    // Tensors over the state's memory come first, for they must go first.
    pub(crate) bindings: Vec<Binding>,
    pub(crate) flats: Vec<FlatTensor>,
    /// This rank's layers, in the order they run; what follows counts them like that.
    pub(crate) layers: Vec<Box<dyn Layer>>,
    pub(crate) stage: Stage,
    /// This stage's actions in each step.
    pub(crate) actions: Arc<[Action]>,
    /// Whether the schedule computes gradients of weights apart from those of inputs.
    pub(crate) defers_weights: bool,
    /// How many layers use each unit: its gradient is complete when all have gone backward.
    pub(crate) num_users: Vec<usize>,
    /// By unit: parameters of whose gradient this rank has only a part.
    pub(crate) partial: Vec<Vec<PartialGradient>>,
    /// Groups of tensor ranks that share a key-value head.
    pub(crate) shared_heads: Vec<Group>,
    /// Units that other stages hold too, with the group of those stages.
    pub(crate) tied: Vec<(usize, Group)>,
    /// One for each layer.
    pub(crate) policies: Vec<ActivationPolicy>,
    pub(crate) head_chunk_rows: Option<usize>,
    pub(crate) seed: u64,
    pub(crate) observer: Box<dyn FnMut(Phase) + Send>,
    pub(crate) home: Home,
    /// Where the inputs of layers wait that are offloaded; none on the host.
    pub(crate) garage: Option<Garage>,
    pub(crate) tensor: TensorParallel,
    pub(crate) transport: Transport,
    pub(crate) zero: Zero,
    pub(crate) ranks: Ranks,
}

/// What a training step is at, for observers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Waiting for a layer's parameters.
    Gather,
    /// A layer's forward.
    Forward,
    /// A layer's backward.
    Backward,
    /// Reducing the gradients of a unit.
    Reduce,
    /// Norm, update and what follows it.
    Step,
    /// Between steps.
    Idle,
}

impl Engine {
    /// Builds this rank's part of the model: every rank fills just what it keeps. A [`Group`] stands for ranks that are
    /// all data parallel.
    ///
    /// # Collective
    /// All ranks. Every rank calls with the same layers and options.
    /// # Errors
    /// A model that is no model, or cannot be cut over these ranks; patterns that match nothing, a source that fails, memory
    /// that is not there. If only this rank fails, the others get an error that says so.
    pub fn new(
        layers: Vec<Box<dyn Layer>>,
        options: EngineOptions,
        ranks: impl Into<Ranks>,
        source: &mut dyn ParamSource,
    ) -> Result<Self, EngineError> {
        let ranks = ranks.into();
        // A handle that goes tells the others that this rank has left: not before they know why.
        let kept = ranks.clone();
        Self::build(layers, options, ranks, source).inspect_err(|error| give_up(&**kept.world(), error))
    }

    fn build(
        layers: Vec<Box<dyn Layer>>,
        options: EngineOptions,
        ranks: Ranks,
        source: &mut dyn ParamSource,
    ) -> Result<Self, EngineError> {
        memory::install();
        let home = Home::new(&options)?;
        let specs: Vec<_> = layers.iter().map(|layer| layer.spec()).collect();
        if layers.is_empty() {
            return Err(EngineError::NoLayers);
        }
        check_patterns(&specs, "frozen", options.frozen.iter().map(String::as_str))?;
        let groups = options.zero.groups.iter().flat_map(|group| &group.patterns);
        check_patterns(&specs, "groups", groups.map(|pattern| pattern.as_str()))?;
        let names = specs.iter().map(|spec| spec.name.as_str());
        if let Some(pattern) = options.activations.stray(names.clone()) {
            let pattern = pattern.as_str().to_owned();
            return Err(EngineError::NoSuchLayer { pattern, layers: names.map(str::to_owned).collect() });
        }
        let is_frozen = |name: &str| options.frozen.iter().any(|pattern| matches_pattern(pattern, name));
        // Zero itself has something to say of a step without micro-batches.
        let num_microbatches = options.zero.grad_accum_steps.max(1);
        let loss = loss_turn(Some(options.pipeline.schedule), num_microbatches);
        let names = specs.iter().map(|spec| spec.name.as_str());
        let policies = options.activations.policies(names, loss);
        let stage = Stage::new(specs, options.pipeline, num_microbatches, &ranks, is_frozen)?;
        let units = stage.units(stage.stage, ranks.data.group_size());
        let groups =
            Groups { data: ranks.data.clone(), tensor: ranks.tensor.clone(), world: ranks.world.clone() };
        let mut zero = {
            let whole = stage.whole_params();
            let (degree, rank) = (stage.degree, stage.tensor_rank);
            let mut fill = |local: &ParamSpec, range: Range<usize>, out: &mut [f32]| {
                let whole = whole[local.name.as_str()];
                let first = range.start;
                for (from, to) in whole.whole_runs(degree, rank, range)? {
                    source.fill(whole, from, &mut out[to.start - first..to.end - first])?;
                }
                Ok(())
            };
            Zero::on_mesh(units, options.zero, groups, stage.placement(), &mut fill)?
        };
        let (flats, bindings) = bind(&mut zero, &stage.local, home.device)?;
        let mut num_users = vec![0; flats.len()];
        for unit in bindings.iter().flat_map(|binding| &binding.units) {
            num_users[*unit] += 1;
        }
        let (partial, shared_heads) = partial_gradients(&stage, &zero, &ranks, options.sequence)?;
        let tied = tied_units(&stage, &zero, &ranks)?;
        let transport = Transport::new(&ranks.pipeline, &stage.schedule, home.clone())?;
        let mut all: Vec<_> = layers.into_iter().map(Some).collect();
        let own = stage.layers.iter().map(|&layer| all[layer].take().expect("a layer is in one part"));
        Ok(Engine {
            bindings,
            flats,
            layers: own.collect(),
            defers_weights: stage
                .schedule
                .actions(stage.stage)
                .iter()
                .any(|action| matches!(action, Action::BackwardInput(_))),
            actions: stage.schedule.actions(stage.stage).into(),
            num_users,
            partial,
            shared_heads,
            tied,
            policies: stage.layers.iter().map(|&layer| policies[layer]).collect(),
            head_chunk_rows: options.head_chunk_rows,
            seed: options.seed,
            observer: Box::new(|_| {}),
            tensor: TensorParallel::new(ranks.tensor.clone(), options.sequence, home.clone()),
            transport,
            garage: Garage::new(&home)?,
            home,
            zero,
            stage,
            ranks,
        })
    }

    /// Has `observer` called whenever a training step enters another phase: to measure, or to fail on purpose.
    pub fn observe(&mut self, observer: impl FnMut(Phase) + Send + 'static) {
        self.observer = Box::new(observer);
    }

    /// Makes a layer's parameters whole and points its tensors at them.
    pub(crate) fn gather(&mut self, layer: usize) -> Result<(), EngineError> {
        (self.observer)(Phase::Gather);
        for &unit in &self.bindings[layer].units {
            let ptr = self.zero.gather(unit)?;
            if self.zero.gathers() {
                // SAFETY: the copy stays at `ptr` until `release`, and parameters change in `step` only, when no graph
                // is alive.
                unsafe { self.flats[unit].point_to(ptr)? };
            }
            // Libtorch's work on a GPU is not seen by the log of the copy's memory: it stands between this and `end_use`.
            self.zero.begin_use(unit)?;
        }
        Ok(())
    }

    /// Starts to make a layer's parameters whole, if there is such a layer.
    pub(crate) fn prefetch(&mut self, layer: Option<usize>) -> Result<(), EngineError> {
        for &unit in
            layer.and_then(|layer| self.bindings.get(layer)).iter().flat_map(|binding| &binding.units)
        {
            self.zero.prefetch(unit)?;
        }
        Ok(())
    }

    /// Copies a layer's output if it is a view of the layer's parameters, whose memory moves and goes.
    pub(crate) fn own_output(&self, layer: usize, output: Tensor) -> Result<Tensor, EngineError> {
        let at = output.data_ptr().addr();
        let is_view = |&unit: &usize| {
            let flat = self.flats[unit].tensor();
            let start = flat.data_ptr().addr();
            (start..start + flat.numel() * flat.kind().elt_size_in_bytes()).contains(&at)
        };
        let is_view = self.bindings[layer].units.iter().any(is_view);
        Ok(if is_view { output.f_alias_copy()? } else { output })
    }

    /// Lets a layer's parameters go, where they are sharded.
    pub(crate) fn release(&mut self, layer: usize) -> Result<(), EngineError> {
        for &unit in &self.bindings[layer].units {
            self.zero.end_use(unit)?;
            if self.zero.gathers() {
                self.flats[unit].forget_memory()?;
                self.zero.release(unit);
            }
        }
        Ok(())
    }

    pub(crate) fn at(&self, layer: usize, pass: &'static str, source: EngineError) -> EngineError {
        EngineError::Layer { layer: self.stage.local[layer].name.clone(), pass, source: Box::new(source) }
    }

    /// The names and parameters of all layers, whole, on this rank or not.
    pub fn specs(&self) -> &[LayerSpec] {
        &self.stage.specs
    }

    /// The ranks and this one's place among them.
    pub fn ranks(&self) -> &Ranks {
        &self.ranks
    }

    /// Bytes that this rank has sent so far.
    pub fn sent_bytes(&self) -> u64 {
        let tied = self.tied.iter().map(|(_, stages)| stages.ledger().total().sent_bytes).sum::<u64>();
        let heads = self.shared_heads.iter().map(|heads| heads.ledger().total().sent_bytes).sum::<u64>();
        self.ranks.sent_bytes() + self.transport.sent_bytes() + tied + heads
    }

    /// Time so far in which this rank communicated or waited for it, and computed nothing. On a GPU what its compute stream stood still for:
    /// collectives, messages and copies, and offloaded steps; so far as it has got, and nothing if that stream does not measure it.
    ///
    /// # Errors
    /// What the driver says.
    pub fn exposed_comm(&self) -> Result<Duration, EngineError> {
        match &self.home.gpu {
            Some(gpu) => {
                let stalled = gpu.stream().stalled().map_err(DeviceError::from);
                Ok(stalled.map_err(ZeroError::from)?)
            }
            None => Ok(self.zero.exposed_comm() + self.transport.waited() + self.tensor.time()),
        }
    }

    /// The sharded state.
    pub fn zero(&self) -> &Zero {
        &self.zero
    }

    /// The sharded state, to visit whole parameters.
    pub fn zero_mut(&mut self) -> &mut Zero {
        &mut self.zero
    }
}

/// The parameters of each unit of whose gradient a rank has only a part: those that ranks hold whole, where each sees its share of the
/// tokens, and the heads that ranks share.
///
/// # Collective
/// The tensor group.
fn partial_gradients(
    stage: &Stage,
    zero: &Zero,
    ranks: &Ranks,
    sequence: SequenceParallel,
) -> Result<(Vec<Vec<PartialGradient>>, Vec<Group>), EngineError> {
    let whole = stage.whole_params();
    let sharers = |param: &ParamSpec| param.split.map_or(1, |split| split.num_sharers(stage.degree));
    // All tensor ranks make all groups; a stage without such heads makes them too.
    let mut groups: HashMap<usize, Group> = HashMap::new();
    let mut numbers: Vec<usize> = whole.values().map(|param| sharers(param)).filter(|&n| n > 1).collect();
    numbers.sort_unstable();
    numbers.dedup();
    for number in numbers {
        if number == stage.degree {
            groups.insert(number, ranks.tensor.clone());
            continue;
        }
        for sharing in ranks.tensor.ranks().to_vec().chunks(number) {
            if let Some(group) = ranks.tensor.subgroup("shared heads", sharing)? {
                groups.insert(number, group);
            }
        }
    }
    let of_unit = |unit: usize| {
        let layout = zero.layout(unit);
        let slots = layout.slots.iter().enumerate();
        let partial = slots.filter_map(|(slot, s)| {
            let param = whole[s.param.name.as_str()];
            let group = match sharers(param) {
                1 if param.split.is_none() && sequence == SequenceParallel::On && stage.degree > 1 => {
                    &ranks.tensor
                }
                1 => return None,
                number => &groups[&number],
            };
            Some(PartialGradient { slot, group: group.clone() })
        });
        if layout.trainable { partial.collect() } else { Vec::new() }
    };
    let partial = (0..zero.layouts().len()).map(of_unit).collect();
    groups.retain(|&number, _| number < stage.degree);
    Ok((partial, groups.into_values().collect()))
}

/// The trained units that other stages hold too.
///
/// # Collective
/// The pipeline group.
fn tied_units(stage: &Stage, zero: &Zero, ranks: &Ranks) -> Result<Vec<(usize, Group)>, EngineError> {
    let mut tied = Vec::new();
    for param in stage.shared() {
        let stages: Vec<usize> = param.stages.iter().map(|&stage| ranks.pipeline.ranks()[stage]).collect();
        let group = ranks.pipeline.subgroup("stages of a tied parameter", &stages)?;
        let is_it = |unit: &usize| {
            let layout = zero.layout(*unit);
            layout.trainable && layout.slots.iter().any(|slot| slot.param.name == param.name)
        };
        if let (Some(group), Some(unit)) = (group, (0..zero.layouts().len()).find(is_it)) {
            tied.push((unit, group));
        }
    }
    Ok(tied)
}

/// Tells the other ranks that this one does not go on, and why: they would wait for it.
pub(crate) fn give_up(group: &dyn ProcessGroup, error: &EngineError) {
    let causes = successors(Some(error as &dyn Error), |&error| error.source());
    let reason: Vec<_> = causes.map(ToString::to_string).collect();
    group.poison(&reason.join(": "));
}

fn check_patterns<'a>(
    specs: &[LayerSpec],
    list: &'static str,
    mut patterns: impl Iterator<Item = &'a str>,
) -> Result<(), EngineError> {
    let params = || specs.iter().flat_map(|spec| &spec.params);
    match patterns.find(|pattern| !params().any(|param| matches_pattern(pattern, &param.name))) {
        Some(pattern) => Err(EngineError::PatternMatchesNothing { pattern: pattern.to_owned(), list }),
        None => Ok(()),
    }
}
