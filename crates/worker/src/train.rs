//! The training loop of one rank.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use shardwise_checkpoint::state::{Attachment, Mesh};
use shardwise_comm::shm::{self, ShmOptions};
use shardwise_config::{EvalSource, Loaded, RunConfig};
use shardwise_data::Loader;
use shardwise_device::cuda::host_waited;
use shardwise_engine::{Batch, BoxError, Engine, Ranks, TrainReport};
use shardwise_kernels::Threads;
use shardwise_monitor::{Outcome, PrintEvery, RunDir, StepMetrics, peak_rss_bytes};
use shardwise_plan::Overlap;
use shardwise_torch::{Tensor, cuda, memory, set_num_threads};
use shardwise_zero::StepOutcome;

use crate::TrainArgs;
use crate::cores;
use crate::data::{self, TextTokenizer, Tokens};
use crate::eval::HeldOut;
use crate::failure::Failure;
use crate::gpu::RankGpu;
use crate::launch::Launch;
use crate::model::{Model, num_cores};
use crate::resume::{self, Resumed};
use crate::sampling::{Sampling, continue_tokens};
use crate::saving::{Fixed, Saver};
use crate::telemetry::Telemetry;
use crate::trace::Tracer;

/// Tokens of the sample at the end.
const SAMPLE_TOKENS: usize = 120;
/// Tokens of the training text that the sample begins with.
const PROMPT_TOKENS: usize = 8;

/// Who decides whether training waits for a save.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SaveHow {
    AsConfigured,
    /// It waits: nothing comes after.
    Now,
}

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
    let loaded = RunConfig::load(&args.run, &args.sets, launch.world_size).map_err(Failure::configuration)?;
    loaded.check_files().map_err(Failure::configuration)?;
    let config = &loaded.config;
    let stop = stop_flag()?;
    let threads = Threads::new(config.threads(launch.threads, num_cores())).unwrap_or(Threads::ONE);
    cores::take_share(launch.rank, launch.world_size, threads.get());
    set_num_threads(threads.get());
    memory::install();

    // First of all that asks libtorch for anything: what it has is registered once.
    let gpu = RankGpu::open(config, launch.rank, &launch.libraries, &telemetry)?;
    let dir = RunDir::new(&args.out);
    let resumed = resume::find(&args.resume, dir.path())?;
    if let Some(resumed) = &resumed {
        resumed.check(config)?;
    }
    if launch.rank == 0 {
        let every = config.report.steps_per_print.map_or(PrintEvery::Auto, PrintEvery::Steps);
        std::fs::create_dir_all(dir.path())?;
        std::fs::write(dir.effective_config(), format!("{:#}\n", loaded.effective().to_json()))?;
        // `auto` that finds nothing begins again: what a run without a checkpoint left is void.
        let last_step = (args.resume != "never").then(|| resumed.as_ref().map_or(0, Resumed::step));
        telemetry.record_to(&dir, config.steps, last_step, every)?;
        resumed.iter().for_each(|resumed| resumed.tell(config, &telemetry));
    }
    let Tokens { file, tokenizer } = data::open(&loaded, &args.out.join("cache"), &telemetry)?;
    let vocab = tokenizer.as_ref().map(|text| text.tokenizer.vocab_size());
    let model = Model::describe(config, vocab)?;
    let loader = data::loader(config, file, model.config.vocab_size())?;

    let held_out = held_out(args, config, &model, tokenizer.as_ref())?;

    telemetry.phase("joining");
    let mut options = ShmOptions::new(launch.rank, launch.world_size, launch.rendezvous.clone());
    options.deadline = Duration::from_secs_f64(config.parallel.deadline_s);
    options.fingerprint = fingerprint(&loaded, args, resumed.as_ref(), threads);
    let group = shm::join(options)?;
    telemetry.phase("building the model");
    let ranks = match &gpu {
        Some(gpu) => gpu.ranks(group.clone(), config, &launch.libraries, &telemetry)?,
        None => Ranks::new(group.clone(), config.parallel.mesh())?,
    };
    let mut engine = model.build(config, ranks, threads, gpu.as_ref(), resumed.as_ref())?;

    let fixed = Fixed {
        mesh: Mesh {
            world_size: config.parallel.world_size,
            zero_stage: config.zero.stage as u8,
            pipeline: config.parallel.pipeline,
            data: config.parallel.data,
            tensor: config.parallel.tensor,
        },
        config: loaded.effective().to_json(),
        attached: attachments(&model, tokenizer.as_ref())?,
    };
    let saver = Saver::new(config.checkpoint, dir.checkpoints(), fixed, &engine, &telemetry)?;
    let first_step = resumed.as_ref().map_or(0, Resumed::step);
    let tracer = Tracer::new(config.trace, dir.path(), launch.rank);
    let mut run = Run {
        config,
        launch,
        gpu: gpu.as_ref(),
        loader,
        held_out,
        stop,
        telemetry: &telemetry,
        first_step,
        saver,
        tracer,
    };
    run.evaluate(&mut engine, run.first_step)?;
    let end = run.train(&mut engine)?;
    run.tracer.finish(&mut engine)?;
    run.saver.finish(&engine)?;
    if end == End::Finished {
        run.evaluate(&mut engine, config.steps)?;
        telemetry.phase("saving the model");
        // Nothing of a step is needed any more, and writing needs a whole unit in fp32.
        memory::release_cached();
        gpu.iter().try_for_each(|_| cuda::release_cached())?;
        shardwise_models::save_hf(&mut engine, &dir.model(), &model.json)?;
        if let Some(text) = &tokenizer {
            if launch.rank == 0 {
                std::fs::copy(&text.path, dir.model().join("tokenizer.json"))?;
            }
            telemetry.phase("writing a sample");
            gpu.iter().try_for_each(|_| cuda::let_cudnn_attend(false))?;
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
    gpu: Option<&'a RankGpu>,
    loader: Loader,
    held_out: Option<HeldOut>,
    stop: Arc<AtomicBool>,
    telemetry: &'a Telemetry,
    /// Steps done before, by the run that this one resumes.
    first_step: u64,
    saver: Saver<'a>,
    tracer: Tracer,
}

impl Run<'_> {
    /// Trains all steps, unless it is asked to stop before.
    fn train(&mut self, engine: &mut Engine) -> Result<End, Failure> {
        for step in self.first_step..self.config.steps {
            self.telemetry.begin_step(step + 1);
            self.tracer.begin_step(step + 1, engine, self.gpu)?;
            if let Some(fault) = self.launch.fault.filter(|fault| fault.step == step + 1) {
                fault.arm(engine);
            }
            let applied = engine.zero().num_steps();
            let lr = self.config.lr_schedule.lr(applied);
            if let Some(momentum) = self.config.lr_schedule.momentum(applied) {
                engine.zero_mut().set_momentum(momentum)?;
            }
            let sent_before = engine.sent_bytes();
            let exposed_before = engine.exposed_comm()?;
            let waited_before = host_waited();
            let data_rank = engine.ranks().at().data;
            let start = Instant::now();
            let report = engine.train_step(lr, |microbatch| self.batch(data_rank, step, microbatch))?;
            // The step's time and bytes include what is still under way on the side thread.
            engine.zero().drain()?;
            let step_s = start.elapsed().as_secs_f64();
            self.tracer.end_step(step + 1, start, engine)?;
            let exposed_s = (engine.exposed_comm()? - exposed_before).as_secs_f64();
            let waited_s = (host_waited() - waited_before).as_secs_f64();
            let memory = self.gpu.map(RankGpu::peak_memory).transpose()?.unwrap_or_default();
            let sent = engine.sent_bytes() - sent_before;
            let stop = self.stop.load(Ordering::Relaxed);
            // One exchange after the step: what is the same on all ranks afterwards includes the wish to stop.
            let mine = [
                sent as f64,
                peak_rss_bytes()? as f64,
                step_s,
                exposed_s,
                f64::from(u8::from(stop)),
                self.saver.standing(),
                memory.reserved_bytes as f64,
                memory.allocated_bytes as f64,
                waited_s,
            ];
            let ranks = engine.zero().exchange(&mine)?;
            let most = |i: usize| ranks.iter().map(|rank| rank[i]).fold(0.0, f64::max);
            let most_of = [most(0), most(1), most(2), most(3), most(6), most(7), most(8)];
            self.telemetry.step(self.metrics(step + 1, lr, &report, most_of))?;
            self.saver.proceed(ranks.iter().map(|rank| rank[5]))?;
            match report.step.outcome {
                StepOutcome::Applied => {}
                StepOutcome::Skipped { reason } => {
                    self.telemetry.note(&format!("step {} was skipped: {reason}", step + 1));
                }
                StepOutcome::Diverged { error } => {
                    self.save(engine, step + 1, SaveHow::Now)?;
                    return Err(anyhow::Error::new(error)
                        .context(format!("stopped at step {}", step + 1))
                        .into());
                }
            }
            let stop = most(4) > 0.0;
            let every = self.config.eval.as_ref().and_then(|eval| eval.every);
            if every.is_some_and(|every| (step + 1).is_multiple_of(every)) && step + 1 < self.config.steps {
                self.evaluate(engine, step + 1)?;
            }
            if self.saver.is_due(step + 1, self.config.steps) {
                self.save(engine, step + 1, if stop { SaveHow::Now } else { SaveHow::AsConfigured })?;
            } else if stop && self.saver.is_on() {
                self.save(engine, step + 1, SaveHow::Now)?;
            }
            if stop {
                self.telemetry.note(&format!("stopped after step {}, as asked", step + 1));
                return Ok(End::Stopped);
            }
        }
        Ok(End::Finished)
    }

    fn save(&mut self, engine: &mut Engine, step: u64, how: SaveHow) -> Result<(), Failure> {
        let state = resume::run_state(self.config, engine);
        match how {
            SaveHow::Now => self.saver.save_now(engine, step, state),
            SaveHow::AsConfigured => self.saver.save(engine, step, state),
        }
    }

    /// Tells the loss on the held-out text, if there is one, after `step` steps.
    fn evaluate(&self, engine: &mut Engine, step: u64) -> Result<(), Failure> {
        if let Some(text) = &self.held_out {
            self.telemetry.phase("evaluating");
            let result = text.evaluate(engine)?;
            let when = match step {
                0 => "before training".to_owned(),
                _ if step == self.config.steps => "after training".to_owned(),
                _ => format!("after step {step}"),
            };
            self.telemetry.note(&format!("held-out text {when}: {result}"));
        }
        Ok(())
    }

    /// The samples of one micro-batch: ranks that have other parts of one model see the same.
    fn batch(&self, data_rank: usize, step: u64, microbatch: usize) -> Result<Batch, BoxError> {
        let batch = self.loader.batch(step, microbatch, data_rank)?;
        let tensor = |tokens: &[i64]| -> Result<Tensor, BoxError> {
            Ok(Tensor::f_from_slice(tokens)?.f_view([batch.rows as i64, batch.seq_len as i64])?)
        };
        let shape = self.loader.sampler().shape();
        let micro_batches = (step * shape.grad_accum_steps as u64 + microbatch as u64)
            * shape.data_parallel as u64
            + data_rank as u64;
        let first_row = micro_batches * batch.rows as u64;
        Ok(Batch { input: tensor(&batch.input)?, target: tensor(&batch.target)?, first_row })
    }

    fn metrics(&self, step: u64, lr: f64, report: &TrainReport, most: [f64; 7]) -> StepMetrics {
        let [sent_bytes, rss_bytes, step_s, exposed_comm_s, device_bytes, allocated_bytes, waited_s] = most;
        let on_gpu = |value: f64| self.gpu.map(|_| value);
        let mib = |bytes: f64| bytes / (1u64 << 20) as f64;
        let tokens = (self.config.batch.global_batch_size * self.config.data.seq_len) as u64;
        StepMetrics {
            step,
            loss: report.loss,
            grad_norm: report.step.grad_norm,
            lr,
            loss_scale: report.step.loss_scale,
            outcome: match report.step.outcome {
                StepOutcome::Applied => Outcome::Applied,
                StepOutcome::Skipped { .. } | StepOutcome::Diverged { .. } => Outcome::Skipped,
            },
            tokens,
            tokens_per_s: tokens as f64 / step_s,
            step_s,
            skipped_steps: report.step.num_skipped,
            group_lrs: self.config.train.groups.iter().map(|group| lr * group.lr_scale).collect(),
            exposed_comm_s,
            comm_bytes: sent_bytes as u64,
            host_wait_s: on_gpu(waited_s),
            peak_rss_mb: mib(rss_bytes),
            device_peak_mb: on_gpu(mib(device_bytes)),
            device_allocated_mb: on_gpu(mib(allocated_bytes)),
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

/// What the run is measured on besides, in its own windows: `--eval`, or else what the run file says.
fn held_out(
    args: &TrainArgs,
    config: &RunConfig,
    model: &Model,
    tokenizer: Option<&TextTokenizer>,
) -> Result<Option<HeldOut>, Failure> {
    let (vocab_size, seq_len) = (model.config.vocab_size(), config.data.seq_len);
    let max_tokens = config.eval.as_ref().and_then(|eval| eval.max_tokens).map(|max| max as usize);
    let (path, name, max_tokens) = match (&args.eval, config.eval.as_ref().map(|eval| &eval.source)) {
        (Some(path), _) => (path, "--eval", None),
        (None, Some(EvalSource::Text(path))) => (path, "eval.text", max_tokens),
        (None, Some(EvalSource::Tokens(path))) => {
            let file = data::open_tokens(path, config)?.with_vocab_size(vocab_size);
            return HeldOut::from_tokens(&file, seq_len, max_tokens).map(Some);
        }
        (None, None) => return Ok(None),
    };
    let Some(TextTokenizer { tokenizer, .. }) = tokenizer else {
        let hint = "train on `data.text`, or measure the saved model with `shardwise eval`";
        return Err(Failure::usage(format!("`{name}` names a text, but the run reads token ids"), hint));
    };
    HeldOut::read(path, tokenizer, vocab_size, seq_len, max_tokens).map(Some)
}

/// Set by SIGTERM: the loop ends after the step it is in.
fn stop_flag() -> Result<Arc<AtomicBool>, Failure> {
    let stop = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(signal_hook::consts::SIGTERM, stop.clone())?;
    Ok(stop)
}

/// What a checkpoint carries besides the state, so that it can be turned into a Hugging Face folder.
fn attachments(model: &Model, tokenizer: Option<&TextTokenizer>) -> Result<Vec<Attachment>, Failure> {
    let config = format!("{:#}\n", model.json);
    let mut files = vec![Attachment { name: "config.json".into(), bytes: config.into_bytes().into() }];
    if let Some(text) = tokenizer {
        let bytes = std::fs::read(&text.path)?;
        files.push(Attachment { name: "tokenizer.json".into(), bytes: bytes.into() });
    }
    Ok(files)
}

/// What must be equal on all ranks.
fn fingerprint(loaded: &Loaded, args: &TrainArgs, resumed: Option<&Resumed>, threads: Threads) -> String {
    let mut hasher = DefaultHasher::new();
    env!("CARGO_PKG_VERSION").hash(&mut hasher);
    loaded.effective().to_json().to_string().hash(&mut hasher);
    args.eval.hash(&mut hasher);
    // They decide the order of collectives, and the last bits of what tensor-parallel ranks each compute alike.
    threads.get().hash(&mut hasher);
    matches!(loaded.config.overlap(num_cores(), threads.get()), Overlap::SideThread).hash(&mut hasher);
    resumed.map(Resumed::identity).hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}
