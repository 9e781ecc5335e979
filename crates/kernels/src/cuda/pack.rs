//! Casts, scaling and sums on a device, for many arrays in one launch.

use super::launch::{Sealed, at_most};
use super::{DevicePtr, FloatType, Launch, LaunchPlan, Params, Source};

/// The names of a kernel for each pair of types, first by `from`.
macro_rules! pairs {
    ($stem:literal) => {
        [
            [concat!($stem, "_f32_to_f32"), concat!($stem, "_f32_to_bf16"), concat!($stem, "_f32_to_f16")],
            [concat!($stem, "_bf16_to_f32"), concat!($stem, "_bf16_to_bf16"), concat!($stem, "_bf16_to_f16")],
            [concat!($stem, "_f16_to_f32"), concat!($stem, "_f16_to_bf16"), concat!($stem, "_f16_to_f16")],
        ]
    };
}

const SCALE: [[&str; 3]; 3] = pairs!("scale");
const ACCUMULATE: [[&str; 3]; 3] = pairs!("accumulate");
pub(super) const ENTRIES: &[&[&str]] =
    &[&SCALE[0], &SCALE[1], &SCALE[2], &ACCUMULATE[0], &ACCUMULATE[1], &ACCUMULATE[2]];

/// Segments of a launch.
const MAX_SEGMENTS: usize = 64;
/// Elements that a block takes at a time.
const PIECE_NUMEL: u64 = 4096;

/// An array and the place it goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Read.
    pub from: DevicePtr,
    /// Written.
    pub to: DevicePtr,
    /// Elements of both.
    pub numel: u64,
}

#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Placed {
    from: DevicePtr,
    to: DevicePtr,
    numel: u64,
    /// Pieces of the segments before this one.
    first_piece: u64,
}

/// Up to 64 segments.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Pack {
    num_pieces: u64,
    num_segments: u32,
    factor: f32,
    segments: [Placed; MAX_SEGMENTS],
}

impl Pack {
    /// Segments of a launch.
    pub const MAX_SEGMENTS: usize = MAX_SEGMENTS;

    /// `to = from * factor` for each segment, as [`crate::convert::scale_on`]: a cast if the factor is 1, and for the gradients
    /// of a layer, their copy into its bucket. One launch for each 64 segments.
    pub fn scale(
        from: FloatType,
        to: FloatType,
        factor: f32,
        segments: &[Segment],
    ) -> impl Iterator<Item = Launch<Pack>> {
        launches(to.pick(from.pick(SCALE)), factor, segments)
    }

    /// `to += from` for each segment, as [`crate::convert::accumulate_on`]. One launch for each 64 segments.
    pub fn accumulate(
        from: FloatType,
        to: FloatType,
        segments: &[Segment],
    ) -> impl Iterator<Item = Launch<Pack>> {
        launches(to.pick(from.pick(ACCUMULATE)), 1.0, segments)
    }
}

fn launches(name: &'static str, factor: f32, segments: &[Segment]) -> impl Iterator<Item = Launch<Pack>> {
    segments.chunks(MAX_SEGMENTS).filter_map(move |chunk| {
        const NOTHING: Placed =
            Placed { from: DevicePtr::NULL, to: DevicePtr::NULL, numel: 0, first_piece: u64::MAX };
        let mut pack = Pack { num_pieces: 0, num_segments: 0, factor, segments: [NOTHING; MAX_SEGMENTS] };
        // Without the empty ones a piece is of one segment only.
        for (place, segment) in pack.segments.iter_mut().zip(chunk.iter().filter(|segment| segment.numel > 0))
        {
            let Segment { from, to, numel } = *segment;
            *place = Placed { from, to, numel, first_piece: pack.num_pieces };
            pack.num_pieces += numel.div_ceil(PIECE_NUMEL);
            pack.num_segments += 1;
        }
        let plan = LaunchPlan { grid: at_most(pack.num_pieces, 4096), block: 256, shared_bytes: 0 };
        (pack.num_pieces > 0).then(|| Launch::new(Source::Pack, name, plan, pack))
    })
}

impl Sealed for Pack {}
impl Params for Pack {}

// What a kernel's parameters may take on every device.
const _: () = assert!(size_of::<Pack>() <= 4096);
