//! Host memory of a rank with a GPU: pinned state and what moves it, and what is the host's by nature.

use serde::Serialize;

use super::{ModelState, NUM_GOING_DOWN, SUM_BYTES, Workload, layers, of_each_size};
use crate::{Bytes, Collectives, Device, Offload, OffloadTo, UnitLayout, ZeroStage};

/// A pinned buffer of a collective that goes through the host.
pub const PIECE: Bytes = Bytes(4 << 20);

/// Pieces of such a call that are under way at a time.
const NUM_PIECES: usize = 2;

/// Buffers of a piece of a collective: what goes down, and what comes up. A message has one.
const BUFFERS_OF_A_PIECE: usize = 2;

/// A process with libtorch's CUDA libraries in it and a context on a GPU. An assumption, not a measurement.
const RUNTIME: Bytes = Bytes(1 << 30);

/// Bytes in host memory that one rank with a GPU needs, by kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct HostMemory {
    /// What is kept here and not on the GPU.
    pub offload: Offload,
    /// That state, pinned.
    #[serde(flatten)]
    pub state: ModelState,
    /// Pinned buffers of gradients on their way down.
    pub reductions: Bytes,
    /// Pinned buffers of new parameters on their way up.
    pub transfers: Bytes,
    /// Pinned buffers of collectives that go through the host.
    pub pieces: Bytes,
    /// Inputs of layers that wait here for their backward pass.
    pub activations: Bytes,
    /// Memory shared with the other ranks.
    pub staging: Bytes,
    /// The process itself.
    pub runtime: Bytes,
    /// Instead of activations, while the trained model is written: one unit in fp32, as it comes from the GPU and as it is put
    /// together, and on a mesh parameters that are.
    pub saving: Bytes,
    /// The most that is resident at one moment of the run.
    pub peak: Bytes,
}

impl HostMemory {
    pub(super) fn new(load: &Workload<'_>, stage: ZeroStage, offload: Offload) -> Self {
        let (_, state) = ModelState::on_gpu(load.units, stage, load.grad_accum_steps, load.widths, offload);
        let shards = || load.units.iter().filter(|unit| unit.trainable).map(UnitLayout::shard_numel);
        let accumulates = stage.sums_before_it_sends(load.grad_accum_steps);
        // What one rank sends down is not a sum yet, unless micro-batches were.
        let told_bytes = if load.is_alone() && !accumulates { load.compute_bytes } else { SUM_BYTES };
        // All of the gradient at once, as it is kept: it goes right to its place.
        let as_it_is = (load.grad_accum_steps == 1 || accumulates) && told_bytes == load.widths.grads;
        let Offload { optimizer, params } = offload;
        let mut host = HostMemory {
            offload,
            state,
            reductions: match optimizer {
                OffloadTo::Host if !as_it_is => of_each_size(shards(), NUM_GOING_DOWN, told_bytes),
                _ => Bytes(0),
            },
            transfers: match (optimizer, params) {
                (OffloadTo::Host, OffloadTo::Device) => load.transfers(stage),
                _ => Bytes(0),
            },
            pieces: pieces(load),
            activations: layers::waiting_on_host(
                load.layers,
                load.flow.as_ref(),
                load.microbatch_tokens,
                load.compute_bytes,
            ),
            staging: load.staging(),
            runtime: RUNTIME,
            saving: load.saving() + Bytes::of(load.largest(), size_of::<f32>()),
            peak: Bytes(0),
        };
        let always =
            host.state.total() + host.reductions + host.transfers + host.pieces + host.staging + host.runtime;
        host.peak = always + host.activations.max(host.saving);
        host
    }
}

/// Pinned buffers of all calls that may be under way at a time, unless NCCL carries them for sure.
fn pieces(load: &Workload<'_>) -> Bytes {
    match load.device {
        Device::Cuda(cuda) if cuda.collectives != Collectives::Nccl => {
            let num_buffers =
                NUM_PIECES * (BUFFERS_OF_A_PIECE * load.calls.collectives + load.calls.messages);
            Bytes(PIECE.0 * num_buffers as u64)
        }
        _ => Bytes(0),
    }
}
