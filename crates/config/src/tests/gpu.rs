//! Runs on GPUs: what they may use, what is offloaded, what is traced.

use super::*;
use crate::*;

const OFFLOAD_OPTIMIZER: &str = "deepspeed.zero_optimization.offload_optimizer.device=cpu";
const OFFLOAD_PARAMS: &str = "deepspeed.zero_optimization.offload_param.device=cpu";

fn config(sets: &[&str], ranks: usize) -> RunConfig {
    load(&run_with(&deepspeed("")), sets, ranks).unwrap().config
}

fn says(sets: &[&str], ranks: usize) -> String {
    load(&run_with(&deepspeed("")), sets, ranks).expect_err("this configuration has errors")
}

/// The notes on what was set, as `kind key: reason`.
fn notes(sets: &[&str], ranks: usize) -> Vec<String> {
    let loaded = load(&run_with(&deepspeed("")), sets, ranks).unwrap();
    let set = loaded.effective().notes().iter().filter(|note| note.kind != NoteKind::Default);
    set.map(|note| format!("{:?} {}: {}", note.kind, note.key, note.reason)).collect()
}

#[test]
fn how_ranks_use_gpus() {
    let plain = config(&["device=cuda"], 2);
    assert_eq!(plain.device, Device::Cuda);
    let expected = CudaConfig {
        collectives: Collectives::Auto,
        sharing: GpuSharing::Exclusive,
        memory_limit: None,
        determinism: Determinism::Off,
    };
    assert_eq!((plain.cuda, plain.cuda.collectives()), (expected, Collectives::Auto));
    let set = config(
        &[
            "device=cuda",
            "cuda={collectives: 'host', share: true, memory_limit: '16GiB', deterministic: true}",
        ],
        2,
    );
    let expected = CudaConfig {
        collectives: Collectives::Host,
        sharing: GpuSharing::Shared,
        memory_limit: Some(16 << 30),
        determinism: Determinism::On,
    };
    assert_eq!(set.cuda, expected);
    let shared = config(&["device=cuda", "cuda={share: true, memory_limit: 5e9}"], 2);
    assert_eq!(
        (shared.cuda.collectives(), shared.cuda.memory_limit),
        (Collectives::Host, Some(5_000_000_000))
    );
    assert_eq!(config(&["device=cuda", "cuda.collectives=nccl"], 2).cuda.collectives(), Collectives::Nccl);
    assert_eq!(
        says(&["device=cuda", "cuda.collectives=nccl", "cuda.share=true"], 2),
        "error: --set cuda.share=true: `cuda.collectives` is `nccl`, but `cuda.share` lets ranks share a GPU, and NCCL does \
         not\nhint: leave `cuda.collectives` out: ranks that share a GPU talk through host memory"
    );
    for bad in ["lots", "0", "-5", "'0GB'", "1.5"] {
        let set = format!("cuda.memory_limit={bad}");
        let says = says(&["device=cuda", &set], 1);
        assert!(
            says.contains("expected bytes, such as `\"16GB\"`, `\"16GiB\"` or a whole number above 0"),
            "{says}"
        );
    }
}

#[test]
fn on_cpu_nothing_of_it_counts() {
    let sets =
        ["cuda={collectives: 'nccl', share: true, memory_limit: '16GB'}", OFFLOAD_OPTIMIZER, OFFLOAD_PARAMS];
    let why = "`device` is `cpu`, where it changes nothing";
    let already = "model state is in host memory already";
    assert_eq!(
        notes(&sets, 2),
        [
            format!("NoEffect cuda.collectives: {why}"),
            format!("NoEffect cuda.share: {why}"),
            format!("NoEffect cuda.memory_limit: {why}"),
            format!("NoEffect deepspeed.zero_optimization.offload_optimizer.device: {already}"),
            format!("NoEffect deepspeed.zero_optimization.offload_param.device: {already}"),
        ]
    );
    assert_eq!(config(&sets, 2).zero.offload, OffloadConfig::NOTHING);
}

#[test]
fn what_is_offloaded() {
    let stage = |stage: u8| format!("deepspeed.zero_optimization.stage={stage}");
    let offload = |number: u8, ranks: usize, sets: &[&str]| {
        config(&[&["device=cuda", &*stage(number)], sets].concat(), ranks).zero.offload
    };
    assert_eq!(offload(0, 2, &[]), OffloadConfig::NOTHING);
    assert_eq!(offload(0, 1, &[OFFLOAD_OPTIMIZER]), OffloadConfig::OPTIMIZER);
    assert_eq!(offload(1, 2, &[OFFLOAD_OPTIMIZER]), OffloadConfig::OPTIMIZER);
    assert_eq!(offload(3, 2, &[OFFLOAD_OPTIMIZER, OFFLOAD_PARAMS]), OffloadConfig::ALL);
    let params_only = offload(3, 1, &[OFFLOAD_PARAMS]);
    assert_eq!((params_only.optimizer, params_only.params), (OffloadTo::Device, OffloadTo::Host));

    let refused = |number: u8, ranks: usize, sets: &[&str]| {
        says(&[&["device=cuda", &*stage(number)], sets].concat(), ranks)
    };
    assert_eq!(
        refused(2, 1, &[OFFLOAD_PARAMS]),
        format!(
            "error: --set {OFFLOAD_PARAMS}: `deepspeed.zero_optimization.offload_param.device` is `\"cpu\"`, but \
             `deepspeed.zero_optimization.stage` is `2`\nhint: set `deepspeed.zero_optimization.stage` to 3, where \
             parameters are gathered for each use, or keep them on the GPU"
        )
    );
    assert_eq!(
        refused(0, 2, &[OFFLOAD_OPTIMIZER]),
        format!(
            "error: --set {OFFLOAD_OPTIMIZER}: `deepspeed.zero_optimization.offload_optimizer.device` is `\"cpu\"`, but \
             `deepspeed.zero_optimization.stage` is `0`, in which each of `2` data-parallel ranks would step all of the \
             model\nhint: set `deepspeed.zero_optimization.stage` to 1, 2 or 3"
        )
    );
    let pipeline = ["device=cuda", "parallel.pipeline=2", OFFLOAD_OPTIMIZER];
    assert_eq!(
        config(&pipeline, 2).zero.offload,
        OffloadConfig::OPTIMIZER,
        "one data-parallel rank on each stage"
    );
}

#[test]
fn old_forms_of_offload_mean_the_new_ones() {
    let old = |key: &str| format!("deepspeed.zero_optimization.{key}=true");
    let stage_3 = ["device=cuda", "deepspeed.zero_optimization.stage=3"];
    for (key, expected) in [
        ("cpu_offload", OffloadConfig::OPTIMIZER),
        ("cpu_offload_param", OffloadConfig { params: OffloadTo::Host, ..OffloadConfig::NOTHING }),
        ("cpu_offload_params", OffloadConfig { params: OffloadTo::Host, ..OffloadConfig::NOTHING }),
    ] {
        let set = old(key);
        let sets = [&stage_3[..], &[&*set]].concat();
        assert_eq!(config(&sets, 2).zero.offload, expected, "{key}");
        let group = if key == "cpu_offload" { "offload_optimizer" } else { "offload_param" };
        let note =
            format!("Remark deepspeed.zero_optimization.{key}: the old form of `{group}.device` = `\"cpu\"`");
        assert_eq!(notes(&sets, 2), [note]);
    }
    assert_eq!(
        says(&["device=cuda", OFFLOAD_OPTIMIZER, &old("cpu_offload")], 1),
        "error: --set deepspeed.zero_optimization.cpu_offload=true: \
         `deepspeed.zero_optimization.offload_optimizer.device` and `deepspeed.zero_optimization.cpu_offload` are both set, \
         but the one is the old form of the other\nhint: keep one of the two"
    );
}

#[test]
fn optimizers_of_the_host_need_their_states_there() {
    let set = "deepspeed.optimizer.type=Muon";
    assert_eq!(
        says(&["device=cuda", set], 1),
        "error: --set deepspeed.optimizer.type=Muon: `Muon` computes its steps on the host only, and its states would be on a \
         GPU\nhint: offload them with `zero_optimization.offload_optimizer.device` = `\"cpu\"`, or choose another optimizer"
    );
    let offload = |sets: &[&str]| config(sets, 1).zero.offload;
    assert_eq!(offload(&["device=cuda", set, OFFLOAD_OPTIMIZER]), OffloadConfig::OPTIMIZER);
    assert_eq!(config(&[set], 1).device, Device::Cpu);
    assert_eq!(offload(&["device=cuda", "deepspeed.optimizer.type=Lamb"]), OffloadConfig::NOTHING);
}

#[test]
fn inputs_that_wait_on_the_host_are_worth_a_note_on_cpu_only() {
    let sets = ["activations.policy=offload"];
    assert_eq!(notes(&sets, 1).len(), 1);
    assert!(notes(&[&sets[..], &["device=cuda"]].concat(), 1).is_empty());
}

#[test]
fn which_steps_are_traced() {
    assert_eq!(config(&[], 1).trace, None);
    let trace = |sets: &[&str]| config(sets, 1).trace;
    assert_eq!(trace(&["trace.first_step=3"]), Some(TraceConfig { first_step: 3, num_steps: 1 }));
    let whole = trace(&["trace={first_step: 1, num_steps: 10}"]);
    assert_eq!(whole, Some(TraceConfig { first_step: 1, num_steps: 10 }));
    assert_eq!(
        says(&["trace.first_step=11"], 1),
        "error: --set trace.first_step=11: `trace.first_step` is `11`, but the run ends with step `10`\n\
         hint: choose an earlier one, or leave `trace` out"
    );
    assert_eq!(
        notes(&["trace={first_step: 9, num_steps: 3}"], 1),
        ["Remark trace.num_steps: the trace ends with the run, at step 10"]
    );
    assert_eq!(
        notes(&["trace.num_steps=3"], 1),
        ["NoEffect trace.num_steps: `trace.first_step` is not set, so no step is traced"]
    );
    assert!(says(&["trace.first_step=0"], 1).contains("expected a whole number of at least 1"));
}

#[test]
fn the_plan_knows_the_device() {
    let model = r#"{"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "vocab_size": 100}"#;
    let files = Files::new(&[("run.json", &run_with(&deepspeed(""))), ("model/config.json", model)]);
    let plan = |sets: &[&str], ranks| files.load("run.json", sets, ranks).unwrap().config.plan(2).unwrap();
    assert!(plan(&[OFFLOAD_OPTIMIZER], 1).memory().host.is_none());
    let gpu = plan(&["device=cuda", OFFLOAD_OPTIMIZER], 1);
    assert_eq!(gpu.memory().offload(), OffloadConfig::OPTIMIZER);
    assert_eq!(gpu.shape.overlap, Overlap::Inline, "nobody to talk to");
    // Two ranks on two cores: beside a GPU a collective takes no time from the computation.
    assert_eq!(plan(&["device=cuda"], 2).shape.overlap, Overlap::SideThread);
    assert_eq!(
        plan(&["device=cuda", "deepspeed.zero_optimization.overlap_comm=false"], 2).shape.overlap,
        Overlap::Inline
    );
}
