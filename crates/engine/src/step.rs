//! One training step: the schedule's actions, one after the other.

use shardwise_device::{DType, Place as MemoryPlace, Slice};
use shardwise_plan::schedule::{self, Action};
use shardwise_torch::{Kind, Tensor, autograd, kind_of};
use shardwise_zero::StepReport;

use crate::engine::give_up;
use crate::source::BoxError;
use crate::{Batch, Context, Engine, EngineError, Phase};

/// What a step did.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainReport {
    /// Mean loss over the global batch.
    pub loss: f64,
    /// Outcome and gradient norm.
    pub step: StepReport,
}

/// What a layer's graph hangs on, between its forward and its backward.
struct Kept {
    input: Tensor,
    output: Tensor,
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
        let mut kept = Vec::new();
        let mut loss_sum = 0.0;
        for action in schedule::without_pipeline(num_microbatches) {
            match action {
                Action::Forward { microbatch } => {
                    let batch =
                        batch(microbatch).map_err(|source| EngineError::Batch { microbatch, source })?;
                    kept = self.forward(&batch)?;
                    let loss = &kept.last().expect("a model has layers").output;
                    loss_sum += loss.f_double_value(&[])?;
                }
                Action::Backward { microbatch } => self.backward(microbatch, std::mem::take(&mut kept))?,
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

    fn forward(&mut self, batch: &Batch) -> Result<Vec<Kept>, EngineError> {
        let mut kept: Vec<Kept> = Vec::with_capacity(self.layers.len());
        let context = Context { target: Some(&batch.target) };
        for index in 0..self.layers.len() {
            self.gather(index)?;
            self.prefetch(Some(index + 1))?;
            let previous = kept.last().map_or(&batch.input, |kept| &kept.output);
            // A leaf of its own: this layer's graph ends here. It needs a gradient if a layer before it does.
            let input = previous.f_detach()?.f_set_requires_grad(previous.requires_grad())?;
            (self.observer)(Phase::Forward);
            let output = self.layers[index]
                .forward(&context, &self.bindings[index].params(), &input)
                .map_err(|e| self.at(index, "forward", e))?;
            let output = self.own_output(index, output)?;
            self.release(index)?;
            kept.push(Kept { input, output });
        }
        let loss = &kept.last().ok_or(EngineError::NoLayers)?.output;
        if loss.numel() != 1 {
            return Err(EngineError::LossNotScalar { shape: loss.size() });
        }
        Ok(kept)
    }

    fn backward(&mut self, microbatch: usize, mut kept: Vec<Kept>) -> Result<(), EngineError> {
        let mut pending: Vec<Option<Pending>> = (0..self.flats.len()).map(|_| None).collect();
        let loss = &kept.last().ok_or(EngineError::NoLayers)?.output;
        let mut grad = Some(loss.f_ones_like()?);
        while let Some(Kept { input, output }) = kept.pop() {
            let index = kept.len();
            // Without a trainable parameter here or before there is nothing to do, but units still count this use.
            let mut param_grads = Vec::new();
            if let Some(dy) = grad.take().filter(|_| output.requires_grad()) {
                self.gather(index)?;
                self.prefetch(index.checked_sub(1))?;
                (self.observer)(Phase::Backward);
                let binding = &self.bindings[index];
                let mut inputs: Vec<&Tensor> = binding.trainable().map(|(_, tensor)| tensor).collect();
                let num_params = inputs.len();
                if input.requires_grad() {
                    inputs.push(&input);
                }
                let mut grads = autograd::grad(&[&output], &[Some(&dy)], &inputs)
                    .map_err(|e| self.at(index, "backward", e.into()))?;
                grad = grads.drain(num_params..).next().flatten();
                param_grads = grads;
                self.release(index)?;
            }
            drop((input, output));
            self.add_grads(index, microbatch, param_grads, &mut pending)?;
        }
        Ok(())
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
