//! Collectives on GPU memory without a GPU: on a driver that runs work as late and as badly ordered as it may.
#![allow(clippy::unwrap_used, reason = "a test that fails may panic")]

#[path = "../common/mod.rs"]
mod common;

mod nccl;
mod real;
mod staged;
