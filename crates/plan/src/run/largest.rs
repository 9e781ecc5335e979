//! Does a run fit, and what is the largest model of its kind that does?

use serde::Serialize;

use super::{RunPlan, RunShape, RunShapeError};
use crate::memory::{GPU_RESERVED, MemoryPlan};
use crate::pipeline::ScheduleKind;
use crate::{Axis, Bytes};

/// More blocks than these are not tried.
const MOST_BLOCKS: usize = 1 << 14;

/// Memory that there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Limits {
    /// Of a GPU.
    pub device: Bytes,
    /// What of it is not for the plan to give: context, libraries, the allocator's waste.
    pub reserved: Bytes,
    /// Of a host, for all of its ranks; `None` if it does not matter.
    pub host: Option<Bytes>,
    /// Ranks on a host.
    pub ranks_per_host: usize,
}

/// What is missing; 0 if it fits.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Excess {
    /// In a GPU's memory.
    pub device: Bytes,
    /// In a host's.
    pub host: Bytes,
}

impl Excess {
    /// The larger of two, of each memory.
    pub fn max(self, other: Excess) -> Excess {
        Excess { device: self.device.max(other.device), host: self.host.max(other.host) }
    }

    /// Whether nothing is.
    pub fn is_none(self) -> bool {
        self == Excess::default()
    }
}

impl Limits {
    /// What a rank needs of its GPU's memory, with what is reserved.
    pub fn on_device(&self, memory: &MemoryPlan) -> Bytes {
        Bytes(memory.peak.0 - GPU_RESERVED.0 + self.reserved.0)
    }

    /// What all ranks of a host need of its memory, if all are like this one.
    pub fn on_host(&self, memory: &MemoryPlan) -> Bytes {
        Bytes(memory.host_peak().0 * self.ranks_per_host as u64)
    }

    /// What is missing for ranks like this one.
    pub fn excess(&self, memory: &MemoryPlan) -> Excess {
        let missing = |needed: Bytes, there: Bytes| Bytes(needed.0.saturating_sub(there.0));
        Excess {
            device: missing(self.on_device(memory), self.device),
            host: self.host.map_or(Bytes(0), |there| missing(self.on_host(memory), there)),
        }
    }
}

impl RunPlan {
    /// What is missing for ranks of any stage, at most.
    pub fn excess(&self, limits: &Limits) -> Excess {
        let of_stage = self.stages.iter().map(|stage| limits.excess(stage.memory_in(self.shape.stage)));
        of_stage.fold(Excess::default(), Excess::max)
    }

    /// Whether ranks of every stage fit.
    pub fn fits(&self, limits: &Limits) -> bool {
        self.excess(limits).is_none()
    }
}

impl RunShape {
    /// The plan of the same run on a GPU with as many blocks of the model as fit; `None` if not even the fewest do. Memory grows with
    /// every block.
    ///
    /// # Errors
    /// [`RunShapeError`], also where a pattern of the run names a block that a smaller model lacks.
    pub fn largest(&self, limits: &Limits) -> Result<Option<RunPlan>, RunShapeError> {
        let plan = |num_blocks: usize| {
            let plan =
                RunPlan::new(RunShape { model: self.model.with_num_blocks(num_blocks), ..self.clone() })?;
            Ok::<_, RunShapeError>(if plan.fits(limits) { Some(plan) } else { None })
        };
        // Every chunk of every pipeline stage has a block, though embedding and head would do at the ends.
        let fewest = self.mesh.degree(Axis::Pipeline) * self.schedule.map_or(1, ScheduleKind::num_chunks);
        let mut fitting = None;
        let (mut low, mut high) = (fewest, fewest);
        while let Some(found) = plan(high)? {
            fitting = Some(found);
            low = high;
            if high >= MOST_BLOCKS {
                return Ok(fitting);
            }
            high = (2 * high).min(MOST_BLOCKS);
        }
        while fitting.is_some() && high - low > 1 {
            let middle = low.midpoint(high);
            match plan(middle)? {
                Some(found) => (fitting, low) = (Some(found), middle),
                None => high = middle,
            }
        }
        Ok(fitting)
    }
}
