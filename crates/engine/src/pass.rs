//! One part of the model on one micro-batch: its layers forward, and backward.

use std::rc::Rc;

use shardwise_plan::ActivationPolicy;
use shardwise_torch::{Kind, Tensor, TorchError, autograd, no_grad};

use crate::gradients::Gradients;
use crate::parked::Parked;
use crate::stage::Part;
use crate::{Batch, Context, DeferredWeights, Engine, EngineError, Phase, Randomness};

/// What is held of a layer between its forward and its backward.
pub(crate) enum Held {
    /// Nothing: no gradient goes through it.
    Nothing,
    /// What its graph hangs on.
    Graph(Graph),
    /// Its input: the forward pass runs once more.
    Input(Parked),
    /// The gradients of its parameters, but for those that wait.
    Weights { grads: Vec<Option<Tensor>>, deferred: DeferredWeights },
    /// Nothing: it has gone backward, and none of its gradients wait.
    Done,
}

/// A layer that has run forward.
pub(crate) struct Graph {
    input: Tensor,
    output: Tensor,
    /// Where its backward pass is in two halves.
    deferred: Option<DeferredWeights>,
}

/// A micro-batch between its forward and its backward through one part.
pub(crate) struct Pass {
    batch: Rc<Batch>,
    held: Vec<Held>,
    /// Size and type of the part's input.
    input: (Vec<i64>, Kind),
}

/// A way through a graph.
type Through = fn(&[&Tensor], &[Option<&Tensor>], &[&Tensor]) -> Result<Vec<Option<Tensor>>, TorchError>;

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
            let deferred = self.new_deferred();
            output = match policy {
                ActivationPolicy::Keep => self.call(index, &batch, &input, deferred.as_ref(), "forward")?,
                _ => no_grad(|| self.call(index, &batch, &input, None, "forward"))?,
            };
            output = self.own_output(index, output)?;
            let learns = input.requires_grad() || self.bindings[index].trainable().next().is_some();
            if policy.recomputes() && output.is_floating_point() {
                output = output.f_detach()?.f_set_requires_grad(learns)?;
            }
            self.release(index)?;
            held.push(match policy {
                _ if !output.requires_grad() => Held::Nothing,
                ActivationPolicy::Keep => {
                    Held::Graph(Graph { input, output: output.shallow_clone(), deferred })
                }
                ActivationPolicy::Recompute => Held::Input(Parked::here(input)),
                ActivationPolicy::Offload => Held::Input(match &mut self.garage {
                    Some(garage) => garage.park(&input, &self.home)?,
                    None => Parked::here(input),
                }),
            });
        }
        Ok((Pass { batch, held, input: kind }, output))
    }

    /// A place for the gradients that wait, if any do.
    fn new_deferred(&self) -> Option<DeferredWeights> {
        self.defers_weights.then(DeferredWeights::default)
    }

    /// Runs one layer on a micro-batch.
    fn call(
        &self,
        index: usize,
        batch: &Batch,
        input: &Tensor,
        deferred: Option<&DeferredWeights>,
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
            deferred,
            gpu: self.home.gpu.as_ref(),
        };
        let params = self.bindings[index].params();
        let _span = self.home.span(|| format!("{pass} {}", self.stage.local[index].name))?;
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
            let layer = std::mem::replace(&mut pass.held[place], Held::Nothing);
            if half == Half::Weights {
                // Nothing of the layer is needed any more, nor its parameters.
                let grads = match layer {
                    Held::Weights { grads, deferred } => {
                        (self.observer)(Phase::Backward);
                        self.with_deferred(index, grads, &deferred)?
                    }
                    Held::Done => continue,
                    _ => Vec::new(),
                };
                self.add_grads(index, microbatch, grads, gradients)?;
                continue;
            }
            let is_last = part.is_last && index + 1 == part.layers.end;
            // Without a trainable parameter here or before there is nothing to do, but units still count this use.
            let mut param_grads = Vec::new();
            let dy = grad.take();
            if !matches!(layer, Held::Nothing) && (is_last || dy.is_some()) {
                self.gather(index)?;
                let before = index.checked_sub(1).filter(|before| {
                    part.layers.contains(before)
                        && !matches!(pass.held[before - part.layers.start], Held::Nothing)
                });
                self.prefetch(before)?;
                if let Some(before) = before {
                    self.fetch_input(&mut pass.held[before - part.layers.start])?;
                }
                let graph = self.graph(index, &pass.batch, layer)?;
                (self.observer)(Phase::Backward);
                let dy = match dy {
                    Some(dy) => dy,
                    None => graph.output.f_full_like(self.zero.loss_scale())?,
                };
                (grad, param_grads) = self.grads(index, &graph, &dy)?;
                self.release(index)?;
                match graph.deferred {
                    Some(deferred) if !deferred.is_empty() => {
                        pass.held[place] = Held::Weights { grads: param_grads, deferred };
                        continue;
                    }
                    _ => {}
                }
            }
            if half == Half::Inputs {
                pass.held[place] = Held::Done;
            }
            self.add_grads(index, microbatch, param_grads, gradients)?;
        }
        // A part that does not use its input gives back zeros: the other stage waits for something.
        if grad.is_none() && part.learns_before && half != Half::Weights {
            let (size, kind) = &pass.input;
            grad = Some(Tensor::f_zeros(size.as_slice(), (*kind, self.home.device))?);
        }
        Ok(grad)
    }

    /// Starts to bring back what is held of a layer, if it is away.
    fn fetch_input(&mut self, held: &mut Held) -> Result<(), EngineError> {
        *held = match std::mem::replace(held, Held::Nothing) {
            Held::Input(parked) => Held::Input(parked.fetched(self.garage.as_mut(), &self.home)?),
            other => other,
        };
        Ok(())
    }

    /// A layer's graph: the one that was kept, or one made anew.
    fn graph(&mut self, index: usize, batch: &Batch, layer: Held) -> Result<Graph, EngineError> {
        match layer {
            Held::Graph(graph) => Ok(graph),
            Held::Input(parked) => {
                let input = parked.back(self.garage.as_mut(), &self.home)?;
                let deferred = self.new_deferred();
                let output = self.call(index, batch, &input, deferred.as_ref(), "forward once more")?;
                Ok(Graph { input, output, deferred })
            }
            Held::Nothing | Held::Weights { .. } | Held::Done => {
                unreachable!("a layer goes backward once, if it learns")
            }
        }
    }

    /// The gradients of a layer's input, if it needs one, and of its trainable parameters, but for those that wait.
    fn grads(
        &self,
        index: usize,
        graph: &Graph,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Vec<Option<Tensor>>), EngineError> {
        let Graph { input, output, deferred } = graph;
        if !output.requires_grad() {
            // Recomputed, and it has used nothing that learns.
            return Ok((None, Vec::new()));
        }
        let _span = self.home.span(|| format!("backward {}", self.stage.local[index].name))?;
        let params: Vec<&Tensor> = self.bindings[index].trainable().map(|(_, tensor)| tensor).collect();
        let through = |wanted: &[&Tensor], grad: Through| {
            let grads = if wanted.is_empty() { Ok(Vec::new()) } else { grad(&[output], &[Some(dy)], wanted) };
            Ok::<_, EngineError>(grads.map_err(|e| self.backward_failed(index, e))?.into_iter())
        };
        let dx_wanted = input.requires_grad().then_some(input);
        let Some(deferred) = deferred else {
            let wanted: Vec<&Tensor> = params.iter().copied().chain(dx_wanted).collect();
            let mut grads = through(&wanted, autograd::grad)?;
            let param_grads = grads.by_ref().take(params.len()).collect();
            return Ok((grads.next().flatten(), param_grads));
        };
        let at_once = params.iter().copied().filter(|param| !deferred.waits(param));
        let mut grads = through(&at_once.chain(dx_wanted).collect::<Vec<_>>(), autograd::grad_and_keep)?;
        let mut param_grads: Vec<Option<Tensor>> = Vec::with_capacity(params.len());
        for param in &params {
            param_grads.push(if deferred.waits(param) { None } else { grads.next().flatten() });
        }
        let dx = grads.next().flatten();
        // A linear map that is not between the input and the output was not come by: its matrix does not wait.
        let lacking: Vec<usize> =
            (0..params.len()).filter(|&i| deferred.waits(params[i]) && deferred.lacks(params[i])).collect();
        let wanted: Vec<&Tensor> = lacking.iter().map(|&i| params[i]).collect();
        deferred.close();
        let made = through(&wanted, autograd::grad)?;
        for (i, grad) in lacking.into_iter().zip(made) {
            param_grads[i] = grad;
        }
        Ok((dx, param_grads))
    }

    /// The gradients of a layer's trainable parameters, with those that have waited.
    fn with_deferred(
        &self,
        index: usize,
        grads: Vec<Option<Tensor>>,
        deferred: &DeferredWeights,
    ) -> Result<Vec<Option<Tensor>>, EngineError> {
        let params = self.bindings[index].trainable().map(|(_, tensor)| tensor);
        let whole = params.zip(grads).map(|(param, made)| match made {
            Some(grad) => Ok(Some(grad)),
            None => no_grad(|| deferred.grad(param)),
        });
        let whole: Result<Vec<_>, _> = whole.collect();
        whole.map_err(|e| self.at(index, "backward", e.into()))
    }

    /// A failure between ranks comes through libtorch as a text: it is told as what it was.
    fn backward_failed(&self, index: usize, error: TorchError) -> EngineError {
        let error = match self.tensor.take_failure() {
            Some(failure) => EngineError::Comm(failure),
            None => error.into(),
        };
        self.at(index, "backward", error)
    }
}
