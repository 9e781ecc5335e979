//! Checkpoints of meshes: saved on one, resumed on any other; each number stored once; verified and exported by the command-line tool.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use shardwise_checkpoint::HfReader;
use shardwise_checkpoint::state::Checkpoint;
use shardwise_monitor::StepMetrics;

use crate::layout::{Layout, Model, gap};
use crate::ranks::{Ended, Ranks};

const STEPS: usize = 4;
const CUT: usize = 2;

/// Another mesh adds the same numbers in another order. Of a loss of about 7, and of a norm as a part of it.
const RESHARDED_TOLERANCE: f64 = 3e-6;
/// Of a weight: a moment that is not its own shows as a part of 3e-4, which is a step.
const RESHARDED_WEIGHTS: f32 = 1e-6;

/// Trains all steps and saves at the cut and at the end.
fn train(layout: Layout, background: bool) -> Ended {
    let mut run = layout.run_file(STEPS);
    run["checkpoint"] = json!({ "every": CUT, "async": background });
    Ranks::new(&run, layout.num_ranks()).run()
}

fn checkpoint(ended: &Ended, step: usize) -> PathBuf {
    ended.path(&format!("checkpoints/step-{step:06}"))
}

/// Goes on from the checkpoint of another run, up to `steps` steps.
fn resume(layout: Layout, checkpoint: &Path, steps: usize) -> Ended {
    layout.ranks(steps).arg("--resume").arg(checkpoint.to_str().unwrap()).run()
}

/// What does not depend on the clock and the process.
fn numbers(ended: &Ended) -> Vec<StepMetrics> {
    let timeless =
        |step| StepMetrics { tokens_per_s: 0.0, step_s: 0.0, exposed_comm_s: 0.0, peak_rss_mb: 0.0, ..step };
    ended.metrics().into_iter().map(timeless).collect()
}

/// The command-line tool, which another package builds.
fn shardwise(args: &[&str]) -> String {
    let path = Path::new(env!("CARGO_BIN_EXE_shardwise-worker")).with_file_name("shardwise");
    assert!(path.is_file(), "`{}` is missing: build it first with `make build`", path.display());
    let output = Command::new(path).args(args).output().unwrap();
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Bytes of tensors in the files of all ranks.
fn stored_bytes(checkpoint: &Path) -> u64 {
    let files = fs::read_dir(checkpoint).unwrap().map(|entry| entry.unwrap().path());
    let shards = files.filter(|path| path.extension().is_some_and(|ending| ending == "safetensors"));
    let tensor_bytes = |path: PathBuf| -> u64 {
        let bytes = fs::read(path).unwrap();
        let (length, rest) = bytes.split_at(8);
        let length = u64::from_le_bytes(length.try_into().unwrap()) as usize;
        let header: Value = serde_json::from_slice(&rest[..length]).unwrap();
        let offsets =
            header.as_object().unwrap().values().filter_map(|tensor| tensor.get("data_offsets")?.as_array());
        offsets.map(|range| range[1].as_u64().unwrap() - range[0].as_u64().unwrap()).sum()
    };
    shards.map(tensor_bytes).sum()
}

/// Everything a mesh has alike is stored by one of its ranks; the tool finds no damage and exports what the run itself exported.
fn check_files(layout: Layout, whole: &Ended) {
    let last = checkpoint(whole, STEPS);
    let weights = whole.weights();
    let num_params: usize = weights.values().map(Vec::len).sum();
    // AdamW: master weights and two moments in fp32.
    assert_eq!(stored_bytes(&last), 12 * num_params as u64, "{layout:?}");
    let tensors = Checkpoint::open(&last).unwrap();
    assert_eq!(tensors.tensors().map(|tensor| tensor.num_bytes()).sum::<u64>(), 12 * num_params as u64);

    let said = shardwise(&["verify", last.to_str().unwrap()]);
    assert!(said.contains("as written"), "{said}");
    let exported = tempfile::tempdir().unwrap();
    shardwise(&["export", last.to_str().unwrap(), exported.path().to_str().unwrap(), "--dtype", "fp32"]);
    let reader = HfReader::open(exported.path()).unwrap();
    assert_eq!(reader.tensors().len(), weights.len(), "{layout:?}");
    for (name, values) in &weights {
        assert!(reader.read_f32(name).unwrap() == *values, "{layout:?}: `{name}` is exported otherwise");
    }
    assert!(exported.path().join("config.json").is_file());
}

/// Saves on `from`, goes on from there on each of `onto`.
fn check_moves(from: Layout, onto: &[Layout]) {
    let whole = train(from, false);
    check_files(from, &whole);
    let (expected, weights) = (numbers(&whole), whole.weights());
    for &layout in onto {
        let layout = Layout { model: from.model, ..layout };
        let ended = resume(layout, &checkpoint(&whole, CUT), STEPS);
        let found = numbers(&ended);
        assert_eq!(found.len(), STEPS - CUT);
        let pairs = || found.iter().zip(&expected[CUT..]);
        let losses = pairs().map(|(a, b)| (a.loss - b.loss).abs()).fold(0.0, f64::max);
        let norms = pairs().map(|(a, b)| (a.grad_norm / b.grad_norm - 1.0).abs()).fold(0.0, f64::max);
        let moved = gap(&ended.weights(), &weights);
        println!(
            "{from:?} to {layout:?}: losses by {losses:.1e}, norms by {norms:.1e}, weights by {moved:.1e}"
        );
        assert!(
            losses < RESHARDED_TOLERANCE && norms < RESHARDED_TOLERANCE,
            "{from:?} to {layout:?}: {found:?}"
        );
        assert!(moved < RESHARDED_WEIGHTS, "{from:?} to {layout:?}: {moved}");
    }
}

#[test]
fn a_llama_moves_from_any_mesh_to_any_other() {
    let tensor = Layout { sequence: true, ..Layout::new([1, 1, 2], 0) };
    let pipeline = Layout { schedule: "zero-bubble", ..Layout::new([2, 1, 1], 1) };
    check_moves(Layout::new([1, 2, 1], 1), &[Layout { stage: 3, ..tensor }]);
    check_moves(tensor, &[pipeline]);
    check_moves(Layout::new([2, 1, 2], 3), &[Layout::ALONE]);
    check_moves(Layout::ALONE, &[Layout::new([2, 2, 1], 3)]);
    check_moves(Layout::new([2, 2, 1], 1), &[Layout::new([1, 2, 2], 3)]);
    // Ranks that share key and value heads.
    check_moves(
        Layout::new([1, 1, 4], 1),
        &[Layout { sequence: true, schedule: "interleaved:2", ..Layout::new([2, 1, 2], 3) }],
    );
}

#[test]
fn a_gpt2_moves_with_its_one_table_and_its_blocks_of_q_k_and_v() {
    let from = |mesh, stage| Layout { model: Model::Gpt2, ..Layout::new(mesh, stage) };
    check_moves(from([1, 1, 2], 1), &[Layout::new([2, 2, 1], 3)]);
    check_moves(
        Layout { sequence: true, schedule: "interleaved:2", ..from([2, 1, 2], 3) },
        &[Layout::new([1, 2, 1], 1)],
    );
    check_moves(from([2, 2, 1], 3), &[Layout::new([1, 1, 4], 1)]);
}

#[test]
fn the_same_mesh_goes_on_with_the_same_bits() {
    let sequence = Layout { sequence: true, schedule: "zero-bubble", ..Layout::new([2, 1, 2], 1) };
    for (layout, background) in [
        (Layout::new([2, 2, 1], 3), false),
        (sequence, true),
        (Layout { model: Model::Gpt2, bf16: true, ..sequence }, false),
        (Layout { bf16: true, ..Layout::new([1, 2, 2], 3) }, true),
    ] {
        let whole = train(layout, background);
        check_files(layout, &whole);
        let ended = resume(layout, &checkpoint(&whole, CUT), STEPS);
        assert_eq!(numbers(&ended), numbers(&whole)[CUT..], "{layout:?}");
        assert!(ended.model() == whole.model(), "{layout:?}: other weights");
    }
}

#[test]
fn a_mesh_that_takes_no_step_has_the_weights_that_another_saved() {
    let from = Layout { model: Model::Gpt2, bf16: true, ..Layout::new([2, 1, 2], 1) };
    let whole = train(from, false);
    for layout in [Layout::ALONE, Layout { sequence: true, ..Layout::new([1, 2, 2], 3) }] {
        let ended =
            resume(Layout { model: from.model, bf16: true, ..layout }, &checkpoint(&whole, STEPS), STEPS);
        assert_eq!(numbers(&ended), []);
        assert!(ended.model() == whole.model(), "{layout:?}: other weights");
    }
}
