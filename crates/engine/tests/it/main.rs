//! The numerical contract of the engine, and what it does when things go wrong: ranks as threads, small models written
//! through the public API.

// Helpers of tests may unwrap as tests may.
#![allow(clippy::unwrap_used)]

mod accounting;
mod activations;
mod contract;
mod failures;
mod layers;
mod mesh_failures;
mod mesh_outcomes;
mod outcomes;
mod pipeline;
mod refusals;
mod runs;
mod splits;
mod stack;
mod views;
