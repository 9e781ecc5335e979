//! One training step: this stage's actions of the schedule, one after the other.

use std::collections::HashMap;
use std::rc::Rc;

use shardwise_device::cuda::wait_on_host;
use shardwise_plan::pipeline::{Action, Payload, Piece};
use shardwise_torch::{Device, Kind, Tensor};
use shardwise_zero::StepReport;

use crate::engine::give_up;
use crate::gradients::Gradients;
use crate::pass::{Half, Pass};
use crate::source::BoxError;
use crate::stage::Part;
use crate::{Batch, Engine, EngineError, Phase};

/// The sum of the losses of micro-batches, in their order; ranks of a tensor group have the same, and one of them tells it.
fn sum_of(losses: &[Tensor]) -> Result<f64, EngineError> {
    let Some((first, others)) = losses.split_first() else { return Ok(0.0) };
    let all = if others.is_empty() { first.view([1]) } else { Tensor::f_stack(losses, 0)? };
    // With the last of them all are on the host.
    let all = wait_on_host(|| all.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double))?;
    let mut values = vec![0.0; losses.len()];
    all.f_copy_data(&mut values, losses.len())?;
    Ok(values.iter().sum())
}

/// What a step did.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainReport {
    /// Mean loss over the global batch.
    pub loss: f64,
    /// Outcome and gradient norm.
    pub step: StepReport,
}

/// A step under way on one stage.
#[derive(Default)]
struct Progress {
    /// Batches by micro-batch, and how many parts have yet to go through them backward.
    batches: HashMap<usize, (Rc<Batch>, usize)>,
    passes: HashMap<Piece, Pass>,
    /// Inputs of parts, and gradients of their outputs, that are here.
    inputs: HashMap<Piece, Tensor>,
    output_grads: HashMap<Piece, Tensor>,
    /// Outputs of parts, and gradients of their inputs, that another stage is to have.
    outputs: HashMap<Piece, Tensor>,
    input_grads: HashMap<Piece, Tensor>,
    gradients: Gradients,
    /// Of this rank's micro-batches. Looked at once, at the end: on a GPU that waits for all work before.
    losses: Vec<Tensor>,
}

impl Engine {
    /// Trains on one global batch; `batch` gives this rank's micro-batches, by index. Ranks that differ in their pipeline
    /// stage or tensor rank only are given the same.
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
        self.run_schedule(lr, batch).inspect_err(|error| give_up(&**self.ranks.world(), error))
    }

    fn run_schedule(
        &mut self,
        lr: f64,
        mut batch: impl FnMut(usize) -> Result<Batch, BoxError>,
    ) -> Result<TrainReport, EngineError> {
        let actions = self.actions.clone();
        let mut progress = Progress::default();
        let mut step = None;
        for &action in actions.iter() {
            match action {
                Action::ReduceTied => {
                    for (unit, stages) in &self.tied {
                        self.zero.all_reduce_gradient(*unit, stages)?;
                    }
                }
                // Every unit is reduced with its last micro-batch.
                Action::ReduceGrads => {}
                Action::Step => {
                    (self.observer)(Phase::Step);
                    let losses = std::mem::take(&mut progress.losses);
                    let losses = if self.stage.tensor_rank == 0 { losses } else { Vec::new() };
                    // Read after the norm was: a GPU is waited for once.
                    step = Some(self.zero.step_telling(lr, || Ok::<_, EngineError>([sum_of(&losses)?]))?);
                    // All ranks have been in the step, and have taken every message before.
                    self.transport.finish()?;
                    (self.observer)(Phase::Idle);
                }
                _ => self.act(action, &mut progress, &mut batch)?,
            }
        }
        let step = step.expect("a schedule ends with the step");
        let num_losses = self.stage.schedule.num_microbatches() * self.zero.group().group_size();
        Ok(TrainReport { loss: step.sums[0] / num_losses as f64, step })
    }

    /// Computes with one micro-batch and one part, or exchanges what another stage has or wants.
    fn act(
        &mut self,
        action: Action,
        progress: &mut Progress,
        batch: &mut impl FnMut(usize) -> Result<Batch, BoxError>,
    ) -> Result<(), EngineError> {
        if !self.is_wanted(action) {
            return Ok(());
        }
        let Some(piece) = action.piece() else { return Ok(()) };
        let part = self.stage.parts[piece.chunk].clone();
        match action {
            Action::RecvActivation { from, .. } => {
                let input = self.transport.recv(Payload::Activation, from)?;
                progress.inputs.insert(piece, input);
            }
            Action::SendActivation { to, .. } => {
                let output = progress.outputs.remove(&piece).expect("made by the forward pass before");
                self.transport.send(Payload::Activation, to, &output)?;
            }
            Action::RecvGrad { from, .. } => {
                let grad = self.transport.recv(Payload::Grad, from)?;
                progress.output_grads.insert(piece, grad);
            }
            Action::SendGrad { to, .. } => {
                let grad = progress.input_grads.remove(&piece).expect("made by the backward pass before");
                self.transport.send(Payload::Grad, to, &grad)?;
            }
            Action::Forward(_) => self.act_forward(piece, &part, progress, batch)?,
            Action::Backward(_) => self.act_backward(piece, &part, Half::Both, progress)?,
            Action::BackwardInput(_) => self.act_backward(piece, &part, Half::Inputs, progress)?,
            Action::BackwardWeight(_) => self.act_backward(piece, &part, Half::Weights, progress)?,
            Action::ReduceTied | Action::ReduceGrads | Action::Step => {}
        }
        Ok(())
    }

    /// Whether a message is sent at all: nobody wants a gradient where nothing learns.
    fn is_wanted(&self, action: Action) -> bool {
        match action {
            Action::SendGrad { piece, .. } => self.stage.parts[piece.chunk].learns_before,
            Action::RecvGrad { piece, .. } => self.stage.parts[piece.chunk].learns_until,
            _ => true,
        }
    }

    fn act_forward(
        &mut self,
        piece: Piece,
        part: &Part,
        progress: &mut Progress,
        batch: &mut impl FnMut(usize) -> Result<Batch, BoxError>,
    ) -> Result<(), EngineError> {
        let Piece { microbatch, chunk } = piece;
        if let std::collections::hash_map::Entry::Vacant(entry) = progress.batches.entry(microbatch) {
            let batch = batch(microbatch).map_err(|source| EngineError::Batch { microbatch, source })?;
            let (input, target) = (self.home.bring(&batch.input)?, self.home.bring(&batch.target)?);
            let batch = Batch { input, target, ..batch };
            entry.insert((Rc::new(batch), self.stage.parts.len()));
        }
        let batch = progress.batches[&microbatch].0.clone();
        let input = match part.index {
            0 => batch.input.shallow_clone(),
            _ => {
                let input = progress.inputs.remove(&piece).expect("received, or made here, before");
                input.f_set_requires_grad(part.learns_before)?
            }
        };
        let (pass, output) = self.forward(part, batch, input)?;
        progress.passes.insert(piece, pass);
        if part.is_last {
            if output.numel() != 1 {
                return Err(EngineError::LossNotScalar { shape: output.size() });
            }
            progress.losses.push(output.f_detach()?);
            return Ok(());
        }
        let output = output.f_detach()?;
        match self.next_chunk(chunk) {
            Some(chunk) => progress.inputs.insert(Piece { microbatch, chunk }, output),
            None => progress.outputs.insert(piece, output),
        };
        Ok(())
    }

    fn act_backward(
        &mut self,
        piece: Piece,
        part: &Part,
        half: Half,
        progress: &mut Progress,
    ) -> Result<(), EngineError> {
        let Piece { microbatch, chunk } = piece;
        let mut pass = progress.passes.remove(&piece).expect("a schedule begins with the forward pass");
        let dy = progress.output_grads.remove(&piece);
        let grad = self.backward(part, microbatch, &mut pass, half, dy, &mut progress.gradients)?;
        if let Some(grad) = grad.filter(|_| part.index > 0 && part.learns_before) {
            match chunk.checked_sub(1).filter(|_| self.next_chunk(chunk - 1).is_some()) {
                Some(chunk) => progress.output_grads.insert(Piece { microbatch, chunk }, grad),
                None => progress.input_grads.insert(piece, grad),
            };
        }
        if half == Half::Inputs {
            progress.passes.insert(piece, pass);
        } else if let Some((_, num_left)) = progress.batches.get_mut(&microbatch) {
            *num_left -= 1;
            if *num_left == 0 {
                progress.batches.remove(&microbatch);
            }
        }
        Ok(())
    }

    /// The chunk that takes the output of `chunk`, if that is on this stage too: there is only one.
    fn next_chunk(&self, chunk: usize) -> Option<usize> {
        (self.stage.stages.num_stages() == 1).then_some(chunk + 1)
    }
}
