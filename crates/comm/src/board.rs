//! Calls that ranks show each other without waiting.
//!
//! Work that is queued on devices is not made together on the hosts: each queues it and goes on. So each member of a group writes its
//! calls on a board of its own, and the others look there when they want to know: whether a rank makes another call in this place,
//! and when nothing comes, who has not come. A board is a ring: of a rank that is far ahead the oldest calls are gone.

use std::sync::atomic::{AtomicU64, Ordering, fence};

use crate::Call;
use crate::segment::{decode_call, encode_call};

/// Calls that a board remembers.
const LENGTH: u64 = 64;

/// One member's calls, valid when zero. It writes, all read.
#[repr(C, align(64))]
pub(crate) struct Board {
    posted: AtomicU64,
    entries: [Entry; LENGTH as usize],
}

/// A call with its number plus one; 0 while it is written.
#[repr(C)]
struct Entry {
    stamp: AtomicU64,
    words: [AtomicU64; 4],
}

/// What a board says about a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Posted {
    /// The member has not come so far.
    NotYet,
    /// This call.
    Call(Call),
    /// It was there, and made room for later ones.
    Forgotten,
}

impl Board {
    /// Shows a call, and says which number it has. One thread of one rank calls it at a time.
    pub(crate) fn post(&self, call: &Call) -> u64 {
        let number = self.posted.load(Ordering::Relaxed);
        let entry = &self.entries[(number % LENGTH) as usize];
        entry.stamp.store(0, Ordering::Relaxed);
        // Who reads a new word below also sees that the old stamp is gone.
        fence(Ordering::Release);
        for (word, value) in entry.words.iter().zip(encode_call(call)) {
            word.store(value, Ordering::Relaxed);
        }
        entry.stamp.store(number + 1, Ordering::Release);
        self.posted.store(number + 1, Ordering::Release);
        // Of two ranks that post and then look, one sees the other's.
        fence(Ordering::SeqCst);
        number
    }

    /// The call of this number.
    pub(crate) fn look(&self, number: u64) -> Posted {
        if self.posted.load(Ordering::Acquire) <= number {
            return Posted::NotYet;
        }
        let entry = &self.entries[(number % LENGTH) as usize];
        if entry.stamp.load(Ordering::Acquire) != number + 1 {
            return Posted::Forgotten;
        }
        let words = std::array::from_fn(|i| entry.words[i].load(Ordering::Relaxed));
        fence(Ordering::Acquire);
        match entry.stamp.load(Ordering::Relaxed) == number + 1 {
            true => Posted::Call(decode_call(words)),
            false => Posted::Forgotten,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Operation;
    use shardwise_device::DType;

    fn board() -> Box<Board> {
        let entry = || Entry { stamp: AtomicU64::new(0), words: std::array::from_fn(|_| AtomicU64::new(0)) };
        Box::new(Board { posted: AtomicU64::new(0), entries: std::array::from_fn(|_| entry()) })
    }

    fn call(sequence: u64) -> Call {
        let (operation, dtype) = (Operation::AllReduce, DType::Bf16);
        Call { operation, sequence, dtype, numel: 3 * sequence, detail: !sequence }
    }

    #[test]
    fn a_board_forgets_what_is_far_back() {
        let board = board();
        assert_eq!(board.look(0), Posted::NotYet);
        for number in 0..100 {
            assert_eq!(board.post(&call(number)), number);
            assert_eq!(board.look(number), Posted::Call(call(number)));
        }
        assert_eq!((board.look(35), board.look(36)), (Posted::Forgotten, Posted::Call(call(36))));
        assert_eq!(board.look(100), Posted::NotYet);
    }

    #[test]
    fn nobody_sees_a_call_that_is_half_written() {
        let board = board();
        std::thread::scope(|scope| {
            scope.spawn(|| (0..20_000).for_each(|number| assert_eq!(board.post(&call(number)), number)));
            for number in 0..20_000 {
                match board.look(number) {
                    Posted::Call(seen) => assert_eq!(seen, call(number)),
                    Posted::NotYet => std::hint::spin_loop(),
                    Posted::Forgotten => {}
                }
            }
        });
    }
}
