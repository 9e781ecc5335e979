//! Whole parameters in fp32, one unit at a time: for files and for tests.

use shardwise_device::{Buffer, DType, Place, Slice};
use shardwise_kernels::Processor;
use shardwise_plan::ParamSpec;

use crate::unit::{ParamState, Unit};
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
            self.gather(unit)?;
            self.on_host(self.full_copy(unit), |copy| {
                Ok(Processor::Host(self.threads()).scale(copy, 1.0, full.view_mut())?)
            })?;
            self.release(unit);
            return Ok(full);
        }
        let owned = self.units[unit].owned.clone();
        let master = self.units[unit].trained.as_ref().and_then(|trained| trained.master.as_ref());
        let master = master.expect("checked above").view();
        self.on_host(master, |master| {
            full.typed_mut::<f32>()?[owned].copy_from_slice(master.typed()?);
            Ok(())
        })?;
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
        self.gather(unit)?;
        let mut bytes = Vec::new();
        self.on_host(self.full_copy(unit), |copy| {
            bytes.extend_from_slice(copy.host_bytes()?);
            Ok(())
        })?;
        self.release(unit);
        Ok(bytes)
    }

    /// The whole compute copy of a unit that is gathered.
    pub(crate) fn full_copy(&self, unit: usize) -> Slice<'_> {
        let Unit { layout, params, .. } = &self.units[unit];
        match params {
            ParamState::Resident(full) | ParamState::Gathered { full, .. } => {
                full.view().range(0..layout.padded_numel)
            }
            _ => unreachable!("gathered before"),
        }
    }

    /// Calls `read` with `slice`, or a copy of it, on the host.
    fn on_host(
        &self,
        slice: Slice<'_>,
        read: impl FnOnce(Slice<'_>) -> Result<(), ZeroError>,
    ) -> Result<(), ZeroError> {
        if slice.place() == Place::Cpu {
            return read(slice);
        }
        let mut copy = Buffer::zeroed(slice.dtype(), slice.numel(), Place::Cpu)?;
        self.tiers.device.copy(slice, copy.view_mut())?;
        read(copy.view())
    }
}
