//! A layer's input, between its forward and the moment it is computed again: where it is, or in host memory.
//!
//! On the host there is nowhere else, and nothing is copied. From a GPU it goes to pinned memory beside the computation, and comes back
//! while the layer after it goes backward:
//!
//! ```text
//! compute   forward 1 │ forward 2 │ forward 3 │ backward 3 │ backward 2 │
//! copies              │ 1 down    │ 2 down    │ 2 up       │ 1 up       │
//! ```

use std::collections::VecDeque;

use shardwise_device::cuda::{Event, Gpu, Priority, Stream, Timing};
use shardwise_device::{Buffer, BufferPool, DeviceError, Memory};
use shardwise_torch::{Kind, Tensor};

use crate::EngineError;
use crate::home::Home;
use crate::slices::dtype_of;

/// Inputs on their way down whose memory is kept: the copy of one runs beside the layer that makes the next.
const MAX_LEAVING: usize = 2;

/// An input that waits.
#[derive(Debug)]
pub(crate) struct Parked {
    stored: Stored,
    requires_grad: bool,
}

#[derive(Debug)]
enum Stored {
    Here(Tensor),
    /// On its way up; the compute stream has to wait for the event before it reads it, or lets its memory go.
    ComingUp(Arrival, Tensor),
    /// In pinned memory: size, type, elements.
    OnHost(Vec<i64>, Kind, Buffer),
}

impl Parked {
    /// Leaves a layer's input where it is.
    pub fn here(input: Tensor) -> Self {
        let requires_grad = input.requires_grad();
        Parked { stored: Stored::Here(input), requires_grad }
    }

    /// The input, a leaf as it was before.
    pub fn back(self, garage: Option<&mut Garage>, home: &Home) -> Result<Tensor, EngineError> {
        let Parked { stored, requires_grad } = self.fetched(garage, home)?;
        let tensor = match stored {
            Stored::Here(tensor) => tensor,
            Stored::ComingUp(arrival, tensor) => {
                arrival.meet()?;
                tensor
            }
            Stored::OnHost(..) => unreachable!("fetched"),
        };
        Ok(tensor.f_detach()?.f_set_requires_grad(requires_grad)?)
    }

    /// Starts to bring the input back where it is computed with.
    pub fn fetched(self, garage: Option<&mut Garage>, home: &Home) -> Result<Self, EngineError> {
        let Parked { stored, requires_grad } = self;
        let stored = match (stored, garage) {
            (Stored::OnHost(size, kind, buffer), Some(garage)) => {
                let (tensor, arrival) = garage.fetch(&size, kind, buffer, home)?;
                Stored::ComingUp(arrival, tensor)
            }
            (stored, _) => stored,
        };
        Ok(Parked { stored, requires_grad })
    }
}

/// The end of a copy to the GPU. What the compute stream does before it waits runs beside the copy.
#[derive(Debug)]
struct Arrival {
    compute: std::sync::Arc<Stream>,
    over: Option<Event>,
}

impl Arrival {
    /// Has the compute stream wait for it.
    fn meet(mut self) -> Result<(), EngineError> {
        self.over.take().map_or(Ok(()), |over| gpu(self.compute.wait(&over)))
    }
}

impl Drop for Arrival {
    fn drop(&mut self) {
        // Of a step that failed: libtorch gives the memory to later work of the compute stream.
        if let Some(over) = self.over.take() {
            let _ = self.compute.wait(&over);
        }
    }
}

/// Pinned memory for inputs, and the stream on which they go there and come back.
pub(crate) struct Garage {
    compute: std::sync::Arc<Stream>,
    copies: Stream,
    pool: BufferPool,
    /// Tensors whose memory a copy still reads, with what comes after it.
    leaving: VecDeque<(Tensor, Event)>,
}

impl Garage {
    /// For the inputs of layers on a GPU; none on the host.
    pub fn new(home: &Home) -> Result<Option<Self>, EngineError> {
        let Some(processor) = &home.gpu else { return Ok(None) };
        let copies = gpu(processor.gpu().stream(Priority::Normal))?.named("activations");
        let pool = BufferPool::of(Memory::Pinned(processor.gpu().clone()));
        let compute = processor.stream().clone();
        Ok(Some(Garage { compute, copies, pool, leaving: VecDeque::new() }))
    }

    fn gpu(&self) -> &Gpu {
        self.copies.gpu()
    }

    /// Moves a layer's input to the host. Small integers, as tokens are, stay.
    pub fn park(&mut self, input: &Tensor, home: &Home) -> Result<Parked, EngineError> {
        let requires_grad = input.requires_grad();
        let input = input.f_detach()?;
        let Some(dtype) = dtype_of(&input).filter(|_| input.numel() > 0) else {
            return Ok(Parked { stored: Stored::Here(input), requires_grad });
        };
        let input = input.f_contiguous()?;
        let mut buffer = self.pool.take(dtype, input.numel()).map_err(device)?;
        self.follow(&self.copies, &self.compute)?;
        gpu(self.copies.copy(home.slice(&input), buffer.view_mut()))?;
        let over = self.mark(&self.copies).inspect_err(|_| {
            // It still reads the input, which is about to go.
            let _ = self.copies.synchronize();
        })?;
        let (size, kind) = (input.size(), input.kind());
        self.leaving.push_back((input, over));
        while self.leaving.len() > MAX_LEAVING {
            let (gone, over) = self.leaving.pop_front().expect("more than none");
            // Libtorch gives its memory to later work of the compute stream.
            gpu(self.compute.wait(&over))?;
            drop(gone);
        }
        Ok(Parked { stored: Stored::OnHost(size, kind, buffer), requires_grad })
    }

    fn fetch(
        &mut self,
        size: &[i64],
        kind: Kind,
        buffer: Buffer,
        home: &Home,
    ) -> Result<(Tensor, Arrival), EngineError> {
        let mut tensor = Tensor::f_empty(size, (kind, home.device))?;
        // Its memory may be what the compute stream has just let go.
        self.follow(&self.copies, &self.compute)?;
        gpu(self.copies.copy(buffer.view(), home.slice_mut(&mut tensor)))?;
        // Whoever writes to the buffer next waits for this.
        self.pool.give_back(buffer);
        let arrival = Arrival { compute: self.compute.clone(), over: Some(self.mark(&self.copies)?) };
        Ok((tensor, arrival))
    }

    /// Has `later` wait for what is queued on `earlier` now.
    fn follow(&self, later: &Stream, earlier: &Stream) -> Result<(), EngineError> {
        let mark = self.mark(earlier)?;
        gpu(later.wait(&mark))
    }

    fn mark(&self, stream: &Stream) -> Result<Event, EngineError> {
        let event = gpu(self.gpu().event(Timing::Untimed))?;
        gpu(event.record(stream))?;
        Ok(event)
    }
}

impl Drop for Garage {
    fn drop(&mut self) {
        // Tensors go back to libtorch, which may give their memory to anyone.
        if !self.leaving.is_empty() {
            let _ = self.copies.synchronize();
        }
    }
}

fn gpu<T>(result: Result<T, shardwise_device::cuda::CudaError>) -> Result<T, EngineError> {
    result.map_err(|error| device(error.into()))
}

fn device(error: DeviceError) -> EngineError {
    EngineError::Zero(error.into())
}

#[cfg(test)]
mod tests {
    use shardwise_plan::ZeroStage;
    use shardwise_torch::Device;
    use shardwise_zero::{AdamOptions, Optimizer, ZeroOptions};

    use super::*;
    use crate::EngineOptions;

    #[test]
    fn an_input_comes_back_as_the_leaf_it_was_and_is_not_copied_on_the_host() {
        let optimizer = Optimizer::AdamW(AdamOptions::default());
        let home = Home::new(&EngineOptions::new(ZeroOptions::new(ZeroStage::Zero, optimizer))).unwrap();
        assert!(Garage::new(&home).unwrap().is_none());
        for requires_grad in [false, true] {
            let input = Tensor::ones([3, 2], (Kind::Float, Device::Cpu)).set_requires_grad(requires_grad);
            let back = Parked::here(input.shallow_clone()).back(None, &home).unwrap();
            assert_eq!((back.requires_grad(), back.is_leaf()), (requires_grad, true));
            assert_eq!(back.data_ptr(), input.data_ptr());
        }
    }
}
