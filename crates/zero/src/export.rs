//! Whole parameters in fp32, one unit at a time: for files and for tests.

use shardwise_device::{Buffer, DType, Place, Slice};
use shardwise_kernels::cast;
use shardwise_plan::ParamSpec;

use crate::unit::ParamState;
use crate::{Zero, ZeroError};

/// Which copy of the parameters is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Master,
    Compute,
}

impl Zero {
    /// Calls `visit` on every rank with each parameter, whole and in fp32: master weights, or the compute copy where
    /// frozen parameters have no other. Needs memory for one unit.
    ///
    /// After an error of `visit` this rank visits nothing more, but goes on gathering: the others need it.
    ///
    /// # Collective
    /// Every rank calls.
    /// # Errors
    /// A failed collective or allocation; what `visit` says.
    pub fn for_each_param<E: From<ZeroError>>(
        &mut self,
        mut visit: impl FnMut(&ParamSpec, &[f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut outcome = Ok(());
        for unit in 0..self.units.len() {
            let full = self.whole_unit(unit)?;
            let values = full.typed::<f32>().map_err(ZeroError::from)?;
            if outcome.is_ok() {
                let mut slots = self.units[unit].layout.slots.iter();
                outcome = slots.try_for_each(|slot| visit(&slot.param, &values[slot.range()]));
            }
        }
        outcome
    }

    fn whole_unit(&mut self, unit: usize) -> Result<Buffer, ZeroError> {
        let numel = self.units[unit].layout.padded_numel;
        let mut full = Buffer::zeroed(DType::F32, numel, Place::Cpu)?;
        let has_master = self.units[unit].trained.as_ref().is_some_and(|trained| trained.master.is_some());
        let source = if has_master { Source::Master } else { Source::Compute };
        if source == Source::Compute {
            let ptr = self.gather(unit)?;
            // SAFETY: `gather` gives the address of `numel` elements of the compute type, which stay until `release`.
            let copy = unsafe { Slice::from_raw(ptr, numel, self.options.compute, Place::Cpu) };
            match copy.dtype() {
                DType::Bf16 => cast::bf16_to_f32(copy.typed()?, full.typed_mut()?),
                DType::F16 => cast::f16_to_f32(copy.typed()?, full.typed_mut()?),
                _ => full.typed_mut::<f32>()?.copy_from_slice(copy.typed()?),
            }
            self.release(unit);
            return Ok(full);
        }
        let owned = self.units[unit].owned.clone();
        let master = self.units[unit].trained.as_ref().and_then(|trained| trained.master.as_ref());
        let master = master.expect("checked above").typed::<f32>()?;
        full.typed_mut::<f32>()?[owned].copy_from_slice(master);
        if self.options.stage.shards_optimizer() {
            full = self.lane.all_gather_in_place(full)?.wait()?;
        }
        Ok(full)
    }

    /// This rank's parameter bits as they are computed with, for comparisons: unit by unit, whole.
    ///
    /// # Collective
    /// Every rank calls.
    /// # Errors
    /// A failed collective or allocation.
    pub fn compute_bytes(&mut self, unit: usize) -> Result<Vec<u8>, ZeroError> {
        let ptr = self.gather(unit)?;
        let numel = self.units[unit].layout.padded_numel;
        // SAFETY: as in `whole_unit`.
        let bytes = unsafe { Slice::from_raw(ptr, numel, self.options.compute, Place::Cpu) }.bytes().to_vec();
        self.release(unit);
        debug_assert!(!matches!(self.units[unit].params, ParamState::Moving));
        Ok(bytes)
    }
}
