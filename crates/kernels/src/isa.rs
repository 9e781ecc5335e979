//! One kernel source, one compilation per instruction set.
//!
//! A [`Kernel`] is written once over a [`Simd`] token. [`Isa::run`] instantiates it inside a function that is
//! compiled for the instruction set, so that everything inlined into it may use those instructions. The choice
//! is made when the program runs; the standard library remembers what the processor answered, so asking again
//! costs one load.
//!
//! ```text
//! step(..) ── Isa::best() ──┬── avx512(kernel) ── kernel.run(Avx512)   16 lanes
//!                           ├── avx2(kernel)   ── kernel.run(Avx2)      8 lanes
//!                           └──────────────────── kernel.run(Scalar)    1 lane: the reference, and any other machine
//! ```

use crate::simd::{Scalar, Simd};

#[cfg(target_arch = "x86_64")]
use crate::simd::x86::{Avx2, Avx512};

/// Work that can be done with any instruction set.
///
/// Implementations mark `run` `#[inline(always)]`: code that is not inlined is compiled for the baseline.
pub(crate) trait Kernel {
    type Output;
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// An instruction set that this machine has: a value is the proof.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Isa(Level);

#[derive(Debug, Clone, Copy)]
enum Level {
    Scalar(Scalar),
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
}

impl Isa {
    /// The plain reference.
    pub const SCALAR: Isa = Isa(Level::Scalar(Scalar));

    /// The widest instruction set of this machine.
    pub fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if let Some(token) = Avx512::detect() {
                return Isa(Level::Avx512(token));
            }
            if let Some(token) = Avx2::detect() {
                return Isa(Level::Avx2(token));
            }
        }
        Isa::SCALAR
    }

    /// Every instruction set of this machine, the reference first.
    #[cfg(test)]
    pub fn all() -> Vec<Self> {
        let mut all = vec![Isa::SCALAR];
        #[cfg(target_arch = "x86_64")]
        {
            all.extend(Avx2::detect().map(|token| Isa(Level::Avx2(token))));
            all.extend(Avx512::detect().map(|token| Isa(Level::Avx512(token))));
        }
        all
    }

    /// Runs `kernel` with this instruction set.
    #[inline]
    pub fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self.0 {
            Level::Scalar(token) => kernel.run(token),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the token exists only where the processor has these instructions.
            Level::Avx2(token) => unsafe { avx2(token, kernel) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Level::Avx512(token) => unsafe { avx512(token, kernel) },
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn avx2<K: Kernel>(token: Avx2, kernel: K) -> K::Output {
    kernel.run(token)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512dq,avx2,fma,f16c")]
fn avx512<K: Kernel>(token: Avx512, kernel: K) -> K::Output {
    kernel.run(token)
}
