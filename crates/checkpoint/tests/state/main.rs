//! Checkpoints of a run: any layout to any layout, nothing lost, nothing damaged unseen.
#![allow(clippy::unwrap_used)] // a failed test may panic anywhere

mod common;
mod damage;
mod export;
mod fixture;
mod kill;
mod layouts;
mod save;
