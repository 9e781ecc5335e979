//! All state, by parameter and name: what a checkpoint keeps.
//!
//! State is told and given in parts of parameters, so it does not matter which stage and how many ranks wrote it. For a
//! trained parameter that is `param`, its fp32 weights, and each state of its optimizer (`exp_avg`, ...); for a frozen
//! one just `param`, in the compute type.

use std::ops::Range;

use shardwise_device::DType;
use shardwise_plan::ParamSpec;

use crate::tiers::{Shown, Tiers};
use crate::unit::{Trained, Unit};
use crate::update::Target;
use crate::{Zero, ZeroError};

/// The name of the weights among the states.
pub const PARAM: &str = "param";

/// A part of one state of one parameter.
#[derive(Debug)]
pub struct StateSlice<'a, B> {
    /// Index of the unit.
    pub unit: usize,
    /// The parameter.
    pub param: &'a ParamSpec,
    /// Which elements of the parameter, row by row.
    pub param_range: Range<usize>,
    /// [`PARAM`], or the name of an optimizer's state.
    pub name: &'static str,
    /// Type of the elements.
    pub dtype: DType,
    /// The elements: `&[u8]` or `&mut [u8]`.
    pub bytes: B,
}

impl Zero {
    /// Calls `visit` with the state in this rank's shard of every unit, in every stage: over all ranks each element of
    /// each state is told once. Needs no memory and no other rank.
    ///
    /// # Errors
    /// A collective that failed before; what `visit` says.
    pub fn for_each_state<E: From<ZeroError>>(
        &mut self,
        mut visit: impl FnMut(StateSlice<'_, &[u8]>) -> Result<(), E>,
    ) -> Result<(), E> {
        for unit in 0..self.units.len() {
            let shard = self.units[unit].layout.shard_range(self.group_rank);
            self.units[unit].visit(
                (unit, &self.tiers),
                shard,
                Shown::ToRead,
                &mut |StateSlice { unit, param, param_range, name, dtype, bytes }| {
                    visit(StateSlice { unit, param, param_range, name, dtype, bytes: &*bytes })
                },
            )?;
        }
        Ok(())
    }

    /// Goes on from saved state: calls `visit` to fill in the state that this rank keeps (all of it in stage 0), then brings
    /// the compute copies up to it. `num_steps` is what [`Zero::num_steps`] was. Gradients reduced so far are forgotten.
    ///
    /// After an error of `visit` this rank's state is partly filled; the other ranks do not wait for it.
    ///
    /// # Collective
    /// Every rank calls, between steps.
    /// # Errors
    /// A failed collective; what `visit` says.
    pub fn load_states<E: From<ZeroError>>(
        &mut self,
        num_steps: u64,
        mut visit: impl FnMut(StateSlice<'_, &mut [u8]>) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut outcome = Ok(());
        for unit in 0..self.units.len() {
            self.release(unit);
            if self.units[unit].trained.is_some() {
                self.settle(unit)?;
            }
            let owned = self.units[unit].owned.clone();
            if outcome.is_ok() {
                let at = (unit, &self.tiers);
                outcome = self.units[unit].visit(at, owned, Shown::ToWrite, &mut visit);
            }
            self.refresh_copy(unit)?;
            self.complete(unit)?;
        }
        self.num_steps = num_steps;
        outcome
    }
}

impl Unit {
    /// Visits the state of `range`, which lies in the owned range.
    fn visit<E: From<ZeroError>>(
        &mut self,
        (index, tiers): (usize, &Tiers),
        range: Range<usize>,
        shown: Shown,
        visit: &mut impl FnMut(StateSlice<'_, &mut [u8]>) -> Result<(), E>,
    ) -> Result<(), E> {
        let Unit { layout, owned, params, trained } = self;
        let mut copy = params.owned_copy(&layout.name, owned.clone())?;
        let offset = range.start - owned.start;
        for fragment in layout.fragments(range) {
            let param = &layout.slots[fragment.slot].param;
            let local = fragment.local_range.start + offset..fragment.local_range.end + offset;
            let slice = |name, dtype, param_range| StateSlice {
                unit: index,
                param,
                param_range,
                name,
                dtype,
                bytes: (),
            };
            let weights = match trained.as_mut().and_then(|trained| trained.master.as_mut()) {
                Some(master) => master.view_mut().into_range(local.clone()),
                None => copy.range_mut(local.clone()),
            };
            let told = slice(PARAM, weights.dtype(), fragment.param_range.clone());
            tiers.show(weights, shown, |bytes| visit(told.with(bytes)))?;
            for piece in trained.iter_mut().flat_map(|trained| &mut trained.pieces) {
                let (start, end) = (piece.range.start.max(local.start), piece.range.end.min(local.end));
                if start >= end {
                    continue;
                }
                let from = fragment.param_range.start;
                let part = from + start - local.start..from + end - local.start;
                for state in &mut piece.states {
                    let told = slice(state.name, state.values.dtype(), part.clone());
                    let at = start - piece.range.start..end - piece.range.start;
                    let values = state.values.view_mut().into_range(at);
                    tiers.show(values, shown, |bytes| visit(told.with(bytes)))?;
                }
            }
        }
        Ok(())
    }
}

impl Zero {
    /// Rounds the master weights into the compute copy, where they are apart.
    fn refresh_copy(&mut self, unit: usize) -> Result<(), ZeroError> {
        let Zero { units, tiers, .. } = self;
        let Unit { layout, owned, params, trained, .. } = &mut units[unit];
        let copy = params.owned_copy(&layout.name, owned.clone())?;
        let Some(Trained { master, num_reduced, pieces, .. }) = trained else { return Ok(()) };
        *num_reduced = 0;
        if master.is_none() {
            return Ok(());
        }
        let numel = copy.numel();
        let stepper = tiers.stepper.clone();
        let mut target = Target::new(tiers, copy, pieces)?;
        if let (master, Some(copy)) = target.master_and_copy(master, 0..numel) {
            stepper.scale(master.as_slice(), 1.0, copy)?;
        }
        target.finish(master.as_ref())
    }
}

impl<'a> StateSlice<'a, ()> {
    fn with<B>(self, bytes: B) -> StateSlice<'a, B> {
        let StateSlice { unit, param, param_range, name, dtype, bytes: () } = self;
        StateSlice { unit, param, param_range, name, dtype, bytes }
    }
}
