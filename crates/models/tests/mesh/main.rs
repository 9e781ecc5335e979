//! Real models over meshes of ranks: pipeline x data x tensor, in every stage of ZeRO, against the run of one rank.

// Helpers of tests may unwrap as tests may.
#![allow(clippy::unwrap_used)]

mod bits;
mod dropout;
mod equality;
mod gpu;
mod optimizers;
mod outcomes;
mod precision;
mod refusals;
mod runs;
