//! A seeded shuffle of `0..n` that needs no table.
//!
//! A Feistel network permutes the numbers of a power-of-two domain, whatever its round function is. The domain is the
//! smallest that holds `n`; a number that lands outside of `0..n` is permuted again until it lands inside (cycle
//! walking), which keeps the map a permutation. Under two walks are needed on average, so place `i` of a shuffle of a
//! billion samples costs a few dozen nanoseconds, and every rank can ask for its own places alone.
//!
//! # Source
//! Luby and Rackoff, "How to construct pseudorandom permutations", 1988; cycle walking: Black and Rogaway, "Ciphers
//! with arbitrary finite domains", 2002.

/// More than the four rounds of the theory, because the round function is a mixer and not a cipher.
const NUM_ROUNDS: usize = 8;

/// Tiny domains have few Feistel networks; walking down from a larger one reaches more shuffles.
const MIN_DOMAIN_BITS: u32 = 8;

/// One shuffle of `0..n`.
#[derive(Debug, Clone)]
pub struct Permutation {
    n: u64,
    /// Widths of the two halves of a number of the domain; equal, or the high half is one bit wider.
    high_bits: u32,
    low_bits: u32,
    round_keys: [u64; NUM_ROUNDS],
}

impl Permutation {
    /// The shuffle number `stream` of `0..n` under `seed`.
    ///
    /// # Panics
    /// If `n` is 0 or above 2^63.
    pub fn new(n: u64, seed: u64, stream: u64) -> Permutation {
        assert!((1..=1 << 63).contains(&n), "cannot shuffle `{n}` numbers");
        let domain_bits = (u64::BITS - (n - 1).leading_zeros()).max(MIN_DOMAIN_BITS);
        let low_bits = domain_bits / 2;
        let key = mix(mix(seed).wrapping_add(stream));
        let round_keys = std::array::from_fn(|round| mix(key.wrapping_add(round as u64)));
        Permutation { n, high_bits: domain_bits - low_bits, low_bits, round_keys }
    }

    /// Which number is at place `i`.
    ///
    /// # Panics
    /// If `i` is not below `n`.
    pub fn at(&self, i: u64) -> u64 {
        assert!(i < self.n, "place `{i}` of `{}`", self.n);
        let mut value = self.permute_domain(i);
        while value >= self.n {
            value = self.permute_domain(value);
        }
        value
    }

    fn permute_domain(&self, value: u64) -> u64 {
        let (high_mask, low_mask) = (mask(self.high_bits), mask(self.low_bits));
        let (mut high, mut low) = (value >> self.low_bits, value & low_mask);
        // Each half in turn is xored with a function of the other; no half changes its width, so an odd number of
        // bits needs no swap.
        for keys in self.round_keys.chunks_exact(2) {
            high ^= mix(low ^ keys[0]) & high_mask;
            low ^= mix(high ^ keys[1]) & low_mask;
        }
        high << self.low_bits | low
    }
}

fn mask(bits: u32) -> u64 {
    (1 << bits) - 1
}

/// A bijection of 64-bit numbers that changes about half of the bits when one changes (the step and finalizer of
/// SplitMix64).
fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn shuffled(n: u64, seed: u64, stream: u64) -> Vec<u64> {
        let permutation = Permutation::new(n, seed, stream);
        (0..n).map(|i| permutation.at(i)).collect()
    }

    fn is_bijection(n: u64, seed: u64, stream: u64) -> bool {
        let mut seen = vec![false; n as usize];
        shuffled(n, seed, stream).into_iter().all(|value| !std::mem::replace(&mut seen[value as usize], true))
    }

    #[test]
    fn every_small_n_is_a_bijection() {
        for n in 1..=600 {
            assert!(is_bijection(n, 7, n), "{n}");
        }
    }

    #[test]
    fn the_largest_n_is_accepted() {
        let permutation = Permutation::new(1 << 63, 1, 2);
        assert!(permutation.at((1 << 63) - 1) < 1 << 63);
    }

    /// A shuffle is part of what makes a run repeatable: it must not change between releases.
    #[test]
    fn shuffles_never_change() {
        assert_eq!(shuffled(10, 0, 0), GOLDEN_10);
        let permutation = Permutation::new(1_000_003, 1234, 5);
        assert_eq!([permutation.at(0), permutation.at(1), permutation.at(1_000_002)], GOLDEN_1000003);
    }
    const GOLDEN_10: [u64; 10] = [9, 4, 5, 3, 0, 8, 2, 6, 1, 7];
    const GOLDEN_1000003: [u64; 3] = [245033, 494039, 664186];

    /// All 24 shuffles of four numbers appear, about equally often.
    #[test]
    fn small_shuffles_are_even() {
        let mut counts = std::collections::HashMap::new();
        for seed in 0..2400 {
            *counts.entry(shuffled(4, seed, 0)).or_insert(0u32) += 1;
        }
        // Expected 100 of each; five standard deviations are 49.
        assert_eq!(counts.len(), 24);
        assert!(counts.values().all(|&count| (51..=149).contains(&count)), "{counts:?}");
    }

    /// Where a number lands says nothing about where the next one lands, or where it lands in the next epoch.
    #[test]
    fn neighbours_and_epochs_are_unrelated() {
        let n = 10_007;
        let correlation = |a: &[u64], b: &[u64]| {
            let mean = (n - 1) as f64 / 2.0;
            let variance = (n * n - 1) as f64 / 12.0;
            let products = a.iter().zip(b).map(|(&a, &b)| (a as f64 - mean) * (b as f64 - mean));
            products.sum::<f64>() / (a.len().min(b.len()) as f64 * variance)
        };
        let identity: Vec<u64> = (0..n).collect();
        let (first, second) = (shuffled(n, 3, 0), shuffled(n, 3, 1));
        // Five standard deviations, 5 / sqrt(n).
        for other in [&identity[..], &second, &first[1..]] {
            assert!(correlation(&first, other).abs() < 0.05);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn any_n_is_a_bijection(n in 1u64..50_000, seed: u64, stream: u64) {
            prop_assert!(is_bijection(n, seed, stream));
        }
    }
}
