//! The worker as its launchers meet it: real processes, one a rank, that train the small case beside this test.

// Helpers of tests may unwrap as tests may.
#![allow(clippy::unwrap_used)]

mod case;
mod eval;
mod layout;
mod mesh;
mod mesh_checkpoints;
mod parity;
mod ranks;
mod resume;
mod same_bits;
mod usage;
mod world_sizes;
