//! Where model state lies, and who computes on it.
//!
//! ```text
//!                           on the host   on a GPU      ZeRO-Offload on a GPU
//! compute copy              host          GPU           GPU; of `params`: shards pinned, copied up when gathered
//! gradient as it is made    host          GPU           GPU, on its way down
//! gradient of a step,
//! master weights, moments   host          GPU           pinned: the step is the host's
//! ```
//!
//! Offloaded, a gradient is copied down while backward goes on, and a step's new parameters are copied up while the next unit is
//! updated. Both processors compute the same bits, so where state lies does not show.

use std::sync::Arc;

use shardwise_device::cuda::{Priority, Stream};
use shardwise_device::{Buffer, DType, DeviceError, Memory, Place, SliceMut};
use shardwise_kernels::Processor;

use crate::zero::narrow;
use crate::{ZeroError, ZeroOptions};

/// Where a kind of state is kept on a rank with a GPU. On others the host has everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Tier {
    /// In the GPU's memory.
    #[default]
    Device,
    /// In pinned host memory.
    Host,
}

/// What a rank with a GPU keeps on the host.
///
/// # Source
/// ZeRO-Offload (arXiv:2101.06840).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offload {
    /// Master weights, optimizer states and the gradient that a step reads. The host computes the step.
    pub optimizer: Tier,
    /// Shards of the compute copy, in stage 3: units are copied up when they are gathered.
    pub params: Tier,
}

/// Whether what was shown was changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shown {
    ToRead,
    ToWrite,
}

/// A stream for each direction: a link carries both at once, and what goes up need not wait for what goes down.
struct Copies {
    up: Arc<Stream>,
    down: Arc<Stream>,
}

pub(crate) struct Tiers {
    /// Computes on compute copies and on gradients as they come.
    pub device: Processor,
    /// Computes on the state of the optimizer.
    pub stepper: Processor,
    /// Copies between the two, where they are apart.
    copies: Option<Copies>,
    /// Where shards of the compute copy lie.
    params: Tier,
    /// Where the next parameters are written if their place is elsewhere: while one is on its way there, the other is written.
    transfers: [Option<Buffer>; 2],
}

impl Tiers {
    pub fn new(options: &ZeroOptions) -> Result<Self, ZeroError> {
        let host = Processor::Host(options.threads);
        let Some(gpu) = &options.gpu else {
            let (device, params) = (host.clone(), Tier::Device);
            return Ok(Tiers { device, stepper: host, copies: None, params, transfers: [None, None] });
        };
        let Offload { optimizer, params } = options.offload;
        let device = Processor::Gpu(gpu.clone());
        let stepper = match optimizer {
            Tier::Device => device.clone(),
            Tier::Host => host,
        };
        let stream = |name| -> Result<_, ZeroError> {
            Ok(Arc::new(gpu.gpu().stream(Priority::High).map_err(DeviceError::from)?.named(name)))
        };
        let copies = Some(Copies { up: stream("copies up")?, down: stream("copies down")? });
        Ok(Tiers { device, stepper, copies, params, transfers: [None, None] })
    }

    /// The streams of copies to and from the host, if what `apart` says is apart.
    fn copies(&self, apart: bool) -> Option<&Copies> {
        self.copies.as_ref().filter(|_| apart)
    }

    /// The stream on which gradients go down, if the host computes the steps of a GPU's model.
    pub fn offloads_optimizer(&self) -> Option<&Arc<Stream>> {
        self.copies(matches!(self.stepper, Processor::Host(_))).map(|copies| &copies.down)
    }

    /// The stream on which shards of parameters go up, if they are kept on the host.
    pub fn offloads_params(&self) -> Option<&Arc<Stream>> {
        self.copies(self.params == Tier::Host).map(|copies| &copies.up)
    }

    /// The stream on which new parameters go to `place`, if they are computed elsewhere.
    pub fn transfers_to(&self, place: Place) -> Option<&Arc<Stream>> {
        let copies = self.copies(self.state_memory().place() != place)?;
        Some(if place == Place::Cpu { &copies.down } else { &copies.up })
    }

    /// Where the optimizer's state lies.
    pub fn state_memory(&self) -> Memory {
        match self.offloads_optimizer() {
            Some(_) => self.device.staging_memory(),
            None => self.device.memory(),
        }
    }

    /// Where shards of parameters lie.
    pub fn shard_memory(&self) -> Memory {
        match self.offloads_params() {
            Some(_) => self.device.staging_memory(),
            None => self.device.memory(),
        }
    }

    /// Writes fp32 values, rounded to the type of `into`, wherever that is.
    pub fn store(&self, values: &[f32], into: SliceMut<'_>) -> Result<(), ZeroError> {
        if into.place() == Place::Cpu {
            return Ok(narrow(values, into)?);
        }
        let mut rounded = Buffer::zeroed(into.dtype(), values.len(), Place::Cpu)?;
        narrow(values, rounded.view_mut())?;
        Ok(self.device.copy(rounded.view(), into)?)
    }

    /// Calls `visit` with the bytes of `slice`, on the host.
    pub fn show<E: From<ZeroError>>(
        &self,
        mut slice: SliceMut<'_>,
        shown: Shown,
        visit: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        if slice.place() == Place::Cpu {
            return visit(slice.host_bytes().map_err(ZeroError::from)?);
        }
        let mut copy = Buffer::zeroed(slice.dtype(), slice.numel(), Place::Cpu).map_err(ZeroError::from)?;
        self.device.copy(slice.as_slice(), copy.view_mut()).map_err(ZeroError::from)?;
        visit(copy.view_mut().bytes())?;
        if shown == Shown::ToWrite {
            self.device.copy(copy.view(), slice.reborrow()).map_err(ZeroError::from)?;
        }
        Ok(())
    }

    /// Memory for `numel` new parameters where steps are computed. What was written there the time before last has left, or is
    /// waited for when this is written.
    pub fn take_transfer(&mut self, dtype: DType, numel: usize) -> Result<Buffer, ZeroError> {
        self.transfers.rotate_left(1);
        // One that is too small ends before there is another.
        let fits = |buffer: &Buffer| buffer.numel() >= numel && buffer.dtype() == dtype;
        match self.transfers[0].take().filter(fits) {
            Some(buffer) => Ok(buffer),
            None => Ok(Buffer::allocate(dtype, numel, &self.state_memory())?),
        }
    }

    /// Takes back what [`Tiers::take_transfer`] gave.
    pub fn keep_transfer(&mut self, buffer: Buffer) {
        self.transfers[0] = Some(buffer);
    }
}
