//! Stop and resume: the run that stopped and the run that did not give the same bits.

use std::path::Path;

use serde_json::{Value, json};
use shardwise_monitor::StepMetrics;

use crate::case::Case;
use crate::ranks::{Ended, Ranks};

const STEPS: u64 = 12;
const WORLD_SIZE: usize = 2;

#[derive(Debug, Clone, Copy)]
struct Kind {
    precision: &'static str,
    stage: usize,
    background: bool,
}

impl Kind {
    fn run_file(self) -> Value {
        let case = Case { accum: 2, micro_batch: 2, steps: STEPS as usize, ..Case::new(self.stage) };
        let mut run = case.run_file();
        run["data"]["order"] = "shuffled".into();
        run["checkpoint"] = json!({ "every": 1, "async": self.background });
        run["deepspeed"]["scheduler"] =
            json!({ "type": "WarmupDecayLR", "params": { "warmup_num_steps": 4, "total_num_steps": 12 } });
        match self.precision {
            "bf16" => run["deepspeed"]["bf16"]["enabled"] = true.into(),
            // So high that the first steps overflow, and so short a window that the scale moves on the way.
            "fp16" => {
                run["deepspeed"]["fp16"] = json!({
                    "enabled": true, "initial_scale_power": 21, "loss_scale_window": 3, "hysteresis": 1,
                });
            }
            _ => {}
        }
        run
    }
}

/// What a run computed in its steps, without what depends on the clock and the process.
fn numbers(ended: &Ended) -> Vec<StepMetrics> {
    assert!(ended.codes.iter().all(|code| *code == Some(0)), "{}", ended.report());
    let lines = std::fs::read_to_string(ended.path("metrics.jsonl")).unwrap();
    let number = |line: &str| {
        let metrics: StepMetrics = serde_json::from_str(line).unwrap();
        StepMetrics { tokens_per_s: 0.0, step_s: 0.0, exposed_comm_s: 0.0, peak_rss_mb: 0.0, ..metrics }
    };
    lines.lines().map(number).collect()
}

fn resumed(kind: Kind, checkpoint: &Path) -> Ended {
    let mut run = kind.run_file();
    run["checkpoint"] = json!({});
    Ranks::new(&run, WORLD_SIZE).arg("--resume").arg(checkpoint.to_str().unwrap()).run()
}

/// Cuts the run after each of `cuts` steps.
fn check(kind: Kind, cuts: impl Iterator<Item = u64>) {
    let whole = Ranks::new(&kind.run_file(), WORLD_SIZE).run();
    let expected = numbers(&whole);
    assert_eq!(expected.len() as u64, STEPS);
    if kind.precision == "fp16" {
        let skipped = expected.last().unwrap().skipped_steps;
        assert!((1..STEPS - 3).contains(&skipped), "`{skipped}` steps were skipped: this case shows nothing");
    }
    for cut in cuts {
        let ended = resumed(kind, &whole.path(&format!("checkpoints/step-{cut:06}")));
        assert_eq!(numbers(&ended), expected[cut as usize..], "{kind:?}, cut after step {cut}");
        assert!(ended.model() == whole.model(), "{kind:?}, cut after step {cut}: other weights");
    }
}

fn kinds() -> impl Iterator<Item = Kind> {
    let stages = |precision| (0..4).map(move |stage| (precision, stage));
    let kinds = ["fp32", "bf16", "fp16"].into_iter().flat_map(stages);
    kinds.flat_map(|(precision, stage)| [false, true].map(|background| Kind { precision, stage, background }))
}

#[test]
fn a_resumed_run_gives_the_same_bits() {
    for (index, kind) in kinds().enumerate() {
        // Each way of saving, each stage and each precision, cut early and late in turn.
        if kind.background == (index / 2).is_multiple_of(2) {
            check(kind, std::iter::once([3, 7, 11][index % 3]));
        }
    }
}

#[test]
#[ignore = "288 runs: several minutes"]
fn a_resumed_run_gives_the_same_bits_wherever_it_was_cut() {
    kinds().for_each(|kind| check(kind, 1..STEPS));
}

#[test]
fn auto_goes_on_in_the_same_folder() {
    let kind = Kind { precision: "bf16", stage: 2, background: true };
    let whole = Ranks::new(&kind.run_file(), WORLD_SIZE).run();
    let (expected, model) = (numbers(&whole), whole.model());
    // What a run that died at step 12 leaves: steps beyond its newest checkpoint, half a save, no model.
    for step in 8..=STEPS {
        std::fs::remove_dir_all(whole.path(&format!("checkpoints/step-{step:06}"))).unwrap();
    }
    std::fs::remove_dir_all(whole.path("model")).unwrap();
    std::fs::create_dir(whole.path("checkpoints/.tmp-step-000008-dead")).unwrap();
    let ended = whole.again(&["--resume", "auto"]);
    assert_eq!(numbers(&ended), expected);
    assert!(ended.model() == model);
    assert!(ended.stderr[0].contains("step-000007"), "{}", ended.report());
    assert!(!ended.path("checkpoints/.tmp-step-000008-dead").exists());
}

#[test]
fn another_layout_goes_on_from_the_same_state() {
    // Named: the ranks' gradients are added in another order.
    const RESHARDED_LOSS: f64 = 2e-5;
    let kind = Kind { precision: "fp32", stage: 2, background: false };
    let whole = Ranks::new(&kind.run_file(), WORLD_SIZE).run();
    let expected = numbers(&whole);
    let checkpoint = whole.path("checkpoints/step-000006");
    // The global batch of 8 samples, on other ranks.
    for (world_size, micro_batch, accum, stage) in [(1, 2, 4, 0), (4, 1, 2, 3), (4, 2, 1, 1), (2, 4, 1, 3)] {
        let mut run = Kind { stage, ..kind }.run_file();
        run["checkpoint"] = json!({});
        run["deepspeed"]["train_micro_batch_size_per_gpu"] = micro_batch.into();
        run["deepspeed"]["gradient_accumulation_steps"] = accum.into();
        let ended = Ranks::new(&run, world_size).arg("--resume").arg(checkpoint.to_str().unwrap()).run();
        let found = numbers(&ended);
        assert_eq!(found.len(), 6);
        for (a, b) in found.iter().zip(&expected[6..]) {
            assert!(
                (a.loss - b.loss).abs() < RESHARDED_LOSS,
                "{world_size} ranks, stage {stage}: {a:?} {b:?}"
            );
        }
    }
}

#[test]
fn what_cannot_be_resumed_is_refused() {
    let kind = Kind { precision: "fp32", stage: 1, background: false };
    let mut run = kind.run_file();
    run["steps"] = 2.into();
    run["deepspeed"]["scheduler"]["params"]["total_num_steps"] = 2.into();
    run["deepspeed"]["scheduler"]["params"]["warmup_num_steps"] = 1.into();
    let whole = Ranks::new(&run, WORLD_SIZE).run();
    numbers(&whole);
    let resume = |run: &Value, path: &str| {
        let ended = Ranks::new(run, WORLD_SIZE).arg("--resume").arg(path).run();
        assert!(ended.codes.iter().all(|code| *code != Some(0)), "{}", ended.report());
        ended.stderr.concat()
    };
    let checkpoint = whole.path("checkpoints/step-000002");
    let mut other = run.clone();
    other["deepspeed"]["optimizer"] = json!({ "type": "Lion", "params": { "lr": 1e-4 } });
    other["deepspeed"]["gradient_accumulation_steps"] = 3.into();
    let said = resume(&other, checkpoint.to_str().unwrap());
    assert!(said.contains("global batch of `8` samples, this run has `12`"), "{said}");
    let said = resume(&run, whole.path("checkpoints/step-000009").to_str().unwrap());
    assert!(said.contains("step-000009"), "{said}");
    other["deepspeed"]["optimizer"] = json!({ "type": "Adagrad", "params": { "lr": 1e-4 } });
    other["deepspeed"]["gradient_accumulation_steps"] = 2.into();
    let said = resume(&other, checkpoint.to_str().unwrap());
    assert!(said.contains("has no `sum`"), "{said}");
    // One byte of one shard.
    let shard = std::fs::read_dir(&checkpoint).unwrap().map(|entry| entry.unwrap().path());
    let shard =
        shard.filter(|path| path.extension().is_some_and(|ending| ending == "safetensors")).min().unwrap();
    let mut bytes = std::fs::read(&shard).unwrap();
    let last = bytes.len() - 5;
    bytes[last] ^= 4;
    std::fs::write(&shard, bytes).unwrap();
    let said = resume(&run, checkpoint.to_str().unwrap());
    assert!(said.contains(shard.file_name().unwrap().to_str().unwrap()), "{said}");
}

#[test]
fn a_save_that_fails_ends_the_run_or_is_only_told() {
    for background in [false, true] {
        for on_failure in ["stop", "continue"] {
            let mut run = Kind { precision: "fp32", stage: 2, background }.run_file();
            run["checkpoint"]["every"] = 5.into();
            run["checkpoint"]["on_failure"] = on_failure.into();
            let whole = Ranks::new(&run, WORLD_SIZE);
            // No folder can be made in the place of a file.
            whole.write("checkpoints", "in the way");
            let ended = whole.run();
            let said = ended.stderr.concat();
            assert!(said.contains("checkpoints"), "{background} {on_failure}: {}", ended.report());
            if on_failure == "continue" {
                assert!(said.contains("the run goes on"), "{}", ended.report());
                assert_eq!(numbers(&ended).len() as u64, STEPS);
                assert!(!ended.model().is_empty());
            } else {
                assert_eq!(ended.codes, [Some(1); WORLD_SIZE], "{}", ended.report());
                assert!(said.contains("a checkpoint could not be saved"), "{}", ended.report());
            }
            assert_eq!(std::fs::read_to_string(ended.path("checkpoints")).unwrap(), "in the way");
        }
    }
}
