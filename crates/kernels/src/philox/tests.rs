use proptest::prelude::*;

use super::*;
use crate::parallel::PIECE_NUMEL;

#[test]
fn the_published_vectors_of_philox() {
    // `philox4x32 10` in the known-answer file of the authors' library.
    let vectors = [
        ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
        ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
        (
            [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
            [0xa409_3822, 0x299f_31d0],
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
        ),
    ];
    for (counter, key, expected) in vectors {
        assert_eq!(philox4x32_10(counter, key), expected);
    }
}

#[test]
fn the_published_vectors_of_fnv1a() {
    for (text, expected) in
        [("", 0xcbf2_9ce4_8422_2325), ("a", 0xaf63_dc4c_8601_ec8c), ("foobar", 0x8594_4171_f739_67e8)]
    {
        assert_eq!(fnv1a(text.as_bytes()), expected);
    }
}

/// Saved models and sampler states depend on these numbers: they may never change.
#[test]
fn the_numbers_of_a_name_are_fixed_for_good() {
    assert_eq!(u64_at(1, "data.order", 0), U64_0);
    assert_eq!(u64_at(1, "data.order", u64::MAX), U64_MAX);
    let mut normal = [0.0; 6];
    fill_normal(42, "model.embed_tokens.weight", 1, 0.0, 0.02, &mut normal);
    assert_eq!(normal.map(f32::to_bits), NORMAL_BITS);
    let mut uniform = [0.0; 6];
    fill_uniform(42, "model.embed_tokens.weight", 1, -1.0, 1.0, &mut uniform);
    assert_eq!(uniform.map(f32::to_bits), UNIFORM_BITS);
}

// From a second implementation, in Python, with its library's logarithm, sine and cosine.
const U64_0: u64 = 0xcb52_1c91_147c_61f8;
const U64_MAX: u64 = 0x5915_3afd_a1fb_e658;
const NORMAL_BITS: [u32; 6] = [0x3b9c_c22a, 0xbcad_2c35, 0xbbf5_5392, 0x3cbc_af0f, 0x3c88_4c4e, 0x3c92_1b0f];
const UNIFORM_BITS: [u32; 6] = [0xbdc2_994d, 0x3d88_71d9, 0x3ddd_e4ac, 0xbe8a_b9be, 0xbf4d_05fd, 0xbe2e_ed81];

#[test]
fn logarithm_and_angles_agree_with_the_library() {
    // Powers of two and their neighbours, the mantissa's turning point sqrt(1/2), odd eighths of a turn.
    let powers = (0..32).flat_map(|shift| [1u32 << shift, (1 << shift) - 1, u32::MAX >> shift]);
    let edges = powers.chain([3_037_000_499, 3_037_000_500, 1 << 29, 3 << 29, 5 << 29, 7 << 29]);
    let many = (0..100_000u32).map(|i| i.wrapping_mul(2_654_435_761));
    for x in edges.chain(many) {
        let unit = (f64::from(x) + 0.5) * TO_UNIT;
        assert!((ln(unit) - unit.ln()).abs() <= 1e-12 * unit.ln().abs(), "ln({unit})");
        let (sin, cos) = sin_cos_turn(x);
        let angle = f64::from(x) * TO_UNIT * TAU;
        assert!((sin - angle.sin()).abs() < 1e-11 && (cos - angle.cos()).abs() < 1e-11, "{x} / 2^32 turns");
    }
}

#[test]
fn moments_and_tails_of_the_normal_distribution() {
    const NUMEL: usize = 1 << 20;
    let mut x = vec![0.0; NUMEL];
    fill_normal(7, "w", 0, 0.5, 2.0, &mut x);
    let z: Vec<f64> = x.iter().map(|&x| (f64::from(x) - 0.5) / 2.0).collect();
    let moment = |k: i32| z.iter().map(|z| z.powi(k)).sum::<f64>() / NUMEL as f64;
    // Standard errors of the first four moments are 1, sqrt 2, sqrt 15 and sqrt 96 over sqrt n; five of them each.
    for (k, expected, variance) in [(1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0f64)] {
        let bound = 5.0 * (variance / NUMEL as f64).sqrt();
        assert!((moment(k) - expected).abs() < bound, "moment {k}: {}", moment(k));
    }
    // Neighbours, of one pair and across pairs, do not correlate.
    for lag in 1..=5 {
        let correlation = z.windows(lag + 1).map(|w| w[0] * w[lag]).sum::<f64>() / NUMEL as f64;
        assert!(correlation.abs() < 5.0 / (NUMEL as f64).sqrt(), "lag {lag}: {correlation}");
    }
    // P(|z| > 1, 2, 3, 4)
    for (bound, expected) in [(1.0, 0.317_310_5), (2.0, 0.045_500_3), (3.0, 0.002_699_8), (4.0, 6.334e-5)] {
        let count = z.iter().filter(|z| z.abs() > bound).count() as f64;
        let mean = expected * NUMEL as f64;
        assert!((count - mean).abs() < 5.0 * mean.sqrt(), "beyond {bound}: {count} for {mean}");
    }
}

#[test]
fn uniform_numbers_fill_their_range_evenly_and_stay_inside() {
    const NUMEL: usize = 1 << 18;
    let mut x = vec![0.0; NUMEL];
    fill_uniform(7, "w", 0, -1.0, 3.0, &mut x);
    let mut counts = [0u32; 16];
    for &x in &x {
        assert!((-1.0..3.0).contains(&x));
        counts[((x + 1.0) * 4.0) as usize] += 1;
    }
    let mean = NUMEL as f64 / 16.0;
    let chi_square: f64 = counts.iter().map(|&n| (f64::from(n) - mean).powi(2) / mean).sum();
    // 15 degrees of freedom: mean 15, standard deviation 5.5.
    assert!(chi_square < 45.0, "{chi_square}");
}

#[test]
fn a_range_of_two_neighbours_yields_only_the_lower_one() {
    let mut x = vec![0.0; 1000];
    fill_uniform(7, "w", 0, 1.0, 1f32.next_up(), &mut x);
    assert!(x.iter().all(|&x| x == 1.0));
    fill_uniform(7, "w", 0, 2.0, 2.0, &mut x);
    assert!(x.iter().all(|&x| x == 2.0));
}

#[test]
fn other_seeds_names_and_places_give_other_numbers() {
    let draw = |seed, name, first| {
        let mut x = [0.0; 8];
        fill_normal(seed, name, first, 0.0, 1.0, &mut x);
        x
    };
    let base = draw(1, "a.weight", 0);
    assert_eq!(base, draw(1, "a.weight", 0));
    for other in
        [draw(2, "a.weight", 0), draw(1, "b.weight", 0), draw(1, "a.weight", 8), draw(1 << 32, "a.weight", 0)]
    {
        assert!(base.iter().zip(other).all(|(a, b)| *a != b));
    }
}

#[test]
fn every_instruction_set_and_number_of_threads_gives_the_same_bits() {
    let numel = 2 * PIECE_NUMEL + 333;
    let normal = Normal { mean: 0.1, std: 0.02 };
    let uniform = Uniform::new(-0.3, 0.7);
    let (stream, first) = (Stream::new(3, "lm_head.weight"), Numbers::from(12_345));
    let fill = |isa, count, normal: Option<Normal>| {
        let mut x = vec![0f32; numel];
        let threads = Threads::new(count).unwrap();
        match normal {
            Some(normal) => fill_with(isa, threads, Draws::new(stream, first, normal), &mut x),
            None => fill_with(isa, threads, Draws::new(stream, first, uniform), &mut x),
        }
        x
    };
    for kind in [Some(normal), None] {
        let reference = fill(Isa::SCALAR, 1, kind);
        for isa in Isa::all() {
            for count in [1, 3] {
                assert!(fill(isa, count, kind) == reference, "{isa:?}, {count} threads");
            }
        }
    }
}

proptest! {
    #[test]
    fn numbers_do_not_depend_on_how_a_range_is_split(
        seed in any::<u64>(),
        first in prop_oneof![0u64..1000, u64::from(u32::MAX) * 4 - 500..u64::from(u32::MAX) * 4 + 500, Just(u64::MAX - 700)],
        cuts in prop::collection::vec(0usize..400, 2),
    ) {
        let (low, high) = (cuts[0].min(cuts[1]), cuts[0].max(cuts[1]));
        let mut whole = vec![0.0; 400];
        fill_normal(seed, "name", first, 0.0, 1.0, &mut whole);
        let mut parts = vec![0.0; 400];
        for range in [0..low, low..high, high..400] {
            fill_normal(seed, "name", first + range.start as u64, 0.0, 1.0, &mut parts[range]);
        }
        prop_assert_eq!(whole, parts);
    }

    #[test]
    fn an_element_is_what_the_definition_says(seed in any::<u64>(), i in any::<u64>()) {
        let i = i.min(u64::MAX - 1);
        let mut x = [0.0];
        fill_normal(seed, "name", i, 0.0, 1.0, &mut x);
        let hash = fnv1a(b"name");
        let block = i / 4;
        let counter = [block as u32, (block >> 32) as u32, hash as u32, (hash >> 32) as u32];
        let words = philox4x32_10(counter, [seed as u32, (seed >> 32) as u32]);
        let pair = if i % 4 < 2 { [words[0], words[1]] } else { [words[2], words[3]] };
        let radius = (-2.0 * ((f64::from(pair[0]) + 0.5) / 2f64.powi(32)).ln()).sqrt();
        let angle = f64::from(pair[1]) / 2f64.powi(32) * TAU;
        let expected = radius * if i % 2 == 0 { angle.cos() } else { angle.sin() };
        prop_assert!((f64::from(x[0]) - expected).abs() < 1e-6, "{} for {expected}", x[0]);
    }
}
