//! The same runs on a GPU: state, kernels and collectives as there, on a fake one.
//!
//! libtorch's operations run on the host and take its memory for the GPU's, and work runs at once: what is late on a GPU is tested below
//! this, in `zero`, `comm` and `kernels`. Here is what joins them: every buffer is where it should be, and every layer sees it.

use serde_json::Value;
use shardwise_device::DType;
use shardwise_plan::pipeline::ScheduleKind;
use shardwise_plan::zoo::SequenceParallel;
use shardwise_plan::{ActivationPolicy, ZeroStage};
use shardwise_zero::{Offload, Overlap, Tier};

use crate::runs::{Link, On, Run, Trace, dropping_gpt2, gpt2, llama};

const NOTHING: Offload = Offload { optimizer: Tier::Device, params: Tier::Device };
const OPTIMIZER: Offload = Offload { optimizer: Tier::Host, params: Tier::Device };
const ALL: Offload = Offload { optimizer: Tier::Host, params: Tier::Host };

const ON_GPU: On = On::FakeGpu(NOTHING, Link::Staged);
const OFFLOADED: On = On::FakeGpu(OPTIMIZER, Link::Staged);
const ALL_OFFLOADED: On = On::FakeGpu(ALL, Link::Staged);

/// Losses and norms on a GPU against the host's: sums over a row (norms, the softmax) are made in another order, which moves a number by
/// some units in the last place of its type, and some steps of AdamW make more of it.
const HOST_F32: f64 = 1e-4;
const HOST_BF16: f64 = 2e-2;

fn run(model: &Value, mesh: [usize; 3], stage: ZeroStage, compute: DType, on: On) -> Run {
    Run { on, clip: Some(0.5), ..Run::new(model, mesh, stage, compute).steps(4) }
}

fn assert_close(gpu: &Trace, host: &Trace, tolerance: f64) {
    let pairs = gpu.losses.iter().zip(&host.losses).chain(gpu.norms.iter().zip(&host.norms));
    for (a, b) in pairs {
        assert!((a - b).abs() <= tolerance * b.abs(), "{a} on the GPU, {b} on the host");
    }
}

#[test]
fn a_gpu_trains_as_the_host_does() {
    for model in [llama(), gpt2(), dropping_gpt2()] {
        for (compute, tolerance) in
            [(DType::F32, HOST_F32), (DType::Bf16, HOST_BF16), (DType::F16, HOST_BF16)]
        {
            let host = run(&model, [1, 1, 1], ZeroStage::Zero, compute, On::Host).trace();
            let gpu = run(&model, [1, 1, 1], ZeroStage::Zero, compute, ON_GPU).trace();
            assert_close(&gpu, &host, tolerance);
        }
    }
}

#[test]
fn stages_on_a_gpu_agree_bit_for_bit_offloaded_too() {
    for compute in [DType::F32, DType::Bf16] {
        let run = |stage, on, overlap| {
            Run { overlap, accum: 1, ..run(&llama(), [1, 2, 1], stage, compute, on) }.trace()
        };
        let first = run(ZeroStage::Zero, ON_GPU, Overlap::Inline);
        for stage in [ZeroStage::One, ZeroStage::Two, ZeroStage::Three] {
            for overlap in [Overlap::Inline, Overlap::SideThread] {
                for on in [ON_GPU, OFFLOADED] {
                    let what = format!("stage {stage}, {on:?}, {overlap:?}");
                    run(stage, on, overlap).assert_same_bits(&first, &what);
                }
            }
        }
        run(ZeroStage::Three, ALL_OFFLOADED, Overlap::SideThread).assert_same_bits(&first, "all offloaded");
    }
    let run = |stage| Run { accum: 1, ..run(&gpt2(), [1, 2, 1], stage, DType::Bf16, ON_GPU) }.trace();
    run(ZeroStage::Three).assert_same_bits(&run(ZeroStage::Zero), "GPT-2");
}

#[test]
fn one_gpu_offloads_with_the_same_bits() {
    for compute in [DType::F32, DType::Bf16] {
        let run = |on| run(&gpt2(), [1, 1, 1], ZeroStage::Three, compute, on).trace();
        let here = run(ON_GPU);
        run(OFFLOADED).assert_same_bits(&here, "optimizer offloaded");
        run(ALL_OFFLOADED).assert_same_bits(&here, "all offloaded");
    }
}

#[test]
fn meshes_of_gpus_train_as_those_of_the_host() {
    let meshes = [
        ([2, 1, 1], ScheduleKind::ZeroBubble, SequenceParallel::Off),
        ([1, 1, 2], ScheduleKind::OneForwardOneBackward, SequenceParallel::On),
        ([2, 2, 2], ScheduleKind::OneForwardOneBackward, SequenceParallel::Off),
    ];
    for (mesh, schedule, sequence) in meshes {
        for model in [llama(), gpt2()] {
            let run = |on| {
                let run = run(&model, mesh, ZeroStage::Three, DType::F32, on);
                Run { schedule, sequence, ..run }.steps(2).trace()
            };
            assert_close(&run(ON_GPU), &run(On::Host), HOST_F32);
        }
    }
}

#[test]
fn activations_offloaded_from_a_gpu_come_back_as_they_were() {
    for overlap in [Overlap::Inline, Overlap::SideThread] {
        let run = |activations| {
            let run = run(&llama(), [1, 2, 1], ZeroStage::Three, DType::Bf16, ON_GPU);
            Run { activations, overlap, ..run }.trace()
        };
        let kept = run(ActivationPolicy::Keep);
        run(ActivationPolicy::Recompute).assert_same_bits(&kept, "recomputed");
        run(ActivationPolicy::Offload).assert_same_bits(&kept, "offloaded");
    }
}

#[test]
fn nccl_and_host_memory_carry_the_same_bits() {
    for (mesh, offload) in [([1, 2, 1], ALL), ([1, 4, 1], NOTHING), ([2, 2, 1], NOTHING), ([1, 2, 2], ALL)] {
        let run = |link| {
            let run = run(&llama(), mesh, ZeroStage::Three, DType::Bf16, On::FakeGpu(offload, link));
            Run { overlap: Overlap::SideThread, accum: 2, ..run }.steps(2).trace()
        };
        run(Link::Nccl).assert_same_bits(&run(Link::Staged), &format!("mesh {mesh:?}, {offload:?}"));
    }
}

/// Neither memory of a GPU nor pinned memory is asked for once the first steps have filled the pools: asking the driver is slow, and
/// stops a GPU. Messages between pipeline stages are left out: how many are under way at a time is a matter of chance.
#[test]
fn steps_in_steady_state_take_no_memory() {
    use ActivationPolicy::{Keep, Offload, Recompute};
    for (mesh, link, stage, accum, offload, activations, overlap) in [
        ([1, 1, 1], Link::Staged, ZeroStage::Zero, 1, NOTHING, Keep, Overlap::Inline),
        ([1, 1, 1], Link::Staged, ZeroStage::Three, 1, ALL, Offload, Overlap::Inline),
        ([1, 1, 1], Link::Staged, ZeroStage::One, 2, OPTIMIZER, Keep, Overlap::Inline),
        ([1, 2, 1], Link::Staged, ZeroStage::Three, 2, ALL, Offload, Overlap::SideThread),
        ([1, 2, 1], Link::Nccl, ZeroStage::Two, 2, NOTHING, Keep, Overlap::Inline),
        ([1, 2, 1], Link::Nccl, ZeroStage::Three, 1, OPTIMIZER, Offload, Overlap::SideThread),
        ([1, 1, 2], Link::Nccl, ZeroStage::Zero, 1, NOTHING, Recompute, Overlap::Inline),
    ] {
        let run = run(&llama(), mesh, stage, DType::Bf16, On::FakeGpu(offload, link));
        let asked = Run { activations, overlap, accum, ..run }.steps(5).allocations();
        let what = format!("mesh {mesh:?}, {link:?}, stage {stage}, {offload:?}, {overlap:?}, {accum}");
        assert_eq!(asked[2..], [asked[2]; 3], "after each step: {asked:?}, {what}");
    }
}
