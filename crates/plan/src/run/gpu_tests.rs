//! Plans of ranks with GPUs.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::memory::{GPU_RESERVED, HostMemory, ModelState, PIECE};
use crate::pipeline::{ScheduleKind, StageCut};
use crate::zoo::{ModelConfig, SequenceParallel};
use crate::{ActivationPolicy, ActivationRules, Collectives, Mesh, OffloadTo, Overlap};

fn small(num_layers: usize) -> Value {
    json!({"model_type": "llama", "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64,
           "num_hidden_layers": num_layers, "num_attention_heads": 2})
}

/// 1.1 billion parameters, 2048 tokens, layers recomputed.
fn one_billion(num_ranks: usize) -> RunShape {
    let json = json!({"model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632,
                      "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4});
    RunShape {
        micro_batch: 1,
        seq_len: 2048,
        grad_accum_steps: 1,
        activations: ActivationRules::all(ActivationPolicy::Recompute),
        ..shape(&json, [1, num_ranks, 1])
    }
}

fn shape(model: &Value, [pipeline, data, tensor]: [usize; 3]) -> RunShape {
    RunShape {
        model: ModelConfig::from_json(model).unwrap(),
        mesh: Mesh::new(pipeline * data * tensor, pipeline, tensor).unwrap(),
        device: Device::Cuda(Cuda::default()),
        schedule: (pipeline > 1).then_some(ScheduleKind::OneForwardOneBackward),
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
        overlap: Overlap::SideThread,
        activations: ActivationRules::default(),
        head_chunk_rows: None,
        frozen: Vec::new(),
        no_decay: Vec::new(),
        grouped: Vec::new(),
    }
}

fn offloading(offload: Offload, shape: RunShape) -> RunShape {
    RunShape { device: Device::Cuda(Cuda { offload, ..Cuda::default() }), ..shape }
}

fn host(memory: &MemoryPlan) -> HostMemory {
    memory.host.expect("the run is on GPUs")
}

const ALL: [Offload; 3] = [Offload::NOTHING, Offload::OPTIMIZER, Offload::ALL];

#[test]
fn a_billion_parameters_on_one_gpu() {
    let shown = |offload| RunPlan::new(offloading(offload, one_billion(1))).unwrap().memory().to_string();
    // 1.1 billion parameters at 2, 4, 8 and 2 bytes. Temporaries are mostly the head's: its scores and the gradient of its table.
    let nothing = [
        "                            device        host",
        "parameters                2.05 GiB           -",
        "master parameters         4.10 GiB           -",
        "optimizer states          8.20 GiB           -",
        "gradients                 2.05 GiB           -",
        "activations                192 MiB           -",
        "temporaries                258 MiB           -",
        "libraries and program     1.00 GiB    1.00 GiB",
        "saving, beyond a step            -     500 MiB",
        "peak                      17.8 GiB    1.49 GiB",
    ];
    assert_eq!(shown(Offload::NOTHING).lines().collect::<Vec<_>>(), nothing);
    // Gradients of four blocks, the embedding and the head are under way, and go right to their place.
    let all = [
        "                            device        host",
        "parameters                       -    2.05 GiB",
        "master parameters                -    4.10 GiB",
        "optimizer states                 -    8.20 GiB",
        "gradients                        -    2.05 GiB",
        "gathered parameters        250 MiB           -",
        "gradients on their way     586 MiB           -",
        "activations                192 MiB           -",
        "temporaries                258 MiB           -",
        "libraries and program     1.00 GiB    1.00 GiB",
        "saving, beyond a step            -     500 MiB",
        "peak                      2.26 GiB    17.9 GiB",
    ];
    assert_eq!(shown(Offload::ALL).lines().collect::<Vec<_>>(), all);
    let optimizer = shown(Offload::OPTIMIZER);
    assert!(optimizer.ends_with("peak                      4.06 GiB    16.1 GiB"), "{optimizer}");
}

#[test]
fn offloaded_state_is_on_the_host_instead() {
    for num_ranks in [1, 2] {
        for stage in ZeroStage::ALL {
            for accum in [1, 3] {
                let memory = |offload: Offload| {
                    let shape =
                        RunShape { stage, grad_accum_steps: accum, ..shape(&small(3), [1, num_ranks, 1]) };
                    *RunPlan::new(offloading(offload, shape)).unwrap().memory()
                };
                let here = memory(Offload::NOTHING);
                assert_eq!(host(&here).state, ModelState::default());
                for offload in ALL {
                    let there = memory(offload);
                    let kept = offload.in_stage(stage, num_ranks);
                    assert_eq!(there.offload(), kept);
                    let (device, host) = (there.state, host(&there).state);
                    assert_eq!(device.params + host.params, here.state.params);
                    assert_eq!(device.master_params + host.master_params, here.state.master_params);
                    assert_eq!(device.optimizer + host.optimizer, here.state.optimizer);
                    let accumulates_whole = stage <= ZeroStage::One && accum > 1;
                    if kept.optimizer == OffloadTo::Host && accumulates_whole {
                        // The sum over micro-batches stays on the GPU, and a shard of the sum over ranks goes down.
                        assert_eq!(
                            (device.grads, host.grads),
                            (here.state.grads, Bytes(here.state.grads.0 / num_ranks as u64))
                        );
                    } else {
                        assert_eq!(device.grads + host.grads, here.state.grads);
                    }
                    assert_eq!(device.optimizer > Bytes(0), kept.optimizer == OffloadTo::Device);
                    assert_eq!(device.params > Bytes(0), kept.params == OffloadTo::Device);
                }
            }
        }
    }
}

#[test]
fn in_fp32_parameters_are_there_twice_where_they_are_apart() {
    let state = |offload| {
        let shape = RunShape { compute_bytes: 4, precision: "fp32", ..shape(&small(3), [1, 2, 1]) };
        let plan = RunPlan::new(offloading(offload, shape)).unwrap();
        (plan.memory().state, host(plan.memory()).state)
    };
    let one = state(Offload::NOTHING).0.params;
    let params_only = Offload { optimizer: OffloadTo::Device, params: OffloadTo::Host };
    for (offload, device, host) in [
        (Offload::NOTHING, [one, Bytes(0)], [Bytes(0); 2]),
        (Offload::OPTIMIZER, [one, Bytes(0)], [Bytes(0), one]),
        (params_only, [Bytes(0), one], [one, Bytes(0)]),
        (Offload::ALL, [Bytes(0); 2], [one, Bytes(0)]),
    ] {
        let found = state(offload);
        let of = |state: ModelState| [state.params, state.master_params];
        assert_eq!((of(found.0), of(found.1)), (device, host), "{offload:?}");
    }
}

#[test]
fn buffers_between_device_and_host_are_those_under_way() {
    // Blocks are of one size: 4 of 6 are under way, embedding and head have sizes of their own.
    let plan =
        |num_ranks, offload| RunPlan::new(offloading(offload, shape(&small(6), [1, num_ranks, 1]))).unwrap();
    let sizes = |plan: &RunPlan| -> (usize, usize) {
        let units = &plan.stages[0].units;
        let largest = units.iter().map(|unit| unit.padded_numel).max().unwrap();
        (units.iter().map(|unit| unit.padded_numel).sum::<usize>() - 2 * units[1].padded_numel, largest)
    };
    let alone = plan(1, Offload::OPTIMIZER);
    let (under_way, largest) = sizes(&alone);
    let memory = alone.memory();
    assert_eq!(
        (memory.reductions, host(memory).reductions),
        (Bytes::of(under_way, 2), Bytes::of(under_way, 2))
    );
    assert_eq!((memory.transfers, host(memory).transfers), (Bytes(0), Bytes::of(2 * largest, 2)));
    assert_eq!((memory.gathered, host(memory).pieces), (Bytes(0), Bytes(0)));
    let everything = plan(1, Offload::ALL);
    // New parameters are made where they stay; a layer's and the next one's are copied up.
    assert_eq!(host(everything.memory()).transfers, Bytes(0));
    assert_eq!(everything.memory().gathered, Bytes::of(2 * largest, 2));
    let two = plan(2, Offload::OPTIMIZER);
    let (under_way, largest) = sizes(&two);
    let memory = two.memory();
    assert_eq!(memory.reductions, Bytes::of(under_way, 2) + Bytes::of(under_way / 2, 4));
    assert_eq!(host(memory).reductions, Bytes::of(under_way / 2, 4));
    assert_eq!(host(memory).transfers, Bytes::of(largest, 2));
    let params_only = Offload { optimizer: OffloadTo::Device, params: OffloadTo::Host };
    let memory = *plan(2, params_only).memory();
    assert_eq!((memory.transfers, host(&memory).transfers), (Bytes::of(largest, 2), Bytes(0)));
}

#[test]
fn collectives_through_the_host_have_pieces_there() {
    let pieces = |mesh, collectives, overlap| {
        let device = Device::Cuda(Cuda { collectives, ..Cuda::default() });
        let plan = RunPlan::new(RunShape { device, overlap, ..shape(&small(3), mesh) }).unwrap();
        host(plan.memory()).pieces.0 / PIECE.0
    };
    use Collectives::{Auto, Host, Nccl};
    assert_eq!(pieces([1, 1, 1], Host, Overlap::Inline), 0);
    assert_eq!(pieces([1, 2, 1], Host, Overlap::Inline), 4);
    assert_eq!(pieces([1, 2, 1], Auto, Overlap::Inline), 4);
    assert_eq!(pieces([1, 2, 1], Nccl, Overlap::Inline), 0);
    assert_eq!(pieces([1, 2, 2], Host, Overlap::Inline), 4);
    assert_eq!(pieces([1, 2, 2], Host, Overlap::SideThread), 8);
    // A message to the other stage and one from it have a buffer each.
    assert_eq!(pieces([2, 1, 1], Host, Overlap::Inline), 4);
}

#[test]
fn inputs_that_wait_on_the_host_are_not_on_the_device() {
    let memory = |policy, device| {
        let activations = ActivationRules::all(policy);
        let shape = RunShape { device, activations, ..shape(&small(6), [1, 1, 1]) };
        *RunPlan::new(shape).unwrap().memory()
    };
    let gpu = Device::Cuda(Cuda::default());
    let (recompute, offload) =
        (memory(ActivationPolicy::Recompute, gpu), memory(ActivationPolicy::Offload, gpu));
    // 64 tokens of 32 elements: the inputs of six blocks, but for that of the block which goes backward. The head keeps its own.
    let input = 64 * 32 * 2;
    assert_eq!(host(&offload).activations, Bytes(6 * input));
    assert_eq!(recompute.activations.0 - offload.activations.0, 5 * input);
    assert_eq!(host(&recompute).activations, Bytes(0));
    let on_cpu = |policy| memory(policy, Device::Cpu).peak;
    assert_eq!(on_cpu(ActivationPolicy::Offload), on_cpu(ActivationPolicy::Recompute));
}

#[test]
fn every_choice_of_offload_is_planned() {
    let choices = |num_ranks| {
        let plan = RunPlan::new(shape(&small(3), [1, num_ranks, 1])).unwrap();
        let of = |memory: &MemoryPlan| (u8::from(memory.stage), memory.offload().describe());
        plan.stages[0].choices.iter().map(of).collect::<Vec<_>>()
    };
    let two = choices(2);
    let (nothing, optimizer, all) = ("nothing", "optimizer", "optimizer and parameters");
    assert_eq!(
        two,
        [
            (0, nothing),
            (1, nothing),
            (1, optimizer),
            (2, nothing),
            (2, optimizer),
            (3, nothing),
            (3, optimizer),
            (3, all)
        ]
    );
    assert_eq!(choices(1).len(), two.len() + 1);
    let cpu = RunPlan::new(RunShape { device: Device::Cpu, ..shape(&small(3), [1, 2, 1]) }).unwrap();
    assert!(cpu.stages[0].choices.is_empty() && cpu.memory().host.is_none());
}

#[test]
fn the_largest_model_fits_and_one_more_block_does_not() {
    let limits = |device, host| Limits { device, reserved: GPU_RESERVED, host, ranks_per_host: 1 };
    let t4 = limits(Bytes(16_000_000_000), Some(Bytes(256_000_000_000)));
    let mut params = Vec::new();
    for offload in ALL {
        let shape = offloading(offload, one_billion(1));
        let largest = shape.largest(&t4).unwrap().expect("a block fits");
        assert!(largest.fits(&t4));
        let model = largest.shape.model.with_num_blocks(largest.shape.model.num_blocks() + 1);
        let more = RunPlan::new(RunShape { model, ..shape }).unwrap();
        assert!(!more.fits(&t4), "{offload:?}");
        params.push(largest.num_params as f64);
    }
    // Two bytes of a parameter are on the device instead of eighteen; then inputs of layers alone.
    assert!(params[1] > 5.0 * params[0], "{params:?}");
    assert!(params[2] > 8.0 * params[0], "{params:?}");
    let tiny = limits(Bytes(1 << 30), None);
    assert_eq!(one_billion(1).largest(&tiny).unwrap(), None);
    // A host limits what the device does not.
    let poor = limits(t4.device, Some(Bytes(16_000_000_000)));
    let few = offloading(Offload::ALL, one_billion(1)).largest(&poor).unwrap().unwrap();
    assert!(few.num_params < 1_000_000_000, "{}", few.num_params);
    let excess = poor.excess(&offloading_memory(Offload::ALL));
    assert!(excess.device == Bytes(0) && excess.host > Bytes(0) && !excess.is_none());
}

fn offloading_memory(offload: Offload) -> MemoryPlan {
    *RunPlan::new(offloading(offload, one_billion(1))).unwrap().memory()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn kinds_add_up_to_the_peaks(
        mesh in prop::sample::select(vec![[1, 1, 1], [1, 2, 1], [2, 1, 1], [1, 1, 2], [2, 3, 2]]),
        stage in prop::sample::select(ZeroStage::ALL.to_vec()),
        offload in prop::sample::select(ALL.to_vec()),
        policy in prop::sample::select(vec![ActivationPolicy::Keep, ActivationPolicy::Recompute, ActivationPolicy::Offload]),
        collectives in prop::sample::select(vec![Collectives::Auto, Collectives::Nccl, Collectives::Host]),
        schedule in prop::sample::select(vec![
            ScheduleKind::GPipe, ScheduleKind::OneForwardOneBackward, ScheduleKind::ZeroBubble, ScheduleKind::Interleaved { num_chunks: 2 },
        ]),
        overlap in prop::sample::select(vec![Overlap::Inline, Overlap::SideThread]),
        accum in 2usize..5,
        layers in 2usize..9,
        compute_bytes in prop::sample::select(vec![2usize, 4]),
    ) {
        let shape = RunShape {
            device: Device::Cuda(Cuda { offload, collectives }),
            schedule: (mesh[0] > 1).then_some(schedule),
            stage,
            compute_bytes,
            precision: if compute_bytes == 2 { "bf16" } else { "fp32" },
            grad_accum_steps: accum,
            overlap,
            activations: ActivationRules::all(policy),
            ..shape(&small(layers), mesh)
        };
        let plan = RunPlan::new(shape.clone()).unwrap();
        for memory in plan.stages.iter().flat_map(|stage| stage.memory.iter().chain(&stage.choices)) {
            let kinds = memory.kinds();
            let (device, on_host): (Vec<_>, Vec<_>) = kinds.into_iter().map(|(_, device, host)| (device, host)).unzip();
            prop_assert_eq!(device.into_iter().sum::<Bytes>(), memory.peak);
            prop_assert_eq!(on_host.into_iter().sum::<Bytes>(), memory.host_peak());
        }
        // What waits on the host is not on the device as well.
        if policy == ActivationPolicy::Offload {
            let recompute = RunPlan::new(RunShape { activations: ActivationRules::all(ActivationPolicy::Recompute), ..shape }).unwrap();
            for (offloaded, recomputed) in plan.stages.iter().zip(&recompute.stages) {
                let step = |memory: &MemoryPlan| memory.activations + memory.layer_grads + memory.temporaries;
                let (offloaded, recomputed) = (offloaded.memory_in(stage), recomputed.memory_in(stage));
                // A moment of copying holds one input more.
                prop_assert!(step(offloaded) <= step(recomputed) + Bytes::of(64 * 32, compute_bytes));
            }
        }
    }
}
