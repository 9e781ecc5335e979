//! Programs of collectives, run by real groups and by a plain reference.
#![allow(dead_code, reason = "each test binary uses a part")]

use half::{bf16, f16};
use proptest::prelude::*;
use shardwise_comm::{Group, Part};
use shardwise_device::cuda::{Access, Gpu, Stream};
use shardwise_device::{Buffer, DType, Memory, Place, Slice, SliceMut};

/// Where the buffers of a program lie.
#[derive(Clone, Copy)]
pub enum Ground<'a> {
    Host,
    /// On a GPU, in memory that logs who uses it or, like libtorch's, is used in the order of one stream.
    Gpu {
        gpu: &'a Gpu,
        compute: &'a Stream,
        log: Log,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Log {
    Kept,
    None,
}

/// A buffer of a program. What is on a GPU is on its way there while the program runs.
struct Placed<'a> {
    ground: Ground<'a>,
    buffer: Buffer,
    /// What the buffer is filled from.
    _pinned: Option<Buffer>,
}

impl<'a> Placed<'a> {
    fn new(ground: Ground<'a>, host: Buffer) -> Self {
        let Ground::Gpu { gpu, compute, .. } = ground else {
            return Placed { ground, buffer: host, _pinned: None };
        };
        let allocate = |memory| Buffer::allocate(host.dtype(), host.numel(), &memory).unwrap();
        let (mut pinned, buffer) =
            (allocate(Memory::Pinned(gpu.clone())), allocate(Memory::Gpu(gpu.clone())));
        pinned.view_mut().bytes().copy_from_slice(host.view().bytes());
        let mut placed = Placed { ground, buffer, _pinned: None };
        if host.numel() > 0 {
            compute.wait_for(placed.buffer.view(), Access::Write).unwrap();
            compute.copy(pinned.view(), placed.view_mut()).unwrap();
        }
        Placed { _pinned: Some(pinned), ..placed }
    }

    fn zeroed(ground: Ground<'a>, dtype: DType, numel: usize) -> Self {
        Placed::new(ground, Buffer::zeroed(dtype, numel, Place::Cpu).unwrap())
    }

    fn view(&self) -> Slice<'_> {
        let view = self.buffer.view();
        match self.ground {
            // SAFETY: the buffer's own memory, used in the order of the compute stream, which `bytes` waits for.
            Ground::Gpu { log: Log::None, .. } => unsafe {
                Slice::from_raw(self.buffer.as_ptr(), view.numel(), view.dtype(), view.place())
            },
            _ => view,
        }
    }

    fn view_mut(&mut self) -> SliceMut<'_> {
        let view = self.buffer.view();
        match self.ground {
            // SAFETY: as in `view`; the buffer is borrowed to write.
            Ground::Gpu { log: Log::None, .. } => unsafe {
                SliceMut::from_raw(self.buffer.as_ptr(), view.numel(), view.dtype(), view.place())
            },
            _ => self.buffer.view_mut(),
        }
    }

    fn bytes(self) -> Vec<u8> {
        let mut out = vec![0; self.buffer.num_bytes()];
        match self.ground {
            Ground::Host => out.copy_from_slice(self.buffer.view().bytes()),
            Ground::Gpu { compute, .. } => {
                compute.copy_and_wait(self.view().cast(DType::U8), SliceMut::of(&mut out)).unwrap();
            }
        }
        out
    }
}

/// As [`run`], with buffers on `ground`.
pub fn run_on(group: &Group, ground: Ground<'_>, program: &[Step], seed: u64) -> Vec<Vec<u8>> {
    let (n, me) = (group.group_size(), group.group_rank());
    let one = |(i, step): (usize, &Step)| {
        let dtype = input_dtype(step);
        let host = input(seed + i as u64, me, dtype, input_numel(step, n));
        let mut own = Placed::new(ground, input(seed + i as u64, me, dtype, input_numel(step, n)));
        let result = match *step {
            Step::AllReduce { .. } => {
                group.all_reduce(own.view_mut()).unwrap();
                own
            }
            Step::ReduceScatter { shard_dtype, numel, cuts, .. } => {
                let mut result = Placed::zeroed(ground, shard_dtype, numel);
                group.reduce_scatter(&parts(own.view(), me, cuts), result.view_mut()).unwrap();
                return result.bytes();
            }
            Step::AllGather { numel, in_place: true, .. } => {
                let mut full = Buffer::zeroed(dtype, numel * n, Place::Cpu).unwrap();
                let place = full.view_mut().into_range(me * numel..(me + 1) * numel);
                place.bytes().copy_from_slice(host.view().bytes());
                let mut full = Placed::new(ground, full);
                group.all_gather_in_place(full.view_mut()).unwrap();
                full
            }
            Step::AllGather { numel, .. } => {
                let mut full = Placed::zeroed(ground, dtype, numel * n);
                group.all_gather(own.view(), full.view_mut()).unwrap();
                return full.bytes();
            }
            Step::Broadcast { root, .. } => {
                group.broadcast(own.view_mut(), root % n).unwrap();
                own
            }
            Step::AllToAll { numel, .. } => {
                let mut result = Placed::zeroed(ground, dtype, numel * n);
                group.all_to_all(own.view(), result.view_mut()).unwrap();
                return result.bytes();
            }
            Step::Ring { numel, .. } => {
                let mut result = Placed::zeroed(ground, dtype, numel);
                let (right, left) = ((me + 1) % n, (me + n - 1) % n);
                if n == 1 {
                    return own.bytes();
                } else if me == 0 {
                    // One rank receives first, so that large messages cannot block each other.
                    group.recv(result.view_mut(), left).unwrap();
                    group.send(own.view(), right).unwrap();
                } else {
                    group.send(own.view(), right).unwrap();
                    group.recv(result.view_mut(), left).unwrap();
                }
                return result.bytes();
            }
            Step::Barrier => {
                group.barrier().unwrap();
                own
            }
        };
        result.bytes()
    };
    program.iter().enumerate().map(one).collect()
}

/// One collective, with what every rank must agree on.
#[derive(Debug, Clone)]
pub enum Step {
    AllReduce { dtype: DType, numel: usize },
    ReduceScatter { dtype: DType, shard_dtype: DType, numel: usize, cuts: u64 },
    AllGather { dtype: DType, numel: usize, in_place: bool },
    Broadcast { dtype: DType, numel: usize, root: usize },
    AllToAll { dtype: DType, numel: usize },
    Ring { dtype: DType, numel: usize },
    Barrier,
}

/// Sizes around the pieces that calls are cut into (slots of 4 KiB in these tests), and odd ones.
fn numel() -> impl Strategy<Value = usize> {
    prop_oneof![Just(0), 1usize..20, 1000usize..1050, 1usize..6000]
}

fn number_type() -> impl Strategy<Value = DType> {
    prop::sample::select(vec![DType::F32, DType::Bf16, DType::F16])
}

fn any_type() -> impl Strategy<Value = DType> {
    prop::sample::select(DType::ALL.to_vec())
}

pub fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (number_type(), numel()).prop_map(|(dtype, numel)| Step::AllReduce { dtype, numel }),
        4 => (number_type(), any::<bool>(), numel(), any::<u64>()).prop_map(|(dtype, wide, numel, cuts)| {
            let shard_dtype = if wide { DType::F32 } else { dtype };
            Step::ReduceScatter { dtype, shard_dtype, numel, cuts }
        }),
        3 => (any_type(), numel(), any::<bool>())
            .prop_map(|(dtype, numel, in_place)| Step::AllGather { dtype, numel, in_place }),
        2 => (any_type(), numel(), 0usize..8).prop_map(|(dtype, numel, root)| Step::Broadcast { dtype, numel, root }),
        2 => (any_type(), numel()).prop_map(|(dtype, numel)| Step::AllToAll { dtype, numel }),
        2 => (any_type(), prop_oneof![3 => 0usize..2000, 1 => 60_000usize..140_000]).prop_map(|(dtype, numel)| Step::Ring { dtype, numel }),
        1 => Just(Step::Barrier),
    ]
}

fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A rank's input: numbers of many magnitudes, so that the order of additions shows in the sum.
fn input(seed: u64, rank: usize, dtype: DType, numel: usize) -> Buffer {
    let mut buffer = Buffer::zeroed(dtype, numel, Place::Cpu).unwrap();
    let bits = |i: usize| mix(seed ^ mix(rank as u64 + 1) ^ mix(i as u64 + 1000));
    let number = |i: usize| {
        let bits = bits(i);
        let exponent = (bits >> 32) as i32 % 12;
        ((bits as u32 as f64 / f64::from(u32::MAX) - 0.5) * f64::from(exponent).exp2()) as f32
    };
    match dtype {
        DType::F32 => fill::<f32>(&mut buffer, number),
        DType::Bf16 => fill(&mut buffer, |i| bf16::from_f32(number(i))),
        DType::F16 => fill(&mut buffer, |i| f16::from_f32(number(i))),
        DType::U8 => fill(&mut buffer, |i| bits(i) as u8),
    }
    buffer
}

fn fill<T: shardwise_device::Element>(buffer: &mut Buffer, value: impl Fn(usize) -> T) {
    buffer.typed_mut::<T>().unwrap().iter_mut().enumerate().for_each(|(i, x)| *x = value(i));
}

/// `input` as parts: cut at random places; elements of some stretches are zero and given as `Zeros`.
fn parts(view: Slice<'_>, rank: usize, cuts: u64) -> Vec<Part<'_>> {
    let mut parts = Vec::new();
    for_each_stretch(view.numel(), rank, cuts, |range, is_zero| {
        parts.push(if is_zero { Part::Zeros(range.len()) } else { Part::Data(view.range(range)) });
    });
    // States the type, in case all stretches are zero.
    parts.push(Part::Data(view.range(0..0)));
    parts
}

fn for_each_stretch(
    numel: usize,
    rank: usize,
    cuts: u64,
    mut visit: impl FnMut(std::ops::Range<usize>, bool),
) {
    let mut at = 0;
    for i in 0.. {
        let bits = mix(cuts ^ mix(rank as u64 * 1000 + i));
        let len = if bits.is_multiple_of(7) { 0 } else { 1 + (bits >> 8) as usize % (numel / 3 + 2) };
        let end = (at + len).min(numel);
        visit(at..end, (bits >> 60) < 5);
        at = end;
        if at == numel {
            return;
        }
    }
}

/// What `parts` stands for, flat.
fn flat(mut input: Buffer, rank: usize, cuts: u64) -> Buffer {
    let width = input.dtype().size_bytes();
    let numel = input.numel();
    for_each_stretch(numel, rank, cuts, |range, is_zero| {
        if is_zero {
            input.view_mut().bytes()[range.start * width..range.end * width].fill(0);
        }
    });
    input
}

fn input_numel(step: &Step, n: usize) -> usize {
    match *step {
        Step::ReduceScatter { numel, .. } | Step::AllToAll { numel, .. } => numel * n,
        Step::AllReduce { numel, .. }
        | Step::AllGather { numel, .. }
        | Step::Broadcast { numel, .. }
        | Step::Ring { numel, .. } => numel,
        Step::Barrier => 0,
    }
}

fn input_dtype(step: &Step) -> DType {
    match *step {
        Step::AllReduce { dtype, .. }
        | Step::ReduceScatter { dtype, .. }
        | Step::AllGather { dtype, .. }
        | Step::Broadcast { dtype, .. }
        | Step::AllToAll { dtype, .. }
        | Step::Ring { dtype, .. } => dtype,
        Step::Barrier => DType::U8,
    }
}

/// Runs a program on a group; returns the bytes of each step's result.
pub fn run(group: &Group, program: &[Step], seed: u64) -> Vec<Vec<u8>> {
    run_on(group, Ground::Host, program, seed)
}

/// What rank `me` of `n` must get, computed one element after the other.
pub fn reference(n: usize, me: usize, program: &[Step], seed: u64) -> Vec<Vec<u8>> {
    let one = |(i, step): (usize, &Step)| -> Vec<u8> {
        let dtype = input_dtype(step);
        let input_of = |rank| input(seed + i as u64, rank, dtype, input_numel(step, n));
        let bytes = |rank| input_of(rank).view().bytes().to_vec();
        match *step {
            Step::AllReduce { numel, .. } => sum(&(0..n).map(input_of).collect::<Vec<_>>(), 0..numel, dtype),
            Step::ReduceScatter { shard_dtype, numel, cuts, .. } => {
                let inputs: Vec<_> = (0..n).map(|rank| flat(input_of(rank), rank, cuts)).collect();
                sum(&inputs, me * numel..(me + 1) * numel, shard_dtype)
            }
            Step::AllGather { .. } => (0..n).flat_map(bytes).collect(),
            Step::Broadcast { root, .. } => bytes(root % n),
            Step::AllToAll { numel, .. } => {
                let piece = me * numel * dtype.size_bytes()..(me + 1) * numel * dtype.size_bytes();
                (0..n).flat_map(|rank| bytes(rank)[piece.clone()].to_vec()).collect()
            }
            Step::Ring { .. } => bytes((me + n - 1) % n),
            Step::Barrier => Vec::new(),
        }
    };
    program.iter().enumerate().map(one).collect()
}

fn sum(inputs: &[Buffer], range: std::ops::Range<usize>, out: DType) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(range.len() * out.size_bytes());
    for i in range {
        let mut total = widened(inputs[0].view(), i);
        for input in &inputs[1..] {
            total += widened(input.view(), i);
        }
        match out {
            DType::F32 => bytes.extend(total.to_ne_bytes()),
            DType::Bf16 => bytes.extend(bf16::from_f32(total).to_ne_bytes()),
            DType::F16 => bytes.extend(f16::from_f32(total).to_ne_bytes()),
            DType::U8 => unreachable!("bytes are not summed"),
        }
    }
    bytes
}

fn widened(view: Slice<'_>, i: usize) -> f32 {
    match view.dtype() {
        DType::F32 => view.typed::<f32>().unwrap()[i],
        DType::Bf16 => view.typed::<bf16>().unwrap()[i].to_f32(),
        DType::F16 => view.typed::<f16>().unwrap()[i].to_f32(),
        DType::U8 => unreachable!("bytes are not summed"),
    }
}
