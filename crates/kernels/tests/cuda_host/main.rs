//! The CUDA kernels' arithmetic, on a machine without a GPU: their sources are compiled as C++, run thread by thread on the host
//! and held against the CPU kernels.
//!
//! The crate `shardwise-fake-gpu` compiles them: its `host.h` gives the compiler CUDA's vocabulary, its `host.cpp` runs grids. Arrays
//! stand between guards, so a kernel that
//! writes beside them is seen; every call runs with the threads of a block in order and backwards, so one that lacks
//! a barrier is seen too (`harness` proves that the host sees it). What only a device can show is left to one: timing, and conversions between
//! f16 and f32, which are instructions there.

#![allow(clippy::unwrap_used)] // a failed test may panic anywhere

mod dropout;
mod elements;
mod gelu;
mod harness;
mod lamb;
mod optimizer;
mod reductions;
mod row_norm;
mod split;

use half::{bf16, f16};
use shardwise_fake_gpu::{HostKernels, Order};
use shardwise_kernels::cuda::{DevicePtr, FloatType, Launch, LaunchPlan, Params};

/// The kernels as a library of the host.
struct Host(&'static HostKernels);

fn host() -> Host {
    Host(HostKernels::get())
}

impl Host {
    /// Runs the call with the threads of each block in this order.
    fn launch<P: Params>(&self, launch: &Launch<P>, order: Order) {
        let name = launch.entry().name;
        assert!(launch.entry().source.entries().any(|entry| entry == name), "`{name}` is not listed");
        // SAFETY: the test's arrays are alive; whether a kernel keeps inside of them is the test's question.
        if let Err(fault) = unsafe { self.0.launch(launch, order) } {
            panic!("`{name}`: {fault}");
        }
    }

    /// Runs the kernel `name`, or says what is wrong with it.
    fn launch_raw(
        &self,
        name: &str,
        plan: LaunchPlan,
        params: *const std::ffi::c_void,
        num_bytes: usize,
        order: Order,
    ) -> Result<(), String> {
        // SAFETY: as above; the structure is alive.
        unsafe { self.0.launch_raw(name, plan, params, num_bytes, order) }
    }
}

/// What `compute` gives, which must not depend on the order of threads.
fn in_both_orders<T: SameBits + std::fmt::Debug>(compute: impl Fn(Order) -> T) -> T {
    let forwards = compute(Order::Forwards);
    let backwards = compute(Order::Backwards);
    forwards.assert_same(&backwards, "threads in order and backwards");
    forwards
}

/// Elements on a device: between guards, the first `offset` elements past an address that all vectors like.
struct Device<T> {
    memory: Vec<u128>,
    start: usize,
    numel: usize,
    element: std::marker::PhantomData<T>,
}

impl<T: Number> Device<T> {
    const GUARD: u8 = 0xa5;
    const GUARD_BYTES: usize = 64;

    fn new(x: &[T], offset: usize) -> Self {
        let start = Self::GUARD_BYTES + offset * size_of::<T>();
        let num_bytes = start + size_of_val(x) + Self::GUARD_BYTES;
        let mut device = Device {
            memory: vec![u128::from_ne_bytes([Self::GUARD; 16]); num_bytes.div_ceil(16)],
            start,
            numel: x.len(),
            element: std::marker::PhantomData,
        };
        device.bytes_mut()[start..start + size_of_val(x)].copy_from_slice(bytemuck(x));
        device
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        let num_bytes = size_of_val(&self.memory[..]);
        // SAFETY: the same memory as bytes, any of which a number may have.
        unsafe { std::slice::from_raw_parts_mut(self.memory.as_mut_ptr().cast(), num_bytes) }
    }

    fn ptr(&mut self) -> DevicePtr {
        let start = self.start;
        DevicePtr::new(self.bytes_mut()[start..].as_mut_ptr() as u64)
    }

    /// The elements, if the guards stand.
    fn get(mut self) -> Vec<T> {
        let (start, numel) = (self.start, self.numel);
        let end = start + numel * size_of::<T>();
        let bytes = self.bytes_mut();
        let intact = |bytes: &[u8]| bytes.iter().all(|&byte| byte == Self::GUARD);
        assert!(intact(&bytes[..start]) && intact(&bytes[end..]), "a kernel wrote beside an array");
        let elements = bytes[start..end].chunks_exact(size_of::<T>());
        // SAFETY: a chunk is as large as an element, and every pattern of bits is a number.
        elements.map(|chunk| unsafe { chunk.as_ptr().cast::<T>().read_unaligned() }).collect()
    }
}

fn bytemuck<T: Number>(x: &[T]) -> &[u8] {
    // SAFETY: numbers have no padding.
    unsafe { std::slice::from_raw_parts(x.as_ptr().cast(), size_of_val(x)) }
}

/// What arrays hold: any pattern of bits is one.
trait Number: Copy + std::fmt::Debug + 'static {}
impl Number for f32 {}
impl Number for f64 {}
impl Number for bf16 {}
impl Number for f16 {}
impl Number for i64 {}
impl Number for u64 {}
impl Number for u32 {}

/// A type that layers compute with.
trait Float: Number + shardwise_kernels::Float + SameBits {
    const TYPE: FloatType;
    /// The relative distance of neighbours, or 0 if it is less than any tolerance.
    const ULP: f32;
    fn round(x: f32) -> Self;
    fn wide(self) -> f32;
}

impl Float for f32 {
    const TYPE: FloatType = FloatType::F32;
    const ULP: f32 = 0.0;
    fn round(x: f32) -> f32 {
        x
    }
    fn wide(self) -> f32 {
        self
    }
}

impl Float for bf16 {
    const TYPE: FloatType = FloatType::Bf16;
    const ULP: f32 = 1.0 / 128.0;
    fn round(x: f32) -> bf16 {
        bf16::from_f32(x)
    }
    fn wide(self) -> f32 {
        self.to_f32()
    }
}

impl Float for f16 {
    const TYPE: FloatType = FloatType::F16;
    const ULP: f32 = 1.0 / 1024.0;
    fn round(x: f32) -> f16 {
        f16::from_f32(x)
    }
    fn wide(self) -> f32 {
        self.to_f32()
    }
}

/// Equal bits, but any NaN for a NaN.
trait SameBits {
    fn assert_same(&self, other: &Self, what: &str);
}

macro_rules! same_bits {
    ($($number:ty),*) => { $(
        impl SameBits for $number {
            fn assert_same(&self, other: &Self, what: &str) {
                let same = self.to_bits() == other.to_bits() || (self.is_nan() && other.is_nan());
                assert!(same, "{what}: {self:?} ({:#x}) for {other:?} ({:#x})", self.to_bits(), other.to_bits());
            }
        }
    )* };
}
same_bits!(f32, f64, bf16, f16);

macro_rules! same_integers {
    ($($number:ty),*) => { $(
        impl SameBits for $number {
            fn assert_same(&self, other: &Self, what: &str) {
                assert_eq!(self, other, "{what}");
            }
        }
    )* };
}
same_integers!(u64, u32);

impl<T: SameBits> SameBits for Vec<T> {
    fn assert_same(&self, other: &Self, what: &str) {
        assert_eq!(self.len(), other.len(), "{what}");
        for (i, (a, b)) in self.iter().zip(other).enumerate() {
            a.assert_same(b, &format!("{what}, element {i}"));
        }
    }
}

impl<A: SameBits, B: SameBits> SameBits for (A, B) {
    fn assert_same(&self, other: &Self, what: &str) {
        self.0.assert_same(&other.0, what);
        self.1.assert_same(&other.1, what);
    }
}

impl<A: SameBits, B: SameBits, C: SameBits> SameBits for (A, B, C) {
    fn assert_same(&self, other: &Self, what: &str) {
        self.0.assert_same(&other.0, what);
        self.1.assert_same(&other.1, what);
        self.2.assert_same(&other.2, what);
    }
}

/// Reproducible bits.
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        // splitmix64
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Between -1 and 1.
    fn unit(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    /// `numel` numbers up to `size`.
    fn numbers<T: Float>(&mut self, numel: usize, size: f32) -> Vec<T> {
        (0..numel).map(|_| T::round(self.unit() * size)).collect()
    }

    /// `numel` numbers with any bits: all magnitudes, subnormal ones, infinities, NaN; half of them are of usual size.
    fn any<T: Float>(&mut self, numel: usize) -> Vec<T> {
        let any = |bits: u64| match bits >> 32 & 3 {
            0 => f32::from_bits(bits as u32),
            1 => [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1e-45, f32::MAX, 65_520.0]
                [bits as usize % 8],
            _ => (bits as u32 as f32 / u32::MAX as f32 - 0.5) * 20.0,
        };
        (0..numel).map(|_| T::round(any(self.bits()))).collect()
    }
}
