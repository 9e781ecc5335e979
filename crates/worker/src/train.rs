//! The training loop of one rank.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use shardwise_comm::shm::{self, ShmOptions};
use shardwise_config::{Loaded, RunConfig};
use shardwise_data::Loader;
use shardwise_engine::{Batch, BoxError, Engine, TrainReport};
use shardwise_kernels::Threads;
use shardwise_monitor::{Outcome, PrintEvery, RunDir, StepMetrics, peak_rss_bytes};
use shardwise_torch::{Tensor, memory, set_num_threads};
use shardwise_zero::StepOutcome;

use crate::TrainArgs;
use crate::cores;
use crate::data::{self, TextTokenizer, Tokens};
use crate::eval::HeldOut;
use crate::failure::Failure;
use crate::launch::Launch;
use crate::model::Model;
use crate::sampling::{Sampling, continue_tokens};
use crate::telemetry::Telemetry;

/// Tokens of the sample at the end.
const SAMPLE_TOKENS: usize = 120;
/// Tokens of the training text that the sample begins with.
const PROMPT_TOKENS: usize = 8;

/// How far a run came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// All steps.
    Finished,
    /// SIGTERM, to any of the ranks, ended it after a step.
    Stopped,
}

pub fn run(args: &TrainArgs, launch: &Launch) -> Result<End, Failure> {
    let mut telemetry = Telemetry::new();
    telemetry.phase("starting");
    if args.resume != "never" {
        let message = format!("`--resume {}` is not supported yet", args.resume.display());
        return Err(Failure::usage(message, "only `never` is"));
    }
    let loaded = RunConfig::load(&args.run, &args.sets, launch.world_size).map_err(Failure::configuration)?;
    loaded.check_files().map_err(Failure::configuration)?;
    let config = &loaded.config;
    let stop = stop_flag()?;
    let threads = threads(config, launch);
    cores::take_share(launch.rank, launch.world_size, threads.get());
    set_num_threads(threads.get());
    memory::install();

    let dir = RunDir::new(&args.out);
    if launch.rank == 0 {
        let every = config.report.steps_per_print.map_or(PrintEvery::Auto, PrintEvery::Steps);
        std::fs::create_dir_all(dir.path())?;
        std::fs::write(dir.effective_config(), format!("{:#}\n", loaded.effective().to_json()))?;
        telemetry.record_to(&dir, config.steps, every)?;
    }
    let Tokens { file, tokenizer } = data::open(&loaded, &args.out.join("cache"), &telemetry)?;
    let vocab = tokenizer.as_ref().map(|text| text.tokenizer.vocab_size());
    let model = Model::describe(config, vocab)?;
    let loader = data::loader(config, file, model.config.vocab_size())?;

    let held_out = held_out(args, config, &model, tokenizer.as_ref())?;

    telemetry.phase("joining");
    let mut options = ShmOptions::new(launch.rank, launch.world_size, launch.rendezvous.clone());
    options.deadline = Duration::from_secs_f64(config.parallel.deadline_s);
    options.fingerprint = fingerprint(&loaded, args);
    let group = shm::join(options)?;
    telemetry.phase("building the model");
    let mut engine = model.build(config, group.clone(), threads)?;

    let mut run = Run { config, launch, loader, stop, telemetry: &telemetry };
    run.evaluate(&mut engine, held_out.as_ref(), "before training")?;
    let end = run.train(&mut engine)?;
    if end == End::Finished {
        run.evaluate(&mut engine, held_out.as_ref(), "after training")?;
        telemetry.phase("saving the model");
        shardwise_models::save_hf(&mut engine, &dir.model(), &model.json)?;
        if let Some(text) = &tokenizer {
            if launch.rank == 0 {
                std::fs::copy(&text.path, dir.model().join("tokenizer.json"))?;
            }
            telemetry.phase("writing a sample");
            run.sample(&mut engine, &model, text)?;
        }
    }
    group.barrier()?;
    telemetry.done();
    Ok(end)
}

/// Everything the loop needs besides the engine.
struct Run<'a> {
    config: &'a RunConfig,
    launch: &'a Launch,
    loader: Loader,
    stop: Arc<AtomicBool>,
    telemetry: &'a Telemetry,
}

impl Run<'_> {
    /// Trains all steps, unless it is asked to stop before.
    fn train(&mut self, engine: &mut Engine) -> Result<End, Failure> {
        let mut applied = 0u64;
        for step in 0..self.config.steps {
            self.telemetry.begin_step(step + 1);
            if let Some(fault) = self.launch.fault.filter(|fault| fault.step == step + 1) {
                fault.arm(engine);
            }
            let lr = self.config.lr_schedule.lr(applied);
            let sent_before = engine.zero().group().ledger().total().sent_bytes;
            let start = Instant::now();
            let report = engine.train_step(lr, |microbatch| self.batch(step, microbatch))?;
            // The step's time and bytes include what is still under way on the side thread.
            engine.zero().drain()?;
            let step_s = start.elapsed().as_secs_f64();
            applied += u64::from(report.step.outcome == StepOutcome::Applied);
            let sent = engine.zero().group().ledger().total().sent_bytes - sent_before;
            let stop = self.stop.load(Ordering::Relaxed);
            // One exchange after the step: what is the same on all ranks afterwards includes the wish to stop.
            let mine = [sent as f64, peak_rss_bytes()? as f64, step_s, f64::from(u8::from(stop))];
            let ranks = engine.zero().exchange(&mine)?;
            let most = |i: usize| ranks.iter().map(|rank| rank[i]).fold(0.0, f64::max);
            self.telemetry.step(self.metrics(step + 1, lr, &report, [most(0), most(1), most(2)]))?;
            if let StepOutcome::Skipped { reason } = report.step.outcome {
                self.telemetry.note(&format!("step {} was skipped: {reason}", step + 1));
            }
            if most(3) > 0.0 {
                self.telemetry.note(&format!("stopped after step {}, as asked", step + 1));
                return Ok(End::Stopped);
            }
        }
        Ok(End::Finished)
    }

    /// Tells the loss on the text of `--eval`, if there is one.
    fn evaluate(&self, engine: &mut Engine, text: Option<&HeldOut>, when: &str) -> Result<(), Failure> {
        if let Some(text) = text {
            self.telemetry.phase(&format!("evaluating {when}"));
            let result = text.evaluate(engine)?;
            self.telemetry.note(&format!("held-out text {when}: {result}"));
        }
        Ok(())
    }

    fn batch(&self, step: u64, microbatch: usize) -> Result<Batch, BoxError> {
        let batch = self.loader.batch(step, microbatch, self.launch.rank)?;
        let tensor = |tokens: &[i64]| -> Result<Tensor, BoxError> {
            Ok(Tensor::f_from_slice(tokens)?.f_view([batch.rows as i64, batch.seq_len as i64])?)
        };
        let shape = self.loader.sampler().shape();
        let micro_batches = (step * shape.grad_accum_steps as u64 + microbatch as u64)
            * shape.data_parallel as u64
            + self.launch.rank as u64;
        let first_row = micro_batches * batch.rows as u64;
        Ok(Batch { input: tensor(&batch.input)?, target: tensor(&batch.target)?, first_row })
    }

    fn metrics(&self, step: u64, lr: f64, report: &TrainReport, most: [f64; 3]) -> StepMetrics {
        let [sent_bytes, rss_bytes, step_s] = most;
        let tokens = (self.config.batch.global_batch_size * self.config.data.seq_len) as u64;
        StepMetrics {
            step,
            loss: report.loss,
            grad_norm: report.step.grad_norm,
            lr,
            loss_scale: None,
            outcome: match report.step.outcome {
                StepOutcome::Applied => Outcome::Applied,
                StepOutcome::Skipped { .. } => Outcome::Skipped,
            },
            tokens,
            tokens_per_s: tokens as f64 / step_s,
            step_s,
            comm_bytes: sent_bytes as u64,
            peak_rss_mb: rss_bytes / (1u64 << 20) as f64,
            device_peak_mb: None,
        }
    }

    /// Lets the model continue the beginning of a sample of its text.
    fn sample(&self, engine: &mut Engine, model: &Model, text: &TextTokenizer) -> Result<(), Failure> {
        let batch = self.loader.batch(0, 0, 0)?;
        let mut tokens = batch.input[..PROMPT_TOKENS.min(batch.input.len())].to_vec();
        let sampling = Sampling { temperature: 0.8, top_k: Some(40), seed: self.config.seed };
        let max_positions = model.config.max_positions();
        continue_tokens(engine, &mut tokens, SAMPLE_TOKENS, max_positions, sampling, |_| true)?;
        let tokens: Vec<u32> = tokens.into_iter().map(|token| token as u32).collect();
        self.telemetry.sample(text.tokenizer.decode(&tokens)?);
        Ok(())
    }
}

/// The text of `--eval`, in the run's own windows.
fn held_out(
    args: &TrainArgs,
    config: &RunConfig,
    model: &Model,
    tokenizer: Option<&TextTokenizer>,
) -> Result<Option<HeldOut>, Failure> {
    let Some(path) = &args.eval else { return Ok(None) };
    let Some(TextTokenizer { tokenizer, .. }) = tokenizer else {
        let hint = "train on `data.text`, or measure the saved model with `shardwise eval`";
        return Err(Failure::usage("`--eval` takes a text, but the run reads token ids", hint));
    };
    HeldOut::read(path, tokenizer, model.config.vocab_size(), config.data.seq_len, None).map(Some)
}

/// Set by SIGTERM: the loop ends after the step it is in.
fn stop_flag() -> Result<Arc<AtomicBool>, Failure> {
    let stop = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(signal_hook::consts::SIGTERM, stop.clone())?;
    Ok(stop)
}

/// The run file's number, the launcher's, or an even share of the cores.
fn threads(config: &RunConfig, launch: &Launch) -> Threads {
    let share = || std::thread::available_parallelism().map_or(1, usize::from) / launch.world_size;
    let count = config.threads_per_rank.or(launch.threads).unwrap_or_else(share);
    Threads::new(count.max(1)).unwrap_or(Threads::ONE)
}

/// What must be equal on all ranks.
fn fingerprint(loaded: &Loaded, args: &TrainArgs) -> String {
    let mut hasher = DefaultHasher::new();
    env!("CARGO_PKG_VERSION").hash(&mut hasher);
    loaded.effective().to_json().to_string().hash(&mut hasher);
    args.eval.hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}
