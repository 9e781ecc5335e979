//! GPUs of NVIDIA, through the driver that is on the machine.
//!
//! `libcuda.so.1` is loaded when [`Driver::load`] is called, and nothing of it is needed to build or to start. On top
//! of its entry points (`api.rs`) stand safe types: a [`Gpu`] is opened, has [`Stream`]s and [`Event`]s, and runs
//! [`Kernel`]s from CUBINs. Memory is in [`crate::Buffer`]s, as on the host.
//!
//! Three rules make this safe, though a GPU works later than it is asked to:
//!
//! - **Memory knows who uses it.** Each buffer logs its uses by streams (`uses.rs`). A use waits for those it
//!   conflicts with, the host waits before it touches pinned memory, and a buffer waits before it is freed.
//! - **Who owns, frees.** Every object holds what it was made from, up to the driver, which is never unloaded.
//! - **A context is current only within a call**, so nobody else's is disturbed.
//!
//! What the log does not see, libtorch's and NCCL's work for one, is put in order by [`Stream::wait_for`],
//! [`Stream::note`] and events.

mod api;
mod copy;
mod cubin;
mod driver;
mod error;
mod event;
mod gpu;
mod info;
mod inventory;
mod kernel;
mod memory;
mod queue;
mod rank;
mod stall;
mod stream;
mod trace;
mod uses;

pub use driver::Driver;
pub use error::CudaError;
pub use event::{Event, Timing};
pub use gpu::{Gpu, HeldMemory, MemoryInfo};
pub use info::{Capability, DriverVersion, GpuInfo, PeerLink};
pub use inventory::{GpuReport, Inventory};
pub use kernel::{Args, Grid, Kernel, Module, Scalar};
pub use rank::{Sharing, gpu_for_rank};
pub use stall::{StallGuard, host_waited, wait_on_host};
pub use stream::{Priority, Stream};
pub use trace::{Span, SpanGuard, Trace};
pub use uses::Access;

pub(crate) use memory::{CudaMemory, Kind};
pub(crate) use uses::Uses;
