//! The shared memory of one group.
//!
//! ```text
//! words      one per member: phases published
//! posts      two per member: the call that a phase begins
//! boards     one per member: the calls that it has queued on devices
//! channels   one per ordered pair: counters and posts of messages
//! channel slots, two per ordered pair     touched only where messages flow
//! slots      two per member: the data of a phase
//! ```
//!
//! All of it is valid when zero. Who may touch what, when, is the protocol of [`crate::word`].

use std::cell::UnsafeCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use shardwise_device::DType;

use crate::arena::{Arena, Mapping, whole_pages};
use crate::board::Board;
use crate::word::Word;
use crate::{Call, CommError, Operation};

/// Bytes of one slot of a channel; a channel has two.
pub(crate) const CHANNEL_SLOT_BYTES: usize = 256 << 10;

/// A rank's slot does not shrink below this, however large the group.
const SMALL_SLOT_BYTES: usize = 64 << 10;

/// A call, in shared memory.
#[repr(C, align(64))]
pub(crate) struct Post(UnsafeCell<[u64; 4]>);

// SAFETY: posts are written and read in turns that a `Word` orders.
unsafe impl Sync for Post {}

impl Post {
    /// # Safety
    /// Nobody reads the post until the writer has published it.
    pub(crate) unsafe fn write(&self, call: &Call) {
        // SAFETY: the caller's contract.
        unsafe { *self.0.get() = encode_call(call) }
    }

    /// # Safety
    /// The post is published and its writer does not write it again before this returns.
    pub(crate) unsafe fn read(&self) -> Call {
        // SAFETY: the caller's contract.
        decode_call(unsafe { *self.0.get() })
    }
}

pub(crate) fn encode_call(call: &Call) -> [u64; 4] {
    let dtype = DType::ALL.iter().position(|&dtype| dtype == call.dtype).expect("ALL has all types") as u64;
    [call.operation as u64 | dtype << 8, call.sequence, call.numel, call.detail]
}

pub(crate) fn decode_call([kind, sequence, numel, detail]: [u64; 4]) -> Call {
    let operation = Operation::ALL.get(kind as usize & 0xff).copied().unwrap_or(Operation::Barrier);
    let dtype = DType::ALL.get(kind as usize >> 8).copied().unwrap_or(DType::U8);
    Call { operation, sequence, dtype, numel, detail }
}

/// Messages from one member to another: a ring of two slots.
#[repr(C)]
pub(crate) struct Channel {
    /// Chunks the sender has put in; poisoned and left like any word.
    pub(crate) sent: Word,
    /// Chunks the receiver has taken out.
    pub(crate) taken: Word,
    /// One more than the chunk that the receiver sleeps for; 0 when it does not.
    pub(crate) awaited: AtomicU32,
    /// The receiver's call, valid while `awaited` is not 0.
    pub(crate) wanted: Post,
    /// The sender's call, where the chunk in that slot begins a message.
    pub(crate) posts: [Post; 2],
}

/// A group's memory, as one member has opened it.
pub(crate) struct Segment {
    mapping: Mapping,
    arena: Arc<Arena>,
    place: u64,
    layout: Layout,
}

#[derive(Clone, Copy)]
struct Layout {
    num_members: usize,
    slot_bytes: usize,
    posts_at: usize,
    boards_at: usize,
    channels_at: usize,
    departures_at: usize,
    channel_slots_at: usize,
    slots_at: usize,
    num_bytes: usize,
}

impl Layout {
    fn new(num_members: usize, slot_bytes: usize) -> Self {
        let n = num_members;
        let share = (2 * slot_bytes / n).max(slot_bytes.min(SMALL_SLOT_BYTES)).max(64 * n);
        // A group of one has nobody to show anything to.
        let (slot_bytes, pairs) = if n == 1 { (0, 0) } else { (whole_pages(share), n * n) };
        let posts_at = n * size_of::<Word>();
        let boards_at = (posts_at + 2 * n * size_of::<Post>()).next_multiple_of(align_of::<Board>());
        let channels_at = (boards_at + n * size_of::<Board>()).next_multiple_of(align_of::<Channel>());
        let departures_at = channels_at + pairs * size_of::<Channel>();
        let channel_slots_at = whole_pages(departures_at + size_of::<AtomicU32>());
        let slots_at = channel_slots_at + 2 * pairs * CHANNEL_SLOT_BYTES;
        let num_bytes = slots_at + 2 * n * slot_bytes;
        Layout {
            num_members,
            slot_bytes,
            posts_at,
            boards_at,
            channels_at,
            departures_at,
            channel_slots_at,
            slots_at,
            num_bytes,
        }
    }
}

impl Segment {
    /// Bytes of a segment, to reserve its place.
    pub(crate) fn num_bytes(num_members: usize, slot_bytes: usize) -> usize {
        Layout::new(num_members, slot_bytes).num_bytes
    }

    pub(crate) fn create(
        arena: &Arc<Arena>,
        place: u64,
        members: usize,
        slot_bytes: usize,
    ) -> Result<Self, CommError> {
        let layout = Layout::new(members, slot_bytes);
        let mapping = arena.create(place, layout.num_bytes, layout.channel_slots_at..layout.slots_at)?;
        Ok(Segment { mapping, arena: Arc::clone(arena), place, layout })
    }

    pub(crate) fn open(
        arena: &Arc<Arena>,
        place: u64,
        members: usize,
        slot_bytes: usize,
    ) -> Result<Self, CommError> {
        let layout = Layout::new(members, slot_bytes);
        let mapping = arena.open(place, layout.num_bytes)?;
        Ok(Segment { mapping, arena: Arc::clone(arena), place, layout })
    }

    /// Bytes of one slot.
    pub(crate) fn slot_bytes(&self) -> usize {
        self.layout.slot_bytes
    }

    /// The members' words.
    pub(crate) fn words(&self) -> &[Word] {
        // SAFETY: the mapping begins with `num_members` words, valid when zero, alive as long as `self`.
        unsafe { std::slice::from_raw_parts(self.mapping.as_ptr().cast(), self.layout.num_members) }
    }

    /// What `member` posts in phases of the parity of `phase`.
    pub(crate) fn post(&self, member: usize, phase: u32) -> &Post {
        debug_assert!(member < self.layout.num_members);
        let index = 2 * member + (phase % 2) as usize;
        // SAFETY: there are two posts for each member, valid when zero, aligned, alive as long as `self`.
        unsafe { &*self.mapping.as_ptr().add(self.layout.posts_at).cast::<Post>().add(index) }
    }

    /// The calls that `member` has queued on devices.
    pub(crate) fn board(&self, member: usize) -> &Board {
        debug_assert!(member < self.layout.num_members);
        // SAFETY: there is a board for each member, valid when zero, aligned, alive as long as `self`.
        unsafe { &*self.mapping.as_ptr().add(self.layout.boards_at).cast::<Board>().add(member) }
    }

    /// What `member` shows in phases of the parity of `phase`: `slot_bytes` bytes, page aligned.
    pub(crate) fn slot(&self, member: usize, phase: u32) -> *mut u8 {
        debug_assert!(member < self.layout.num_members);
        let index = 2 * member + (phase % 2) as usize;
        // SAFETY: there are two slots for each member inside the mapping.
        unsafe { self.mapping.as_ptr().add(self.layout.slots_at + index * self.layout.slot_bytes) }
    }

    /// The messages from one member to another.
    pub(crate) fn channel(&self, from: usize, to: usize) -> &Channel {
        let n = self.layout.num_members;
        debug_assert!(from < n && to < n);
        // SAFETY: there is a channel for each ordered pair, valid when zero, aligned, alive as long as
        // `self`.
        unsafe { &*self.mapping.as_ptr().add(self.layout.channels_at).cast::<Channel>().add(from * n + to) }
    }

    /// Slot of the channel for the chunk number `chunk`: [`CHANNEL_SLOT_BYTES`] bytes.
    pub(crate) fn channel_slot(&self, from: usize, to: usize, chunk: u32) -> *mut u8 {
        let n = self.layout.num_members;
        debug_assert!(from < n && to < n);
        let index = 2 * (from * n + to) + (chunk % 2) as usize;
        // SAFETY: there are two slots for each ordered pair inside the mapping.
        unsafe { self.mapping.as_ptr().add(self.layout.channel_slots_at + index * CHANNEL_SLOT_BYTES) }
    }

    /// Wakes everyone who waits here, now and later.
    pub(crate) fn poison(&self) {
        self.words().iter().for_each(Word::poison);
        self.channels().for_each(|(_, _, channel)| {
            channel.sent.poison();
            channel.taken.poison();
        });
    }

    /// `member` will not come any more. The last one to leave gives the memory back.
    pub(crate) fn leave(&self, member: usize) {
        self.words()[member].leave();
        for (from, to, channel) in self.channels() {
            if from == member {
                channel.sent.leave();
            }
            if to == member {
                channel.taken.leave();
            }
        }
        // SAFETY: a number between the channels and their slots, valid when zero, aligned.
        let departures =
            unsafe { &*self.mapping.as_ptr().add(self.layout.departures_at).cast::<AtomicU32>() };
        if departures.fetch_add(1, Ordering::AcqRel) as usize + 1 == self.layout.num_members {
            self.arena.release(self.place, self.layout.num_bytes);
        }
    }

    fn channels(&self) -> impl Iterator<Item = (usize, usize, &Channel)> {
        let n = self.layout.num_members;
        let pairs = (0..n).flat_map(move |from| (0..n).map(move |to| (from, to)));
        pairs.filter(|(from, to)| from != to).map(|(from, to)| (from, to, self.channel(from, to)))
    }
}
