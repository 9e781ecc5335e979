//! One part of the model on one micro-batch: its layers forward, and backward.

use std::rc::Rc;

use shardwise_plan::ActivationPolicy;
use shardwise_torch::{Kind, Tensor, autograd, no_grad};

use crate::gradients::Gradients;
use crate::parked::Parked;
use crate::stage::Part;
use crate::{Batch, Context, Engine, EngineError, Phase, Randomness};

/// What is held of a layer between its forward and its backward.
pub(crate) enum Held {
    /// Nothing: no gradient goes through it.
    Nothing,
    /// What its graph hangs on.
    Graph { input: Tensor, output: Tensor },
    /// Its input: the forward pass runs once more.
    Input(Parked),
    /// What the gradients of its parameters follow from, when that of its input is known.
    Weights { output: Tensor, dy: Tensor },
}

/// A micro-batch between its forward and its backward through one part.
pub(crate) struct Pass {
    batch: Rc<Batch>,
    held: Vec<Held>,
    /// Size and type of the part's input.
    input: (Vec<i64>, Kind),
}

/// Which gradients a backward pass is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Half {
    /// All of them.
    Both,
    /// Those that earlier layers wait for.
    Inputs,
    /// The rest: those of parameters.
    Weights,
}

impl Engine {
    /// Runs a part forward; `input` needs a gradient if an earlier part learns.
    pub(crate) fn forward(
        &mut self,
        part: &Part,
        batch: Rc<Batch>,
        input: Tensor,
    ) -> Result<(Pass, Tensor), EngineError> {
        let mut held = Vec::with_capacity(part.layers.len());
        let kind = (input.size(), input.kind());
        let mut output = input;
        for index in part.layers.clone() {
            self.gather(index)?;
            self.prefetch(Some(index + 1).filter(|next| part.layers.contains(next)))?;
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
        Ok((Pass { batch, held, input: kind }, output))
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
            tensor: Some(&self.tensor),
        };
        let params = self.bindings[index].params();
        self.layers[index].forward(&context, &params, input).map_err(|e| self.at(index, pass, e))
    }

    /// Runs a part backward: from the gradient of its output, or from the loss, to that of its input, if an earlier part
    /// wants it, and of its parameters.
    pub(crate) fn backward(
        &mut self,
        part: &Part,
        microbatch: usize,
        pass: &mut Pass,
        half: Half,
        dy: Option<Tensor>,
        gradients: &mut Gradients,
    ) -> Result<Option<Tensor>, EngineError> {
        let mut grad = dy;
        for index in part.layers.clone().rev() {
            let place = index - part.layers.start;
            let is_last = part.is_last && index + 1 == part.layers.end;
            // Without a trainable parameter here or before there is nothing to do, but units still count this use.
            let mut param_grads = Vec::new();
            let dy = grad.take();
            let layer = std::mem::replace(&mut pass.held[place], Held::Nothing);
            let has_work = match half {
                Half::Weights => matches!(layer, Held::Weights { .. }),
                _ => !matches!(layer, Held::Nothing) && (is_last || dy.is_some()),
            };
            if has_work {
                self.gather(index)?;
                self.prefetch(index.checked_sub(1).filter(|next| part.layers.contains(next)))?;
                let (input, output, dy) = match layer {
                    Held::Weights { output, dy } => (None, output, Some(dy)),
                    Held::Graph { input, output } => (Some(input), output, dy),
                    Held::Input(parked) => {
                        let input = parked.back()?;
                        (self.observer)(Phase::Forward);
                        let output = self.call(index, &pass.batch, &input, "forward once more")?;
                        (Some(input), output, dy)
                    }
                    Held::Nothing => unreachable!("excluded above"),
                };
                (self.observer)(Phase::Backward);
                let dy = match dy {
                    Some(dy) => dy,
                    None => output.f_full_like(self.zero.loss_scale())?,
                };
                if half == Half::Inputs {
                    grad = self.input_grad(index, input.as_ref(), &output, &dy)?;
                    pass.held[place] = Held::Weights { output, dy };
                } else {
                    (grad, param_grads) = self.grads(index, input.as_ref(), &output, &dy)?;
                }
                self.release(index)?;
            }
            if half != Half::Inputs {
                self.add_grads(index, microbatch, param_grads, gradients)?;
            }
        }
        // A part that does not use its input gives back zeros: the other stage waits for something.
        if grad.is_none() && part.learns_before && half != Half::Weights {
            let (size, kind) = &pass.input;
            grad = Some(Tensor::f_zeros(size.as_slice(), (*kind, shardwise_torch::Device::Cpu))?);
        }
        Ok(grad)
    }

    /// The gradients of a layer's input, if it needs one, and of its trainable parameters.
    fn grads(
        &self,
        index: usize,
        input: Option<&Tensor>,
        output: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Vec<Option<Tensor>>), EngineError> {
        if !output.requires_grad() {
            // Recomputed, and it has used nothing that learns.
            return Ok((None, Vec::new()));
        }
        let mut inputs: Vec<&Tensor> = self.bindings[index].trainable().map(|(_, tensor)| tensor).collect();
        let num_params = inputs.len();
        inputs.extend(input.filter(|input| input.requires_grad()));
        if inputs.is_empty() {
            return Ok((None, Vec::new()));
        }
        let mut grads =
            autograd::grad(&[output], &[Some(dy)], &inputs).map_err(|e| self.backward_failed(index, e))?;
        let dx = grads.drain(num_params..).next().flatten();
        Ok((dx, grads))
    }

    /// The gradient of a layer's input alone; the graph stays for those of its parameters.
    fn input_grad(
        &self,
        index: usize,
        input: Option<&Tensor>,
        output: &Tensor,
        dy: &Tensor,
    ) -> Result<Option<Tensor>, EngineError> {
        let Some(input) = input.filter(|input| input.requires_grad() && output.requires_grad()) else {
            return Ok(None);
        };
        let grads = autograd::grad_and_keep(&[output], &[Some(dy)], &[input]);
        Ok(grads.map_err(|e| self.backward_failed(index, e))?.into_iter().next().flatten())
    }

    /// A failure between ranks comes through libtorch as a text: it is told as what it was.
    fn backward_failed(&self, index: usize, error: shardwise_torch::TorchError) -> EngineError {
        let error = match self.tensor.take_failure() {
            Some(failure) => EngineError::Comm(failure),
            None => error.into(),
        };
        self.at(index, "backward", error)
    }
}
