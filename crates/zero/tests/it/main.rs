//! The numerical contract of sharded state, without tensors: ranks as threads, units of any sizes, made-up gradients.

// Helpers of tests may unwrap as tests may.
#![allow(clippy::unwrap_used)]

mod accounting;
mod errors;
mod harness;
mod numbers;
mod parameters;
mod reference;
mod scaling;
mod steps;
