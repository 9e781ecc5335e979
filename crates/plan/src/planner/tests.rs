//! The planner against the papers, against the plan of a run, and against the simulator.

use serde_json::{Value, json};

use super::*;
use crate::memory::MemoryPlan;
use crate::pipeline::{Durations, Schedule, Transport};
use crate::run::{RunPlan, RunShape};
use crate::share::alive;
use crate::{ActivationPolicy, ActivationRules, Axis};

fn gpt2(layers: usize, hidden: usize, inner: usize, vocab: usize) -> Value {
    json!({"model_type": "gpt2", "n_layer": layers, "n_embd": hidden, "n_head": hidden / 128, "n_inner": inner,
           "vocab_size": vocab, "n_positions": 1024, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0})
}

fn job(model: &Value) -> Job {
    Job {
        device: Device::Cpu,
        grouped_queries: GroupedQueries::Shared,
        head_chunks: HeadChunks::Host,
        model: ModelConfig::from_json(model).unwrap(),
        seq_len: 1024,
        global_batch: 1024,
        micro_batch: 1,
        compute_bytes: 2,
        widths: StateWidths::adamw(2),
        frozen: Vec::new(),
        overlap: Overlap::SideThread,
        sequence: SequenceParallel::Off,
        cut: StageCut::Time,
        schedules: vec![
            ScheduleKind::OneForwardOneBackward,
            ScheduleKind::Interleaved { num_chunks: 2 },
            ScheduleKind::ZeroBubble,
        ],
        pipeline: None,
        tensor: None,
        stage: None,
    }
}

fn cluster(num_ranks: usize) -> Cluster {
    Cluster {
        num_ranks,
        ranks_per_host: 8,
        device_memory: Bytes(80_000_000_000),
        reserved: Bytes(0),
        flops: 4e14,
        link: 2.5e10,
        host_link: 3e11,
    }
}

fn num_params(model: &ModelConfig) -> f64 {
    let units = crate::layout::units_of(&model.layers(), 1, |_| false);
    units.iter().map(|unit| unit.numel()).sum::<usize>() as f64
}

/// 16-bit parameters and gradients, K = 12 bytes of optimizer state.
const PAPER: StateWidths = StateWidths { params: 2, master_params: 4, optimizer: 8, grads: 2 };

/// GB of model state with data parallelism alone, as one figure after the point.
fn state_gb(job: &Job, num_ranks: usize, stage: ZeroStage) -> f64 {
    let job = Job { pipeline: Some(1), tensor: Some(1), stage: Some(stage), widths: PAPER, ..job.clone() };
    let found = search(&job, &cluster(num_ranks));
    let all = found.feasible.iter().chain(&found.over);
    // The paper keeps the whole gradient in stage 1, as we do when micro-batches are accumulated.
    let accumulates = |estimate: &&Estimate| estimate.layout.num_microbatches > 1;
    let memory = all.clone().find(accumulates).unwrap().memory;
    let state = memory.parameters + memory.gradients + memory.optimizer;
    (state.0 as f64 / 1e8).round() / 10.0
}

#[test]
fn the_zero_papers_table() {
    let job = job(&gpt2(36, 4096, 16_504, 51_200));
    let numel = num_params(&job.model);
    assert!((numel / 7.5e9 - 1.0).abs() < 4e-4, "{numel}");
    assert_eq!(ZeroStage::ALL.map(|stage| state_gb(&job, 64, stage)), [120.0, 31.4, 16.6, 1.9]);
}

fn a_trillion() -> Job {
    let job = Job { global_batch: 4096, ..job(&gpt2(128, 25_600, 101_184, 51_200)) };
    let numel = num_params(&job.model);
    assert!((numel / 1e12 - 1.0).abs() < 2e-3, "{numel}");
    job
}

#[test]
fn a_trillion_parameters_on_1024_ranks() {
    assert_eq!(state_gb(&a_trillion(), 1024, ZeroStage::Three), 15.6);
}

#[test]
fn a_trillion_parameters_have_layouts_that_fit_and_the_best_is_sensible() {
    let found = search(&a_trillion(), &cluster(1024));
    let best = found.feasible.first().unwrap();
    assert!(best.fits() && best.memory.total() <= Bytes(80_000_000_000));
    assert!(found.feasible.windows(2).all(|pair| pair[0].step_s <= pair[1].step_s));
    assert!(found.over.windows(2).all(|pair| pair[0].excess <= pair[1].excess));
    assert!(
        found
            .over
            .iter()
            .all(|estimate| { estimate.memory.total() == cluster(1024).device_memory + estimate.excess })
    );
    // No layout computes faster than the rate allows.
    let flops: u64 = 3 * a_trillion().model.forward_flops(1024).iter().sum::<u64>();
    let least = flops as f64 * (4096 * 1024) as f64 / 1024.0 / 4e14;
    assert!(best.step_s > least && best.step_s < 1.5 * least, "{} {least}", best.step_s);
    // Tensor groups of the best stay within a host.
    assert!(best.layout.mesh.degree(Axis::Tensor) <= 8);
    // 200 heads are a multiple of 8, not of 16.
    let ruled = found.ruled_out.iter().find(|ruled| ruled.tensor == Some(16)).unwrap();
    assert!(ruled.reason.contains("the `200` heads of"), "{ruled:?}");
}

#[test]
fn what_is_asked_for_is_all_that_is_tried() {
    let asked = Job {
        pipeline: Some(4),
        tensor: Some(2),
        stage: Some(ZeroStage::Two),
        ..job(&gpt2(8, 256, 1024, 1000))
    };
    let found = search(&asked, &cluster(16));
    assert!(!found.feasible.is_empty());
    for Estimate { layout, .. } in &found.feasible {
        let degrees = [Axis::Pipeline, Axis::Data, Axis::Tensor].map(|axis| layout.mesh.degree(axis));
        assert_eq!((degrees, layout.stage), ([4, 2, 2], ZeroStage::Two));
        assert_eq!(layout.num_microbatches * layout.micro_batch * 2, 1024);
    }
    let reason = |job: Job| {
        let found = search(&job, &cluster(16));
        assert!(found.feasible.is_empty() && found.over.is_empty());
        found.ruled_out[0].reason.clone()
    };
    assert_eq!(reason(Job { pipeline: Some(3), ..asked.clone() }), "does not divide `16` ranks");
    assert_eq!(
        reason(Job { global_batch: 1023, ..asked.clone() }),
        "does not divide the global batch of `1023` samples"
    );
    let error = reason(Job { pipeline: Some(16), tensor: Some(1), ..asked });
    assert_eq!(error, "1f1b: `10` layers cannot be cut into `16` parts, expected 1 to 10");
}

/// A layout without pipeline and tensor axes is what [`RunPlan`] plans.
#[test]
fn data_parallel_layouts_are_the_plan_of_the_run() {
    let llama = json!({"model_type": "llama", "vocab_size": 16384, "hidden_size": 1024, "intermediate_size": 2816,
                       "num_hidden_layers": 12, "num_attention_heads": 16, "tie_word_embeddings": false});
    for (model, tied) in [(llama.clone(), false), (llama, true), (gpt2(12, 768, 3072, 50_257), true)] {
        let mut model = model;
        model["tie_word_embeddings"] = json!(tied);
        for overlap in [Overlap::Inline, Overlap::SideThread] {
            for stage in ZeroStage::ALL {
                for (accum, policy) in [1, 4].into_iter().flat_map(|accum| {
                    [ActivationPolicy::Keep, ActivationPolicy::Recompute].map(|policy| (accum, policy))
                }) {
                    let mesh = Mesh::new(4, 1, 1).unwrap();
                    let sequence = SequenceParallel::Off;
                    same_as_run_plan(
                        &model,
                        Case { mesh, schedule: None, sequence, overlap, stage, accum, policy },
                    );
                }
            }
        }
    }
}

/// And so is any other layout.
#[test]
fn layouts_of_every_mesh_are_the_plan_of_the_run() {
    use ActivationPolicy::{Keep, Recompute};
    let models = [
        json!({"model_type": "llama", "vocab_size": 1001, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 6,
               "num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": false}),
        gpt2(6, 512, 2048, 5000),
    ];
    let schedules = [
        ScheduleKind::GPipe,
        ScheduleKind::OneForwardOneBackward,
        ScheduleKind::Interleaved { num_chunks: 2 },
        ScheduleKind::ZeroBubble,
    ];
    for (model, schedule) in models.iter().flat_map(|model| schedules.map(|schedule| (model, schedule))) {
        for [pipeline, tensor] in [[1, 2], [2, 1], [2, 2], [4, 1], [2, 4]] {
            for (sequence, overlap, policy) in [
                (SequenceParallel::Off, Overlap::Inline, Keep),
                (SequenceParallel::On, Overlap::SideThread, Recompute),
            ] {
                for stage in ZeroStage::ALL {
                    let case = Case {
                        mesh: Mesh::new(8, pipeline, tensor).unwrap(),
                        schedule: (pipeline > 1).then_some(schedule),
                        sequence,
                        overlap,
                        stage,
                        accum: 4,
                        policy,
                    };
                    same_as_run_plan(model, case);
                }
            }
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Case {
    mesh: Mesh,
    schedule: Option<ScheduleKind>,
    sequence: SequenceParallel,
    overlap: Overlap,
    stage: ZeroStage,
    accum: usize,
    policy: ActivationPolicy,
}

fn same_as_run_plan(model: &Value, case: Case) {
    let Case { mesh, schedule, sequence, overlap, stage, accum, policy } = case;
    let shape = RunShape {
        model: ModelConfig::from_json(model).unwrap(),
        mesh,
        schedule,
        stage_cut: StageCut::Time,
        sequence,
        stage,
        compute_bytes: 2,
        precision: "bf16",
        optimizer_bytes: 8,
        grad_bytes: 4,
        micro_batch: 3,
        seq_len: 512,
        grad_accum_steps: accum,
        overlap,
        activations: ActivationRules::all(policy),
        device: Device::Cpu,
        head_chunk_rows: None,
        frozen: Vec::new(),
        no_decay: Vec::new(),
        grouped: Vec::new(),
    };
    let plan = RunPlan::new(shape).unwrap();
    let [pipeline, data, tensor] = [Axis::Pipeline, Axis::Data, Axis::Tensor].map(|axis| mesh.degree(axis));
    let asked = Job {
        seq_len: 512,
        global_batch: data * 3 * accum,
        micro_batch: 3,
        overlap,
        sequence,
        schedules: schedule.into_iter().collect(),
        pipeline: Some(pipeline),
        tensor: Some(tensor),
        stage: Some(stage),
        ..job(model)
    };
    let found = search(&asked, &cluster(mesh.world_size()));
    let same = |estimate: &&Estimate| {
        estimate.layout.micro_batch == 3
            && (estimate.layout.recompute == Recompute::Layers) == policy.recomputes()
    };
    let context = format!("{case:?} {}", asked.model.family());
    let estimate = found.feasible.iter().find(same).unwrap_or_else(|| panic!("{context}: {found:?}"));
    let memory = plan.stages[estimate.fullest_stage].memory_in(stage);
    // What is not for a layout to give stays out: the process, and what ranks of a host show each other.
    let counted = |memory: &MemoryPlan| {
        let step = memory.activations + memory.layer_grads + memory.temporaries;
        memory.state.total() + memory.gathered + memory.reductions + memory.messages + step
    };
    let most = plan.stages.iter().map(|plan| counted(plan.memory_in(stage))).max();
    assert_eq!(Some(counted(memory)), most, "{context}");
    assert_eq!(estimate.memory.parameters, memory.state.params, "{context}");
    assert_eq!(estimate.memory.gradients, memory.state.grads, "{context}");
    assert_eq!(estimate.memory.optimizer, memory.state.master_params + memory.state.optimizer, "{context}");
    assert_eq!(estimate.memory.activations, memory.activations, "{context}");
    let pools = memory.gathered + memory.reductions + memory.messages;
    assert_eq!(estimate.memory.buffers, pools + memory.layer_grads + memory.temporaries, "{context}");
    assert_eq!(estimate.traffic, plan.traffic(), "{context}");
    for (axis, bytes) in [(pipeline, estimate.traffic.pipeline), (tensor, estimate.traffic.tensor)] {
        assert_eq!(axis > 1, bytes > Bytes(0), "{context}");
    }
    assert_eq!(pipeline > 1, estimate.bubble > 0.0, "{context}");
}

#[test]
fn pipelines_take_as_long_and_keep_as_much_as_their_simulation() {
    let asked = job(&gpt2(14, 256, 1024, 1000));
    let free_wires = Cluster { link: f64::INFINITY, host_link: f64::INFINITY, ..cluster(8) };
    let found = search(&Job { global_batch: 64, ..asked.clone() }, &free_wires);
    let mut seen = [0; 3];
    for estimate in found.feasible.iter().filter(|estimate| estimate.layout.recompute == Recompute::Off) {
        let layout = &estimate.layout;
        let Some(kind) = layout.schedule else { continue };
        let num_stages = layout.mesh.degree(Axis::Pipeline);
        let schedule = Schedule::new(kind, num_stages, layout.num_microbatches).unwrap();
        let flops = asked.model.forward_flops(1024);
        let stages = crate::pipeline::Stages::new(
            &asked.model.layers(),
            &flops,
            &StageCut::Time,
            num_stages,
            kind.num_chunks(),
        )
        .unwrap();
        let scale =
            (layout.micro_batch * 1024) as f64 / layout.mesh.degree(Axis::Tensor) as f64 / free_wires.flops;
        let part = |part: &std::ops::Range<usize>| flops[part.clone()].iter().sum::<u64>() as f64 * scale;
        let forward: Vec<f64> = stages.parts().iter().map(part).collect();
        let durations = Durations {
            backward_input: forward.clone(),
            backward_weight: forward.clone(),
            forward,
            transfer: 0.0,
        };
        let simulation = schedule.simulate(&durations, Transport::Buffered).unwrap();
        for stage in 0..num_stages {
            let kept = alive(layout.schedule, num_stages, layout.num_microbatches, stage);
            assert_eq!(kept, simulation.peak_activations[stage], "{layout:?}");
            if kind == ScheduleKind::ZeroBubble {
                let mut waiting = 0usize;
                let waits = |action: &crate::pipeline::Action| {
                    match action {
                        crate::pipeline::Action::BackwardInput(_) => waiting += 1,
                        crate::pipeline::Action::BackwardWeight(_) => waiting -= 1,
                        _ => {}
                    }
                    waiting
                };
                let most = schedule.actions(stage).iter().map(waits).max().unwrap();
                assert_eq!(most, layout.num_microbatches.min(stage + 1), "{layout:?}");
            }
        }
        let ratio = estimate.step_s / simulation.makespan;
        let (index, tolerance) = match kind {
            ScheduleKind::OneForwardOneBackward => (0, 0.05),
            ScheduleKind::Interleaved { .. } => (1, 0.15),
            _ => (2, 0.15),
        };
        seen[index] += 1;
        // Formulas know stages and not the order in which uneven ones fill; few micro-batches show that most.
        if layout.num_microbatches >= 2 * num_stages {
            assert!((ratio - 1.0).abs() < tolerance, "{ratio} {layout:?}");
            assert!(
                (estimate.bubble - simulation.bubble).abs() < tolerance,
                "{} {} {layout:?}",
                estimate.bubble,
                simulation.bubble
            );
        }
    }
    assert!(seen.iter().all(|&count| count > 10), "{seen:?}");
}

#[test]
fn recomputation_and_tensor_axes_trade_memory_for_time() {
    let asked = Job { pipeline: Some(1), stage: Some(ZeroStage::One), ..job(&gpt2(8, 1024, 4096, 5000)) };
    let of = |tensor: usize, sequence, recompute| {
        let job = Job { tensor: Some(tensor), sequence, micro_batch: 4, ..asked.clone() };
        let found = search(&job, &cluster(8));
        let wanted =
            |estimate: &&Estimate| estimate.layout.micro_batch == 4 && estimate.layout.recompute == recompute;
        *found.feasible.iter().find(wanted).unwrap()
    };
    use SequenceParallel::{Off, On};
    let (whole, recomputed) = (of(1, Off, Recompute::Off), of(1, Off, Recompute::Layers));
    assert!(recomputed.memory.activations.0 * 3 < whole.memory.activations.0);
    assert!((recomputed.step_s / whole.step_s - 4.0 / 3.0).abs() < 0.05);
    let (four, split) = (of(4, Off, Recompute::Off), of(4, On, Recompute::Off));
    assert!(four.memory.parameters.0 * 3 < whole.memory.parameters.0);
    assert!(
        split.memory.activations < four.memory.activations
            && four.memory.activations < whole.memory.activations
    );
    // 8 blocks: two sums forward and two backward; one of the embedding, one of the head's input; 2 (T - 1) / T of it each. Three
    // numbers of each token's softmax, to each of the other ranks.
    let boundary = 4 * 1024 * 1024 * 2;
    let softmax = 4 * 1024 * 12 * 3;
    let num_microbatches = 1024 / 2 / 4;
    assert_eq!(four.traffic.tensor, Bytes(num_microbatches * ((8 * 4 + 2) * boundary * 2 * 3 / 4 + softmax)));
    assert!(split.traffic.tensor > four.traffic.tensor);
    assert_eq!(whole.traffic.tensor, Bytes(0));
}

#[test]
fn stages_send_activations_and_gradients_of_tied_tables() {
    let asked = Job {
        pipeline: Some(4),
        tensor: Some(1),
        stage: Some(ZeroStage::One),
        ..job(&gpt2(6, 512, 2048, 5000))
    };
    let found = search(
        &Job { global_batch: 32, schedules: vec![ScheduleKind::OneForwardOneBackward], ..asked },
        &cluster(8),
    );
    let estimate = found.feasible.iter().find(|estimate| estimate.layout.micro_batch == 2).unwrap();
    let boundary = 2 * 1024 * 512 * 2;
    // The first and the last stage send half the messages of those between, and the table's gradient.
    let table = 5000 * 512 * 4;
    assert_eq!(estimate.layout.num_microbatches, 8);
    assert_eq!(estimate.traffic.pipeline, Bytes((8 * 2 * boundary).max(8 * boundary + table)));
}

#[test]
fn frozen_parameters_have_no_gradients_and_no_optimizer() {
    let asked = Job {
        pipeline: Some(1),
        tensor: Some(1),
        stage: Some(ZeroStage::Zero),
        ..job(&gpt2(2, 256, 1024, 1000))
    };
    let memory =
        |frozen: Vec<NamePattern>| search(&Job { frozen, ..asked.clone() }, &cluster(2)).feasible[0].memory;
    let (trained, frozen) = (memory(Vec::new()), memory(vec![NamePattern::new("*")]));
    assert!(trained.optimizer > Bytes(0) && trained.gradients > Bytes(0));
    assert_eq!((frozen.optimizer, frozen.gradients), (Bytes(0), Bytes(0)));
    assert_eq!(frozen.parameters, trained.parameters);
}
