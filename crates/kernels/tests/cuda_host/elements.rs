//! Kernels that compute each element alone: the CPU's bits.

use half::{bf16, f16};
use shardwise_device::{Element, Slice, SliceMut};
use shardwise_kernels::cuda::{
    DevicePtr, LaunchPlan, Pack, Rotate, Segment, SumRanks, SumType, SwigluBackward, SwigluForward,
};
use shardwise_kernels::reduce::{Store, Term, sum_in_order};
use shardwise_kernels::rotary::{self, Direction, Shape};
use shardwise_kernels::{Threads, convert, swiglu};

use super::{Device, Float, Number, Order, Random, SameBits, host, in_both_orders};

/// Around a vector, a block's turn, a piece.
const SIZES: [usize; 10] = [1, 2, 3, 7, 8, 9, 255, 1024, 4096, 9001];

/// Calls `$check::<A, B>($args)` for all pairs of types.
macro_rules! for_all_pairs {
    ($check:ident) => {
        $check::<f32, f32>();
        $check::<f32, bf16>();
        $check::<f32, f16>();
        $check::<bf16, f32>();
        $check::<bf16, bf16>();
        $check::<bf16, f16>();
        $check::<f16, f32>();
        $check::<f16, bf16>();
        $check::<f16, f16>();
    };
}

fn segments<A: Number, B: Number>(from: &mut [Device<A>], to: &mut [Device<B>]) -> Vec<Segment> {
    let pairs = from.iter_mut().zip(to);
    pairs.map(|(from, to)| Segment { numel: from.numel as u64, from: from.ptr(), to: to.ptr() }).collect()
}

fn check_pack<A: Float + Element, B: Float + Element>() {
    let mut random = Random(1);
    // More segments than a launch has, empty ones among them, at all offsets.
    let numels: Vec<usize> =
        (0..150).map(|i| if i % 7 == 3 { 0 } else { SIZES[i % SIZES.len()] % 3000 + i }).collect();
    let from: Vec<Vec<A>> = numels.iter().map(|&numel| random.any(numel)).collect();
    let to: Vec<Vec<B>> = numels.iter().map(|&numel| random.any(numel)).collect();
    let factor = 0.3;
    let run = |scale: bool| {
        in_both_orders(|order| {
            let mut froms: Vec<_> = from.iter().enumerate().map(|(i, x)| Device::new(x, i % 9)).collect();
            let mut tos: Vec<_> = to.iter().enumerate().map(|(i, x)| Device::new(x, (i / 9) % 9)).collect();
            let segments = segments(&mut froms, &mut tos);
            let launches: Vec<_> = match scale {
                true => Pack::scale(A::TYPE, B::TYPE, factor, &segments).collect(),
                false => Pack::accumulate(A::TYPE, B::TYPE, &segments).collect(),
            };
            assert_eq!(launches.len(), 3);
            launches.iter().for_each(|launch| host().launch(launch, order));
            froms.into_iter().zip(&from).for_each(|(now, x)| now.get().assert_same(x, "read only"));
            tos.into_iter().map(Device::get).collect::<Vec<_>>()
        })
    };
    let (scaled, summed) = (run(true), run(false));
    for (i, from) in from.iter().enumerate() {
        let mut expected = to[i].clone();
        convert::scale_on(Threads::ONE, Slice::of(from), factor, SliceMut::of(&mut expected));
        scaled[i].assert_same(&expected, &format!("segment {i} scaled"));
        let mut expected = to[i].clone();
        convert::accumulate_on(Threads::ONE, SliceMut::of(&mut expected), Slice::of(from));
        summed[i].assert_same(&expected, &format!("segment {i} summed"));
    }
}

#[test]
fn many_arrays_are_scaled_and_summed_like_on_the_cpu() {
    for_all_pairs!(check_pack);
}

#[test]
fn nothing_to_pack_needs_no_launch() {
    let nothing = Segment { from: DevicePtr::NULL, to: DevicePtr::NULL, numel: 0 };
    assert_eq!(Pack::scale(f32::TYPE, bf16::TYPE, 1.0, &[nothing; 70]).count(), 0);
    assert_eq!(Pack::accumulate(f32::TYPE, bf16::TYPE, &[]).count(), 0);
}

/// Casts `x` with the kernel.
fn cast<A: Float, B: Float>(x: &[A]) -> Vec<B> {
    in_both_orders(|order| {
        let (mut from, mut to) = (Device::new(x, 0), Device::new(&vec![B::round(0.0); x.len()], 0));
        let segment = Segment { from: from.ptr(), to: to.ptr(), numel: x.len() as u64 };
        Pack::scale(A::TYPE, B::TYPE, 1.0, &[segment]).for_each(|launch| host().launch(&launch, order));
        to.get()
    })
}

#[test]
fn casts_round_like_the_crate_half() {
    let all16: Vec<u16> = (0..=u16::MAX).collect();
    let bf16s: Vec<bf16> = all16.iter().map(|&bits| bf16::from_bits(bits)).collect();
    let f16s: Vec<f16> = all16.iter().map(|&bits| f16::from_bits(bits)).collect();
    let wide = |x: Vec<f32>, y: Vec<f32>| x.assert_same(&y, "widened");
    wide(cast(&bf16s), bf16s.iter().map(|x| x.to_f32()).collect());
    wide(cast(&f16s), f16s.iter().map(|x| x.to_f32()).collect());
    // Every 16-bit number, halfway to the next, and the neighbours of both.
    let mut near = Vec::new();
    for x in bf16s.iter().map(|x| x.to_f32()).chain(f16s.iter().map(|x| x.to_f32())) {
        for step in [0, 1, 0x0fff, 0x1000, 0x1001, 0x7fff, 0x8000, 0x8001] {
            near.push(f32::from_bits(x.to_bits().wrapping_add(step)));
        }
    }
    let narrow: Vec<bf16> = near.iter().map(|&x| bf16::from_f32(x)).collect();
    cast::<f32, bf16>(&near).assert_same(&narrow, "to bf16");
    let narrow: Vec<f16> = near.iter().map(|&x| f16::from_f32(x)).collect();
    cast::<f32, f16>(&near).assert_same(&narrow, "to f16");
}

fn check_sum_ranks<A: Float + Element, B: Float + Element>(to: SumType) {
    let mut random = Random(5);
    for (i, numel) in SIZES.into_iter().enumerate() {
        for num_terms in [1, 2, 4, 5, 6, 9] {
            // Terms side by side, or with anything between; at all offsets.
            let stride = numel + [0, 7, 64 - numel % 64][(i + num_terms) % 3];
            let terms: Vec<A> = random.any((num_terms - 1) * stride + numel);
            let sum = in_both_orders(|order| {
                let mut from = Device::new(&terms, [0, 0, 1][i % 3]);
                let mut sum = Device::new(&vec![B::round(0.0); numel], [0, 8, 0, 3][num_terms % 4]);
                let (stride, numel, num_terms) = (stride as u64, numel as u64, num_terms as u32);
                let call = SumRanks { terms: from.ptr(), sum: sum.ptr(), stride, numel, num_terms };
                host().launch(&call.launch(A::TYPE, to), order);
                from.get().assert_same(&terms, "read only");
                sum.get()
            });
            let mut expected = vec![B::round(0.0); numel];
            let rows: Vec<_> = (0..num_terms)
                .map(|rank| Term::Of(Slice::of(&terms[rank * stride..rank * stride + numel])))
                .collect();
            sum_in_order(&rows, SliceMut::of(&mut expected), Store::Cached);
            sum.assert_same(&expected, &format!("{num_terms} terms of {numel}, {stride} apart"));
        }
    }
}

#[test]
fn terms_of_ranks_are_summed_like_on_the_cpu() {
    check_sum_ranks::<f32, f32>(SumType::F32);
    check_sum_ranks::<f32, f32>(SumType::Same);
    check_sum_ranks::<bf16, f32>(SumType::F32);
    check_sum_ranks::<bf16, bf16>(SumType::Same);
    check_sum_ranks::<f16, f32>(SumType::F32);
    check_sum_ranks::<f16, f16>(SumType::Same);
}

fn check_swiglu<T: Float>() {
    let mut random = Random(2);
    for (i, numel) in SIZES.into_iter().chain([70_000]).enumerate() {
        let [gate, up, dy]: [Vec<T>; 3] = std::array::from_fn(|_| random.any(numel));
        let zeros = vec![T::round(0.0); numel];
        // All offsets alike, or one that is not.
        let offsets = [[0; 5], [8; 5], [1; 5], [0, 0, 3, 0, 0]][i % 4];
        let out = in_both_orders(|order| {
            let (mut g, mut u) = (Device::new(&gate, offsets[0]), Device::new(&up, offsets[1]));
            let mut out = Device::new(&zeros, offsets[2]);
            let call = SwigluForward { gate: g.ptr(), up: u.ptr(), out: out.ptr(), numel: numel as u64 };
            host().launch(&call.launch(T::TYPE), order);
            out.get()
        });
        let mut expected = zeros.clone();
        swiglu::forward(Threads::ONE, &gate, &up, &mut expected);
        out.assert_same(&expected, "forward");
        let gradients = in_both_orders(|order| {
            // The gradients over what they are of.
            let (mut g, mut u) = (Device::new(&gate, offsets[0]), Device::new(&up, offsets[1]));
            let mut dy = Device::new(&dy, offsets[2]);
            let (dgate, dup) = (g.ptr(), u.ptr());
            let call = SwigluBackward { gate: dgate, up: dup, dy: dy.ptr(), dgate, dup, numel: numel as u64 };
            host().launch(&call.launch(T::TYPE), order);
            (g.get(), u.get())
        });
        let (mut dgate, mut dup) = (zeros.clone(), zeros);
        swiglu::backward(Threads::ONE, &gate, &up, &dy, &mut dgate, &mut dup);
        gradients.assert_same(&(dgate, dup), "backward");
    }
}

#[test]
fn swiglu_is_the_cpus() {
    check_swiglu::<f32>();
    check_swiglu::<bf16>();
    check_swiglu::<f16>();
}

#[test]
fn a_thread_takes_several_turns_where_the_grid_is_small() {
    let mut random = Random(4);
    let [gate, up]: [Vec<bf16>; 2] = std::array::from_fn(|_| random.any(20_003));
    let mut expected = up.clone();
    swiglu::forward(Threads::ONE, &gate, &up, &mut expected);
    for offset in [0, 1] {
        let (mut gate, mut out) = (Device::new(&gate, offset), Device::new(&up, offset));
        let numel = out.numel as u64;
        let call =
            SwigluForward { gate: gate.ptr(), up: out.ptr(), out: out.ptr(), numel }.launch(bf16::TYPE);
        let plan = LaunchPlan { grid: 2, ..call.plan() };
        let num_bytes = size_of::<SwigluForward>();
        host().launch_raw(call.entry().name, plan, call.params(), num_bytes, Order::Forwards).unwrap();
        out.get().assert_same(&expected, "two blocks");
    }
}

fn check_rotary<T: Float>() {
    let mut random = Random(3);
    let shapes = [(1, 1, 1, 2), (2, 5, 3, 16), (1, 7, 4, 64), (3, 3, 2, 6), (2, 4, 5, 128), (1, 3, 40, 10)];
    for (batch, seq, heads, head_dim) in shapes {
        let shape = Shape { batch, seq, heads, head_dim };
        let half = head_dim / 2;
        let x: Vec<T> = random.any(shape.numel());
        let (cos, sin) = (random.numbers::<f32>(seq * half, 1.0), random.numbers::<f32>(seq * half, 1.0));
        for (direction, sign) in [(Direction::Forward, 1.0), (Direction::Inverse, -1.0)] {
            let mut expected = x.clone();
            rotary::rotate(Threads::ONE, direction, &x, &mut expected, &cos, &sin, shape);
            for offset in [0, 1] {
                let turned = in_both_orders(|order| {
                    let mut x = Device::new(&x, offset);
                    let (mut cos, mut sin) = (Device::new(&cos, 0), Device::new(&sin, 4 * offset));
                    let (x_, cos, sin) = (x.ptr(), cos.ptr(), sin.ptr());
                    let rows = (batch * seq) as u64;
                    let (heads, half) = (heads as u32, half as u32);
                    let call = Rotate { x: x_, out: x_, cos, sin, rows, seq: seq as u64, heads, half, sign };
                    host().launch(&call.launch(T::TYPE), order);
                    x.get()
                });
                turned.assert_same(&expected, &format!("{shape:?}, {direction:?}"));
            }
        }
    }
}

#[test]
fn rotary_is_the_cpus() {
    check_rotary::<f32>();
    check_rotary::<bf16>();
    check_rotary::<f16>();
}
