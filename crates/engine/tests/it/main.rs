//! The numerical contract of the engine, and what it does when things go wrong: ranks as threads, small models written
//! through the public API.

mod accounting;
mod contract;
mod failures;
mod layers;
mod outcomes;
mod refusals;
mod runs;
mod splits;
mod views;
