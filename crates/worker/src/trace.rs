//! A timeline of some steps, in the form that Chrome and Perfetto read.
//!
//! ```text
//! host         ─ gather ─ forward ─ gather ─ forward ─ .. ─ step ─       phases of the rank's thread
//! compute      ─ layer 0 ─ layer 1 ─ ..                                  on a GPU: one line for each stream
//! copies       ─ copy ─ ..
//! ```
//! Each rank writes a file of its own, `trace/rank-N.json`, once the steps are over.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use shardwise_config::TraceConfig;
use shardwise_device::cuda;
use shardwise_engine::{Engine, Phase};

use crate::failure::Failure;
use crate::gpu::RankGpu;

/// The line of the rank's thread; those of streams follow.
const HOST: usize = 0;

/// What is to be recorded, and what has been.
pub struct Tracer {
    config: Option<TraceConfig>,
    path: PathBuf,
    rank: usize,
    recording: Option<Recording>,
}

struct Recording {
    began: Instant,
    gpu: Option<cuda::Trace>,
    phases: Arc<Mutex<Vec<(Phase, Instant)>>>,
    /// Number, beginning and end of each step.
    steps: Vec<(u64, Instant, Instant)>,
}

impl Tracer {
    pub fn new(config: Option<TraceConfig>, dir: &Path, rank: usize) -> Self {
        let path = dir.join("trace").join(format!("rank-{rank}.json"));
        Tracer { config, path, rank, recording: None }
    }

    /// To be called before step `step`, which counts from 1.
    pub fn begin_step(
        &mut self,
        step: u64,
        engine: &mut Engine,
        gpu: Option<&RankGpu>,
    ) -> Result<(), Failure> {
        if self.config.is_none_or(|config| config.first_step != step) {
            return Ok(());
        }
        let gpu = gpu.map(|gpu| gpu.processor().gpu().trace()).transpose()?;
        let began = gpu.as_ref().map_or_else(Instant::now, cuda::Trace::began);
        let phases = Arc::<Mutex<Vec<_>>>::default();
        let noted = Arc::clone(&phases);
        engine.observe(move |phase| {
            noted.lock().unwrap_or_else(PoisonError::into_inner).push((phase, Instant::now()));
        });
        self.recording = Some(Recording { began, gpu, phases, steps: Vec::new() });
        Ok(())
    }

    /// To be called after step `step`, which began at `start`; after the last that is to be recorded the file is written.
    pub fn end_step(&mut self, step: u64, start: Instant, engine: &mut Engine) -> Result<(), Failure> {
        let (Some(config), Some(recording)) = (self.config, &mut self.recording) else { return Ok(()) };
        recording.steps.push((step, start, Instant::now()));
        if step + 1 < config.first_step + config.num_steps {
            return Ok(());
        }
        self.finish(engine)
    }

    /// Writes what has been recorded, if anything has and was not written: of a run that ends early too.
    pub fn finish(&mut self, engine: &mut Engine) -> Result<(), Failure> {
        let Some(recording) = self.recording.take() else { return Ok(()) };
        engine.observe(|_| {});
        let events = recording.events(self.rank)?;
        if let Some(folder) = self.path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        let text = json!({ "displayTimeUnit": "ms", "traceEvents": events });
        std::fs::write(&self.path, format!("{text}\n"))?;
        Ok(())
    }
}

impl Recording {
    fn events(self, rank: usize) -> Result<Vec<Value>, Failure> {
        let micros = |time: Instant| time.saturating_duration_since(self.began).as_secs_f64() * 1e6;
        let span = |line: usize, name: &str, start_us: f64, duration_us: f64| json!({ "name": name, "ph": "X", "pid": rank, "tid": line, "ts": start_us, "dur": duration_us });
        let named = |line: usize, name: &str| json!({ "name": "thread_name", "ph": "M", "pid": rank, "tid": line, "args": { "name": name } });
        let process = json!({ "name": "process_name", "ph": "M", "pid": rank, "args": { "name": format!("rank {rank}") } });
        let mut events = vec![process, named(HOST, "host")];
        for &(step, start, end) in &self.steps {
            events.push(span(HOST, &format!("step {step}"), micros(start), micros(end) - micros(start)));
        }
        let phases = self.phases.lock().unwrap_or_else(PoisonError::into_inner);
        let ends = phases.iter().skip(1).map(|&(_, end)| end).chain(self.steps.last().map(|step| step.2));
        for (&(phase, start), end) in phases.iter().zip(ends).filter(|((phase, _), _)| *phase != Phase::Idle)
        {
            let length = end.saturating_duration_since(start);
            events.push(span(
                HOST,
                name_of(phase),
                micros(start),
                length.max(Duration::ZERO).as_secs_f64() * 1e6,
            ));
        }
        let mut lines: Vec<&'static str> = Vec::new();
        for work in self.gpu.map(cuda::Trace::finish).transpose()?.unwrap_or_default() {
            let place = lines.iter().position(|&line| line == work.stream).unwrap_or_else(|| {
                lines.push(work.stream);
                events.push(named(lines.len(), work.stream));
                lines.len() - 1
            });
            events.push(span(place + 1, &work.name, work.start_us, work.duration_us));
        }
        Ok(events)
    }
}

fn name_of(phase: Phase) -> &'static str {
    match phase {
        Phase::Gather => "gather",
        Phase::Forward => "forward",
        Phase::Backward => "backward",
        Phase::Reduce => "reduce",
        Phase::Step => "step",
        Phase::Idle => "idle",
    }
}
