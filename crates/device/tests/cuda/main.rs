//! GPUs without a GPU: the device layer against a driver that runs work as late and as badly ordered as it may.

mod failures;
mod fake;
mod inventory;
mod kernels;
mod order;
mod programs;
mod real;
mod streams;
