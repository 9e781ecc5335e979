//! Real models over meshes of ranks: pipeline x data x tensor, in every stage of ZeRO, against the run of one rank.

// Helpers of tests may unwrap as tests may.
#![allow(clippy::unwrap_used)]

mod equality;
mod runs;
