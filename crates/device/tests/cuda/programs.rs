//! Any program of safe calls gives what it would give if each call finished before the next began.

use proptest::prelude::*;
use shardwise_device::cuda::{Gpu, Stream};
use shardwise_device::{Buffer, BufferPool, DType, Memory, Place, SliceMut};
use shardwise_fake_gpu::{Eagerness, FakeGpu, stream};

const NUM_BUFFERS: usize = 5;
const BYTES: usize = 24;

#[derive(Debug, Clone)]
pub enum Call {
    Fill {
        stream: usize,
        buffer: usize,
        start: usize,
        len: usize,
        byte: u8,
    },
    Copy {
        stream: usize,
        from: usize,
        into: usize,
        at: (usize, usize),
        len: usize,
    },
    HostWrite {
        buffer: usize,
        start: usize,
        len: usize,
        byte: u8,
    },
    HostRead {
        buffer: usize,
    },
    /// Drops the buffer and makes another.
    Replace {
        buffer: usize,
    },
    /// Gives the buffer to its pool and takes one: the same, or one given back before.
    Exchange {
        buffer: usize,
    },
    NewStream {
        stream: usize,
    },
}

/// The first three are a GPU's, the last of them the second's; the others are pinned.
fn on_gpu(buffer: usize) -> bool {
    buffer < 3
}

/// Which of the two GPUs a stream, or a buffer on a GPU, belongs to: two of three are the first's.
fn gpu_of(index: usize) -> usize {
    usize::from(index == 2)
}

pub fn call() -> impl Strategy<Value = Call> {
    let (stream, buffer) = (0..3usize, 0..NUM_BUFFERS);
    let part = (0..BYTES, 0..BYTES).prop_map(|(start, len)| (start, len.min(BYTES - start)));
    prop_oneof![
        3 => (stream.clone(), 0..3usize, part.clone(), any::<u8>()).prop_filter_map(
            "the buffer is on the stream's GPU",
            |(stream, buffer, (start, len), byte)| {
                (gpu_of(stream) == gpu_of(buffer)).then_some(Call::Fill { stream, buffer, start, len, byte })
            }
        ),
        8 => (stream.clone(), buffer.clone(), buffer.clone(), (0..BYTES, 0..BYTES), 0..BYTES).prop_filter_map(
            "one of two buffers is on the stream's GPU",
            |(stream, from, into, at, len)| {
                let len = len.min(BYTES - at.0).min(BYTES - at.1);
                let here = |buffer: usize| on_gpu(buffer) && gpu_of(buffer) == gpu_of(stream);
                let possible = from != into && (here(from) || here(into));
                possible.then_some(Call::Copy { stream, from, into, at, len })
            }
        ),
        2 => (3..NUM_BUFFERS, part, any::<u8>())
            .prop_map(|(buffer, (start, len), byte)| Call::HostWrite { buffer, start, len, byte }),
        1 => (3..NUM_BUFFERS).prop_map(|buffer| Call::HostRead { buffer }),
        1 => buffer.clone().prop_map(|buffer| Call::Replace { buffer }),
        1 => buffer.prop_map(|buffer| Call::Exchange { buffer }),
        1 => stream.prop_map(|stream| Call::NewStream { stream }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn a_program_does_what_it_says(
        calls in prop::collection::vec(call(), 1..60),
        seed in any::<u64>(),
        eagerness in prop::sample::select(vec![Eagerness::Lazy, Eagerness::Random, Eagerness::Random]),
    ) {
        let fake = FakeGpu::new((seed, eagerness));
        fake.set_devices(2);
        let driver = fake.driver();
        run([driver.open(0).unwrap(), driver.open(1).unwrap()], calls);
        prop_assert_eq!(fake.report(), "");
    }
}

/// Runs a program on two GPUs, or on one that was opened twice, and compares.
pub fn run(gpus: [Gpu; 2], calls: Vec<Call>) {
    let memory = |buffer| match on_gpu(buffer) {
        true => Memory::Gpu(gpus[gpu_of(buffer)].clone()),
        false => Memory::Pinned(gpus[buffer % 2].clone()),
    };
    let new = |buffer| Buffer::allocate(DType::U8, BYTES, &memory(buffer)).unwrap();
    let mut streams: Vec<Stream> = (0..3).map(|index| stream(&gpus[gpu_of(index)])).collect();
    let mut pools = [0, 2, 3].map(|buffer| BufferPool::of(memory(buffer)));
    // Given back last, taken first: what the pools hold.
    let mut waiting: [Vec<Vec<u8>>; 3] = Default::default();
    let mut buffers: Vec<Buffer> = (0..NUM_BUFFERS).map(new).collect();
    let mut expected = vec![vec![0u8; BYTES]; NUM_BUFFERS];
    for call in calls {
        match call {
            Call::Fill { stream, buffer, start, len, byte } => {
                let range = start..start + len;
                streams[stream].fill(buffers[buffer].view_mut().into_range(range.clone()), byte).unwrap();
                expected[buffer][range].fill(byte);
            }
            Call::Copy { stream, from, into, at, len } => {
                let [source, target] = buffers.get_disjoint_mut([from, into]).unwrap();
                let source = source.view().range(at.0..at.0 + len);
                streams[stream].copy(source, target.view_mut().into_range(at.1..at.1 + len)).unwrap();
                let bytes = expected[from][at.0..at.0 + len].to_vec();
                expected[into][at.1..at.1 + len].copy_from_slice(&bytes);
            }
            Call::HostWrite { buffer, start, len, byte } => {
                let range = start..start + len;
                buffers[buffer].view_mut().into_range(range.clone()).host_bytes().unwrap().fill(byte);
                expected[buffer][range].fill(byte);
            }
            Call::HostRead { buffer } => {
                assert_eq!(buffers[buffer].view().host_bytes().unwrap(), expected[buffer]);
            }
            Call::Replace { buffer } => {
                buffers[buffer] = new(buffer);
                expected[buffer] = vec![0; BYTES];
            }
            Call::Exchange { buffer } => {
                let pool = if on_gpu(buffer) { gpu_of(buffer) } else { 2 };
                let mut other = pools[pool].take(DType::U8, BYTES).unwrap();
                std::mem::swap(&mut buffers[buffer], &mut other);
                pools[pool].give_back(other);
                let taken = waiting[pool].pop().unwrap_or(vec![0; BYTES]);
                waiting[pool].push(std::mem::replace(&mut expected[buffer], taken));
            }
            Call::NewStream { stream: index } => streams[index] = stream(&gpus[gpu_of(index)]),
        }
    }
    for (buffer, expected) in buffers.iter().zip(&expected) {
        let mut bytes = vec![0u8; BYTES];
        match buffer.view().host_bytes() {
            Ok(host) => bytes.copy_from_slice(host),
            Err(_) => {
                let Place::Cuda { ordinal } = buffer.place() else { unreachable!("the host reads its own") };
                let here = streams.iter().find(|stream| stream.gpu().ordinal() == ordinal).unwrap();
                here.copy_and_wait(buffer.view(), SliceMut::of(&mut bytes)).unwrap();
            }
        }
        assert_eq!(&bytes, expected);
    }
}
