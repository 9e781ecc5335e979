//! What the commands on checkpoints share: finding one, and saying how far they are.

use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use shardwise_checkpoint::CheckpointError;
use shardwise_checkpoint::state::{Checkpoint, Progress};
use shardwise_monitor::format_duration;

use crate::console::{self, UsageError};

/// Opens the checkpoint that `path` names, or the newest one of the run or folder that it names. Damaged ones that
/// were passed over are told.
pub fn find(path: &Path) -> anyhow::Result<Checkpoint> {
    let found = Checkpoint::find(path).map_err(|error| usage(path, error))?;
    for (_, error) in &found.damaged {
        console::print_stderr(&format!("warning: passed over a damaged checkpoint: {error}\n"));
    }
    Ok(found.checkpoint)
}

/// A path where no checkpoint is was mistyped; anything else is damage.
pub fn usage(path: &Path, error: CheckpointError) -> anyhow::Error {
    let is_none = match &error {
        CheckpointError::NoCheckpoint { newest, .. } => newest.is_none(),
        CheckpointError::Io { path: missing, .. } => missing == path,
        _ => false,
    };
    if !is_none {
        return error.into();
    }
    let message = format!("there is no checkpoint in `{}`", path.display());
    UsageError::new(message, "name a `step-NNNNNN` folder, or the output folder of a run that saved some")
        .into()
}

/// `2.25 GB`, as disks are sold.
pub fn format_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["kB", "MB", "GB", "TB", "PB"];
    let mut value = bytes as f64;
    let mut unit = "bytes";
    for next in UNITS {
        if value < 999.5 {
            break;
        }
        (value, unit) = (value / 1000.0, next);
    }
    match unit {
        "bytes" => format!("{bytes} bytes"),
        unit if value < 9.995 => format!("{value:.2} {unit}"),
        unit if value < 99.95 => format!("{value:.1} {unit}"),
        unit => format!("{value:.0} {unit}"),
    }
}

/// A line on the screen that counts up, if there is a screen; and the time that was taken.
#[derive(Debug)]
pub struct Meter {
    what: &'static str,
    start: Instant,
    shown: Instant,
    is_live: bool,
    has_line: bool,
}

impl Meter {
    const REDRAW: Duration = Duration::from_millis(100);

    pub fn new(what: &'static str) -> Self {
        let now = Instant::now();
        Meter { what, start: now, shown: now, is_live: console::is_live(), has_line: false }
    }

    pub fn show(&mut self, progress: Progress) {
        if !self.is_live || self.shown.elapsed() < Self::REDRAW {
            return;
        }
        self.shown = Instant::now();
        self.has_line = true;
        let Progress { done_bytes, total_bytes } = progress;
        let [done, total] = [done_bytes, total_bytes].map(format_bytes);
        // The screen may be gone; the work goes on.
        let _ = write!(std::io::stderr(), "\r\x1b[K{} {done} of {total}", self.what);
    }

    /// Removes the line; `1.2s, 1.9 GB/s`.
    pub fn finish(self, num_bytes: u64) -> String {
        if self.has_line {
            console::print_stderr("\r\x1b[K");
        }
        let elapsed = self.start.elapsed();
        let speed = num_bytes as f64 / 1e9 / elapsed.as_secs_f64().max(1e-9);
        format!("{}, {speed:.2} GB/s", format_duration(elapsed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (bytes, text) in [
            (0, "0 bytes"),
            (999, "999 bytes"),
            (1000, "1.00 kB"),
            (9_995, "10.0 kB"),
            (123_456_789, "123 MB"),
            (999_600_000, "1.00 GB"),
            (2_252_000_000, "2.25 GB"),
            (u64::MAX, "18447 PB"),
        ] {
            assert_eq!(format_bytes(bytes), text);
        }
    }
}
