//! What a rank tells the world: events to the supervisor, metrics to files, plain lines where nobody supervises.

use std::io::Write;
use std::sync::Mutex;

use shardwise_monitor::{Event, PrintEvery, Progress, RunDir, RunRecorder, StepMetrics};

use crate::failure::Failure;
use crate::launch::{events, is_supervised};

/// Rank 0 records and shows; the others only say where they are.
pub struct Telemetry {
    recorder: Option<Mutex<RunRecorder>>,
    progress: Option<Mutex<Progress>>,
}

impl Telemetry {
    /// A rank that says where it is and nothing more, until [`Telemetry::record_to`].
    pub fn new() -> Self {
        Telemetry { recorder: None, progress: None }
    }

    /// Rank 0: metrics go to `dir`, and to standard error if there is no supervisor to show them.
    /// A run that goes on after `resumed` steps writes what comes after them.
    pub fn record_to(
        &mut self,
        dir: &RunDir,
        total_steps: u64,
        resumed: Option<u64>,
        every: PrintEvery,
    ) -> Result<(), Failure> {
        let recorder = match resumed {
            Some(step) => RunRecorder::resume(dir.path(), step)?,
            None => RunRecorder::open(dir.path())?,
        };
        self.recorder = Some(Mutex::new(recorder));
        if !is_supervised() {
            self.progress = Some(Mutex::new(Progress::plain(total_steps, every, std::io::stderr())));
        }
        Ok(())
    }

    pub fn phase(&self, phase: &str) {
        events().send(&Event::Phase { phase: phase.into() });
        self.show(|progress| progress.phase(phase));
    }

    pub fn begin_step(&self, step: u64) {
        events().send(&Event::BeginStep { step });
    }

    pub fn step(&self, metrics: StepMetrics) -> Result<(), Failure> {
        let Some(recorder) = &self.recorder else { return Ok(()) };
        recorder.lock().unwrap_or_else(std::sync::PoisonError::into_inner).record(&metrics)?;
        self.show(|progress| progress.step(&metrics));
        events().send(&Event::Step(metrics));
        Ok(())
    }

    pub fn note(&self, text: &str) {
        if self.recorder.is_some() {
            events().send(&Event::Note { text: text.into() });
            self.show(|progress| progress.note(text));
        }
    }

    /// What every rank may have to say.
    pub fn warn(&self, text: &str) {
        let _ = writeln!(std::io::stderr(), "warning: {text}");
        events().send(&Event::Note { text: text.into() });
    }

    pub fn sample(&self, text: String) {
        if self.recorder.is_some() {
            if !is_supervised() {
                // A reader that has seen enough is no failure.
                let _ = writeln!(std::io::stdout(), "{text}");
            }
            events().send(&Event::Sample { text });
        }
    }

    pub fn done(&self) {
        self.show(Progress::finish);
        events().send(&Event::Done);
    }

    fn show(&self, show: impl FnOnce(&mut Progress)) {
        if let Some(progress) = &self.progress {
            show(&mut progress.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
        }
    }
}
