//! LAMB: norms of whole parameters, between its two passes.
//!
//! ```text
//! first pass     a row of the table for each shard that this rank owns, with two numbers for each parameter
//! exchange       where state is sharded: the rows of all data ranks, in rank order
//!                where tensor ranks have parts: the rows' sum, and that of all tensor ranks
//! second pass    each parameter adds its column, in order
//! ```
//!
//! So norms are summed within shards and then in rank order, also where one rank has all shards, and stages agree bit for bit. The table
//! lies where steps are computed: on a GPU the host queues both passes and reads no norm.

use std::mem::replace;

use shardwise_device::{Buffer, DType, SliceMut};
use shardwise_kernels::Processor;
use shardwise_kernels::optimizer::{Lamb, SquaredNorms};
use shardwise_kernels::processor::{LambApplySlices, LambMomentSlices, NormColumn};

use crate::algorithm::Algorithm;
use crate::pieces::Piece;
use crate::unit::{Trained, Unit};
use crate::update::{Moved, Target, Update};
use crate::{Optimizer, Zero, ZeroError};

/// Bytes of one parameter's norms.
const PAIR: usize = SquaredNorms::NUM_BYTES;

/// Squared norms of every parameter of every unit, as bytes.
pub(crate) struct NormTable {
    rows: Buffer,
    num_rows: usize,
    /// The number of each unit's first parameter.
    starts: Vec<usize>,
}

impl NormTable {
    /// Where the norms of a piece go.
    pub fn place(&mut self, unit: usize, piece: &Piece) -> SliceMut<'_> {
        // A rank that owns one shard has that row alone.
        let row = if self.num_rows == 1 { 0 } else { piece.shard };
        let at = row * self.row_bytes() + (self.starts[unit] + piece.slot) * PAIR;
        self.rows.view_mut().into_range(at..at + PAIR)
    }

    fn of(&self, unit: usize, slot: usize) -> NormColumn<'_> {
        let (table, tensor) = (self.rows.view(), self.starts[unit] + slot);
        NormColumn { table, num_rows: self.num_rows, tensor }
    }

    fn row_bytes(&self) -> usize {
        self.rows.numel() / self.num_rows
    }
}

impl Zero {
    /// Before the first unit's gradient is taken: norms of nothing.
    pub(crate) fn begin_update(&mut self) -> Result<(), ZeroError> {
        let Optimizer::Lamb(_) = self.options.optimizer else { return Ok(()) };
        let num_params = self.units.iter().map(|unit| unit.layout.slots.len());
        let starts =
            num_params.clone().scan(0, |start, numel| Some(replace(start, *start + numel))).collect();
        let num_rows = if self.options.stage.shards_optimizer() { 1 } else { self.group().group_size() };
        let num_bytes = num_rows * num_params.sum::<usize>() * PAIR;
        let mut rows = self.step_pool().take(DType::U8, num_bytes)?;
        self.tiers.stepper.zero(rows.view_mut())?;
        self.norms = Some(NormTable { rows, num_rows, starts });
        Ok(())
    }

    /// Ends the update of all units.
    pub(crate) fn finish_update(&mut self, update: Update) -> Result<(), ZeroError> {
        let Some(norms) = self.norms.take() else { return Ok(()) };
        let norms = self.over_data_ranks(norms)?;
        let norms = self.over_tensor_ranks(norms)?;
        for index in 0..self.units.len() {
            let Zero { units, tiers, .. } = &mut *self;
            let stepper = tiers.stepper.clone();
            let Unit { layout, owned, params, trained: Some(trained), .. } = &mut units[index] else {
                continue;
            };
            let copy = params.owned_copy(&layout.name, owned.clone())?;
            let mut target = Target::new(tiers, copy, &trained.pieces)?;
            let Trained { master, pieces, .. } = &mut *trained;
            for piece in pieces {
                let (master, compute) = target.master_and_copy(master, piece.range.clone());
                let states = [piece.states[0].values.view(), piece.states[1].values.view()];
                let norms = norms.of(index, piece.slot);
                let slices = LambApplySlices { master, states, compute, norms };
                stepper.lamb_apply(&piece.lamb(update), slices)?;
            }
            target.finish(trained.master.as_ref())?;
            self.complete(index)?;
        }
        self.step_pool().give_back(norms.rows);
        Ok(())
    }

    /// The rows of all shards, where this rank has one.
    fn over_data_ranks(&mut self, norms: NormTable) -> Result<NormTable, ZeroError> {
        if !self.options.stage.shards_optimizer() {
            return Ok(norms);
        }
        let num_rows = self.group().group_size();
        let all = self.step_pool().take(DType::U8, num_rows * norms.rows.numel())?;
        let (own, rows) = self.lane.all_gather(norms.rows, all)?.wait()?;
        self.step_pool().give_back(own);
        Ok(NormTable { rows, num_rows, ..norms })
    }

    /// A row from each tensor rank, where these have parts of parameters. Each part counts once: what another rank speaks for is
    /// taken from there.
    fn over_tensor_ranks(&mut self, norms: NormTable) -> Result<NormTable, ZeroError> {
        let tensor = self.groups().tensor.clone();
        let (num_rows, row_bytes) = (tensor.group_size(), norms.row_bytes());
        if num_rows == 1 {
            return Ok(norms);
        }
        let mut own = self.step_pool().take(DType::U8, row_bytes)?;
        self.tiers.stepper.add_norms(norms.rows.view(), norms.num_rows, own.view_mut())?;
        for (unit, start) in self.units.iter().zip(&norms.starts) {
            for (slot, index) in unit.layout.slots.iter().zip(*start..) {
                if self.placement.tensor_replicas.contains(&slot.param.name) {
                    let at = index * PAIR..(index + 1) * PAIR;
                    self.tiers.stepper.zero(own.view_mut().into_range(at))?;
                }
            }
        }
        let mut rows = self.step_pool().take(DType::U8, num_rows * row_bytes)?;
        self.lane.beside(&tensor, |group| group.all_gather(own.view(), rows.view_mut()))?;
        self.step_pool().give_back(own);
        self.step_pool().give_back(norms.rows);
        Ok(NormTable { rows, num_rows, ..norms })
    }
}

impl Piece {
    /// LAMB's first pass.
    pub(crate) fn take_moments(
        &mut self,
        stepper: &Processor,
        update: Update,
        moved: Moved<'_>,
    ) -> Result<(), ZeroError> {
        let lamb = self.lamb(update);
        let Moved { grad, master, norms: Some(norms), .. } = moved else {
            unreachable!("a step of LAMB begins with a table")
        };
        let [m, v] = &mut self.states[..] else { unreachable!("LAMB has two states") };
        let states = [m.values.view_mut(), v.values.view_mut()];
        let slices = LambMomentSlices { grad, master: master.as_slice(), states, norms };
        Ok(stepper.lamb_moments(&lamb, update.grad_scale, slices)?)
    }

    fn lamb(&self, update: Update) -> Lamb {
        let Algorithm::Lamb(options) = self.settings.algorithm else {
            unreachable!("LAMB takes all parameters or none")
        };
        Lamb {
            lr: self.lr(update),
            beta1: options.beta1,
            beta2: options.beta2,
            eps: options.eps,
            weight_decay: self.settings.weight_decay,
            max_coeff: options.max_coeff,
            min_coeff: options.min_coeff,
            bias_correction: options.bias_correction,
            step: update.step,
        }
    }
}
