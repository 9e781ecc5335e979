//! The numerical contract of sharded state, without tensors: ranks as threads, units of any sizes, made-up gradients.

// Helpers of tests may unwrap as tests may.
#![allow(clippy::unwrap_used)]

mod accounting;
mod algorithms;
mod errors;
mod gpu;
mod harness;
mod mesh;
mod mesh_harness;
mod numbers;
mod optimizers;
mod parameters;
mod reference;
mod scaling;
mod state;
mod steps;
