//! A GPU's processor does what the host's does, bit for bit: on the fake driver, which runs the CUDA kernels on the host, late and
//! in any order that streams leave open.

#![allow(clippy::unwrap_used)] // a failed test may panic anywhere

use std::cell::RefCell;
use std::sync::Arc;

use half::{bf16, f16};
use shardwise_device::cuda::{CudaError, Driver};
use shardwise_device::{Buffer, DType, Memory, Place, Slice, SliceMut};
use shardwise_fake_gpu::{ALL_WAYS, Eagerness, FakeCode, FakeGpu, real_processor};
use shardwise_kernels::optimizer::{
    Adagrad, Adam, BiasCorrection, Direction, Lamb, Lion, Noise, Sgd, SquaredNorms, WeightDecay,
};
use shardwise_kernels::processor::{
    GpuProcessor, LambApplySlices, LambMomentSlices, NormColumn, Piece, ProcessorError, StepSlices,
};
use shardwise_kernels::{Processor, Threads};

/// Two threads: the host's bits do not depend on it.
fn host() -> Processor {
    Processor::Host(Threads::new(2).unwrap())
}

const TYPES: [DType; 3] = [DType::F32, DType::Bf16, DType::F16];

/// Numbers of a type, as bytes.
#[derive(Clone)]
struct Array {
    dtype: DType,
    bytes: Vec<u8>,
}

impl Array {
    fn new(dtype: DType, numbers: impl IntoIterator<Item = f32>) -> Array {
        let bytes = |x: f32| match dtype {
            DType::Bf16 => bf16::from_f32(x).to_ne_bytes().to_vec(),
            DType::F16 => f16::from_f32(x).to_ne_bytes().to_vec(),
            _ => x.to_ne_bytes().to_vec(),
        };
        Array { dtype, bytes: numbers.into_iter().flat_map(bytes).collect() }
    }

    fn numel(&self) -> usize {
        self.bytes.len() / self.dtype.size_bytes()
    }

    /// In memory of `processor`, from element `offset` on.
    fn put(&self, processor: &Processor, offset: usize) -> Buffer {
        let mut buffer = Buffer::allocate(self.dtype, offset + self.numel(), &processor.memory()).unwrap();
        let mut staged = Buffer::allocate(self.dtype, self.numel(), &Memory::Host).unwrap();
        staged.view_mut().bytes().copy_from_slice(&self.bytes);
        processor.copy(staged.view(), buffer.view_mut().into_range(offset..offset + self.numel())).unwrap();
        buffer
    }

    fn get(processor: &Processor, view: Slice<'_>) -> Array {
        let mut staged = Buffer::allocate(view.dtype(), view.numel(), &Memory::Host).unwrap();
        processor.copy(view, staged.view_mut()).unwrap();
        Array { dtype: view.dtype(), bytes: staged.view().bytes().to_vec() }
    }

    /// The bits of each number, with one NaN for all.
    fn bits(&self) -> Vec<u32> {
        let bits = |x: &[u8]| match self.dtype {
            DType::F32 => {
                let x = f32::from_ne_bytes(x.try_into().unwrap());
                if x.is_nan() { u32::MAX } else { x.to_bits() }
            }
            DType::Bf16 => {
                let x = bf16::from_ne_bytes(x.try_into().unwrap());
                if x.is_nan() { u32::MAX } else { x.to_bits().into() }
            }
            DType::F16 => {
                let x = f16::from_ne_bytes(x.try_into().unwrap());
                if x.is_nan() { u32::MAX } else { x.to_bits().into() }
            }
            DType::U8 => x[0].into(),
        };
        self.bytes.chunks_exact(self.dtype.size_bytes()).map(bits).collect()
    }
}

thread_local! {
    /// The machine's own GPU instead of fakes.
    static REAL: RefCell<Option<Arc<GpuProcessor>>> = const { RefCell::new(None) };
}

/// What `compute` leaves is the same on the host and on GPUs of all ways, which are clean afterwards.
#[track_caller]
fn compare(what: &str, compute: impl Fn(&Processor) -> Vec<Array>) {
    let expected = compute(&host());
    let compare_on = |processor, way: &str| {
        let got = compute(&Processor::Gpu(processor));
        for (index, (got, expected)) in got.iter().zip(&expected).enumerate() {
            assert_eq!(got.dtype, expected.dtype);
            assert!(got.bits() == expected.bits(), "{what}, result {index}, {way}");
        }
        assert_eq!(got.len(), expected.len());
    };
    if let Some(real) = REAL.with_borrow(Clone::clone) {
        return compare_on(real, "on this machine's GPU");
    }
    for way in ALL_WAYS {
        let fake = FakeGpu::new(way);
        compare_on(fake.processor(&fake.gpu()), &format!("{way:?}"));
        assert_eq!(fake.report(), "", "{what}, {way:?}");
    }
}

#[test]
#[ignore = "needs a GPU"]
fn kernels_give_the_hosts_bits_on_this_machine() {
    let real = real_processor();
    REAL.set(Some(real.clone()));
    pieces_are_packed_and_accumulated();
    views_are_scaled_cast_and_zeroed();
    every_number_of_16_bits_is_cast();
    terms_of_ranks_are_summed_in_order();
    sums_of_squares_are_the_hosts();
    adam_steps_are_the_hosts();
    sgd_steps_are_the_hosts();
    lion_and_adagrad_steps_are_the_hosts();
    lamb_steps_are_the_hosts();
    REAL.set(None);
    real.gpu().synchronize().unwrap();
    assert_eq!(real.gpu().take_lost_error(), None);
}

#[test]
fn every_number_of_16_bits_is_cast() {
    for dtype in [DType::Bf16, DType::F16] {
        let bytes = (0..=u16::MAX).flat_map(u16::to_ne_bytes).collect();
        let all = Array { dtype, bytes };
        compare(&format!("casts of {dtype}"), |processor| {
            let from = all.put(processor, 0);
            let cast = |dtype| {
                let mut to = Buffer::allocate(dtype, all.numel(), &processor.memory()).unwrap();
                processor.scale(from.view(), 1.0, to.view_mut()).unwrap();
                Array::get(processor, to.view())
            };
            TYPES.map(cast).to_vec()
        });
    }
}

/// Reproducible numbers.
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        // splitmix64
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Numbers between -`size` and `size`.
    fn usual(&mut self, dtype: DType, numel: usize, size: f32) -> Array {
        let unit = |bits: u64| (bits >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
        Array::new(dtype, (0..numel).map(|_| unit(self.bits()) * size))
    }

    /// Any bits, infinities and NaN among them; half are of usual size.
    fn any(&mut self, dtype: DType, numel: usize) -> Array {
        let any = |bits: u64| match bits >> 32 & 3 {
            0 => f32::from_bits(bits as u32),
            1 => [0.0, -0.0, f32::INFINITY, f32::NAN, 1e-45, 65_520.0][bits as usize % 6],
            _ => (bits as u32 as f32 / u32::MAX as f32 - 0.5) * 20.0,
        };
        Array::new(dtype, (0..numel).map(|_| any(self.bits())))
    }
}

/// Arrays of all types and sizes, more than one launch takes; none for zeros.
fn pieces(random: &mut Random) -> Vec<(Option<Array>, usize)> {
    let sizes = [1, 2, 3, 7, 0, 9, 255, 64, 4097, 12];
    (0..150usize)
        .map(|i| {
            let numel = sizes[i % sizes.len()];
            let dtype = TYPES[(i / 2) % 3];
            ((i % 11 != 5).then(|| random.any(dtype, numel)), numel)
        })
        .collect()
}

#[test]
fn pieces_are_packed_and_accumulated() {
    let mut random = Random(1);
    let arrays = pieces(&mut random);
    let numel = arrays.iter().map(|(_, numel)| numel).sum();
    for (offset, to_type) in TYPES.into_iter().enumerate() {
        let before = random.any(to_type, numel);
        compare(&format!("pieces to {to_type}"), |processor| {
            let buffers: Vec<_> = arrays
                .iter()
                .enumerate()
                .map(|(i, (array, _))| array.as_ref().map(|array| array.put(processor, i % 5)))
                .collect();
            let pieces: Vec<_> = buffers
                .iter()
                .zip(&arrays)
                .enumerate()
                .map(|(i, (buffer, (_, numel)))| match buffer {
                    Some(buffer) => Piece::Data(buffer.view().range(i % 5..i % 5 + numel)),
                    None => Piece::Zeros(*numel),
                })
                .collect();
            let (mut packed, mut sum) = (before.put(processor, offset), before.put(processor, offset));
            let range = offset..offset + numel;
            processor.pack(&pieces, 0.3, packed.view_mut().into_range(range.clone())).unwrap();
            processor.accumulate(&pieces, sum.view_mut().into_range(range)).unwrap();
            vec![Array::get(processor, packed.view()), Array::get(processor, sum.view())]
        });
    }
}

#[test]
fn views_are_scaled_cast_and_zeroed() {
    let mut random = Random(2);
    for from_type in TYPES {
        for to_type in TYPES {
            let (from, to) = (random.any(from_type, 5003), random.any(to_type, 5003));
            compare(&format!("{from_type} to {to_type}"), |processor| {
                let (from, mut to) = (from.put(processor, 0), to.put(processor, 0));
                processor.scale(from.view().range(3..5000), 0.7, to.view_mut().into_range(5..5002)).unwrap();
                processor.scale(from.view().range(0..2), 1.0, to.view_mut().into_range(0..2)).unwrap();
                processor.zero(to.view_mut().into_range(2..4)).unwrap();
                processor.zero(to.view_mut().into_range(9..9)).unwrap();
                vec![Array::get(processor, from.view()), Array::get(processor, to.view())]
            });
        }
    }
}

#[test]
fn terms_of_ranks_are_summed_in_order() {
    let mut random = Random(11);
    for from_type in TYPES {
        for (num_terms, numel, stride) in
            [(1, 700, 700), (2, 1, 3), (3, 1024, 1024), (5, 1003, 1088), (8, 0, 64), (9, 4097, 4100)]
        {
            let terms = random.any(from_type, (num_terms - 1) * stride + numel);
            compare(&format!("{num_terms} terms of {numel} x {from_type}"), |processor| {
                let terms = terms.put(processor, 1);
                let sum = |dtype| {
                    let mut sum = Buffer::allocate(dtype, numel + 3, &processor.memory()).unwrap();
                    let (terms, into) = (terms.view().range(1..terms.numel()), 3..numel + 3);
                    processor.sum_ranks(terms, stride, sum.view_mut().into_range(into)).unwrap();
                    Array::get(processor, sum.view())
                };
                vec![sum(from_type), sum(DType::F32)]
            });
        }
    }
}

#[test]
fn a_second_stream_shares_the_kernels() {
    let fake = FakeGpu::lazy();
    fake.set_devices(2);
    let (gpu, other) = (fake.gpu(), fake.open(1));
    let first = fake.processor(&gpu);
    first.load([shardwise_kernels::cuda::Source::SumRanks]).unwrap();
    let second = Processor::Gpu(first.on_stream(shardwise_fake_gpu::stream(&gpu)).unwrap().into());
    drop(first);
    let terms = Array::new(DType::F32, [1.0, 2.0, 3.0, 4.0]).put(&second, 0);
    let mut sum = Buffer::allocate(DType::F32, 2, &second.memory()).unwrap();
    second.sum_ranks(terms.view(), 2, sum.view_mut()).unwrap();
    assert_eq!(shardwise_fake_gpu::values(&gpu, &sum), [4.0, 6.0]);
    let error = fake.processor(&gpu).on_stream(shardwise_fake_gpu::stream(&other)).unwrap_err();
    assert_eq!(error, CudaError::WrongGpu { what: "stream", expected: 0, got: 1 });
    drop((second, terms, sum, gpu, other));
    fake.assert_clean();
}

#[test]
fn sums_of_squares_are_the_hosts() {
    let mut random = Random(3);
    let arrays: Vec<Array> = [0, 1, 31, 33, 65_536, 65_537, 140_001]
        .into_iter()
        .enumerate()
        .map(|(i, numel)| random.usual(TYPES[i % 3], numel, 3.0))
        .collect();
    let broken = Array::new(DType::F32, [1.0, f32::INFINITY, 2.0]);
    compare("sums of squares", |processor| {
        let buffers: Vec<_> = arrays.iter().map(|array| array.put(processor, 1)).collect();
        let broken = broken.put(processor, 0);
        let parts: Vec<_> = buffers.iter().map(|buffer| buffer.view().range(1..buffer.numel())).collect();
        let mut sums = Vec::new();
        // The scratch grows, and is used again for fewer.
        for parts in [&parts[..3], &parts[..], &parts[2..5], &[], &parts[..1]] {
            sums.extend(processor.sums_of_squares(parts).unwrap());
        }
        let with_infinity = processor.sums_of_squares(&[broken.view(), parts[1]]).unwrap();
        assert!(!with_infinity[0].is_finite() && with_infinity[1].is_finite());
        let bits = sums.iter().flat_map(|sum| sum.to_bits().to_ne_bytes()).collect();
        vec![Array { dtype: DType::U8, bytes: bits }]
    });
}

/// An optimizer's step, as its method of `Processor`.
fn check_step<const K: usize>(
    what: &str,
    step: impl Fn(&Processor, StepSlices<'_, K>) -> Result<(), ProcessorError>,
) {
    let mut random = Random(4);
    let copies = [None, Some(DType::Bf16), Some(DType::F16)];
    let sizes = [(1, 0), (63, 3), (1025, 0), (5003, 1), (0, 2)];
    let types = [DType::F32, DType::Bf16, DType::F16];
    for ((case, (numel, offset)), grad_type) in
        sizes.into_iter().enumerate().flat_map(|case| types.map(|dtype| (case, dtype)))
    {
        // bf16 states whose numbers begin in the middle of a group of random words.
        let noises = [None, Some(Noise::new(42, "layers.0.weight", 7, 77))];
        let noise = noises[case % 2];
        let copy = copies[case % 3];
        let state_type = if noise.is_some() { DType::Bf16 } else { DType::F32 };
        let grad = random.any(grad_type, numel);
        let master = random.usual(DType::F32, numel, 2.0);
        let states: [Array; K] = std::array::from_fn(|_| {
            let positive = random.usual(DType::F32, numel, 0.1);
            Array::new(state_type, positive.bits().into_iter().map(|bits| f32::from_bits(bits).abs()))
        });
        compare(&format!("{what}, {numel} elements of {grad_type}, {copy:?}, {noise:?}"), |processor| {
            let (grad, mut master) = (grad.put(processor, offset), master.put(processor, offset));
            let mut states = states.each_ref().map(|state| state.put(processor, offset));
            let mut compute =
                copy.map(|dtype| Buffer::allocate(dtype, offset + numel, &processor.memory()).unwrap());
            let range = offset..offset + numel;
            // Twice, as each step depends on the last.
            for _ in 0..2 {
                let slices = StepSlices {
                    grad: grad.view().range(range.clone()),
                    master: master.view_mut().into_range(range.clone()),
                    states: states.each_mut().map(|state| state.view_mut().into_range(range.clone())),
                    noise,
                    compute: compute.as_mut().map(|copy| copy.view_mut().into_range(range.clone())),
                };
                step(processor, slices).unwrap();
            }
            let mut after = vec![Array::get(processor, grad.view()), Array::get(processor, master.view())];
            after.extend(states.iter().chain(&compute).map(|state| Array::get(processor, state.view())));
            after
        });
    }
}

const GRAD_SCALE: f32 = 0.37;

#[test]
fn adam_steps_are_the_hosts() {
    for (decay, bias_correction) in
        [(WeightDecay::Decoupled, BiasCorrection::On), (WeightDecay::L2, BiasCorrection::Off)]
    {
        let (lr, beta1, beta2, eps, weight_decay) = (1e-2, 0.9, 0.95, 1e-8, 0.1);
        let adam = Adam { lr, beta1, beta2, eps, weight_decay, decay, bias_correction, step: 3 };
        check_step(&format!("{adam:?}"), |processor, slices| processor.adam(&adam, GRAD_SCALE, slices));
    }
}

#[test]
fn sgd_steps_are_the_hosts() {
    for direction in [Direction::Momentum, Direction::Nesterov] {
        let sgd = Sgd { lr: 0.1, momentum: 0.9, dampening: 0.2, weight_decay: 0.01, direction, step: 2 };
        check_step(&format!("{sgd:?}"), |processor, slices| processor.sgd(&sgd, GRAD_SCALE, slices));
    }
    let sgd = Sgd {
        lr: 0.1,
        momentum: 0.0,
        dampening: 0.0,
        weight_decay: 0.01,
        direction: Direction::Momentum,
        step: 1,
    };
    check_step("plain", |processor, slices| processor.plain_sgd(&sgd, GRAD_SCALE, slices));
}

#[test]
fn lion_and_adagrad_steps_are_the_hosts() {
    let lion = Lion { lr: 1e-3, beta1: 0.9, beta2: 0.99, weight_decay: 0.1 };
    check_step("lion", |processor, slices| processor.lion(&lion, GRAD_SCALE, slices));
    let adagrad = Adagrad { lr: 1e-2, lr_decay: 0.01, eps: 1e-10, weight_decay: 0.1, step: 3 };
    check_step("adagrad", |processor, slices| processor.adagrad(&adagrad, GRAD_SCALE, slices));
}

const LAMB: Lamb = Lamb {
    lr: 1e-2,
    beta1: 0.9,
    beta2: 0.99,
    eps: 1e-6,
    weight_decay: 0.1,
    max_coeff: 10.0,
    min_coeff: 0.01,
    bias_correction: BiasCorrection::On,
    step: 2,
};

/// Tensors in two parts each: norms from both passes' calls in a table, which nobody waits for.
#[test]
fn lamb_steps_are_the_hosts() {
    const PAIR: usize = SquaredNorms::NUM_BYTES;
    let mut random = Random(11);
    let parts: Vec<Vec<[Array; 4]>> = [[1, 0], [700, 301], [70_001, 5]]
        .into_iter()
        .map(|sizes| {
            let of = |numel| {
                let [grad, param, m] = [2.0, 3.0, 0.1].map(|size| random.usual(DType::F32, numel, size));
                let v = Array::new(DType::F32, m.bits().into_iter().map(|bits| f32::from_bits(bits).abs()));
                [grad, param, m, v]
            };
            sizes.map(of).into()
        })
        .collect();
    for copy in [None, Some(DType::Bf16), Some(DType::F16)] {
        compare(&format!("{copy:?}"), |processor| {
            let allocate = |dtype, numel| Buffer::allocate(dtype, numel, &processor.memory()).unwrap();
            let mut table = allocate(DType::U8, 2 * parts.len() * PAIR);
            let mut sums = allocate(DType::U8, parts.len() * PAIR);
            let mut buffers: Vec<Vec<[Buffer; 4]>> = parts
                .iter()
                .map(|parts| parts.iter().map(|part| part.each_ref().map(|x| x.put(processor, 0))).collect())
                .collect();
            let mut copies = Vec::new();
            for _ in 0..2 {
                for (tensor, parts) in buffers.iter_mut().enumerate() {
                    for (row, [grad, master, m, v]) in parts.iter_mut().enumerate() {
                        let at = (row * 3 + tensor) * PAIR;
                        let slices = LambMomentSlices {
                            grad: grad.view(),
                            master: master.view(),
                            states: [m.view_mut(), v.view_mut()],
                            norms: table.view_mut().into_range(at..at + PAIR),
                        };
                        processor.lamb_moments(&LAMB, GRAD_SCALE, slices).unwrap();
                    }
                }
                processor.add_norms(table.view(), 2, sums.view_mut()).unwrap();
                copies.clear();
                for (tensor, [_, master, m, v]) in buffers
                    .iter_mut()
                    .enumerate()
                    .flat_map(|(i, parts)| parts.iter_mut().map(move |x| (i, x)))
                {
                    // From the table or from its sums: the same.
                    let (table, num_rows) = if tensor == 1 { (sums.view(), 1) } else { (table.view(), 2) };
                    let mut compute = copy.map(|dtype| allocate(dtype, master.numel()));
                    let slices = LambApplySlices {
                        master: master.view_mut(),
                        states: [m.view(), v.view()],
                        compute: compute.as_mut().map(|copy| copy.view_mut()),
                        norms: NormColumn { table, num_rows, tensor },
                    };
                    processor.lamb_apply(&LAMB, slices).unwrap();
                    copies.extend(compute);
                }
            }
            let mut after = vec![Array::get(processor, table.view()), Array::get(processor, sums.view())];
            after.extend(buffers.iter().flatten().flatten().map(|x| Array::get(processor, x.view())));
            after.extend(copies.iter().map(|copy| Array::get(processor, copy.view())));
            after
        });
    }
}

#[test]
fn lamb_waits_for_nothing_on_the_host() {
    let fake = FakeGpu::lazy();
    let gpu = fake.gpu();
    let processor = Processor::Gpu(fake.processor(&gpu));
    let buffer = |dtype, numel| Buffer::allocate(dtype, numel, &processor.memory()).unwrap();
    let [grad, mut master, mut m, mut v] = [(); 4].map(|()| buffer(DType::F32, 1000));
    let mut norms = buffer(DType::U8, SquaredNorms::NUM_BYTES);
    gpu.synchronize().unwrap();
    let ran = fake.num_ran();
    for _ in 0..2 {
        let states = [m.view_mut(), v.view_mut()];
        let slices =
            LambMomentSlices { grad: grad.view(), master: master.view(), states, norms: norms.view_mut() };
        processor.lamb_moments(&LAMB, 1.0, slices).unwrap();
        let norms = NormColumn { table: norms.view(), num_rows: 1, tensor: 0 };
        let (master, states) = (master.view_mut(), [m.view(), v.view()]);
        processor.lamb_apply(&LAMB, LambApplySlices { master, states, compute: None, norms }).unwrap();
    }
    assert_eq!(fake.num_ran(), ran, "nothing had to run yet");
    drop((grad, master, m, v, norms, processor, gpu));
    fake.assert_clean();
}

#[test]
fn two_streams_on_the_same_buffers_take_turns() {
    let (start, addend) = (Random(5).usual(DType::F32, 3000, 1.0), Random(6).usual(DType::Bf16, 3000, 1.0));
    let run = |processors: [&Processor; 2]| {
        let (mut a, mut b) = (start.put(processors[0], 0), start.put(processors[1], 0));
        let addend = addend.put(processors[0], 0);
        let mut sums = Vec::new();
        for turn in 0..12 {
            let (one, two) = (processors[turn % 2], processors[(turn / 2) % 2]);
            one.scale(a.view().range(0..2000), 0.9, b.view_mut().into_range(1000..3000)).unwrap();
            two.accumulate(&[Piece::Data(addend.view()), Piece::Zeros(0)], b.view_mut()).unwrap();
            one.pack(&[Piece::Zeros(500), Piece::Data(b.view().range(0..2500))], 0.8, a.view_mut()).unwrap();
            if turn % 4 == 3 {
                sums.extend(two.sums_of_squares(&[a.view(), b.view()]).unwrap());
            }
        }
        let results = [a, b].map(|buffer| Array::get(processors[1], buffer.view()).bits());
        (results, sums)
    };
    let expected = run([&host(), &host()]);
    for way in ALL_WAYS {
        let fake = FakeGpu::new(way);
        let gpu = fake.gpu();
        let processors = [fake.processor(&gpu), fake.processor(&gpu)].map(Processor::Gpu);
        assert!(run([&processors[0], &processors[1]]) == expected, "{way:?}");
        drop((processors, gpu));
        fake.assert_clean();
    }
}

#[test]
fn ranks_are_threads_on_one_driver_and_share_what_they_must() {
    let numbers = Random(7).usual(DType::F32, 70_001, 1.0);
    let expected = host().sums_of_squares(&[numbers.put(&host(), 0).view()]).unwrap();
    for way in [ALL_WAYS[0], ALL_WAYS[2]] {
        let fake = FakeGpu::new(way);
        fake.set_devices(2);
        let shared = Processor::Gpu(fake.processor(&fake.open(0)));
        std::thread::scope(|scope| {
            for rank in 0..4u32 {
                let (fake, shared, numbers, expected) = (&fake, &shared, &numbers, &expected);
                scope.spawn(move || {
                    let own = Processor::Gpu(fake.processor(&fake.open(rank % 2)));
                    for _ in 0..3 {
                        for processor in [&own, shared] {
                            let buffer = numbers.put(processor, 0);
                            assert_eq!(&processor.sums_of_squares(&[buffer.view()]).unwrap(), expected);
                        }
                    }
                });
            }
        });
        drop(shared);
        fake.assert_clean();
    }
}

#[test]
fn views_without_a_log_are_used_in_the_streams_order() {
    let numbers = Random(8).usual(DType::F32, 100, 1.0);
    for way in ALL_WAYS {
        let fake = FakeGpu::new(way);
        let gpu = fake.gpu();
        let processor = Processor::Gpu(fake.processor(&gpu));
        let (a, b) = (numbers.put(&processor, 0), numbers.put(&processor, 0));
        for _ in 0..3 {
            // SAFETY: the buffers live until the stream is through; nobody else uses them.
            let (from, to) = unsafe {
                let from = Slice::from_raw(a.as_ptr(), 100, DType::F32, a.place());
                (from, SliceMut::from_raw(b.as_ptr(), 100, DType::F32, b.place()))
            };
            processor.accumulate(&[Piece::Data(from)], to).unwrap();
        }
        // SAFETY: as above.
        let sum = unsafe { Slice::from_raw(b.as_ptr(), 100, DType::F32, b.place()) };
        let sum = Array::get(&processor, sum);
        let expected = host();
        let mut on_host = numbers.put(&expected, 0);
        let addend = numbers.put(&expected, 0);
        for _ in 0..3 {
            expected.accumulate(&[Piece::Data(addend.view())], on_host.view_mut()).unwrap();
        }
        assert_eq!(sum.bits(), Array::get(&expected, on_host.view()).bits());
        drop((a, b, processor, gpu));
        fake.assert_clean();
    }
}

#[test]
fn memory_that_is_elsewhere_is_an_error_and_nothing_is_queued() {
    let fake = FakeGpu::lazy();
    fake.set_devices(2);
    let (gpu, other) = (fake.open(0), fake.open(1));
    let processor = Processor::Gpu(fake.processor(&gpu));
    let buffer = |memory: &Memory| Buffer::allocate(DType::F32, 8, memory).unwrap();
    let mut here = buffer(&processor.memory());
    let here_too = buffer(&processor.memory());
    let [mut m, mut v] = [buffer(&processor.memory()), buffer(&processor.memory())];
    let mut norms = Buffer::allocate(DType::U8, SquaredNorms::NUM_BYTES, &processor.memory()).unwrap();
    for memory in [Memory::Host, Memory::Pinned(gpu.clone()), Memory::Gpu(other.clone())] {
        let mut there = buffer(&memory);
        let place = there.place();
        gpu.synchronize().unwrap();
        let ran = fake.num_ran();
        let elsewhere = |result: Result<(), ProcessorError>| {
            let expected = Place::Cuda { ordinal: 0 };
            assert!(
                matches!(result, Err(ProcessorError::Elsewhere { got, expected: at }) if got == place && at == expected),
                "{result:?}"
            );
        };
        elsewhere(processor.zero(there.view_mut()));
        elsewhere(processor.scale(there.view(), 1.0, here.view_mut()));
        elsewhere(processor.scale(here.view(), 1.0, there.view_mut()));
        let zeros = [Piece::Zeros(4), Piece::Data(there.view().range(0..4))];
        elsewhere(processor.pack(&zeros, 1.0, here.view_mut()));
        elsewhere(processor.accumulate(&zeros, here.view_mut()));
        elsewhere(processor.sums_of_squares(&[here.view(), there.view()]).map(drop));
        elsewhere(processor.sum_ranks(there.view(), 8, here.view_mut()));
        let lion = Lion { lr: 1e-3, beta1: 0.9, beta2: 0.99, weight_decay: 0.1 };
        let states = [there.view_mut()];
        let slices =
            StepSlices { grad: here_too.view(), master: here.view_mut(), states, noise: None, compute: None };
        elsewhere(processor.lion(&lion, 1.0, slices));
        let states = [m.view_mut(), v.view_mut()];
        let slices =
            LambMomentSlices { grad: there.view(), master: here.view(), states, norms: norms.view_mut() };
        elsewhere(processor.lamb_moments(&LAMB, 1.0, slices));
        let norms = NormColumn { table: norms.view(), num_rows: 1, tensor: 0 };
        let (master, states) = (here.view_mut(), [m.view(), there.view()]);
        elsewhere(processor.lamb_apply(&LAMB, LambApplySlices { master, states, compute: None, norms }));
        gpu.synchronize().unwrap();
        assert_eq!(fake.num_ran(), ran);
    }
    // The host's processor, given a GPU's memory.
    let (host, mut mine) = (host(), buffer(&Memory::Host));
    let unreachable = |result: Result<(), ProcessorError>| {
        let told = result.unwrap_err().to_string();
        assert!(told.starts_with("the memory is on `cuda:0`, where the host cannot reach it"), "{told}");
    };
    unreachable(host.zero(here.view_mut()));
    unreachable(host.scale(here.view(), 0.5, mine.view_mut()));
    unreachable(host.scale(mine.view(), 0.5, here.view_mut()));
    unreachable(host.scale(mine.view(), 1.0, here.view_mut()));
    unreachable(host.pack(&[Piece::Data(here_too.view())], 1.0, mine.view_mut()));
    unreachable(host.accumulate(&[Piece::Data(here_too.view())], mine.view_mut()));
    unreachable(host.accumulate(&[Piece::Data(mine.view())], here.view_mut()));
    unreachable(host.sums_of_squares(&[here.view()]).map(drop));
    unreachable(host.sum_ranks(here.view(), 8, mine.view_mut()));
    unreachable(host.copy(here.view(), mine.view_mut()));
    // And copies that no stream of the GPU can do.
    let there = buffer(&Memory::Host);
    let error = processor.copy(there.view(), mine.view_mut()).unwrap_err();
    assert!(matches!(error, ProcessorError::Cuda(CudaError::WrongPlaces { .. })), "{error}");
}

#[test]
fn pinned_memory_serves_the_hosts_processor_behind_streams() {
    // ZeRO-Offload: the GPU copies down, the host computes, the GPU copies up; nobody waits by hand.
    let numbers = Random(9).usual(DType::F32, 4000, 1.0);
    for way in ALL_WAYS {
        let fake = FakeGpu::new(way);
        let gpu = fake.gpu();
        let processor = Processor::Gpu(fake.processor(&gpu));
        let copies = shardwise_fake_gpu::stream(&gpu);
        let mut on_gpu = numbers.put(&processor, 0);
        let mut staged = Buffer::allocate(DType::F32, 4000, &processor.staging_memory()).unwrap();
        let mut updated = Buffer::allocate(DType::F32, 4000, &processor.staging_memory()).unwrap();
        for _ in 0..3 {
            let before = Array::get(&processor, on_gpu.view());
            processor
                .accumulate(&[Piece::Data(before.put(&processor, 0).view())], on_gpu.view_mut())
                .unwrap();
            copies.copy(on_gpu.view(), staged.view_mut()).unwrap();
            host().scale(staged.view(), 0.25, updated.view_mut()).unwrap();
            copies.copy(updated.view(), on_gpu.view_mut()).unwrap();
        }
        let halved = numbers.bits().into_iter().map(|bits| f32::from_bits(bits) / 8.0);
        assert_eq!(Array::get(&processor, on_gpu.view()).bits(), Array::new(DType::F32, halved).bits());
        drop((processor, copies, on_gpu, staged, updated, gpu));
        fake.assert_clean();
    }
}

#[test]
fn a_failure_at_any_call_is_an_error_or_does_no_harm() {
    const LAUNCH_FAILED: i32 = 719;
    let numbers = Random(10).usual(DType::F32, 300, 1.0);
    let sequence = |fake: &FakeGpu| -> Result<Vec<f64>, ProcessorError> {
        let gpu = Driver::load(Some(fake.path()))?.open(0)?;
        let stream = gpu.stream(Default::default())?;
        // SAFETY: the fake's own machine code.
        let gpu = unsafe { GpuProcessor::new(stream, FakeCode) };
        let processor = Processor::Gpu(gpu.into());
        let mut a = Buffer::allocate(DType::F32, 300, &processor.memory())?;
        let mut b = Buffer::allocate(DType::F32, 300, &processor.memory())?;
        let mut staged = Buffer::allocate(DType::F32, 300, &Memory::Host)?;
        staged.view_mut().bytes().copy_from_slice(&numbers.bytes);
        processor.copy(staged.view(), a.view_mut())?;
        processor.pack(&[Piece::Zeros(100), Piece::Data(a.view().range(0..200))], 0.5, b.view_mut())?;
        processor.accumulate(&[Piece::Data(a.view())], b.view_mut())?;
        processor.sums_of_squares(&[a.view(), b.view()])
    };
    let fake = FakeGpu::new((1, Eagerness::Random));
    let before = fake.num_calls();
    let expected = sequence(&fake).unwrap();
    let num_calls = fake.num_calls() - before;
    fake.assert_clean();
    let mut failed = 0;
    for call in 1..=num_calls {
        fake.fail_at(call, LAUNCH_FAILED);
        match sequence(&fake) {
            // Where the end of an object met the error, or a question whether something is over.
            Ok(sums) => assert_eq!(sums, expected, "call {call}"),
            Err(error) => {
                failed += 1;
                assert!(error.to_string().contains("LAUNCH_FAILED"), "call {call}: {error}");
            }
        }
        assert_eq!(fake.report(), "", "call {call} of {num_calls}");
    }
    assert!(failed * 2 > num_calls, "{failed} of {num_calls} calls were noticed");
}

#[test]
fn slices_that_do_not_match_are_a_callers_bug() {
    let fake = FakeGpu::lazy();
    let gpu = fake.gpu();
    for processor in [host(), Processor::Gpu(fake.processor(&gpu))] {
        let buffer = |dtype, numel| Buffer::allocate(dtype, numel, &processor.memory()).unwrap();
        let panics = |call: &mut dyn FnMut()| {
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(call)).unwrap_err();
        };
        let (a, mut b) = (buffer(DType::F32, 4), buffer(DType::F32, 5));
        let mut bytes = buffer(DType::U8, 4);
        panics(&mut || drop(processor.scale(a.view(), 1.0, b.view_mut())));
        panics(&mut || drop(processor.pack(&[Piece::Data(a.view())], 1.0, b.view_mut())));
        panics(&mut || drop(processor.accumulate(&[Piece::Zeros(6)], b.view_mut())));
        panics(&mut || drop(processor.scale(a.view(), 1.0, bytes.view_mut())));
        panics(&mut || drop(processor.sums_of_squares(&[bytes.view()])));
        panics(&mut || drop(processor.copy(a.view(), b.view_mut())));
        panics(&mut || drop(processor.sum_ranks(a.view(), 3, b.view_mut().into_range(0..2))));
        panics(&mut || drop(processor.sum_ranks(bytes.view(), 4, b.view_mut().into_range(0..4))));
        let sgd = Sgd {
            lr: 0.1,
            momentum: 0.0,
            dampening: 0.0,
            weight_decay: 0.0,
            direction: Direction::Momentum,
            step: 1,
        };
        panics(&mut || {
            let (grad, master) = (a.view(), b.view_mut());
            let slices = StepSlices { grad, master, states: [], noise: None, compute: None };
            drop(processor.plain_sgd(&sgd, 1.0, slices));
        });
    }
}

#[test]
fn kernels_can_be_loaded_before_they_are_needed() {
    use shardwise_kernels::cuda::Source;
    let fake = FakeGpu::lazy();
    let processor = fake.processor(&fake.gpu());
    processor.load(Source::ALL).unwrap();
    let calls = fake.num_calls();
    processor.load(Source::ALL).unwrap();
    assert_eq!(fake.num_calls(), calls, "once");
    drop(processor);
    fake.assert_clean();
}
