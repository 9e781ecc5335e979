//! States in bf16, rounded at random.
//!
//! The mean of what is written is what was computed, so small changes add up over the steps. The random bits are a
//! pure function of seed, name, step and element number:
//!
//! ```text
//! key     = Philox(counter: step, key: seed)
//! counter = [ block (64 bits) | FNV-1a of the name (64 bits) ]
//! elements 64 c .. 64 c + 64 share the blocks 16 c .. 16 c + 16: word w of block 16 c + b belongs to element 64 c + 16 w + b
//! ```
//!
//! so neither threads nor ranks nor instruction sets make a difference. One word serves both states of an element, with
//! 16 bits each: just as many as bf16 drops.

use half::bf16;

use super::Rule;
use super::pass::Copy16;
use crate::isa::Kernel;
use crate::philox::{fnv1a, halves, philox4x32_10};
use crate::simd::{Scalar, Simd};

/// The random bits of one step of one array.
///
/// `cuda/optimizer.cu` reads the same structure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Noise {
    key: [u32; 2],
    name: [u32; 2],
    /// Number of the first element.
    first: u64,
}

/// Elements that share blocks.
const GROUP_NUMEL: usize = 64;
/// Blocks of a group: each has four words.
const GROUP_BLOCKS: usize = GROUP_NUMEL / 4;

impl Noise {
    /// Draws nothing of meaning: for states that are not rounded at random.
    pub(crate) const UNUSED: Noise = Noise { key: [0; 2], name: [0; 2], first: 0 };

    /// The number of the first element.
    pub(crate) fn first(&self) -> u64 {
        self.first
    }

    /// For elements `first..` of the array `name`, in the step `step`.
    pub fn new(seed: u64, name: &str, step: u64, first: u64) -> Self {
        let [low, high] = halves(step);
        let [k0, k1, _, _] = philox4x32_10([low, high, 0, 0], halves(seed));
        Noise { key: [k0, k1], name: halves(fnv1a(name.as_bytes())), first }
    }

    /// The same for the elements from `numel` on.
    pub(super) fn after(self, numel: usize) -> Self {
        Noise { first: self.first + numel as u64, ..self }
    }

    /// The words of one group of elements.
    #[inline(always)]
    fn group(self, group: u64) -> [u32; GROUP_NUMEL] {
        let mut words = [0; GROUP_NUMEL];
        for b in 0..GROUP_BLOCKS {
            let [low, high] = halves(group * GROUP_BLOCKS as u64 + b as u64);
            let block = philox4x32_10([low, high, self.name[0], self.name[1]], self.key);
            for (w, word) in block.into_iter().enumerate() {
                words[w * GROUP_BLOCKS + b] = word;
            }
        }
        words
    }
}

/// Rounds up or down, by chance, so that the mean is `x`; infinities and NaN stay what they are.
#[inline(always)]
fn round(x: f32, noise16: u32) -> bf16 {
    const QUIET: u16 = 0x40;
    let bits = x.to_bits();
    let rounded = (bits.wrapping_add(noise16) >> 16) as u16;
    let nan = (bits >> 16) as u16 | QUIET;
    // Noise below one unit of bf16 carries no infinity further, for its dropped bits are zero.
    bf16::from_bits(if x.is_nan() { nan } else { rounded })
}

/// One piece of a step with bf16 states.
pub(super) struct StochasticPass<'a, R, C, const K: usize> {
    pub rule: R,
    pub noise: Noise,
    pub grad: &'a [f32],
    pub master: &'a mut [f32],
    pub states: [&'a mut [bf16]; K],
    pub compute: C,
}

impl<'a, R, const K: usize> StochasticPass<'a, R, (), K> {
    /// The same, writing a 16-bit copy.
    pub fn writing<C>(self, compute: C) -> StochasticPass<'a, R, C, K> {
        let StochasticPass { rule, noise, grad, master, states, compute: () } = self;
        StochasticPass { rule, noise, grad, master, states, compute }
    }
}

impl<R: Rule<K>, C: Copy16, const K: usize> Kernel for StochasticPass<'_, R, C, K> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        const { assert!(K <= 2, "a word has bits for two states") };
        let numel = self.grad.len();
        assert!(self.master.len() == numel && self.compute.numel_or(numel) == numel);
        assert!(self.states.iter().all(|state| state.len() == numel));
        let mut at = 0;
        while at < numel {
            let number = self.noise.first + at as u64;
            let inside = (number % GROUP_NUMEL as u64) as usize;
            let count = (GROUP_NUMEL - inside).min(numel - at);
            let words = self.noise.group(number / GROUP_NUMEL as u64);
            // SAFETY: `at + count <= numel`, the length of every slice (asserted), and `count <= GROUP_NUMEL`.
            unsafe { self.update(simd, at, &words[inside..inside + count]) }
            at += count;
        }
        self.compute.finish(simd);
    }
}

impl<R: Rule<K>, C: Copy16, const K: usize> StochasticPass<'_, R, C, K> {
    /// # Safety
    /// `at..at + words.len()` lies inside every slice, and there are at most [`GROUP_NUMEL`] words.
    #[inline(always)]
    unsafe fn update<S: Simd>(&mut self, simd: S, at: usize, words: &[u32]) {
        let count = words.len();
        let mut wide = [[0f32; GROUP_NUMEL]; K];
        for (wide, state) in wide.iter_mut().zip(&self.states) {
            for (wide, state) in wide.iter_mut().zip(&state[at..at + count]) {
                *wide = f32::from_bits(u32::from(state.to_bits()) << 16);
            }
        }
        let whole = count - count % S::LANES;
        for from in (0..whole).step_by(S::LANES) {
            // SAFETY: `from + LANES <= count`.
            unsafe { self.lanes(simd, at, from, &mut wide) }
        }
        for from in whole..count {
            // SAFETY: `from < count`, and a scalar is one lane.
            unsafe { self.lanes(Scalar, at, from, &mut wide) }
        }
        for (k, (wide, state)) in wide.iter().zip(&mut self.states).enumerate() {
            for ((wide, state), word) in wide.iter().zip(&mut state[at..at + count]).zip(words) {
                *state = round(*wide, (word >> (16 * k)) & 0xffff);
            }
        }
    }

    /// # Safety
    /// `at + from..at + from + S::LANES` lies inside every slice, and `from + S::LANES <= GROUP_NUMEL`.
    #[inline(always)]
    unsafe fn lanes<S: Simd>(&mut self, simd: S, at: usize, from: usize, wide: &mut [[f32; GROUP_NUMEL]; K]) {
        let mut states = [simd.splat(0.0); K];
        for (lanes, wide) in states.iter_mut().zip(&*wide) {
            // SAFETY: in range by the caller's promise.
            *lanes = unsafe { simd.load(wide.as_ptr().add(from)) };
        }
        let at = at + from;
        // SAFETY: as above.
        let (grad, param) =
            unsafe { (simd.load(self.grad.as_ptr().add(at)), simd.load(self.master.as_ptr().add(at))) };
        let (param, states) = self.rule.update(simd, grad, param, states);
        for (lanes, wide) in states.into_iter().zip(wide) {
            // SAFETY: as above.
            unsafe { simd.store(wide.as_mut_ptr().add(from), lanes) }
        }
        // SAFETY: as above; a copy that is stored through the cache asks for no alignment.
        unsafe {
            simd.store(self.master.as_mut_ptr().add(at), param);
            self.compute.store(simd, at, param);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_keeps_the_mean_and_what_bf16_can_say() {
        let x = 1.0 + 0.3 / 128.0; // 0.3 of the way from 1 to the next bf16
        let up = (0..1 << 16).filter(|&noise| round(x, noise) > bf16::ONE).count();
        let expected = 0.3 * 65536.0;
        // `x` itself is rounded to f32: by 1/65536 of the way at most.
        assert!((up as f64 - expected).abs() <= 1.0, "{up} of 65536 round up, expected {expected}");
        for x in [0.0, -0.0, 1.0, -1.5, f32::INFINITY, f32::NEG_INFINITY, 2f32.powi(-133)] {
            for noise in [0, 1, 0x7fff, 0xffff] {
                assert_eq!(round(x, noise).to_f32().to_bits(), x.to_bits());
            }
        }
        for bits in [0x7f80_0001, 0xff80_0001, 0x7fff_ffff, 0xffff_ffff] {
            assert!(round(f32::from_bits(bits), 0xffff).is_nan());
        }
    }

    #[test]
    fn noise_depends_on_seed_name_step_and_element_alone() {
        let of = |seed, name: &str, step| Noise::new(seed, name, step, 0).group(3);
        let base = of(1, "a", 1);
        assert_eq!(base, Noise::new(1, "a", 1, 7).after(1).group(3), "the start is no part of the stream");
        for other in [of(2, "a", 1), of(1, "b", 1), of(1, "a", 2), Noise::new(1, "a", 1, 0).group(4)] {
            let same = base.iter().zip(&other).filter(|(a, b)| a == b).count();
            assert_eq!(same, 0);
        }
    }
}
