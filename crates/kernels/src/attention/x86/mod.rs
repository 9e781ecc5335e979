//! The vector path: AVX512-BF16, whose one instruction for products multiplies 16 pairs of bf16 numbers by 16 others
//! and adds each pair's two products to an `f32`.
//!
//! All seven matrix products of attention go through one function ([`product`]). Its left side is read one pair of
//! numbers at a time, as they lie in memory; its right side is packed first ([`pack`]), so that the pairs of 16
//! columns follow each other. The packed operands of a block stay in the level 1 and 2 caches.
//!
//! Positions are padded with zeros to multiples of [`STRIPE`]: no code here knows of odd sizes.

use std::ops::{Deref, DerefMut};

pub(super) mod backward;
mod exp;
pub(super) mod forward;
mod lanes;
mod pack;
mod product;

/// `f32` lanes of a register.
const LANES: usize = 16;
/// Positions are handled in stripes of this many, and matrices are skipped above the diagonal by stripes.
const STRIPE: usize = 16;
/// Columns that are packed together and multiplied together.
const PANEL: usize = 64;

/// AVX512-BF16. Exists only on machines that have it, with AVX-512 F, BW and VL.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bf16Dot(());

impl Bf16Dot {
    pub fn detect() -> Option<Self> {
        let all = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512bf16");
        all.then_some(Bf16Dot(()))
    }
}

/// Zeroed memory that begins on a cache line, so that no vector straddles two.
struct Aligned<T> {
    memory: Vec<T>,
    start: usize,
    numel: usize,
}

impl<T: Copy + Default> Aligned<T> {
    fn zeroed(numel: usize) -> Self {
        const { assert!(size_of::<T>() == 4) };
        let memory = vec![T::default(); numel + LANES - 1];
        let start = memory.as_ptr().align_offset(64);
        assert!(start < LANES, "4-byte elements reach a cache line within 16");
        Aligned { memory, start, numel }
    }
}

impl<T> Deref for Aligned<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        &self.memory[self.start..][..self.numel]
    }
}

impl<T> DerefMut for Aligned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.memory[self.start..][..self.numel]
    }
}
