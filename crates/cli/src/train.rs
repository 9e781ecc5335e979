//! `shardwise train`: everything that can be refused is refused before a rank starts; then the ranks are
//! supervised; then the end is told.

use std::ffi::{OsStr, OsString};
use std::io::Read;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context;
use shardwise_config::NoteKind;
use shardwise_monitor::{Event, Progress};
use shardwise_plan::Axis;

use crate::Exit;
use crate::args::{RunArgs, TrainArgs};
use crate::console::{self, UsageError};
use crate::out_dir::{Existing, OutDir};
use crate::summary::Summary;
use crate::supervise::{self, Failure, Launch, Outcome, Watcher};
use crate::{report, run_file, worker_binary};

/// Trains, and says how the command ends.
pub fn run(args: &TrainArgs) -> anyhow::Result<Exit> {
    if let Some(text) = args.eval.as_deref().filter(|text| !text.is_file()) {
        let message = format!("`--eval {}` is no file", text.display());
        return Err(UsageError::new(message, "give a text that the model is not trained on").into());
    }
    let worker = worker_binary::locate()?;
    let loaded = run_file::load(&args.run)?;
    loaded.check_files()?;
    let config = &loaded.config;
    let folder = args.out.clone().unwrap_or_else(|| default_out(&args.run.run));
    let existing = existing(args, &folder)?;
    let out = OutDir::prepare(&folder, existing, &run_file::inputs(&loaded)?)?;

    let effective = out.run().effective_config();
    std::fs::write(&effective, format!("{:#}\n", loaded.effective().to_json()))
        .with_context(|| format!("could not write `{}`", effective.display()))?;

    let run_id = random_id()?;
    let launch = Launch {
        worker,
        args: worker_args(&args.run, args.eval.as_deref(), &args.resume, &folder),
        mesh: config.parallel.mesh(),
        threads_per_rank: config.threads(None, num_cores()),
        master_port: free_port(&run_id),
        run_id,
        run: out.run().clone(),
    };
    let progress = if console::is_live() {
        Progress::live(config.steps)
    } else {
        Progress::plain(config.steps, run_file::print_every(config), std::io::stderr())
    };
    let mut screen = Screen { progress, summary: Summary::default() };
    screen.note(&headline(&launch, config.steps));
    let num_idle = loaded.effective().notes().iter().filter(|note| note.kind == NoteKind::NoEffect).count();
    if num_idle > 0 {
        screen.note(&format!(
            "{} here: `shardwise check` says why",
            plural(num_idle, "setting without effect", "settings without effect")
        ));
    }

    let started = Instant::now();
    let outcome = supervise::run(&launch, &mut screen);
    screen.progress.finish();
    let summary = screen.summary;
    match outcome? {
        Outcome::Finished => {
            console::print_result(&summary.text(out.run(), started.elapsed()))?;
            Ok(Exit::Done)
        }
        Outcome::Stopped { signal, failure } => {
            if let Some(failure) = failure {
                print_failure(&failure, &launch);
            }
            console::print_stderr(&format!(
                "stopped after step {} of {}\n",
                summary.last_step(),
                config.steps
            ));
            console::print_result(&summary.text(out.run(), started.elapsed()))?;
            Ok(Exit::Interrupted { signal })
        }
        Outcome::Failed(failure) => {
            print_failure(&failure, &launch);
            Ok(if failure.is_configuration() { Exit::Usage } else { Exit::Failed })
        }
    }
}

fn print_failure(failure: &Failure, launch: &Launch) {
    console::print_error(&failure.message(&launch.mesh), failure.hint().as_deref());
    console::print_stderr(&report::details(failure, &launch.run, launch.num_ranks()));
}

fn headline(launch: &Launch, steps: u64) -> String {
    let [pipeline, data, tensor] =
        [Axis::Pipeline, Axis::Data, Axis::Tensor].map(|axis| launch.mesh.degree(axis));
    let mesh = match pipeline * tensor {
        1 => String::new(),
        _ => format!(" (pipeline {pipeline} x data {data} x tensor {tensor})"),
    };
    format!(
        "training into `{}`: {}{mesh} with {} each, {}",
        launch.run.path().display(),
        plural(launch.num_ranks(), "rank", "ranks"),
        plural(launch.threads_per_rank, "thread", "threads"),
        plural(steps as usize, "step", "steps"),
    )
}

fn plural(count: usize, one: &str, many: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { many })
}

/// `out/` and the run file's name without its ending.
fn default_out(run_file: &Path) -> PathBuf {
    Path::new("out").join(run_file.file_stem().unwrap_or(run_file.as_os_str()))
}

/// What becomes of a run that the output folder already holds.
fn existing(args: &TrainArgs, folder: &Path) -> anyhow::Result<Existing> {
    if args.overwrite && args.resume == "auto" {
        return Err(UsageError::new(
            "`--resume auto` and `--overwrite` ask for opposite things",
            "`--resume auto` goes on with the run in the folder, `--overwrite` replaces it",
        )
        .into());
    }
    let is_within = || {
        let checkpoint = Path::new(&args.resume).canonicalize();
        let folder = folder.canonicalize();
        checkpoint.is_ok_and(|checkpoint| folder.is_ok_and(|folder| checkpoint.starts_with(folder)))
    };
    Ok(match () {
        () if args.resume == "auto" || args.resume != "never" && is_within() => Existing::Continue,
        () if args.overwrite => Existing::Replace,
        () => Existing::Refuse,
    })
}

fn worker_args(run: &RunArgs, eval: Option<&Path>, resume: &OsStr, out: &Path) -> Vec<OsString> {
    let mut args: Vec<OsString> = vec![run.run.clone().into(), "--out".into(), out.into()];
    if resume != "never" {
        args.extend(["--resume".into(), resume.to_owned()]);
    }
    for set in &run.sets {
        args.extend(["--set".into(), set.into()]);
    }
    if let Some(text) = eval {
        args.extend(["--eval".into(), text.into()]);
    }
    args
}

fn num_cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// 128 random bits, in hexadecimal.
fn random_id() -> anyhow::Result<String> {
    let mut bytes = [0_u8; 16];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut source| source.read_exact(&mut bytes))
        .context("could not read random bytes from `/dev/urandom`")?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// A port that is free now. Ranks on one host meet in shared memory and use it only as a name, so where there is
/// no loopback interface a number drawn from the run's id does as well.
fn free_port(run_id: &str) -> u16 {
    let bound = TcpListener::bind(("127.0.0.1", 0)).and_then(|listener| listener.local_addr());
    bound.map_or_else(
        |_| {
            let drawn = u16::from_str_radix(&run_id[..4], 16).expect("an id is hexadecimal");
            20_000 + drawn % 40_000
        },
        |address| address.port(),
    )
}

/// Progress on standard error, and what the summary needs.
struct Screen {
    progress: Progress,
    summary: Summary,
}

impl Watcher for Screen {
    fn event(&mut self, rank: usize, event: &Event) {
        match event {
            // Every rank goes through the same phases.
            Event::Phase { phase } if rank == 0 => self.progress.phase(phase),
            Event::Step(metrics) if rank == 0 => {
                self.summary.step(metrics);
                self.progress.step(metrics);
            }
            Event::Sample { text } if rank == 0 => self.summary.sample(text),
            Event::Note { text } if rank == 0 => self.progress.note(text),
            Event::Note { text } => self.progress.note(&format!("rank {rank}: {text}")),
            _ => {}
        }
    }

    fn note(&mut self, text: &str) {
        self.progress.note(text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_shares() {
        assert_eq!(default_out(Path::new("runs/small.toml")), Path::new("out/small"));
        assert_eq!(default_out(Path::new("demo")), Path::new("out/demo"));
        let (a, b) = (random_id().unwrap(), random_id().unwrap());
        assert_eq!(a.len(), 32);
        assert_ne!(a, b);
        assert!(free_port(&a) > 0);
    }

    #[test]
    fn the_worker_gets_the_same_run() {
        let run = RunArgs { run: "r.json".into(), ranks: 2, sets: vec!["a.b=c d".into(), "e=".into()] };
        let args = worker_args(&run, Some(Path::new("held out.txt")), OsStr::new("auto"), Path::new("out/r"));
        let expected = [
            "r.json",
            "--out",
            "out/r",
            "--resume",
            "auto",
            "--set",
            "a.b=c d",
            "--set",
            "e=",
            "--eval",
            "held out.txt",
        ];
        assert_eq!(args, expected);
    }
}
