//! Model state: what a rank keeps for the whole run.

use std::mem::take;

use serde::Serialize;

use crate::{Bytes, Offload, OffloadTo, UnitLayout, ZeroStage};

/// Bytes of one element of each kind of state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StateWidths {
    /// The copy of the parameters that layers compute with.
    pub params: usize,
    /// The copy that the optimizer updates; 0 where that is the compute copy.
    pub master_params: usize,
    /// The optimizer's moments, together.
    pub optimizer: usize,
    /// Gradients, as summed over micro-batches and ranks.
    pub grads: usize,
}

impl StateWidths {
    /// The same for a run of `num_ranks`, with `grad_accum_steps` micro-batches in a step. The gradient of a single one is kept as layers made
    /// it: there is nothing to sum.
    #[must_use]
    pub fn of_run(self, num_ranks: usize, grad_accum_steps: usize) -> Self {
        match (num_ranks, grad_accum_steps) {
            (1, 1) => StateWidths { grads: self.grads.min(self.params), ..self },
            _ => self,
        }
    }

    /// AdamW in fp32 with gradients summed in fp32, for layers that compute in elements of `compute_bytes`. In fp32 the
    /// compute copy is the master copy.
    pub const fn adamw(compute_bytes: usize) -> Self {
        StateWidths::new(compute_bytes, 8, 4)
    }

    /// Layers that compute in elements of `compute_bytes`, an optimizer with `optimizer` bytes of states for each element, and
    /// gradients summed in elements of `grads` bytes.
    pub const fn new(compute_bytes: usize, optimizer: usize, grads: usize) -> Self {
        let master_params = if compute_bytes < 4 { 4 } else { 0 };
        StateWidths { params: compute_bytes, master_params, optimizer, grads }
    }
}

/// Bytes of model state on one rank, by kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct ModelState {
    /// Compute copy of the parameters.
    pub params: Bytes,
    /// Master weights.
    pub master_params: Bytes,
    /// Optimizer states.
    pub optimizer: Bytes,
    /// Gradients.
    pub grads: Bytes,
}

impl ModelState {
    /// What each rank keeps of `units`. All ranks keep the same, for shards are equal.
    ///
    /// # Source
    /// ZeRO (arXiv:1910.02054) section 3 and figure 1. Ours differs in that stage 1 shards the gradients too when nothing is
    /// accumulated.
    pub fn new(units: &[UnitLayout], stage: ZeroStage, grad_accum_steps: usize, widths: StateWidths) -> Self {
        let mut sum = ModelState::default();
        for unit in units {
            let share = |whole: bool| if whole { unit.padded_numel } else { unit.shard_numel() };
            sum.params += Bytes::of(share(!stage.shards_parameters()), widths.params);
            if unit.trainable {
                let owned = share(!stage.shards_optimizer());
                sum.master_params += Bytes::of(owned, widths.master_params);
                sum.optimizer += Bytes::of(owned, widths.optimizer);
                sum.grads += Bytes::of(share(stage.keeps_whole_gradients(grad_accum_steps)), widths.grads);
            }
        }
        sum
    }

    /// What each rank keeps of `units` in a GPU's memory, and on the host beside it.
    pub fn on_gpu(
        units: &[UnitLayout],
        stage: ZeroStage,
        grad_accum_steps: usize,
        widths: StateWidths,
        offload: Offload,
    ) -> (ModelState, ModelState) {
        let mut device = ModelState::new(units, stage, grad_accum_steps, widths);
        let mut host = ModelState::default();
        let is_apart = offload.optimizer != offload.params;
        let owned = |unit: &UnitLayout| match stage.shards_optimizer() {
            true => unit.shard_numel(),
            false => unit.padded_numel,
        };
        let owned_bytes = |width: usize| -> Bytes {
            let trained = units.iter().filter(|unit| unit.trainable);
            trained.map(|unit| Bytes::of(owned(unit), width)).sum()
        };
        if is_apart && widths.master_params == 0 {
            // The copy that layers compute with cannot be the one that is updated: it lies elsewhere.
            device.master_params = owned_bytes(widths.params);
        }
        if offload.params == OffloadTo::Host {
            host.params = take(&mut device.params);
        }
        if offload.optimizer == OffloadTo::Host {
            host.master_params = take(&mut device.master_params);
            host.optimizer = take(&mut device.optimizer);
            host.grads = owned_bytes(widths.grads);
            // Where gradients are accumulated whole, that is on the GPU.
            if !stage.sums_before_it_sends(grad_accum_steps) {
                device.grads = Bytes(0);
            }
        }
        (device, host)
    }

    /// All of it.
    pub fn total(&self) -> Bytes {
        self.params + self.master_params + self.optimizer + self.grads
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Init, ParamSpec};

    fn unit(numel: usize, trainable: bool, num_shards: usize) -> UnitLayout {
        UnitLayout::new("l", trainable, vec![ParamSpec::new("l", "w", &[numel], Init::Zeros)], num_shards)
    }

    /// 16-bit parameters and gradients, K = 12 bytes of optimizer state.
    const PAPER: StateWidths = StateWidths { params: 2, master_params: 4, optimizer: 8, grads: 2 };

    fn gb(units: &[UnitLayout], stage: ZeroStage) -> f64 {
        // The paper keeps the whole gradient in stage 1, as we do when micro-batches are accumulated.
        let bytes = ModelState::new(units, stage, 2, PAPER).total();
        (bytes.0 as f64 / 1e8).round() / 10.0
    }

    #[test]
    fn the_papers_figure_1() {
        let units = [unit(7_500_000_000, true, 64)];
        assert_eq!(ZeroStage::ALL.map(|stage| gb(&units, stage)), [120.0, 31.4, 16.6, 1.9]);
    }

    #[test]
    fn the_papers_trillion_parameters_on_1024_ranks() {
        assert_eq!(gb(&[unit(1_000_000_000_000, true, 1024)], ZeroStage::Three), 15.6);
    }

    #[test]
    fn our_widths() {
        let units = [unit(64 * 100, true, 2)];
        let per_param = |stage, accum, compute| {
            let state = ModelState::new(&units, stage, accum, StateWidths::adamw(compute));
            state.total().0 as f64 / 6400.0
        };
        // bf16: 2 + 4 + 8 + 4 in all.
        assert_eq!(ZeroStage::ALL.map(|stage| per_param(stage, 1, 2)), [18.0, 10.0, 10.0, 9.0]);
        assert_eq!(ZeroStage::ALL.map(|stage| per_param(stage, 4, 2)), [18.0, 12.0, 10.0, 9.0]);
        // fp32: 4 + 8 + 4.
        assert_eq!(ZeroStage::ALL.map(|stage| per_param(stage, 1, 4)), [16.0, 10.0, 10.0, 8.0]);
        assert_eq!(ZeroStage::ALL.map(|stage| per_param(stage, 4, 4)), [16.0, 12.0, 10.0, 8.0]);
    }

    #[test]
    fn frozen_parameters_have_a_compute_copy_and_nothing_else() {
        let units = [unit(640, true, 2), unit(1280, false, 2)];
        let state = ModelState::new(&units, ZeroStage::Three, 1, StateWidths::adamw(2));
        assert_eq!(state.params, Bytes(2 * (640 + 1280) / 2));
        assert_eq!(state.total(), state.params + Bytes((4 + 8 + 4) * 640 / 2));
    }
}
