//! What a run says about itself.
//!
//! A rank tells its supervisor where it is through [`Event`]s, one JSON line each. Rank 0 keeps the record of
//! the run with a [`RunRecorder`]: `metrics.jsonl` and TensorBoard events, one entry for each optimizer step.
//! The supervisor turns the same steps into a [`Progress`] line for people.
//!
//! ```text
//! rank 0 ── StepMetrics ─┬─► RunRecorder ──► metrics.jsonl, events.out.tfevents.*
//!                        └─► EventWriter ══ stdout ══► supervisor ──► Progress
//! rank N ── BeginStep, Error, ... ──► EventWriter ══ stdout ══► supervisor
//! ```
//!
//! The record belongs to the rank and not to the supervisor, so a run whose ranks were started by another
//! launcher leaves the same files.

mod error;
mod events;
mod memory;
mod metrics;
mod progress;
mod recorder;
mod run_dir;
mod tensorboard;
mod text;

pub use error::MonitorError;
pub use events::{ErrorEvent, Event, EventWriter};
pub use memory::peak_rss_bytes;
pub use metrics::{MetricsWriter, Outcome, StepMetrics};
pub use progress::{Pace, PrintEvery, Progress, step_line};
pub use recorder::RunRecorder;
pub use run_dir::RunDir;
pub use tensorboard::TensorBoardWriter;
pub use text::{format_count, format_duration, format_mib};
