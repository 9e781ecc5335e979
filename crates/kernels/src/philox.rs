//! Random numbers that are a pure function of (seed, name, index).
//!
//! Philox4x32-10 turns a 128-bit counter and a 64-bit key into four random words. The key is the seed. The low
//! half of the counter is a block number, the high half a hash of the parameter's name:
//!
//! ```text
//! key     = seed
//! counter = [ i / 4 (64 bits) | FNV-1a of the name (64 bits) ]      word i % 4 belongs to element i
//! ```
//!
//! So every rank fills just the elements that it owns, in any order and any split, and the model is the same for
//! every world size. Logarithm, sine and cosine are polynomials in `f64` written here: a library's differ from
//! machine to machine in the last bit, plain additions and multiplications do not.
//!
//! All streams of one name draw from the same words: what needs independent numbers needs a name of its own.
//!
//! # Source
//! Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

use std::f64::consts::{LN_2, SQRT_2, TAU};
use std::ops::Range;

use crate::Threads;
use crate::isa::{Isa, Kernel};
use crate::parallel::{Split, for_each_piece};
use crate::simd::Simd;

mod numbers;

pub(crate) use numbers::{Numbers, Runs};

/// Fills `out` with normally distributed numbers: elements `first..first + out.len()` of parameter `name`.
///
/// By Box and Muller's transform of two words into two numbers, in `f64`, rounded once. No number is further from
/// `mean` than 6.8 `std`.
///
/// # Panics
/// If the last index does not fit `u64`.
pub fn fill_normal(seed: u64, name: &str, first: u64, mean: f32, std: f32, out: &mut [f32]) {
    fill_normal_on(Threads::ONE, seed, name, first, mean, std, out);
}

/// [`fill_normal`] on several threads, the same numbers.
///
/// # Panics
/// As [`fill_normal`].
pub fn fill_normal_on(
    threads: Threads,
    seed: u64,
    name: &str,
    first: u64,
    mean: f32,
    std: f32,
    out: &mut [f32],
) {
    let normal = Normal { mean: f64::from(mean), std: f64::from(std) };
    let draws = Draws::new(Stream::new(seed, name), Numbers::from(first), normal);
    fill_with(Isa::best(), threads, draws, out);
}

/// Fills `out` with numbers uniform in `low..high`: elements `first..first + out.len()` of parameter `name`.
///
/// `high` itself is never drawn unless it equals `low`.
///
/// # Panics
/// If `low > high`, one of them is not finite, or the last index does not fit `u64`.
pub fn fill_uniform(seed: u64, name: &str, first: u64, low: f32, high: f32, out: &mut [f32]) {
    fill_uniform_on(Threads::ONE, seed, name, first, low, high, out);
}

/// [`fill_uniform`] on several threads, the same numbers.
///
/// # Panics
/// As [`fill_uniform`].
pub fn fill_uniform_on(
    threads: Threads,
    seed: u64,
    name: &str,
    first: u64,
    low: f32,
    high: f32,
    out: &mut [f32],
) {
    let draws = Draws::new(Stream::new(seed, name), Numbers::from(first), Uniform::new(low, high));
    fill_with(Isa::best(), threads, draws, out);
}

/// 64 random bits: number `i` of the stream `name`, for samplers and shuffles.
pub fn u64_at(seed: u64, name: &str, i: u64) -> u64 {
    let [x0, x1, _, _] = Stream::new(seed, name).words(i);
    u64::from(x1) << 32 | u64::from(x0)
}

/// The words of one (seed, name). Kernels read the same structure.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Stream {
    key: [u32; 2],
    /// High half of the counter.
    name: [u32; 2],
}

impl Stream {
    pub fn new(seed: u64, name: &str) -> Self {
        Stream { key: halves(seed), name: halves(fnv1a(name.as_bytes())) }
    }

    /// The four words of block `block`.
    #[inline(always)]
    fn words(self, block: u64) -> [u32; 4] {
        let [low, high] = halves(block);
        philox4x32_10([low, high, self.name[0], self.name[1]], self.key)
    }
}

pub(crate) const fn halves(x: u64) -> [u32; 2] {
    [x as u32, (x >> 32) as u32]
}

/// FNV-1a, 64 bits: stable for good, as saved models and sampler states depend on it.
pub(crate) const fn fnv1a(bytes: &[u8]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    let mut i = 0;
    while i < bytes.len() {
        hash = (hash ^ bytes[i] as u64).wrapping_mul(0x0000_0100_0000_01b3);
        i += 1;
    }
    hash
}

/// Ten rounds of Philox on one counter (section 4.3 of the paper).
#[inline(always)]
pub(crate) fn philox4x32_10(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let ([mut x0, mut x1, mut x2, mut x3], [mut k0, mut k1]) = (counter, key);
    for _ in 0..10 {
        let p0 = u64::from(x0) * 0xd251_1f53;
        let p1 = u64::from(x2) * 0xcd9e_8d57;
        (x0, x1, x2, x3) = ((p1 >> 32) as u32 ^ x1 ^ k0, p1 as u32, (p0 >> 32) as u32 ^ x3 ^ k1, p0 as u32);
        k0 = k0.wrapping_add(0x9e37_79b9);
        k1 = k1.wrapping_add(0xbb67_ae85);
    }
    [x0, x1, x2, x3]
}

/// Turns the four words of a block into its four elements.
pub(crate) trait Distribution: Copy + Send + Sync {
    fn sample(self, words: [u32; 4]) -> [f32; 4];
}

#[derive(Debug, Clone, Copy)]
struct Normal {
    mean: f64,
    std: f64,
}

impl Distribution for Normal {
    #[inline(always)]
    fn sample(self, words: [u32; 4]) -> [f32; 4] {
        let (z0, z1) = box_muller(words[0], words[1]);
        let (z2, z3) = box_muller(words[2], words[3]);
        [z0, z1, z2, z3].map(|z| (self.mean + self.std * z) as f32)
    }
}

#[derive(Debug, Clone, Copy)]
struct Uniform {
    low: f64,
    span: f64,
    /// The largest number to return: rounding to `f32` could reach `high`.
    last: f32,
}

impl Uniform {
    fn new(low: f32, high: f32) -> Self {
        assert!(low.is_finite() && high.is_finite() && low <= high, "a range from `{low}` to `{high}`");
        let last = if low < high { high.next_down() } else { high };
        Uniform { low: f64::from(low), span: f64::from(high) - f64::from(low), last }
    }
}

impl Distribution for Uniform {
    #[inline(always)]
    fn sample(self, words: [u32; 4]) -> [f32; 4] {
        words.map(|word| ((self.low + self.span * (f64::from(word) * TO_UNIT)) as f32).min(self.last))
    }
}

/// 2^-32
const TO_UNIT: f64 = 1.0 / 4_294_967_296.0;

/// Two independent standard normal numbers.
#[inline(always)]
fn box_muller(x0: u32, x1: u32) -> (f64, f64) {
    // In the open interval (0, 1), so the logarithm is finite and negative.
    let unit = (f64::from(x0) + 0.5) * TO_UNIT;
    let radius = (-2.0 * ln(unit)).sqrt();
    let (sin, cos) = sin_cos_turn(x1);
    (radius * cos, radius * sin)
}

/// Natural logarithm of a normal positive number, to 1e-12 relative.
#[inline(always)]
pub(crate) fn ln(x: f64) -> f64 {
    let bits = x.to_bits();
    // x = mantissa * 2^exponent with the mantissa in [1, 2), then in [sqrt(1/2), sqrt(2)].
    let mantissa = f64::from_bits(bits & 0x000f_ffff_ffff_ffff | 0x3ff0_0000_0000_0000);
    let exponent = f64::from((bits >> 52) as i32 - 1023);
    let large = mantissa > SQRT_2;
    let mantissa = if large { mantissa * 0.5 } else { mantissa };
    let exponent = if large { exponent + 1.0 } else { exponent };
    // ln(m) = 2 artanh(t), t = (m - 1) / (m + 1), |t| < 0.172: the first term left out is below 2e-14.
    let t = (mantissa - 1.0) / (mantissa + 1.0);
    let t2 = t * t;
    let mut series = 1.0 / 15.0;
    for odd in [13.0, 11.0, 9.0, 7.0, 5.0, 3.0, 1.0] {
        series = series * t2 + 1.0 / odd;
    }
    exponent * LN_2 + 2.0 * t * series
}

/// Sine and cosine of `x / 2^32` of a full turn, to 1e-11.
#[inline(always)]
fn sin_cos_turn(x: u32) -> (f64, f64) {
    // The nearest quarter turn, and the rest: an exact integer in -2^29..2^29, an eighth of a turn either way.
    let quarter = x.wrapping_add(1 << 29) >> 30;
    let rest = x.wrapping_sub(quarter << 30) as i32;
    let angle = f64::from(rest) * (TAU * TO_UNIT);
    let a2 = angle * angle;
    // Taylor series; the first terms left out are below 7e-12 (sine) and 4e-13 (cosine).
    let mut sin = -1.0 / 110.0;
    for denominator in [72.0, 42.0, 20.0, 6.0] {
        sin = (1.0 + sin * a2) * (-1.0 / denominator);
    }
    let sin = angle * (1.0 + sin * a2);
    let mut cos = -1.0 / 132.0;
    for denominator in [90.0, 56.0, 30.0, 12.0, 2.0] {
        cos = (1.0 + cos * a2) * (-1.0 / denominator);
    }
    let cos = 1.0 + cos * a2;
    // Turn back by the quarters: (cos, sin), (-sin, cos), (-cos, -sin), (sin, -cos).
    let odd = quarter & 1 == 1;
    let (c, s) = if odd { (sin, cos) } else { (cos, sin) };
    let c = if (quarter + 1) & 2 == 2 { -c } else { c };
    let s = if quarter & 2 == 2 { -s } else { s };
    (s, c)
}

/// Elements computed together, at most.
pub(crate) const GROUP_NUMEL: usize = 4 * GROUP_BLOCKS;
const GROUP_BLOCKS: usize = 16;
/// Of fewer, where a run ends or is short: two such groups cost less than a whole one.
const SMALL_NUMEL: usize = 4 * SMALL_BLOCKS;
const SMALL_BLOCKS: usize = 4;

/// The samples of elements, one group of blocks after the other.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Draws<D> {
    stream: Stream,
    numbers: Numbers,
    distribution: D,
}

impl<D: Distribution> Draws<D> {
    pub fn new(stream: Stream, numbers: Numbers, distribution: D) -> Self {
        Draws { stream, numbers, distribution }
    }

    /// # Panics
    /// If the numbers of `numel` elements do not fit.
    pub fn check(&self, numel: usize) {
        assert!(self.numbers.fit(numel), "element numbers fit 64 bits");
    }

    /// The draws after `numel` elements, which more follow.
    pub fn skip(self, numel: usize) -> Self {
        Draws { numbers: self.numbers.skip(numel), ..self }
    }

    /// Draws some of the next `numel` elements, at least one, and says where in `group` they are.
    #[inline(always)]
    pub fn next(&mut self, numel: usize, group: &mut [f32; GROUP_NUMEL]) -> Range<usize> {
        let (first, run) = self.numbers.run(numel);
        let skip = (first % 4) as usize;
        let group_numel = if skip + run <= 2 * SMALL_NUMEL {
            self.group::<SMALL_BLOCKS>(first / 4, group)
        } else {
            self.group::<GROUP_BLOCKS>(first / 4, group)
        };
        let take = (group_numel - skip).min(run);
        self.numbers.take(take);
        skip..skip + take
    }

    /// Writes the elements of `BLOCKS` blocks to the start of `group`, and says how many they are. Plain loops, which the
    /// compiler turns into the lanes of the instruction set.
    #[inline(always)]
    fn group<const BLOCKS: usize>(&self, first_block: u64, group: &mut [f32; GROUP_NUMEL]) -> usize {
        let mut words = [[0; BLOCKS]; 4];
        for b in 0..BLOCKS {
            let block = self.stream.words(first_block + b as u64);
            for (word, x) in words.iter_mut().zip(block) {
                word[b] = x;
            }
        }
        let mut elements = [[0.0; BLOCKS]; 4];
        for b in 0..BLOCKS {
            let block = self.distribution.sample([words[0][b], words[1][b], words[2][b], words[3][b]]);
            for (element, x) in elements.iter_mut().zip(block) {
                element[b] = x;
            }
        }
        for (i, x) in group[..4 * BLOCKS].iter_mut().enumerate() {
            *x = elements[i % 4][i / 4];
        }
        4 * BLOCKS
    }
}

pub(crate) fn fill_with<D: Distribution>(isa: Isa, threads: Threads, draws: Draws<D>, out: &mut [f32]) {
    draws.check(out.len());
    for_each_piece(threads, Fill { draws, out }, |piece| isa.run(piece));
}

struct Fill<'a, D> {
    draws: Draws<D>,
    out: &'a mut [f32],
}

impl<D: Distribution> Split for Fill<'_, D> {
    fn numel(&self) -> usize {
        self.out.len()
    }
    fn split_at(self, at: usize) -> (Self, Self) {
        let (low, high) = self.out.split_at_mut(at);
        (Fill { draws: self.draws, out: low }, Fill { draws: self.draws.skip(at), out: high })
    }
}

impl<D: Distribution> Kernel for Fill<'_, D> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let Fill { mut draws, out: mut rest } = self;
        let mut group = [0.0; GROUP_NUMEL];
        while !rest.is_empty() {
            let drawn = draws.next(rest.len(), &mut group);
            let (now, later) = rest.split_at_mut(drawn.len());
            now.copy_from_slice(&group[drawn]);
            rest = later;
        }
    }
}

#[cfg(test)]
mod tests;
