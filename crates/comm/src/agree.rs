//! Comparing calls before they are made, where what moves the data cannot.
//!
//! Each rank shows its call to the others through a group in host memory. All compare all, so all come to the same judgement.

use shardwise_device::{Slice, SliceMut};

use crate::member::Patience;
use crate::segment::{decode_call, encode_call};
use crate::{Call, CommError, ProcessGroup};

const CALL_BYTES: usize = size_of::<[u64; 4]>();

fn encode(call: &Call) -> [u8; CALL_BYTES] {
    let mut bytes = [0; CALL_BYTES];
    for (bytes, word) in bytes.chunks_exact_mut(size_of::<u64>()).zip(encode_call(call)) {
        bytes.copy_from_slice(&word.to_ne_bytes());
    }
    bytes
}

fn decode(bytes: &[u8]) -> Call {
    let mut words = [0; 4];
    for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(size_of::<u64>())) {
        *word = u64::from_ne_bytes(bytes.try_into().expect("chunks of eight bytes"));
    }
    decode_call(words)
}

/// Compares a collective with what the other ranks of `control` call.
pub(crate) fn agree(control: &dyn ProcessGroup, call: &Call) -> Result<(), CommError> {
    let ranks = control.ranks();
    let mut shown = vec![0u8; ranks.len() * CALL_BYTES];
    control.all_gather(Slice::of(&encode(call)), SliceMut::of(&mut shown))?;
    let mut calls = shown.chunks_exact(CALL_BYTES).map(decode).enumerate();
    let (_, first) = calls.next().expect("a group has a first rank");
    match calls.find(|(_, other)| *other != first) {
        None => Ok(()),
        Some((other, other_call)) => Err(mismatch(control, (0, first), (other, other_call))),
    }
}

/// Shows the message that is about to be sent to the one who shall receive it.
pub(crate) fn announce(
    control: &dyn ProcessGroup,
    call: &Call,
    to: usize,
    patience: Patience,
) -> Result<(), CommError> {
    let shown = encode(call);
    match patience {
        Patience::Deadline => control.send(Slice::of(&shown), to),
        Patience::Endless => control.send_ahead(Slice::of(&shown), to),
    }
}

/// Compares the message that is about to be received with the one that `from` has announced.
pub(crate) fn expect(control: &dyn ProcessGroup, call: &Call, from: usize) -> Result<(), CommError> {
    let mut shown = [0u8; CALL_BYTES];
    control.recv(SliceMut::of(&mut shown), from)?;
    let sent = decode(&shown);
    if (sent.sequence, sent.dtype, sent.numel) == (call.sequence, call.dtype, call.numel) {
        return Ok(());
    }
    Err(mismatch(control, (control.group_rank(), *call), (from, sent)))
}

fn mismatch(
    control: &dyn ProcessGroup,
    (rank, call): (usize, Call),
    (other, other_call): (usize, Call),
) -> CommError {
    let (rank, other_rank) = (control.ranks()[rank], control.ranks()[other]);
    let group = control.name().to_owned();
    control.fail(&CommError::Mismatch { group, rank, call, other_rank, other_call })
}
