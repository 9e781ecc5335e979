//! State on a GPU, and on the host beside one: a fake GPU, which runs the kernels of the tree as late as the rules allow, gives the bits of
//! the host in every stage, precision and optimizer.
//!
//! What libtorch does to the same memory is played here: gathered copies are read, and gradients made and overwritten, on the compute
//! stream and without a log.

use std::cell::RefCell;
use std::ptr::NonNull;
use std::sync::Arc;

use shardwise_comm::staged::Staged;
use shardwise_comm::{Group, solo, thread};
use shardwise_device::cuda::Gpu;
use shardwise_device::{Buffer, DType, Memory, Slice, SliceMut};
use shardwise_fake_gpu::{ALL_WAYS, Eagerness, FakeGpu};
use shardwise_kernels::Processor;
use shardwise_kernels::optimizer::Direction;
use shardwise_kernels::processor::{GpuProcessor, Piece};
use shardwise_plan::memory::{Calls, MemoryPlan, ModelState, StateWidths, Workload, Written};
use shardwise_plan::{Bytes, Cuda, Device, OffloadTo, UnitLayout, ZeroStage};
use shardwise_zero::{
    AdagradOptions, BiasCorrection, LambOptions, LionOptions, LossScaling, MuonOptions, Offload, Optimizer,
    Overlap, ReductionOptions, SgdOptions, StatePrecision, Tier, Zero, ZeroError, ZeroOptions,
};

use crate::harness::{ADAM, Model, Trace, common, options, trace, unchanged};

const ON_HOST: Offload = Offload { optimizer: Tier::Host, params: Tier::Device };
const ALL_ON_HOST: Offload = Offload { optimizer: Tier::Host, params: Tier::Host };
const PARAMS_ON_HOST: Offload = Offload { optimizer: Tier::Device, params: Tier::Host };

/// What stands for libtorch on one rank.
struct Libtorch {
    gpu: Gpu,
    processor: Arc<GpuProcessor>,
    /// Gradients that were given to `reduce`: their memory is overwritten, and stays.
    made: Vec<Buffer>,
    /// The sum of all copies that were ever used: what forward and backward saw.
    seen: Option<Buffer>,
}

thread_local! {
    static LIBTORCH: RefCell<Option<Libtorch>> = const { RefCell::new(None) };
}

fn with_libtorch<T>(f: impl FnOnce(&mut Libtorch) -> T) -> T {
    LIBTORCH.with_borrow_mut(|libtorch| f(libtorch.as_mut().expect("the rank has a GPU")))
}

/// The memory of a buffer without its log.
fn unlogged(buffer: &mut Buffer) -> SliceMut<'static> {
    // SAFETY: the buffer stays with `Libtorch` until all work is over, and is used on the compute stream alone, in its order.
    unsafe { SliceMut::from_raw(buffer.as_ptr(), buffer.numel(), buffer.dtype(), buffer.place()) }
}

/// Gives `grads` to `reduce` as libtorch would: memory without a log, which the compute stream overwrites next.
pub fn reduce_on_gpu(zero: &mut Zero, unit: usize, microbatch: usize, grads: &[Option<Buffer>]) {
    let mut on_gpu: Vec<Option<Buffer>> = grads
        .iter()
        .map(|grad| {
            with_libtorch(|libtorch| {
                let grad = grad.as_ref()?;
                let memory = Memory::Gpu(libtorch.gpu.clone());
                let mut copy = Buffer::allocate(grad.dtype(), grad.numel(), &memory).unwrap();
                Processor::Gpu(libtorch.processor.clone()).copy(grad.view(), copy.view_mut()).unwrap();
                Some(copy)
            })
        })
        .collect();
    let slices: Vec<_> = on_gpu.iter_mut().map(|grad| Some(unlogged(grad.as_mut()?))).collect();
    let views: Vec<_> = slices.iter().map(|slice| slice.as_ref().map(SliceMut::as_slice)).collect();
    zero.reduce(unit, microbatch, &views).unwrap();
    with_libtorch(|libtorch| {
        for slice in slices.into_iter().flatten().filter(|slice| slice.numel() > 0) {
            libtorch.processor.stream().fill(slice, 0xff).unwrap();
        }
        libtorch.made.extend(on_gpu.into_iter().flatten());
    });
}

/// Reads the gathered copy of a unit on the compute stream.
pub fn use_on_gpu(zero: &mut Zero, unit: usize) {
    let address: NonNull<u8> = zero.gather(unit).unwrap();
    let (numel, dtype) = (zero.layout(unit).padded_numel, zero.compute_dtype());
    zero.begin_use(unit).unwrap();
    with_libtorch(|libtorch| {
        // SAFETY: the copy is there until it is released, and the work below is between `begin_use` and `end_use`.
        let copy = unsafe { Slice::from_raw(address, numel, dtype, zero.compute_place()) };
        let memory = Memory::Gpu(libtorch.gpu.clone());
        let seen = libtorch.seen.get_or_insert_with(|| Buffer::allocate(DType::F32, 4096, &memory).unwrap());
        let processor = Processor::Gpu(libtorch.processor.clone());
        processor.accumulate(&[Piece::Data(copy)], seen.view_mut().into_range(0..numel)).unwrap();
    });
    zero.end_use(unit).unwrap();
}

const LAMB: LambOptions = LambOptions {
    beta1: 0.9,
    beta2: 0.99,
    eps: 1e-6,
    weight_decay: 0.1,
    max_coeff: 10.0,
    min_coeff: 0.01,
    bias_correction: BiasCorrection::On,
};

fn muon() -> MuonOptions {
    MuonOptions {
        momentum: 0.95,
        direction: Direction::Nesterov,
        num_newton_schulz_steps: 5,
        weight_decay: 0.1,
        adamw: ADAM,
        adamw_lr_scale: 0.5,
        adamw_for: vec![],
    }
}

fn model() -> Model {
    Model { units: vec![vec![300, 7], vec![64, 1, 33], vec![5], vec![40, 8, 500]], frozen: vec![2] }
}

/// What a rank's run leaves, and what its layers saw.
type Run = (Trace, Vec<u8>);

/// Three steps of one rank on `gpu`.
fn train(fake: &FakeGpu, gpu: &Gpu, options: &ZeroOptions, group: Group) -> Run {
    let processor = fake.processor(gpu);
    let libtorch = Libtorch { gpu: gpu.clone(), processor: processor.clone(), made: Vec::new(), seen: None };
    LIBTORCH.set(Some(libtorch));
    let group = match group.group_size() {
        1 => group,
        _ => Staged::new(group, gpu, processor.stream().clone()).unwrap(),
    };
    let options = ZeroOptions { gpu: Some(processor.clone()), ..options.clone() };
    let trace = trace(&mut model().zero(&options, group), &[0, 1, 2], options.grad_accum_steps, &unchanged);
    let libtorch = LIBTORCH.take().expect("set above");
    let seen = libtorch.seen.as_ref().expect("every unit was used");
    let mut on_host = Buffer::zeroed(seen.dtype(), seen.numel(), shardwise_device::Place::Cpu).unwrap();
    Processor::Gpu(processor).copy(seen.view(), on_host.view_mut()).unwrap();
    (trace, on_host.view().bytes().to_vec())
}

fn one_rank(way: (u64, Eagerness), options: &ZeroOptions) -> Run {
    let fake = FakeGpu::new(way);
    let run = train(&fake, &fake.gpu(), options, solo());
    fake.assert_clean();
    run
}

/// Ranks that share one GPU.
fn ranks(num_ranks: usize, way: (u64, Eagerness), options: &ZeroOptions) -> Run {
    let fake = FakeGpu::new(way);
    let runs = thread::run(num_ranks, |group| train(&fake, &fake.gpu(), options, group));
    fake.assert_clean();
    let (traces, seen): (Vec<_>, Vec<_>) = runs.into_iter().unzip();
    assert!(seen.iter().all(|one| *one == seen[0]), "all ranks see the same copies");
    (common(traces), seen.into_iter().next().expect("a rank"))
}

fn on_host(num_ranks: usize, options: &ZeroOptions) -> Trace {
    let accum = options.grad_accum_steps;
    common(model().run(num_ranks, options, |zero| trace(zero, &[0, 1, 2], accum, &unchanged)))
}

#[test]
fn one_gpu_gives_the_hosts_bits_wherever_state_is() {
    for compute in [DType::F32, DType::Bf16, DType::F16] {
        for accum in [1, 3] {
            let plain = ZeroOptions {
                grad_accum_steps: accum,
                clip_grad_norm: Some(0.7),
                ..options(ZeroStage::Three, compute)
            };
            let expected = on_host(1, &plain);
            let mut seen = None;
            for (i, offload) in
                [Offload::default(), ON_HOST, ALL_ON_HOST, PARAMS_ON_HOST].into_iter().enumerate()
            {
                for way in [ALL_WAYS[0], ALL_WAYS[1 + i]] {
                    let what = format!("{compute}, {accum} micro-batches, {offload:?}, {way:?}");
                    let (found, used) = one_rank(way, &ZeroOptions { offload, ..plain.clone() });
                    assert_eq!(found, expected, "{what}");
                    assert!(*seen.get_or_insert_with(|| used.clone()) == used, "layers see the same: {what}");
                }
            }
        }
    }
}

#[test]
fn ranks_that_share_a_gpu_give_the_hosts_bits_in_every_stage() {
    for (num_ranks, overlap) in [(2, Overlap::Inline), (2, Overlap::SideThread), (3, Overlap::SideThread)] {
        for stage in ZeroStage::ALL {
            for (compute, accum) in [(DType::F32, 1), (DType::Bf16, 2)] {
                let plain = ZeroOptions { grad_accum_steps: accum, overlap, ..options(stage, compute) };
                let expected = on_host(num_ranks, &plain);
                let mut tiers = vec![Offload::default()];
                if stage.shards_optimizer() {
                    tiers.push(ON_HOST);
                }
                if stage.shards_parameters() {
                    tiers.extend([ALL_ON_HOST, PARAMS_ON_HOST]);
                }
                for (i, offload) in tiers.into_iter().enumerate() {
                    let way = ALL_WAYS[(i + num_ranks + accum) % ALL_WAYS.len()];
                    let what =
                        format!("{num_ranks} ranks, {stage}, {compute}, {accum}, {offload:?}, {way:?}");
                    let (found, _) = ranks(num_ranks, way, &ZeroOptions { offload, ..plain.clone() });
                    assert_eq!(found, expected, "{what}");
                }
            }
        }
    }
}

#[test]
fn every_optimizer_gives_the_hosts_bits() {
    let sgd = |momentum, direction| {
        Optimizer::Sgd(SgdOptions { momentum, dampening: 0.0, direction, weight_decay: 0.1 })
    };
    let on_either = [
        Optimizer::AdamW(ADAM),
        Optimizer::Adam(ADAM),
        sgd(0.0, Direction::Momentum),
        sgd(0.9, Direction::Momentum),
        sgd(0.9, Direction::Nesterov),
        Optimizer::Adagrad(AdagradOptions {
            lr_decay: 0.1,
            initial_accumulator_value: 0.5,
            eps: 1e-8,
            weight_decay: 0.1,
        }),
        Optimizer::Lion(LionOptions { beta1: 0.9, beta2: 0.99, weight_decay: 0.1 }),
        Optimizer::Lamb(LAMB),
    ];
    let cases = on_either.into_iter().flat_map(|optimizer| {
        let all = [Offload::default(), ON_HOST];
        all.map(|offload| (optimizer.clone(), offload))
    });
    let on_host_only = (Optimizer::Muon(muon()), ON_HOST);
    for (i, (optimizer, offload)) in cases.chain([on_host_only]).enumerate() {
        let looks_at_params = matches!(optimizer, Optimizer::Lamb(_) | Optimizer::Muon(_));
        for states in [StatePrecision::F32, StatePrecision::Bf16 { seed: 9 }] {
            if looks_at_params && states != StatePrecision::F32 {
                continue;
            }
            let options =
                ZeroOptions { optimizer: optimizer.clone(), states, ..options(ZeroStage::Two, DType::Bf16) };
            let expected = on_host(2, &options);
            let way = ALL_WAYS[i % ALL_WAYS.len()];
            let (found, _) = ranks(2, way, &ZeroOptions { offload, ..options.clone() });
            assert_eq!(found, expected, "{optimizer:?}, {states:?}, {offload:?}, {way:?}");
        }
    }
}

/// Norms of whole parameters, from one rank's shards or from all ranks', wherever they are.
#[test]
fn lamb_gives_the_hosts_bits_in_every_stage() {
    for (num_ranks, overlap) in [(1, Overlap::Inline), (2, Overlap::Inline), (3, Overlap::SideThread)] {
        let mut of_all_stages = None;
        for stage in ZeroStage::ALL {
            for compute in [DType::F32, DType::F16] {
                let plain =
                    ZeroOptions { optimizer: Optimizer::Lamb(LAMB), overlap, ..options(stage, compute) };
                let expected = on_host(num_ranks, &plain);
                if compute == DType::F32 {
                    let weights = &*of_all_stages.get_or_insert_with(|| expected.weights.clone());
                    assert_eq!(&expected.weights, weights, "{stage} on the host");
                }
                let mut tiers = vec![Offload::default()];
                if stage.shards_parameters() {
                    tiers.extend([ALL_ON_HOST, PARAMS_ON_HOST]);
                }
                for (i, offload) in tiers.into_iter().enumerate() {
                    let way = ALL_WAYS[(i + num_ranks) % ALL_WAYS.len()];
                    let what = format!("{num_ranks} ranks, {stage}, {compute}, {offload:?}, {way:?}");
                    let options = ZeroOptions { offload, ..plain.clone() };
                    let found = match num_ranks {
                        1 => one_rank(way, &options).0,
                        _ => ranks(num_ranks, way, &options).0,
                    };
                    assert_eq!(found, expected, "{what}");
                }
            }
        }
    }
}

#[test]
fn gradients_in_sixteen_bits_and_overflows_give_the_hosts_bits() {
    for (accumulation_dtype, communication_dtype) in
        [(DType::Bf16, None), (DType::F32, Some(DType::Bf16)), (DType::Bf16, Some(DType::F32))]
    {
        let reduction =
            ReductionOptions { accumulation_dtype, communication_dtype, ..ReductionOptions::default() };
        for stage in [ZeroStage::One, ZeroStage::Three] {
            let options = ZeroOptions { reduction, grad_accum_steps: 2, ..options(stage, DType::Bf16) };
            let expected = on_host(2, &options);
            for offload in [Offload::default(), ON_HOST] {
                let (found, _) = ranks(2, ALL_WAYS[3], &ZeroOptions { offload, ..options.clone() });
                assert_eq!(found, expected, "{reduction:?}, {stage}, {offload:?}");
            }
        }
    }
    // So large a scale that gradients overflow: which parameter is named, and nothing moves.
    let loss_scaling = Some(LossScaling::Static(f64::from(u32::MAX)));
    let options = ZeroOptions { loss_scaling, ..options(ZeroStage::Two, DType::F16) };
    let expected = on_host(2, &options);
    assert!(expected.outcomes.iter().all(|outcome| !outcome.is_applied()), "{:?}", expected.outcomes);
    for offload in [Offload::default(), ON_HOST] {
        let (found, _) = ranks(2, ALL_WAYS[4], &ZeroOptions { offload, ..options.clone() });
        assert_eq!(found, expected, "{offload:?}");
    }
}

/// State is read and written through the host, whatever tier it is in.
#[test]
fn states_move_between_tiers() {
    let plain = options(ZeroStage::Three, DType::Bf16);
    let read = |zero: &mut Zero| {
        let mut all = Vec::new();
        zero.for_each_state::<ZeroError>(|slice| {
            all.push((slice.param.name.clone(), slice.param_range, slice.name, slice.bytes.to_vec()));
            Ok(())
        })
        .unwrap();
        all
    };
    let expected = {
        let mut zero = model().zero(&plain, solo());
        trace(&mut zero, &[0, 1], 1, &unchanged);
        read(&mut zero)
    };
    for offload in [Offload::default(), ON_HOST, ALL_ON_HOST, PARAMS_ON_HOST] {
        let fake = FakeGpu::lazy();
        {
            let gpu = fake.gpu();
            let options = ZeroOptions { gpu: Some(fake.processor(&gpu)), offload, ..plain.clone() };
            let mut zero = model().zero(&options, solo());
            zero.load_states::<ZeroError>(2, |slice| {
                let is_it = |saved: &&(String, std::ops::Range<usize>, &str, Vec<u8>)| {
                    saved.0 == slice.param.name && saved.1 == slice.param_range && saved.2 == slice.name
                };
                slice.bytes.copy_from_slice(&expected.iter().find(is_it).unwrap().3);
                Ok(())
            })
            .unwrap();
            assert_eq!(read(&mut zero), expected, "{offload:?}");
        }
        fake.assert_clean();
    }
}

#[test]
fn what_offloading_cannot_do_is_refused() {
    let fake = FakeGpu::lazy();
    let gpu = fake.gpu();
    let processor = fake.processor(&gpu);
    let refused = |num_ranks, options: &ZeroOptions| {
        let options = ZeroOptions { gpu: Some(processor.clone()), ..options.clone() };
        let new = |group: Group| {
            let layouts = model().layouts(group.group_size());
            Zero::new(layouts, options.clone(), group, &mut crate::harness::fill).err().unwrap().to_string()
        };
        thread::run(num_ranks, new).remove(0)
    };
    let stage_2 = ZeroOptions { offload: ALL_ON_HOST, ..options(ZeroStage::Two, DType::Bf16) };
    assert_eq!(refused(1, &stage_2), "`offload.params` is `host`, expected `device`, unless `stage` is 3");
    let stage_0 = ZeroOptions { offload: ON_HOST, ..options(ZeroStage::Zero, DType::Bf16) };
    assert!(refused(2, &stage_0).starts_with("`offload.optimizer` is `host`, expected `device` in stage 0"));
    for stage in ZeroStage::ALL {
        let on_device = ZeroOptions { optimizer: Optimizer::Muon(muon()), ..options(stage, DType::Bf16) };
        assert_eq!(
            refused(2, &on_device),
            "`offload.optimizer` is `device`, expected `host` for Muon, whose matrix products have no kernels for GPUs: \
             offload the optimizer, in stage 1 or above where there are several ranks"
        );
    }
}

fn planned(offload: Offload) -> shardwise_plan::Offload {
    let to = |tier| if tier == Tier::Host { OffloadTo::Host } else { OffloadTo::Device };
    shardwise_plan::Offload { optimizer: to(offload.optimizer), params: to(offload.params) }
}

/// What a plan says of these options on GPUs, without layers.
fn plan(layouts: &[UnitLayout], options: &ZeroOptions) -> MemoryPlan {
    let load = Workload {
        units: layouts,
        layers: &[],
        flow: None,
        device: Device::Cuda(Cuda { offload: planned(options.offload), ..Cuda::default() }),
        calls: Calls::default(),
        num_groups: 0,
        compute_bytes: options.compute.size_bytes(),
        widths: StateWidths::adamw(options.compute.size_bytes())
            .of_run(layouts[0].num_shards, options.grad_accum_steps),
        microbatch_tokens: 0,
        grad_accum_steps: options.grad_accum_steps,
        overlap: options.overlap,
        written: Written::default(),
    };
    MemoryPlan::new(&load, options.stage)
}

/// A driver that pins what the plan counts, and no more, lets state be born and trained; with a byte less it is not born.
#[test]
fn the_plan_knows_how_much_memory_is_pinned() {
    for (stage, offload) in [
        (ZeroStage::Zero, ON_HOST),
        (ZeroStage::Three, ON_HOST),
        (ZeroStage::Three, ALL_ON_HOST),
        (ZeroStage::Three, PARAMS_ON_HOST),
    ] {
        for (compute, accum) in [(DType::F32, 1), (DType::Bf16, 1), (DType::Bf16, 3)] {
            let options = ZeroOptions { offload, grad_accum_steps: accum, ..options(stage, compute) };
            let what = format!("{stage}, {offload:?}, {compute}, {accum}");
            let host = plan(&model().layouts(1), &options).host.unwrap();
            let is_born = |limit: u64| {
                let fake = FakeGpu::lazy();
                fake.set_pinned_limit(limit as usize);
                let gpu = fake.gpu();
                let options = ZeroOptions { gpu: Some(fake.processor(&gpu)), ..options.clone() };
                Zero::new(model().layouts(1), options, solo(), &mut crate::harness::fill).is_ok()
            };
            let state = host.state.total();
            assert!(is_born(state.0), "{what}");
            assert!(!is_born(state.0 - 1), "{what}");
            let fake = FakeGpu::new(ALL_WAYS[1]);
            // Where the GPU has the optimizer, it tells sums of squares in a few bytes.
            let few = Bytes(256);
            fake.set_pinned_limit((state + host.reductions + host.transfers + few).0 as usize);
            train(&fake, &fake.gpu(), &options, solo());
            fake.assert_clean();
        }
    }
}

#[test]
fn the_plan_counts_each_kind_of_state() {
    for num_ranks in [1, 2] {
        for (stage, offload) in [
            (ZeroStage::One, Offload::default()),
            (ZeroStage::Two, ON_HOST),
            (ZeroStage::Three, ON_HOST),
            (ZeroStage::Three, ALL_ON_HOST),
            (ZeroStage::Three, PARAMS_ON_HOST),
        ] {
            for compute in [DType::F32, DType::Bf16] {
                let options = ZeroOptions { offload, ..options(stage, compute) };
                let fake = FakeGpu::lazy();
                let found = thread::run(num_ranks, |group| {
                    let (gpu, is_alone) = (fake.gpu(), group.group_size() == 1);
                    let processor = fake.processor(&gpu);
                    let group = match is_alone {
                        true => group,
                        false => Staged::new(group, &gpu, processor.stream().clone()).unwrap(),
                    };
                    model()
                        .zero(&ZeroOptions { gpu: Some(processor), ..options.clone() }, group)
                        .state_bytes()
                });
                let layouts = model().layouts(num_ranks);
                let widths = StateWidths::adamw(compute.size_bytes()).of_run(num_ranks, 1);
                let (device, host) = ModelState::on_gpu(&layouts, stage, 1, widths, planned(offload));
                let both = [
                    device.params + host.params,
                    device.master_params + host.master_params,
                    device.optimizer + host.optimizer,
                    device.grads + host.grads,
                ];
                for bytes in found {
                    let found = [bytes.params, bytes.master_params, bytes.optimizer, bytes.grads];
                    let found = found.map(|bytes| Bytes(bytes as u64));
                    assert_eq!(found, both, "{num_ranks} ranks, {stage}, {offload:?}, {compute}");
                }
                fake.assert_clean();
            }
        }
    }
}
