//! [`Engine`]: a model, its state, and inference.

use std::error::Error;
use std::iter::successors;

use shardwise_comm::{Group, ProcessGroup};
use shardwise_plan::layout::units_of;
use shardwise_plan::pattern::matches_pattern;
use shardwise_plan::{ActivationPolicy, ActivationRules, LayerSpec, ParamSpec};
use shardwise_torch::{FlatTensor, Tensor, memory, no_grad};
use shardwise_zero::{Zero, ZeroError, ZeroOptions};

use crate::binding::{Binding, bind};
use crate::source::ParamSource;
use crate::{Context, EngineError, Layer};

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
}

impl EngineOptions {
    /// All parameters are trained, all activations kept.
    pub fn new(zero: ZeroOptions) -> Self {
        let activations = ActivationRules::default();
        EngineOptions { zero, frozen: Vec::new(), activations, head_chunk_rows: None, seed: 0 }
    }
}

/// One rank of a training run: a model and this rank's part of its state.
pub struct Engine {
    // Tensors over the state's memory come first, for they must go first.
    pub(crate) bindings: Vec<Binding>,
    pub(crate) flats: Vec<FlatTensor>,
    pub(crate) layers: Vec<Box<dyn Layer>>,
    pub(crate) specs: Vec<LayerSpec>,
    /// How many layers use each unit: its gradient is complete when all have gone backward.
    pub(crate) num_users: Vec<usize>,
    pub(crate) zero: Zero,
    pub(crate) grad_accum_steps: usize,
    /// One for each layer.
    pub(crate) policies: Vec<ActivationPolicy>,
    pub(crate) head_chunk_rows: Option<usize>,
    pub(crate) seed: u64,
    pub(crate) observer: Box<dyn FnMut(Phase) + Send>,
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
    /// Builds this rank's part of the model: every rank fills just what it keeps.
    ///
    /// # Collective
    /// `group`. Every rank calls with the same layers and options.
    /// # Errors
    /// A model that is no model, patterns that match nothing, a source that fails, memory that is not there. If only this
    /// rank fails, the others get an error that says so.
    pub fn new(
        layers: Vec<Box<dyn Layer>>,
        options: EngineOptions,
        group: Group,
        source: &mut dyn ParamSource,
    ) -> Result<Self, EngineError> {
        memory::install();
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
        let policies = options.activations.policies(names);
        let is_frozen = |name: &str| options.frozen.iter().any(|pattern| matches_pattern(pattern, name));
        let units = units_of(&specs, group.group_size(), is_frozen);
        let grad_accum_steps = options.zero.grad_accum_steps;
        let mut fill = |param: &ParamSpec, range, out: &mut [f32]| source.fill(param, range, out);
        let others = group.clone();
        let build = || -> Result<_, EngineError> {
            let mut zero = Zero::new(units, options.zero, group, &mut fill)?;
            let (flats, bindings) = bind(&mut zero, &specs)?;
            Ok((zero, flats, bindings))
        };
        let (zero, flats, bindings) = build().inspect_err(|error| give_up(&*others, error))?;
        let mut num_users = vec![0; flats.len()];
        for unit in bindings.iter().flat_map(|binding| &binding.units) {
            num_users[*unit] += 1;
        }
        Ok(Engine {
            bindings,
            flats,
            layers,
            specs,
            num_users,
            zero,
            grad_accum_steps,
            policies,
            head_chunk_rows: options.head_chunk_rows,
            seed: options.seed,
            observer: Box::new(|_| {}),
        })
    }

    /// Has `observer` called whenever a training step enters another phase: to measure, or to fail on purpose.
    pub fn observe(&mut self, observer: impl FnMut(Phase) + Send + 'static) {
        self.observer = Box::new(observer);
    }

    /// Runs the model without a target: what the last layer predicts.
    ///
    /// # Collective
    /// Every rank calls, in stage 3.
    /// # Errors
    /// A layer or a collective that fails.
    pub fn predict(&mut self, input: &Tensor) -> Result<Tensor, EngineError> {
        self.run(input, None)
    }

    /// Runs the model against a target without learning: the loss.
    ///
    /// # Collective
    /// Every rank calls, in stage 3.
    /// # Errors
    /// A layer or a collective that fails.
    pub fn evaluate(&mut self, input: &Tensor, target: &Tensor) -> Result<f64, EngineError> {
        Ok(self.run(input, Some(target))?.f_double_value(&[])?)
    }

    fn run(&mut self, input: &Tensor, target: Option<&Tensor>) -> Result<Tensor, EngineError> {
        let outcome = self.run_layers(input, target);
        match &outcome {
            // Below stage 3 the others need not even have called.
            Err(error) if self.zero.stage().shards_parameters() => give_up(&**self.zero.group(), error),
            _ => {}
        }
        outcome
    }

    fn run_layers(&mut self, input: &Tensor, target: Option<&Tensor>) -> Result<Tensor, EngineError> {
        let mut x = input.shallow_clone();
        for index in 0..self.layers.len() {
            self.gather(index)?;
            let context = Context::inference(target);
            let (layer, params) = (&self.layers[index], self.bindings[index].params());
            x = no_grad(|| layer.forward(&context, &params, &x)).map_err(|e| self.at(index, "forward", e))?;
            x = self.own_output(index, x)?;
            self.release(index)?;
        }
        Ok(x)
    }

    /// Makes a layer's parameters whole and points its tensors at them.
    pub(crate) fn gather(&mut self, layer: usize) -> Result<(), EngineError> {
        (self.observer)(Phase::Gather);
        for &unit in &self.bindings[layer].units {
            let ptr = self.zero.gather(unit)?;
            if self.zero.stage().shards_parameters() {
                // SAFETY: the copy stays at `ptr` until `release`, and parameters change in `step` only, when no graph
                // is alive.
                unsafe { self.flats[unit].point_to(ptr)? };
            }
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
        if self.zero.stage().shards_parameters() {
            for &unit in &self.bindings[layer].units {
                self.flats[unit].forget_memory()?;
                self.zero.release(unit);
            }
        }
        Ok(())
    }

    pub(crate) fn at(&self, layer: usize, pass: &'static str, source: EngineError) -> EngineError {
        EngineError::Layer { layer: self.specs[layer].name.clone(), pass, source: Box::new(source) }
    }

    /// Calls `visit` on every rank with each parameter, whole and in fp32 (master weights). Needs memory for one unit.
    ///
    /// # Collective
    /// Every rank calls.
    /// # Errors
    /// A failed collective or allocation; what `visit` says.
    pub fn for_each_param<E: From<EngineError>>(
        &mut self,
        mut visit: impl FnMut(&ParamSpec, &[f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        enum Stop<E> {
            Zero(ZeroError),
            Visit(E),
        }
        impl<E> From<ZeroError> for Stop<E> {
            fn from(error: ZeroError) -> Self {
                Stop::Zero(error)
            }
        }
        self.zero.for_each_param(|param, values| visit(param, values).map_err(Stop::Visit)).map_err(|stop| {
            match stop {
                Stop::Zero(error) => EngineError::from(error).into(),
                Stop::Visit(error) => error,
            }
        })
    }

    /// The layers' names and parameters.
    pub fn specs(&self) -> &[LayerSpec] {
        &self.specs
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
