//! The host's threads.
//!
//! Each function asks first whether the host reaches the memory: then the kernels cannot find that it does not.

use shardwise_device::{Slice, SliceMut};

use super::{Piece, ProcessorError, num_terms};
use crate::reduce::{Store, Term, sum_in_order};
use crate::{Threads, convert, norm};

pub(super) fn zero(into: SliceMut<'_>) -> Result<(), ProcessorError> {
    into.host_bytes()?.fill(0);
    Ok(())
}

pub(super) fn scale(
    threads: Threads,
    from: Slice<'_>,
    factor: f32,
    mut to: SliceMut<'_>,
) -> Result<(), ProcessorError> {
    from.host_bytes()?;
    to.reborrow().host_bytes()?;
    convert::scale_on(threads, from, factor, to);
    Ok(())
}

pub(super) fn pack(
    threads: Threads,
    pieces: &[Piece<'_>],
    factor: f32,
    to: SliceMut<'_>,
) -> Result<(), ProcessorError> {
    let mut rest = to;
    for piece in pieces {
        let (here, after) = rest.split_at(piece.numel());
        rest = after;
        match piece {
            Piece::Data(data) => scale(threads, *data, factor, here)?,
            Piece::Zeros(_) => zero(here)?,
        }
    }
    assert_eq!(rest.numel(), 0, "elements that no piece fills");
    Ok(())
}

pub(super) fn accumulate(
    threads: Threads,
    pieces: &[Piece<'_>],
    sum: SliceMut<'_>,
) -> Result<(), ProcessorError> {
    let mut rest = sum;
    for piece in pieces {
        let (mut here, after) = rest.split_at(piece.numel());
        rest = after;
        if let Piece::Data(data) = piece {
            data.host_bytes()?;
            here.reborrow().host_bytes()?;
            convert::accumulate_on(threads, here, *data);
        }
    }
    assert_eq!(rest.numel(), 0, "elements that no piece covers");
    Ok(())
}

pub(super) fn sum_ranks(
    terms: Slice<'_>,
    stride: usize,
    mut sum: SliceMut<'_>,
) -> Result<(), ProcessorError> {
    terms.host_bytes()?;
    sum.reborrow().host_bytes()?;
    let numel = sum.numel();
    let term = |rank: usize| Term::Of(terms.range(rank * stride..rank * stride + numel));
    let terms: Vec<_> = (0..num_terms(terms, stride, sum.as_slice())).map(term).collect();
    sum_in_order(&terms, sum, Store::Cached);
    Ok(())
}

pub(super) fn sums_of_squares(threads: Threads, parts: &[Slice<'_>]) -> Result<Vec<f64>, ProcessorError> {
    let sum = |part: &Slice<'_>| {
        part.host_bytes()?;
        Ok(norm::sum_of_squares_of(threads, *part))
    };
    parts.iter().map(sum).collect()
}

pub(super) fn copy(from: Slice<'_>, into: SliceMut<'_>) -> Result<(), ProcessorError> {
    assert_eq!((from.numel(), from.dtype()), (into.numel(), into.dtype()), "a copy");
    into.host_bytes()?.copy_from_slice(from.host_bytes()?);
    Ok(())
}
