//! The numerical contract of the engine, and what it does when things go wrong: ranks as threads, small models written
//! through the public API.

// Helpers of tests may unwrap as tests may.
#![allow(clippy::unwrap_used)]

mod accounting;
mod activations;
mod contract;
mod failures;
mod layers;
mod outcomes;
mod refusals;
mod runs;
mod splits;
mod views;
