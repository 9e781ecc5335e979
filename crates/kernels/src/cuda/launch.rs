//! What a launcher needs to know of a call.

use std::ffi::c_void;

use shardwise_device::DType;

use super::Source;

/// An address in a device's memory. Validity, length, alignment to the element and order on a stream are up to whoever
/// launches; kernels move 16 bytes at a time where all addresses of a call allow it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct DevicePtr(u64);

impl DevicePtr {
    /// No address.
    pub const NULL: DevicePtr = DevicePtr(0);

    /// The address `address`.
    pub const fn new(address: u64) -> Self {
        DevicePtr(address)
    }

    /// The address as a number.
    pub const fn address(self) -> u64 {
        self.0
    }
}

/// The element types that kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FloatType {
    /// 32 bits.
    F32,
    /// Brain float.
    Bf16,
    /// IEEE's 16 bits.
    F16,
}

impl FloatType {
    /// All of them.
    pub const ALL: [FloatType; 3] = [FloatType::F32, FloatType::Bf16, FloatType::F16];

    /// Of a buffer, if it holds numbers.
    pub const fn of(dtype: DType) -> Option<Self> {
        match dtype {
            DType::F32 => Some(FloatType::F32),
            DType::Bf16 => Some(FloatType::Bf16),
            DType::F16 => Some(FloatType::F16),
            DType::U8 => None,
        }
    }

    /// Elements in 16 bytes: what a thread takes at a time.
    pub(super) const fn vector_numel(self) -> u64 {
        match self {
            FloatType::F32 => 4,
            FloatType::Bf16 | FloatType::F16 => 8,
        }
    }

    /// This type's among what there is of each.
    pub(super) fn pick<T: Copy>(self, of_each: [T; 3]) -> T {
        of_each[self as usize]
    }
}

/// The names of a kernel for each type.
macro_rules! typed {
    ($stem:expr) => {
        [concat!($stem, "_f32"), concat!($stem, "_bf16"), concat!($stem, "_f16")]
    };
}
pub(super) use typed;

/// Which kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Entry {
    /// Whose machine code it is in.
    pub source: Source,
    /// Its name there.
    pub name: &'static str,
}

/// How many threads: `grid` blocks of `block` threads in a row, with `shared_bytes` of dynamic shared memory for each block.
///
/// It depends on the shape of the call alone, not on the device, and so do the results.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LaunchPlan {
    /// Blocks, at least 1.
    pub grid: u32,
    /// Threads of a block: a number of whole warps.
    pub block: u32,
    /// Dynamic shared memory of a block, below the 48 KiB that need no permission.
    pub shared_bytes: u32,
}

/// Threads of a warp.
pub(super) const WARP: u64 = 32;

impl LaunchPlan {
    /// Threads of a block where elements are alone.
    const BLOCK: u32 = 256;
    /// Blocks that keep every device busy; threads take several elements where there are more.
    const MAX_GRID: u64 = 4096;

    /// For elements that are computed alone, `per_thread` at a time.
    pub(super) fn elements(numel: u64, per_thread: u64) -> Self {
        let blocks = numel.div_ceil(per_thread).div_ceil(Self::BLOCK.into());
        LaunchPlan { grid: at_most(blocks, Self::MAX_GRID), block: Self::BLOCK, shared_bytes: 0 }
    }

    /// For rows that take a block each, in which a thread takes `per_thread` elements at a time.
    pub(super) fn rows(rows: u64, width: u64, per_thread: u64, max_block: u64) -> Self {
        let threads = width.div_ceil(per_thread).clamp(1, max_block).next_multiple_of(WARP);
        LaunchPlan { grid: at_most(rows, 1 << 20), block: threads as u32, shared_bytes: 0 }
    }
}

/// `blocks`, or so many that each has several turns; never none.
pub(super) fn at_most(blocks: u64, most: u64) -> u32 {
    blocks.clamp(1, most) as u32
}

mod sealed {
    pub trait Sealed {}
}
pub(super) use sealed::Sealed;

/// The parameters of a kernel: one structure, laid out as the kernel's source declares it.
pub trait Params: Copy + Sealed {}

/// One call of a kernel. The launcher passes [`params`](Launch::params) as the address of the only parameter.
#[derive(Debug, Clone, Copy)]
pub struct Launch<P> {
    entry: Entry,
    plan: LaunchPlan,
    params: P,
}

impl<P: Params> Launch<P> {
    pub(super) fn new(source: Source, name: &'static str, plan: LaunchPlan, params: P) -> Self {
        Launch { entry: Entry { source, name }, plan, params }
    }

    /// Which kernel.
    pub fn entry(&self) -> Entry {
        self.entry
    }

    /// How many threads.
    pub fn plan(&self) -> LaunchPlan {
        self.plan
    }

    /// Where the kernel's parameter is, `size_of::<P>()` bytes: what the driver's array of parameters points to.
    pub fn params(&self) -> *const c_void {
        (&raw const self.params).cast()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans_have_a_block_for_everything_and_stay_small() {
        let elements = |numel| LaunchPlan::elements(numel, 4);
        assert_eq!((elements(0).grid, elements(1024).grid, elements(1025).grid), (1, 1, 2));
        assert_eq!(elements(u64::MAX).grid, 4096);
        let rows = |rows, width| LaunchPlan::rows(rows, width, 8, 256);
        assert_eq!((rows(0, 0).grid, rows(0, 0).block), (1, 32));
        assert_eq!((rows(5, 768).grid, rows(5, 768).block), (5, 96));
        assert_eq!((rows(u64::MAX, u64::MAX).grid, rows(1, u64::MAX).block), (1 << 20, 256));
    }
}
