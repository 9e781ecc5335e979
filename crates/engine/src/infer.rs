//! The model without learning: predictions and losses.

use shardwise_torch::{Tensor, no_grad};

use shardwise_plan::pipeline::Payload;

use crate::engine::give_up;
use crate::transport::broadcast;
use crate::{Context, Engine, EngineError};

/// Positions of a sample that the last layer is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Positions {
    All,
    Last,
}

impl Engine {
    /// Runs the model without a target: what the last layer predicts.
    ///
    /// # Collective
    /// Ranks that differ in their pipeline stage or tensor rank only call with the same input; in stage 3 every rank calls.
    /// # Errors
    /// A layer or a collective that fails.
    pub fn predict(&mut self, input: &Tensor) -> Result<Tensor, EngineError> {
        self.run(input, None, Positions::All)
    }

    /// What [`Engine::predict`] gives for the last position alone, for models whose last layer takes each position by itself, as a
    /// language model's head does: the layer is given no more than that.
    ///
    /// # Shapes
    /// - `input`: `[batch, seq]`; what the last layer is given: `[batch, 1, ..]`
    /// # Collective
    /// As [`Engine::predict`].
    /// # Errors
    /// As [`Engine::predict`].
    pub fn predict_last(&mut self, input: &Tensor) -> Result<Tensor, EngineError> {
        self.run(input, None, Positions::Last)
    }

    /// Runs the model against a target without learning: the loss.
    ///
    /// # Collective
    /// As [`Engine::predict`].
    /// # Errors
    /// A layer or a collective that fails.
    pub fn evaluate(&mut self, input: &Tensor, target: &Tensor) -> Result<f64, EngineError> {
        Ok(self.run(input, Some(target), Positions::All)?.f_double_value(&[])?)
    }

    fn run(
        &mut self,
        input: &Tensor,
        target: Option<&Tensor>,
        positions: Positions,
    ) -> Result<Tensor, EngineError> {
        let outcome = self.run_parts(input, target, positions);
        // A replica that is one rank and holds every parameter runs alone: the others need not even have called.
        let is_alone = !self.zero.stage().shards_parameters()
            && self.stage.degree == 1
            && self.stage.stages.num_stages() == 1;
        match &outcome {
            Err(error) if !is_alone => give_up(&**self.ranks.world(), error),
            _ => {}
        }
        outcome
    }

    fn run_parts(
        &mut self,
        input: &Tensor,
        target: Option<&Tensor>,
        positions: Positions,
    ) -> Result<Tensor, EngineError> {
        let num_stages = self.stage.stages.num_stages();
        let mut x = self.home.bring(input)?;
        let target = target.map(|target| self.home.bring(target)).transpose()?;
        for part in self.stage.parts.clone() {
            // The part before is on the stage before, or on this one if there is no other.
            if part.index > 0 && num_stages > 1 {
                x = self.transport.recv(Payload::Activation, (part.index - 1) % num_stages)?;
            }
            for layer in part.layers.clone() {
                let is_last = part.is_last && layer + 1 == part.layers.end;
                if is_last && positions == Positions::Last && x.dim() > 1 {
                    x = x.f_narrow(1, x.size()[1] - 1, 1)?.f_contiguous()?;
                }
                x = self.run_layer(layer, &x, target.as_ref())?;
            }
            if !part.is_last && num_stages > 1 {
                self.transport.send(Payload::Activation, (part.index + 1) % num_stages, &x)?;
            }
        }
        if num_stages == 1 {
            return Ok(x);
        }
        let last = num_stages - 1;
        let result = (self.stage.stage == last).then_some(x);
        let result = broadcast(&self.ranks.pipeline, &self.home, last, result)?;
        self.transport.finish()?;
        Ok(result)
    }

    fn run_layer(
        &mut self,
        index: usize,
        x: &Tensor,
        target: Option<&Tensor>,
    ) -> Result<Tensor, EngineError> {
        self.gather(index)?;
        // A text to go on with is of any length: every rank has all of its tokens.
        let tensor = self.tensor.with_all_tokens();
        let context =
            Context { tensor: Some(&tensor), gpu: self.home.gpu.as_ref(), ..Context::inference(target) };
        let (layer, params) = (&self.layers[index], self.bindings[index].params());
        let x = no_grad(|| layer.forward(&context, &params, x)).map_err(|e| self.at(index, "forward", e))?;
        let x = self.own_output(index, x)?;
        self.release(index)?;
        Ok(x)
    }
}
