//! The whole program when things go wrong: real binaries, real processes, real training of a tiny model.
//!
//! Ranks fail on purpose at a chosen point of a step (`SHARDWISE_FAULT`, see the worker's `fault` module). Each test then asks what
//! people depend on: the command ends soon, says which rank failed, how and where, and leaves nothing behind.

// Helpers of tests may unwrap as tests may.
#![allow(clippy::unwrap_used)]

mod bench;
mod blame;
mod interrupts;
mod kills;
mod meshes;
