//! Tensors as Rust slices, for kernels.

use half::{bf16, f16};
use shardwise_device::Element;
use shardwise_kernels::{Threads, add};
use shardwise_torch::{Device, Kind, Tensor, tch};

/// Threads of one operation: as many as libtorch's own use.
pub(crate) fn threads() -> Threads {
    usize::try_from(tch::get_num_threads()).ok().and_then(Threads::new).unwrap_or(Threads::ONE)
}

/// The element type that kernels would run on, if all tensors share one and are contiguous.
pub(super) fn common_kind(tensors: &[&Tensor]) -> Option<Kind> {
    let kind = tensors.first()?.kind();
    let fits = |t: &&Tensor| t.kind() == kind && t.is_contiguous();
    (matches!(kind, Kind::BFloat16 | Kind::Half | Kind::Float) && tensors.iter().all(fits)).then_some(kind)
}

/// [`common_kind`] of tensors in host memory.
pub(super) fn fused_kind(tensors: &[&Tensor]) -> Option<Kind> {
    common_kind(tensors).filter(|_| tensors.iter().all(|t| t.device() == Device::Cpu))
}

/// Whether the tensors are on a processor that does not multiply numbers of their type.
pub(super) fn multiplies_in_f32(tensors: &[&Tensor]) -> bool {
    tensors.iter().all(|t| t.device() == Device::Cpu && !multiplies(t.kind()))
}

/// Whether this processor multiplies matrices of `kind` as they are. Where it does not, libtorch goes through them element by element,
/// some sixty times slower than f32, and operations of [`crate::ops`] multiply copies in f32.
pub fn multiplies(kind: Kind) -> bool {
    match kind {
        Kind::Half => multiplies_f16(),
        Kind::BFloat16 => multiplies_bf16(),
        _ => true,
    }
}

/// Where libtorch's library for matrix products takes bf16.
fn multiplies_bf16() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("avx512bw")
        && std::arch::is_x86_feature_detected!("avx512vl")
        && std::arch::is_x86_feature_detected!("avx512dq");
    #[cfg(target_arch = "aarch64")]
    return std::arch::is_aarch64_feature_detected!("bf16");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    return false;
}

fn multiplies_f16() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("avx512fp16");
    #[cfg(target_arch = "aarch64")]
    return std::arch::is_aarch64_feature_detected!("fp16");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    return false;
}

/// An element type of fused kernels.
pub(super) trait Fused: Element {
    const KIND: Kind;
    /// `acc += x`.
    fn add_to(threads: Threads, acc: &mut [f32], x: &[Self]);
}

impl Fused for f32 {
    const KIND: Kind = Kind::Float;
    fn add_to(threads: Threads, acc: &mut [f32], x: &[f32]) {
        add::add_assign_on(threads, acc, x);
    }
}
impl Fused for bf16 {
    const KIND: Kind = Kind::BFloat16;
    fn add_to(threads: Threads, acc: &mut [f32], x: &[bf16]) {
        add::add_assign_bf16_on(threads, acc, x);
    }
}
impl Fused for f16 {
    const KIND: Kind = Kind::Half;
    fn add_to(threads: Threads, acc: &mut [f32], x: &[f16]) {
        add::add_assign_f16_on(threads, acc, x);
    }
}

/// The elements of a contiguous host tensor of type `T`, in memory order.
pub(super) fn elements<T: Fused>(tensor: &Tensor) -> &[T] {
    require_here(tensor, T::KIND);
    if tensor.numel() == 0 {
        return &[];
    }
    // SAFETY: a contiguous host tensor of this type holds `numel` elements from `data_ptr` on while it lives; in this crate
    // nobody writes to a tensor that somebody reads.
    unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast(), tensor.numel()) }
}

/// # Panics
/// For a tensor whose elements the host cannot read one after the other: a fault would name nobody.
fn require_here(tensor: &Tensor, kind: Kind) {
    let found = (tensor.device(), tensor.kind(), tensor.is_contiguous());
    assert_eq!(
        found,
        (Device::Cpu, kind, true),
        "device, type and contiguity of a tensor for a kernel of the host"
    );
}

/// The elements of a contiguous host tensor whose memory nobody else has seen yet.
pub(super) fn elements_mut<T: Fused>(tensor: &mut Tensor) -> &mut [T] {
    require_here(tensor, T::KIND);
    if tensor.numel() == 0 {
        return &mut [];
    }
    // SAFETY: as in `elements`; the callers have made its memory and nobody else reads or writes it now.
    unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast(), tensor.numel()) }
}

/// The token ids of a contiguous `i64` tensor.
pub(super) fn ids(tensor: &Tensor) -> &[i64] {
    require_here(tensor, Kind::Int64);
    if tensor.numel() == 0 {
        return &[];
    }
    // SAFETY: as in `elements`.
    unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast(), tensor.numel()) }
}
