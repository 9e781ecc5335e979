//! GPUs without a GPU: the device layer against a driver that runs work as late and as badly ordered as it may.
#![allow(clippy::unwrap_used)] // a failed test may panic anywhere

mod failures;
mod inventory;
mod kernels;
mod order;
mod programs;
mod real;
mod streams;
