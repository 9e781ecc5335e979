//! A reduction's input, read across the borders of its parts.

use std::ops::Range;

use shardwise_device::{DType, Slice};

use crate::Part;

/// Zeros to read from, a cache-friendly piece at a time.
#[repr(align(64))]
struct Zeros([u8; 4096]);

static ZEROS: Zeros = Zeros([0; 4096]);

/// The concatenation of parts.
pub(crate) struct Parts<'a> {
    parts: &'a [Part<'a>],
    /// First element of each part, and the end.
    starts: Vec<usize>,
    dtype: DType,
}

impl<'a> Parts<'a> {
    /// `dtype` is the type of all parts that have one.
    pub(crate) fn new(parts: &'a [Part<'a>], dtype: DType) -> Self {
        let mut starts = Vec::with_capacity(parts.len() + 1);
        let mut start = 0;
        for part in parts {
            starts.push(start);
            start += part.numel();
        }
        starts.push(start);
        Parts { parts, starts, dtype }
    }

    pub(crate) fn dtype(&self) -> DType {
        self.dtype
    }

    /// Calls `visit` with the elements `range` in order, cut where parts end (and zeros now and then), each
    /// with its offset in `range`.
    pub(crate) fn for_each_run(&self, range: Range<usize>, mut visit: impl FnMut(usize, Slice<'a>)) {
        let mut at = range.start;
        let mut index = self.starts.partition_point(|&start| start <= at).saturating_sub(1);
        while at < range.end {
            let end = self.starts[index + 1].min(range.end);
            if at < end {
                match self.parts[index] {
                    Part::Data(slice) => {
                        let start = self.starts[index];
                        visit(at - range.start, slice.range(at - start..end - start));
                        at = end;
                    }
                    Part::Zeros(_) => {
                        let numel = (end - at).min(ZEROS.0.len() / self.dtype.size_bytes());
                        visit(at - range.start, self.zeros(numel));
                        at += numel;
                    }
                }
            }
            if at == self.starts[index + 1] {
                index += 1;
            }
        }
    }

    fn zeros(&self, numel: usize) -> Slice<'a> {
        let place = shardwise_device::Place::Cpu;
        debug_assert!(numel * self.dtype.size_bytes() <= ZEROS.0.len());
        // SAFETY: constant zero bytes, aligned for every type, at least so many; zero bytes are the number
        // zero.
        unsafe { Slice::from_raw(std::ptr::NonNull::from(&ZEROS.0).cast(), numel, self.dtype, place) }
    }
}

/// The parts of `parts` that are the elements `range` of their concatenation, whose parts begin at `starts`.
pub(crate) fn runs<'a>(
    parts: &'a [Part<'a>],
    starts: &[usize],
    range: Range<usize>,
) -> impl Iterator<Item = Part<'a>> {
    let first = starts.partition_point(|&start| start <= range.start).saturating_sub(1);
    let bounds = starts.windows(2).zip(parts).skip(first);
    let until = range.end;
    bounds.take_while(move |(bounds, _)| bounds[0] < until).filter_map(move |(bounds, part)| {
        let here = range.start.max(bounds[0])..range.end.min(bounds[1]);
        (!here.is_empty()).then(|| match part {
            Part::Data(data) => Part::Data(data.range(here.start - bounds[0]..here.end - bounds[0])),
            Part::Zeros(_) => Part::Zeros(here.len()),
        })
    })
}

/// The first element of each part, and the end.
pub(crate) fn starts_of(parts: &[Part<'_>]) -> Vec<usize> {
    let mut starts = vec![0];
    for part in parts {
        starts.push(starts[starts.len() - 1] + part.numel());
    }
    starts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_cover_any_range() {
        let (a, b) = ([1f32, 2.0, 3.0], [4f32]);
        let parts = [
            Part::Zeros(0),
            Part::Data(Slice::of(&a)),
            Part::Zeros(2000),
            Part::Data(Slice::of(&b)),
            Part::Zeros(1),
        ];
        let flat: Vec<f32> = a.iter().copied().chain([0.0; 2000]).chain(b).chain([0.0]).collect();
        let parts = Parts::new(&parts, DType::F32);
        for range in
            [0..0, 0..2005, 1..2, 2..5, 3..3, 5..1999, 1000..2005, 2003..2004, 2004..2005, 2005..2005]
        {
            let mut seen = Vec::new();
            parts.for_each_run(range.clone(), |offset, run| {
                assert_eq!(offset, seen.len());
                seen.extend_from_slice(run.typed::<f32>().unwrap());
            });
            assert_eq!(seen, flat[range]);
        }
    }
}
