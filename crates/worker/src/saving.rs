//! Saving the state of a run while it trains.
//!
//! ```text
//! blocking      step ─ every rank writes its shard ─ all agree ─ rank 0 commits ─ all agree ─ step
//! background    step ─ copy ─ step ─ step ─ step ────────── step ─ ...
//!                      └ every rank writes ┘ └ rank 0 commits ┘   behind the steps
//! ```
//! In the background no rank waits for another: where each of them stands travels in the exchange that ends every step,
//! and rank 0 commits once all have written. A checkpoint is complete or not there at all.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::Value;
use shardwise_checkpoint::FileDType;
use shardwise_checkpoint::state::{
    Attachment, Background, Block, Committed, Contents, Fragment, Keep, Mesh, Progress, Region, Save,
};
use shardwise_config::{CheckpointConfig, CheckpointWriting, OnSaveFailure};
use shardwise_device::DType;
use shardwise_engine::{Engine, StatePart};
use shardwise_monitor::Event;

use crate::failure::Failure;
use crate::launch::events;
use crate::telemetry::Telemetry;

/// Saves of fewer bytes a rank take no time worth a word on the way.
const LONG_SAVE_BYTES: u64 = 1 << 28;

/// What a rank tells the others about its part of a save, as a number for the exchange.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    /// Nothing is under way here.
    Idle,
    /// It writes.
    Busy,
    /// Its shard is on disk.
    Written,
    /// It could not write.
    Failed,
}

/// Saves checkpoints of one run, on one rank.
pub struct Saver<'a> {
    config: CheckpointConfig,
    dir: PathBuf,
    rank: usize,
    /// The same on all ranks, another for each start.
    nonce: u64,
    fixed: Fixed,
    telemetry: &'a Telemetry,
    writing: Background<(Save, Copies)>,
    committing: Background<Committed>,
    /// How long training waited for the save that is being committed.
    stall: Duration,
    under_way: Option<UnderWay>,
    /// Host copies of the state, kept for the next save.
    copies: Option<Copies>,
}

/// What every checkpoint of the run says alike.
pub struct Fixed {
    pub mesh: Mesh,
    pub config: Value,
    pub attached: Vec<Attachment>,
}

struct UnderWay {
    step: u64,
    standing: Standing,
    stall: Duration,
    run_state: Value,
    /// Of the shard, once it is written.
    save: Option<Save>,
    error: Option<anyhow::Error>,
}

#[derive(Default)]
struct Copies {
    fragments: Vec<Fragment>,
    bytes: Vec<Vec<u8>>,
}

impl<'a> Saver<'a> {
    /// # Collective
    /// Every rank of the engine's group calls.
    pub fn new(
        config: CheckpointConfig,
        dir: PathBuf,
        fixed: Fixed,
        engine: &Engine,
        telemetry: &'a Telemetry,
    ) -> Result<Self, Failure> {
        // Rank 0 draws a number that f64 holds exactly.
        let drawn = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let drawn = (drawn.as_nanos() as u64 ^ u64::from(std::process::id()) << 32) & ((1 << 52) - 1);
        let nonce = engine.zero().exchange(&[drawn as f64])?[0][0] as u64;
        Ok(Saver {
            config,
            dir,
            rank: engine.ranks().world().group_rank(),
            nonce,
            fixed,
            telemetry,
            writing: Background::new(),
            committing: Background::new(),
            stall: Duration::ZERO,
            under_way: None,
            copies: None,
        })
    }

    /// Whether a checkpoint is due after `step` of `steps`.
    pub fn is_due(&self, step: u64, steps: u64) -> bool {
        self.config.every.is_some_and(|every| step.is_multiple_of(every) || step == steps)
    }

    /// Whether the run saves at all.
    pub fn is_on(&self) -> bool {
        self.config.every.is_some()
    }

    /// Saves the state after `step`, as configured: waits for the disk, or only for a copy.
    ///
    /// # Collective
    /// Every rank calls, between the same steps.
    pub fn save(&mut self, engine: &mut Engine, step: u64, run_state: Value) -> Result<(), Failure> {
        match self.config.writing {
            CheckpointWriting::Blocking => self.save_now(engine, step, run_state),
            CheckpointWriting::Background => {
                self.finish(engine)?;
                self.start(engine, step, run_state)
            }
        }
    }

    /// Saves the state after `step` and waits until it is complete.
    ///
    /// # Collective
    /// As [`Saver::save`].
    pub fn save_now(&mut self, engine: &mut Engine, step: u64, run_state: Value) -> Result<(), Failure> {
        self.finish(engine)?;
        self.telemetry.phase(&format!("saving step {step}"));
        let since = Instant::now();
        let written = self.write_shard(engine, step);
        let (save, error) = match written {
            Ok(save) => (Some(save), None),
            Err(error) => (None, Some(error)),
        };
        let standing = if error.is_none() { Standing::Written } else { Standing::Failed };
        let stall = since.elapsed();
        self.under_way = Some(UnderWay { step, standing, stall, run_state, save, error });
        self.finish(engine)?;
        self.telemetry.phase("training");
        Ok(())
    }

    /// Writes this rank's shard straight from the state.
    fn write_shard(&self, engine: &mut Engine, step: u64) -> anyhow::Result<Save> {
        let save = Save::begin(&self.dir, step, self.nonce, self.rank)?;
        let mut fragments = Vec::new();
        visit(engine, |part| {
            fragments.push(fragment(&part));
            Ok(())
        })?;
        let mut writer = save.shard_writer(&fragments)?;
        if self.rank == 0 {
            let mut told = 0;
            writer = writer.on_progress(move |Progress { done_bytes, total_bytes }| {
                let percent = done_bytes * 100 / total_bytes.max(1);
                // Small ones are over before anyone could read it.
                if total_bytes > LONG_SAVE_BYTES && percent >= told + 10 {
                    told = percent;
                    events().send(&Event::Phase { phase: format!("saving step {step}, {percent}%") });
                }
            });
        }
        let order: Vec<usize> = writer.order().collect();
        // The file orders its tensors by type: one look at the state for each type, which is one in most runs.
        let mut next = 0;
        while next < order.len() {
            let before = next;
            let mut index = 0;
            visit(engine, |part| {
                if order.get(next) == Some(&index) {
                    writer.write(index, part.bytes)?;
                    next += 1;
                }
                index += 1;
                Ok(())
            })?;
            assert!(next > before, "a fragment in the writer's order is a fragment of the state");
        }
        writer.finish()?;
        Ok(save)
    }

    /// Copies the state and has it written behind the next steps.
    fn start(&mut self, engine: &mut Engine, step: u64, run_state: Value) -> Result<(), Failure> {
        let since = Instant::now();
        let copies = self.copy(engine);
        let (dir, nonce, rank) = (self.dir.clone(), self.nonce, self.rank);
        let stall = since.elapsed();
        let started = copies.and_then(|copies| {
            self.writing.start(step, move |cancel| {
                let save = Save::begin(&dir, step, nonce, rank)?;
                let mut writer = save.shard_writer(&copies.fragments)?.cancelled_by(cancel);
                let order: Vec<usize> = writer.order().collect();
                order.into_iter().try_for_each(|index| writer.write(index, &copies.bytes[index]))?;
                writer.finish()?;
                Ok((save, copies))
            })?;
            Ok(())
        });
        let (standing, error) = match started {
            Ok(()) => (Standing::Busy, None),
            Err(error) => (Standing::Failed, Some(error)),
        };
        self.under_way = Some(UnderWay { step, standing, stall, run_state, save: None, error });
        Ok(())
    }

    fn copy(&mut self, engine: &mut Engine) -> anyhow::Result<Copies> {
        let mut copies = self.copies.take().unwrap_or_default();
        copies.fragments.clear();
        let mut index = 0;
        visit(engine, |part| {
            copies.fragments.push(fragment(&part));
            match copies.bytes.get_mut(index) {
                Some(bytes) => {
                    bytes.clear();
                    bytes.extend_from_slice(part.bytes);
                }
                None => copies.bytes.push(part.bytes.to_vec()),
            }
            index += 1;
            Ok(())
        })?;
        copies.bytes.truncate(index);
        Ok(copies)
    }

    /// What this rank says in the exchange that ends a step.
    pub fn standing(&mut self) -> f64 {
        self.take_written(false);
        self.under_way.as_ref().map_or(Standing::Idle, |save| save.standing) as u8 as f64
    }

    /// Takes the result of the writing behind the steps: if there is one, or once there is one.
    fn take_written(&mut self, wait: bool) {
        let Some(under_way) = &mut self.under_way else { return };
        if under_way.standing != Standing::Busy {
            return;
        }
        match if wait { self.writing.wait() } else { self.writing.poll() } {
            None => {}
            Some(Ok((save, copies))) => {
                (under_way.standing, under_way.save) = (Standing::Written, Some(save));
                self.copies = Some(copies);
            }
            Some(Err(error)) => {
                (under_way.standing, under_way.error) = (Standing::Failed, Some(error.into()))
            }
        }
    }

    /// Goes on with a save in the background, given what all ranks said of it: commits what is written, reports what failed.
    pub fn proceed(&mut self, standings: impl Iterator<Item = f64>) -> Result<(), Failure> {
        let standings: Vec<f64> = standings.collect();
        self.settle_commit(false)?;
        let is = |standing: Standing| move |&number: &f64| number == standing as u8 as f64;
        if standings.iter().any(is(Standing::Busy)) || standings.iter().all(is(Standing::Idle)) {
            return Ok(());
        }
        let Some(under_way) = self.under_way.take() else { return Ok(()) };
        if let Some(rank) = standings.iter().position(is(Standing::Failed)) {
            return self.failed(under_way, rank);
        }
        let UnderWay { step, stall, run_state, save, .. } = under_way;
        if self.rank != 0 {
            return Ok(());
        }
        let save = save.expect("a rank that has written keeps its save");
        let contents = Contents {
            program: format!("shardwise {}", env!("CARGO_PKG_VERSION")),
            mesh: self.fixed.mesh.clone(),
            config: self.fixed.config.clone(),
            run_state,
            attached: self.fixed.attached.clone(),
        };
        let keep = match self.config.keep.and_then(|keep| std::num::NonZeroUsize::new(keep as usize)) {
            Some(keep) => Keep::Newest(keep),
            None => Keep::All,
        };
        self.stall = stall;
        let started = self.committing.start(step, move |_| save.commit(&contents, keep));
        started.or_else(|error| self.report(error.into()))
    }

    /// Rank 0: tells how a commit ended, if it has.
    fn settle_commit(&mut self, wait: bool) -> Result<(), Failure> {
        let result = if wait { self.committing.wait() } else { self.committing.poll() };
        match result {
            None => Ok(()),
            Some(Ok(committed)) => {
                let gb = committed.num_bytes as f64 / 1e9;
                let (dir, stall) = (committed.dir.display(), self.stall.as_secs_f64());
                self.telemetry.note(&format!("saved `{dir}`: {gb:.3} GB, training waited {stall:.2} s"));
                if let Err(error) = committed.clean_up {
                    self.telemetry
                        .note(&format!("the checkpoint is complete, but cleaning up failed: {error}"));
                }
                Ok(())
            }
            Some(Err(error)) => self.report(error.into()),
        }
    }

    fn failed(&mut self, under_way: UnderWay, rank: usize) -> Result<(), Failure> {
        let UnderWay { step, save, error, .. } = under_way;
        if self.rank == 0
            && let Some(save) = save
        {
            // Leftovers are removed at the next save in any case.
            let _ = save.abandon();
        }
        match (error, self.config.on_failure) {
            (Some(error), _) => self.report(error),
            (None, OnSaveFailure::Continue) => Ok(()),
            (None, OnSaveFailure::Stop) => Err(Failure::from(shardwise_comm::CommError::GaveUp {
                rank,
                reason: format!("could not save the checkpoint of step {step}"),
            })),
        }
    }

    /// A save that failed here ends the run, or is only told.
    fn report(&self, error: anyhow::Error) -> Result<(), Failure> {
        match self.config.on_failure {
            OnSaveFailure::Stop => Err(error.context("a checkpoint could not be saved").into()),
            OnSaveFailure::Continue => {
                self.telemetry.warn(&format!("a checkpoint could not be saved, the run goes on: {error:#}"));
                Ok(())
            }
        }
    }

    /// Waits until nothing is under way on any rank.
    ///
    /// # Collective
    /// Every rank calls.
    pub fn finish(&mut self, engine: &Engine) -> Result<(), Failure> {
        self.take_written(true);
        let mine = [self.standing()];
        let ranks = engine.zero().exchange(&mine)?;
        self.proceed(ranks.iter().map(|rank| rank[0]))?;
        // What rank 0 finds must be known to all before anyone goes on, or a run could end with a save half done.
        let outcome = self.settle_commit(true);
        let failed = f64::from(u8::from(outcome.is_err()));
        let any_failed = engine.zero().exchange(&[failed])?.iter().any(|rank| rank[0] > 0.0);
        outcome?;
        if any_failed {
            let reason = "could not save a checkpoint".to_owned();
            return Err(Failure::from(shardwise_comm::CommError::GaveUp { rank: 0, reason }));
        }
        Ok(())
    }
}

/// Visits the state between steps.
fn visit(
    engine: &mut Engine,
    visit: impl FnMut(StatePart<'_, &[u8]>) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    engine.for_each_state(visit)
}

fn fragment(part: &StatePart<'_, &[u8]>) -> Fragment {
    Fragment {
        name: part.param.name.clone(),
        kind: part.name.to_owned(),
        dtype: file_dtype(part.dtype),
        shape: part.param.shape.clone(),
        region: region(part),
    }
}

/// Which elements of the whole parameter a part is.
pub fn region<B>(part: &StatePart<'_, B>) -> Region {
    let block = Block { offset: part.block.offset.clone(), shape: part.block.shape.clone() };
    Region { block, range: part.range.clone() }
}

pub fn file_dtype(dtype: DType) -> FileDType {
    match dtype {
        DType::Bf16 => FileDType::Bf16,
        DType::F16 => FileDType::F16,
        _ => FileDType::F32,
    }
}
