//! The algorithms: what goes through the slots, phase by phase.
//!
//! A rank reads its own data where it lies and shows the peers only what they need. Large calls go piece by
//! piece: while a piece is in the slots it is in the cache too, so that main memory sees each input once and
//! each result once.

use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use shardwise_device::{DType, Place, Slice, SliceMut};
use shardwise_kernels::reduce::{Store, Term, copy, copy_bytes, sum_in_order};

use crate::CommError;
use crate::member::Exchange;
use crate::parts::Parts;
use crate::segment::Segment;

/// Results of at least so many bytes are written past the cache.
const STREAMING_BYTES: usize = 4 << 20;
/// Up to this size every rank reads everything of every rank, which needs one phase less than dividing the
/// work.
const DIRECT_BYTES: usize = 16 << 10;

fn store_for(num_bytes: usize) -> Store {
    if num_bytes >= STREAMING_BYTES { Store::Streaming } else { Store::Cached }
}

/// `0..total` in steps; at least one, as every call has at least one phase.
fn steps(total: usize, step: usize) -> impl Iterator<Item = Range<usize>> {
    let num_steps = total.div_ceil(step.max(1)).max(1);
    (0..num_steps).map(move |i| (i * step).min(total)..((i + 1) * step).min(total))
}

/// Elements in `num_bytes`, rounded down to whole cache lines (but at least one element).
fn elements_in(num_bytes: usize, dtype: DType) -> usize {
    (num_bytes / 64 * 64 / dtype.size_bytes()).max(1)
}

/// # Safety
/// `ptr` is valid for reads of `numel` elements, aligned, and not written while the slice lives.
unsafe fn view<'a>(ptr: *const u8, numel: usize, dtype: DType) -> Slice<'a> {
    let ptr = NonNull::new(ptr.cast_mut()).expect("slots are not at address 0");
    // SAFETY: the caller's contract.
    unsafe { Slice::from_raw(ptr, numel, dtype, Place::Cpu) }
}

pub(crate) fn all_gather(
    x: &mut Exchange<'_>,
    shard: Option<Slice<'_>>,
    full: SliceMut<'_>,
) -> Result<(), CommError> {
    let (n, me) = (x.size(), x.me());
    let full = full.bytes();
    let shard_bytes = full.len() / n;
    let store = store_for(full.len());
    let own_place = me * shard_bytes..(me + 1) * shard_bytes;
    if n == 1 {
        if let Some(shard) = shard {
            full.copy_from_slice(shard.bytes());
        }
        return Ok(());
    }
    for range in steps(shard_bytes, x.slot_bytes()) {
        let own = match &shard {
            Some(shard) => &shard.bytes()[range.clone()],
            None => &full[own_place.clone()][range.clone()],
        };
        // SAFETY: a step fits a slot, and the slot is this rank's to fill.
        unsafe { copy_bytes(own.as_ptr(), x.slot(), own.len(), Store::Cached) };
        x.publish();
        if let Some(shard) = &shard {
            let (own, place) = (&shard.bytes()[range.clone()], &mut full[own_place.clone()][range.clone()]);
            copy(Slice::of(own), SliceMut::of(place), store);
        }
        x.wait()?;
        for peer in x.peers() {
            let place = &mut full[peer * shard_bytes..(peer + 1) * shard_bytes][range.clone()];
            // SAFETY: the peer shows as many bytes as this rank: the calls agree in size.
            unsafe { copy_bytes(x.shown(peer), place.as_mut_ptr(), place.len(), store) };
        }
    }
    Ok(())
}

pub(crate) fn broadcast(x: &mut Exchange<'_>, buffer: SliceMut<'_>, root: usize) -> Result<(), CommError> {
    if x.size() == 1 {
        return Ok(());
    }
    let buffer = buffer.bytes();
    let store = store_for(buffer.len());
    for range in steps(buffer.len(), x.slot_bytes()) {
        let piece = &mut buffer[range];
        if x.me() == root {
            // SAFETY: a step fits a slot, and the slot is this rank's to fill.
            unsafe { copy_bytes(piece.as_ptr(), x.slot(), piece.len(), Store::Cached) };
        }
        x.publish();
        x.wait()?;
        if x.me() != root {
            // SAFETY: the root shows as many bytes as the calls, which agree, have in this step.
            unsafe { copy_bytes(x.shown(root), piece.as_mut_ptr(), piece.len(), store) };
        }
    }
    Ok(())
}

pub(crate) fn all_to_all(
    x: &mut Exchange<'_>,
    input: Slice<'_>,
    output: SliceMut<'_>,
) -> Result<(), CommError> {
    let (n, me) = (x.size(), x.me());
    let (input, output) = (input.bytes(), output.bytes());
    let piece_bytes = input.len() / n;
    let store = store_for(output.len());
    let own = me * piece_bytes..(me + 1) * piece_bytes;
    copy(Slice::of(&input[own.clone()]), SliceMut::of(&mut output[own]), store);
    if n == 1 {
        return Ok(());
    }
    // The slot holds a piece for each peer, in the order of their ranks.
    let step = elements_in(x.slot_bytes() / (n - 1), DType::U8);
    let index_for = |from: usize, to: usize| if to < from { to } else { to - 1 };
    for range in steps(piece_bytes, step) {
        for peer in x.peers() {
            let piece = &input[peer * piece_bytes..][range.clone()];
            // SAFETY: `n - 1` steps fit a slot, and the slot is this rank's to fill.
            unsafe {
                copy_bytes(
                    piece.as_ptr(),
                    x.slot().add(index_for(me, peer) * step),
                    piece.len(),
                    Store::Cached,
                )
            };
        }
        x.publish();
        x.wait()?;
        for peer in x.peers() {
            let place = &mut output[peer * piece_bytes..][range.clone()];
            // SAFETY: the peer shows a piece of the same size for each other rank: the calls agree.
            unsafe {
                let shown = x.shown(peer).add(index_for(peer, me) * step);
                copy_bytes(shown, place.as_mut_ptr(), place.len(), store);
            }
        }
    }
    Ok(())
}

/// Adds `range` of this rank's `input` in its place among the peers' pieces, which begin at `shown(peer)`.
///
/// # Safety
/// Each `shown(peer)` is valid for reads of `out.numel()` elements of `dtype`.
unsafe fn sum_with_peers(
    (n, me): (usize, usize),
    shown: impl Fn(usize) -> *const u8,
    (input, start, dtype): (&Parts<'_>, usize, DType),
    mut out: SliceMut<'_>,
    store: Store,
) {
    let mut terms = vec![Term::Out; n];
    let range = start..start + out.numel();
    input.for_each_run(range, |offset, own| {
        for (rank, term) in terms.iter_mut().enumerate() {
            *term = if rank == me {
                Term::Of(own)
            } else {
                // SAFETY: the run lies inside what the caller vouches for.
                Term::Of(unsafe { view(shown(rank).add(offset * dtype.size_bytes()), own.numel(), dtype) })
            };
        }
        sum_in_order(&terms, out.range_mut(offset..offset + own.numel()), store);
    });
}

pub(crate) fn reduce_scatter(
    x: &mut Exchange<'_>,
    input: &Parts<'_>,
    mut shard: SliceMut<'_>,
) -> Result<(), CommError> {
    let (n, me) = (x.size(), x.me());
    let (numel, dtype) = (shard.numel(), input.dtype());
    let width = dtype.size_bytes();
    let store = store_for(shard.num_bytes());
    if n == 1 {
        // SAFETY: there are no peers to read.
        unsafe { sum_with_peers((1, 0), |_| std::ptr::null(), (input, 0, dtype), shard, store) };
        return Ok(());
    }
    // The slot holds a piece for each peer, in the order of their ranks.
    let step = elements_in(x.slot_bytes() / (n - 1), dtype);
    let index_for = |from: usize, to: usize| if to < from { to } else { to - 1 };
    for range in steps(numel, step) {
        for peer in x.peers() {
            let start = peer * numel;
            // SAFETY: `n - 1` steps fit a slot.
            let place = unsafe { x.slot().add(index_for(me, peer) * step * width) };
            input.for_each_run(start + range.start..start + range.end, |offset, run| {
                let bytes = run.bytes();
                // SAFETY: the run lies inside the step, and the slot is this rank's to fill.
                unsafe { copy_bytes(bytes.as_ptr(), place.add(offset * width), bytes.len(), Store::Cached) };
            });
        }
        x.publish();
        x.wait()?;
        let out = shard.range_mut(range.clone());
        // SAFETY: each peer shows a piece of the same size for each other rank: the calls agree.
        unsafe {
            let shown = |peer| x.shown(peer).add(index_for(peer, me) * step * width);
            sum_with_peers((n, me), shown, (input, me * numel + range.start, dtype), out, store);
        }
    }
    Ok(())
}

pub(crate) fn all_reduce(x: &mut Exchange<'_>, buffer: SliceMut<'_>) -> Result<(), CommError> {
    match x.size() {
        1 => Ok(()),
        // With two ranks, showing everything moves no more than dividing the work.
        2 => all_reduce_direct(x, buffer),
        _ if buffer.num_bytes() <= DIRECT_BYTES => all_reduce_direct(x, buffer),
        _ => all_reduce_divided(x, buffer),
    }
}

/// Every rank shows all it has, and adds all that it sees.
fn all_reduce_direct(x: &mut Exchange<'_>, mut buffer: SliceMut<'_>) -> Result<(), CommError> {
    let dtype = buffer.dtype();
    let mut terms = vec![Term::Out; x.size()];
    for range in steps(buffer.numel(), elements_in(x.slot_bytes(), dtype)) {
        let mut piece = buffer.range_mut(range);
        // SAFETY: a step fits a slot, and the slot is this rank's to fill.
        unsafe { copy_bytes(piece.as_mut_ptr(), x.slot(), piece.num_bytes(), Store::Cached) };
        x.publish();
        x.wait()?;
        for peer in x.peers() {
            // SAFETY: the peer shows as many elements as this rank: the calls agree.
            terms[peer] = Term::Of(unsafe { view(x.shown(peer), piece.numel(), dtype) });
        }
        // In place: these lines are in the cache already, so there is no read to save by writing past it.
        sum_in_order(&terms, piece, Store::Cached);
    }
    Ok(())
}

/// Every rank adds one piece and shows the sum.
///
/// The slot holds `n - 1` pieces for the peers to add and, behind them, this rank's sum of the step before.
/// So each phase does both halves: it hands out the pieces of step `i` and the sums of step `i - 1`, and the
/// last phase hands out sums only.
fn all_reduce_divided(x: &mut Exchange<'_>, mut buffer: SliceMut<'_>) -> Result<(), CommError> {
    let (n, me, dtype) = (x.size(), x.me(), buffer.dtype());
    let width = dtype.size_bytes();
    let store = store_for(buffer.num_bytes());
    // Elements of a piece, and of a step, in which each rank has one piece.
    let piece = elements_in(x.slot_bytes() / n, dtype);
    let index_for = |from: usize, to: usize| if to < from { to } else { to - 1 };
    let piece_of = |step: &Range<usize>, rank: usize| {
        let even = step.len().div_ceil(n);
        let start = (step.start + rank * even).min(step.end);
        start..(start + even).min(step.end)
    };
    let mut terms = vec![Term::Out; n];
    let mut before: Option<Range<usize>> = None;
    for step in steps(buffer.numel(), piece * n).map(Some).chain([None]) {
        if let Some(step) = &step {
            for peer in x.peers() {
                let part = buffer.as_slice().range(piece_of(step, peer)).bytes();
                // SAFETY: `n` pieces fit a slot, and the slot is this rank's to fill.
                unsafe {
                    let place = x.slot().add(index_for(me, peer) * piece * width);
                    copy_bytes(part.as_ptr(), place, part.len(), Store::Cached);
                }
            }
        }
        if let Some(before) = &before {
            let sum = buffer.as_slice().range(piece_of(before, me)).bytes();
            // SAFETY: as above; the sum is the last piece of the slot.
            unsafe {
                copy_bytes(sum.as_ptr(), x.slot().add((n - 1) * piece * width), sum.len(), Store::Cached)
            };
        }
        x.publish();
        x.wait()?;
        if let Some(step) = &step {
            let own = buffer.range_mut(piece_of(step, me));
            for peer in x.peers() {
                // SAFETY: each peer shows a piece of this size for this rank: the calls agree.
                unsafe {
                    let shown = x.shown(peer).add(index_for(peer, me) * piece * width);
                    terms[peer] = Term::Of(view(shown, own.numel(), dtype));
                }
            }
            sum_in_order(&terms, own, Store::Cached);
        }
        if let Some(before) = &before {
            for peer in x.peers() {
                let place = buffer.range_mut(piece_of(before, peer)).bytes();
                // SAFETY: each peer shows its sum of the step before behind the pieces.
                unsafe {
                    let shown = x.shown(peer).add((n - 1) * piece * width);
                    copy_bytes(shown, place.as_mut_ptr(), place.len(), store);
                }
            }
        }
        before = step;
    }
    Ok(())
}

/// `founder` makes the memory of a new group; the other members of the new group open it.
pub(crate) fn share_segment(
    x: &mut Exchange<'_>,
    founder: usize,
    is_member: bool,
    num_members: usize,
) -> Result<Option<Arc<Segment>>, CommError> {
    let universe = &x.member.universe;
    let created = if x.me() == founder {
        let (place, segment) = universe.create_segment(num_members).map_err(|error| universe.fail(&error))?;
        if x.size() > 1 {
            // SAFETY: a slot holds at least a page, is aligned to it, and is this rank's to fill.
            unsafe { x.slot().cast::<u64>().write(place) };
        }
        Some(segment)
    } else {
        None
    };
    if x.size() == 1 {
        return Ok(created);
    }
    x.publish();
    x.wait()?;
    if created.is_some() || !is_member {
        return Ok(created);
    }
    // SAFETY: the founder has published the place in its slot.
    let place = unsafe { x.shown(founder).cast::<u64>().read() };
    universe.open_segment(place, num_members).map(Some).map_err(|error| universe.fail(&error))
}
