//! One training step: the schedule's actions, one after the other.

use shardwise_device::{DType, Place as MemoryPlace, Slice};
use shardwise_plan::ActivationPolicy;
use shardwise_plan::schedule::{self, Action};
use shardwise_torch::{Kind, Tensor, autograd, kind_of, no_grad};
use shardwise_zero::StepReport;

use crate::engine::give_up;
use crate::parked::Parked;
use crate::source::BoxError;
use crate::{Batch, Context, Engine, EngineError, Phase, Randomness};

/// What a step did.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainReport {
    /// Mean loss over the global batch.
    pub loss: f64,
    /// Outcome and gradient norm.
    pub step: StepReport,
}

/// What is held of a layer between its forward and its backward.
enum Held {
    /// Nothing: no gradient goes through it.
    Nothing,
    /// What its graph hangs on.
    Graph { input: Tensor, output: Tensor },
    /// Its input: the forward pass runs once more.
    Input(Parked),
}

/// A micro-batch between its forward and its backward.
struct Pass {
    batch: Batch,
    held: Vec<Held>,
}

/// Gradients of one micro-batch, until every layer that uses a unit has added its own.
struct Pending {
    grads: Vec<Option<Tensor>>,
    num_left: usize,
}

impl Engine {
    /// Trains on one global batch; `batch` gives this rank's micro-batches, by index.
    ///
    /// # Collective
    /// Every rank calls with the same rate.
    /// # Errors
    /// A layer, a collective or `batch` that fails. The engine is of no use afterwards, on any rank: the others get an
    /// error that names this rank and says why it gave up.
    pub fn train_step(
        &mut self,
        lr: f64,
        batch: impl FnMut(usize) -> Result<Batch, BoxError>,
    ) -> Result<TrainReport, EngineError> {
        self.run_schedule(lr, batch).inspect_err(|error| give_up(&**self.zero.group(), error))
    }

    fn run_schedule(
        &mut self,
        lr: f64,
        mut batch: impl FnMut(usize) -> Result<Batch, BoxError>,
    ) -> Result<TrainReport, EngineError> {
        let num_microbatches = self.grad_accum_steps;
        let mut pass = None;
        let mut loss_sum = 0.0;
        for action in schedule::without_pipeline(num_microbatches) {
            match action {
                Action::Forward { microbatch } => {
                    let batch =
                        batch(microbatch).map_err(|source| EngineError::Batch { microbatch, source })?;
                    let (forward, loss) = self.forward(batch)?;
                    pass = Some(forward);
                    loss_sum += loss;
                }
                Action::Backward { microbatch } => {
                    self.backward(microbatch, pass.take().expect("a schedule begins with the forward pass"))?;
                }
                Action::Step => {}
            }
        }
        (self.observer)(Phase::Step);
        let step = self.zero.step(lr, &[loss_sum])?;
        (self.observer)(Phase::Idle);
        let num_ranks = self.zero.group().group_size();
        let loss = step.sums[0] / (num_microbatches * num_ranks) as f64;
        Ok(TrainReport { loss, step })
    }

    fn forward(&mut self, batch: Batch) -> Result<(Pass, f64), EngineError> {
        let mut held = Vec::with_capacity(self.layers.len());
        let mut output = batch.input.shallow_clone();
        for index in 0..self.layers.len() {
            self.gather(index)?;
            self.prefetch(Some(index + 1))?;
            // A leaf of its own: this layer's graph ends here. It needs a gradient if a layer before it does.
            let input = output.f_detach()?.f_set_requires_grad(output.requires_grad())?;
            (self.observer)(Phase::Forward);
            let policy = self.policies[index];
            output = match policy {
                ActivationPolicy::Keep => self.call(index, &batch, &input, "forward")?,
                _ => no_grad(|| self.call(index, &batch, &input, "forward"))?,
            };
            output = self.own_output(index, output)?;
            let learns = input.requires_grad() || self.bindings[index].trainable().next().is_some();
            if policy.recomputes() && output.is_floating_point() {
                output = output.f_detach()?.f_set_requires_grad(learns)?;
            }
            self.release(index)?;
            held.push(match policy {
                _ if !output.requires_grad() => Held::Nothing,
                ActivationPolicy::Keep => Held::Graph { input, output: output.shallow_clone() },
                ActivationPolicy::Recompute => Held::Input(Parked::here(input)),
                ActivationPolicy::Offload => Held::Input(Parked::in_host_memory(&input)?),
            });
        }
        if output.numel() != 1 {
            return Err(EngineError::LossNotScalar { shape: output.size() });
        }
        Ok((Pass { batch, held }, output.f_double_value(&[])?))
    }

    /// Runs one layer on a micro-batch.
    fn call(
        &self,
        index: usize,
        batch: &Batch,
        input: &Tensor,
        pass: &'static str,
    ) -> Result<Tensor, EngineError> {
        let num_rows = batch.input.size().first().map_or(1, |&rows| rows as usize);
        let random = Randomness { seed: self.seed, first_row: batch.first_row, num_rows };
        let context = Context {
            target: Some(&batch.target),
            random: Some(random),
            loss_scale: self.zero.loss_scale(),
            head_chunk_rows: self.head_chunk_rows,
        };
        let params = self.bindings[index].params();
        self.layers[index].forward(&context, &params, input).map_err(|e| self.at(index, pass, e))
    }

    fn backward(&mut self, microbatch: usize, pass: Pass) -> Result<(), EngineError> {
        let Pass { batch, mut held } = pass;
        let mut pending: Vec<Option<Pending>> = (0..self.flats.len()).map(|_| None).collect();
        // Of the output of the layer to come; the loss itself has a number.
        let mut grad = None;
        while let Some(layer) = held.pop() {
            let index = held.len();
            let is_last = index + 1 == self.layers.len();
            // Without a trainable parameter here or before there is nothing to do, but units still count this use.
            let mut param_grads = Vec::new();
            let dy = grad.take();
            if !matches!(layer, Held::Nothing) && (is_last || dy.is_some()) {
                self.gather(index)?;
                self.prefetch(index.checked_sub(1))?;
                let (input, output) = match layer {
                    Held::Graph { input, output } => (input, output),
                    Held::Input(parked) => {
                        let input = parked.back()?;
                        (self.observer)(Phase::Forward);
                        let output = self.call(index, &batch, &input, "forward once more")?;
                        (input, output)
                    }
                    Held::Nothing => unreachable!("excluded above"),
                };
                (self.observer)(Phase::Backward);
                let dy = match dy {
                    Some(dy) => dy,
                    None => output.f_full_like(self.zero.loss_scale())?,
                };
                (grad, param_grads) = self.grads(index, &input, &output, &dy)?;
                self.release(index)?;
            }
            self.add_grads(index, microbatch, param_grads, &mut pending)?;
        }
        Ok(())
    }

    /// The gradients of a layer's input, if it needs one, and of its trainable parameters.
    fn grads(
        &self,
        index: usize,
        input: &Tensor,
        output: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Vec<Option<Tensor>>), EngineError> {
        if !output.requires_grad() {
            // Recomputed, and it has used nothing that learns.
            return Ok((None, Vec::new()));
        }
        let mut inputs: Vec<&Tensor> = self.bindings[index].trainable().map(|(_, tensor)| tensor).collect();
        let num_params = inputs.len();
        if input.requires_grad() {
            inputs.push(input);
        }
        let mut grads = autograd::grad(&[output], &[Some(dy)], &inputs)
            .map_err(|e| self.at(index, "backward", e.into()))?;
        let dx = grads.drain(num_params..).next().flatten();
        Ok((dx, grads))
    }

    /// Adds a layer's gradients to its units', and reduces the units that are complete.
    fn add_grads(
        &mut self,
        layer: usize,
        microbatch: usize,
        grads: Vec<Option<Tensor>>,
        pending: &mut [Option<Pending>],
    ) -> Result<(), EngineError> {
        let places: Vec<_> = self.bindings[layer].trainable().map(|(place, _)| place).collect();
        let units = self.bindings[layer].units.clone();
        for &unit in &units {
            pending[unit].get_or_insert_with(|| Pending {
                grads: self.zero.layout(unit).slots.iter().map(|_| None).collect(),
                num_left: self.num_users[unit],
            });
        }
        for (place, grad) in places.iter().zip(grads) {
            let Some(mut grad) = grad else { continue };
            if grad.is_sparse() {
                grad = grad.f_to_dense(None::<Kind>, false)?;
            }
            let slot = &mut pending[place.unit].as_mut().expect("made above").grads[place.slot];
            // A tied parameter: the other layer's gradient came first.
            *slot = Some(match slot.take() {
                Some(other) => other.f_add(&grad)?,
                None => grad,
            });
        }
        for unit in units {
            let state = pending[unit].as_mut().expect("made above");
            state.num_left -= 1;
            if state.num_left == 0 {
                let mut grads = pending[unit].take().expect("made above").grads;
                for grad in grads.iter_mut().flatten() {
                    // Libtorch lays out a gradient as it likes.
                    *grad = grad.f_contiguous()?;
                }
                self.reduce(unit, microbatch, &grads)?;
            }
        }
        Ok(())
    }

    fn reduce(
        &mut self,
        unit: usize,
        microbatch: usize,
        grads: &[Option<Tensor>],
    ) -> Result<(), EngineError> {
        (self.observer)(Phase::Reduce);
        let dtype = self.zero.compute_dtype();
        let slices: Vec<_> =
            grads.iter().map(|grad| grad.as_ref().map(|grad| slice_of(grad, dtype))).collect();
        Ok(self.zero.reduce(unit, microbatch, &slices)?)
    }
}

/// A contiguous tensor's memory.
fn slice_of(tensor: &Tensor, dtype: DType) -> Slice<'_> {
    // Autograd gives a gradient its parameter's type. Were it another, we would read other numbers in silence.
    assert!(tensor.is_contiguous() && tensor.kind() == kind_of(dtype), "a gradient is {:?}", tensor.kind());
    let ptr = std::ptr::NonNull::new(tensor.data_ptr().cast())
        .unwrap_or(std::ptr::NonNull::<u64>::dangling().cast());
    // SAFETY: a contiguous host tensor of this type holds its elements from `data_ptr` on, for as long as it lives;
    // nobody writes to a gradient.
    unsafe { Slice::from_raw(ptr, tensor.numel(), dtype, MemoryPlace::Cpu) }
}
