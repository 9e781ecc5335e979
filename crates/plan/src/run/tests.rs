//! Plans against what follows from a few numbers.

use serde_json::json;

use super::*;
use crate::pipeline::{ScheduleKind, StageCut};
use crate::zoo::{ModelConfig, SequenceParallel};
use crate::{ActivationRules, Mesh, NamePattern, Overlap};

fn shape(num_ranks: usize, tied: bool) -> RunShape {
    let json = json!({"model_type": "llama", "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64,
                      "num_hidden_layers": 2, "num_attention_heads": 2, "tie_word_embeddings": tied});
    RunShape {
        model: ModelConfig::from_json(&json).unwrap(),
        mesh: Mesh::new(num_ranks, 1, 1).unwrap(),
        device: Device::Cpu,
        schedule: None,
        stage_cut: StageCut::Parameters,
        sequence: SequenceParallel::Off,
        stage: ZeroStage::Three,
        compute_bytes: 2,
        precision: "bf16",
        optimizer_bytes: 8,
        grad_bytes: 4,
        micro_batch: 4,
        seq_len: 16,
        grad_accum_steps: 3,
        overlap: Overlap::Inline,
        activations: ActivationRules::default(),
        head_chunk_rows: None,
        frozen: Vec::new(),
        no_decay: Vec::new(),
        grouped: Vec::new(),
    }
}

#[test]
fn adds_up() {
    let plan = RunPlan::new(shape(2, false)).unwrap();
    assert_eq!(plan.step_tokens, 2 * 3 * 4 * 16);
    assert_eq!(plan.num_params, plan.num_trained);
    assert_eq!(plan.memory().stage, ZeroStage::Three);
    let padded: usize = plan.stages[0].units.iter().map(|unit| unit.padded_numel).sum();
    // Each micro-batch: two gathers and a reduction of everything.
    assert_eq!(plan.stages[0].data_traffic.elements, 3 * 3 * padded / 2);
}

#[test]
fn a_tied_table_is_gathered_for_both_of_its_layers() {
    let tied = RunPlan::new(shape(2, true)).unwrap();
    let table = tied.stages[0].units[0].padded_numel;
    let padded: usize = tied.stages[0].units.iter().map(|unit| unit.padded_numel).sum();
    assert_eq!(tied.stages[0].data_traffic.elements, 3 * (3 * padded + 2 * table) / 2);
}

#[test]
fn frozen_layers_before_the_first_trained_one_are_gathered_once() {
    let mut shape = shape(2, false);
    shape.frozen = vec![NamePattern::new("model.*")];
    let plan = RunPlan::new(shape).unwrap();
    let half = |trainable: bool| -> usize {
        let units = plan.stages[0].units.iter().filter(|unit| unit.trainable == trainable);
        units.map(|unit| unit.padded_numel - unit.shard_numel()).sum()
    };
    // The head goes backward: its frozen norm is gathered twice, like its trained table.
    let norm = plan.stages[0]
        .units
        .iter()
        .find(|unit| unit.name == "lm_head" && !unit.trainable)
        .unwrap()
        .padded_numel;
    assert_eq!(plan.stages[0].data_traffic.elements, 3 * (3 * half(true) + half(false) + norm / 2));
}

#[test]
fn what_cannot_be_is_refused() {
    let refused = |change: fn(&mut RunShape)| {
        let mut shape = shape(2, false);
        change(&mut shape);
        RunPlan::new(shape).unwrap_err().to_string()
    };
    assert_eq!(
        refused(|shape| shape.seq_len = 4096),
        "`data.seq_len` is `4096`, the model has `2048` positions"
    );
    assert_eq!(
        refused(|shape| shape.no_decay = vec![NamePattern::new("*.bias")]),
        "`*.bias` in `train.no_decay` matches no parameter"
    );
    let rule = (NamePattern::new("h.*"), crate::ActivationPolicy::Recompute);
    let mut shape = shape(2, false);
    shape.activations.rules.push(rule);
    let error = RunPlan::new(shape).unwrap_err().to_string();
    assert!(
        error.starts_with("`h.*` in `activations` matches no layer; the layers are [\"model."),
        "{error}"
    );
}

#[test]
fn narrower_states_are_counted() {
    let state = |optimizer_bytes, grad_bytes| {
        let plan = RunPlan::new(RunShape { optimizer_bytes, grad_bytes, ..shape(1, false) }).unwrap();
        (plan.memory().state, plan.stages[0].units.iter().map(|unit| unit.padded_numel as u64).sum::<u64>())
    };
    let (adamw, padded) = state(8, 4);
    assert_eq!((adamw.optimizer.0, adamw.grads.0), (8 * padded, 4 * padded));
    let (narrow, _) = state(4, 2);
    assert_eq!((narrow.optimizer.0, narrow.grads.0), (4 * padded, 2 * padded));
}

fn on(mesh: [usize; 3], tied: bool, change: fn(&mut RunShape)) -> RunPlan {
    let [pipeline, data, tensor] = mesh;
    let mut shape = shape(1, tied);
    shape.mesh = Mesh::new(pipeline * data * tensor, pipeline, tensor).unwrap();
    shape.schedule = (pipeline > 1).then_some(ScheduleKind::OneForwardOneBackward);
    change(&mut shape);
    RunPlan::new(shape).unwrap()
}

#[test]
fn the_ranks_of_a_mesh_hold_the_model_once_for_each_replica() {
    for tied in [false, true] {
        let plan = on([2, 3, 2], tied, |_| {});
        let ranks: Vec<_> = plan.stages.iter().map(|stage| stage.ranks.clone()).collect();
        assert_eq!(ranks, [0..6, 6..12]);
        let held: usize = plan.stages.iter().map(StagePlan::num_params).sum();
        // Tables and matrices are halved, norms are not: two in each block and the last one.
        let norms = 5 * 32;
        let table = 100 * 32;
        let twice = if tied { table / 2 } else { 0 };
        assert_eq!(held, (plan.num_params - norms) / 2 + norms + twice, "tied {tied}");
        let own = |unit: &&UnitLayout| unit.name == "model.embed_tokens.weight";
        let shared: Vec<_> = plan.stages.iter().map(|stage| stage.units.iter().find(own)).collect();
        assert_eq!(shared[0].is_some(), tied);
        assert_eq!(shared[0], shared[1], "the same unit on both stages");
        assert_eq!(plan.step_tokens, 3 * 3 * 4 * 16);
    }
}

#[test]
fn a_stage_keeps_as_many_micro_batches_as_the_schedule_lets_live() {
    let seven = json!({"model_type": "llama", "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64,
                       "num_hidden_layers": 7, "num_attention_heads": 2});
    let kept = |schedule| -> Vec<(usize, u64)> {
        let shape = RunShape {
            model: ModelConfig::from_json(&seven).unwrap(),
            mesh: Mesh::new(3, 3, 1).unwrap(),
            schedule: Some(schedule),
            stage_cut: StageCut::Uniform,
            grad_accum_steps: 8,
            ..shape(1, false)
        };
        let stages = RunPlan::new(shape).unwrap().stages;
        stages.iter().map(|stage| (stage.alive, stage.memory_in(ZeroStage::Three).activations.0)).collect()
    };
    let one = kept(ScheduleKind::OneForwardOneBackward);
    assert_eq!(one.iter().map(|&(alive, _)| alive).collect::<Vec<_>>(), [3, 2, 1]);
    let gpipe = kept(ScheduleKind::GPipe);
    assert!(gpipe.iter().all(|&(alive, _)| alive == 8));
    // The middle stage has blocks alone: 8 micro-batches against 2.
    assert_eq!(gpipe[1].1, 4 * one[1].1);
}

#[test]
fn each_axis_sends_its_own() {
    let only = |mesh| {
        let AxisTraffic { pipeline, data, tensor } = on(mesh, true, |_| {}).traffic();
        [pipeline, data, tensor].map(|bytes| bytes > Bytes(0))
    };
    assert_eq!(only([1, 1, 1]), [false; 3]);
    assert_eq!(only([2, 1, 1]), [true, false, false]);
    assert_eq!(only([1, 2, 1]), [false, true, false]);
    assert_eq!(only([1, 1, 2]), [false, false, true]);
    let plan = on([2, 2, 1], true, |_| {});
    // 3 micro-batches of 64 tokens forward, and the gradient of half of the table in fp32, whose sum two stages make.
    let table = plan.stages[0].units.iter().find(|unit| unit.name.ends_with("weight")).unwrap();
    let expected = 3 * 64 * 32 * 2 + 4 * table.shard_numel() as u64;
    assert_eq!(plan.stages[0].traffic.pipeline, Bytes(expected));
    // Groups of the data axis, of the table, and of messages in two directions.
    assert_eq!(plan.memory().staging, Bytes(4 * (4 << 20)));
    assert_eq!(plan.busiest(), plan.stages.iter().map(|stage| stage.traffic.total()).max().unwrap());
    // With split tokens the gradients of norms are sums over the group.
    let split = on([1, 1, 2], false, |shape| shape.sequence = SequenceParallel::On);
    let whole = on([1, 1, 2], false, |_| {});
    let norms = 5 * 32;
    let more = split.traffic().tensor.0 - whole.traffic().tensor.0;
    assert_eq!(more, 3 * 2 * norms);
}
