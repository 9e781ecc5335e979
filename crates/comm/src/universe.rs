//! What all groups of one world share: who has given up and why, who waits for whom, who has left.
//!
//! An error is final: the first rank to fail writes a record into its own place and then claims the world's
//! verdict by one compare-and-swap. From then on every call on every group of every rank returns that
//! verdict. As a rank writes its record before it claims, a rank killed half-way leaves no half verdict
//! behind.

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use crate::arena::{Arena, Mapping, whole_pages};
use crate::segment::{Segment, decode_call, encode_call};
use crate::{CommError, Options};

/// A sleeping rank looks around this often: for a verdict whose author does not know the group it sleeps in,
/// and to show that it is alive and waits.
pub(crate) const SLICE: Duration = Duration::from_millis(100);

/// How long a waiting rank looks before it sleeps. Waking a sleeper on another core costs about this much
/// (several times as much on a virtual machine), so looking longer would cost more than it can save.
const SPIN: Duration = Duration::from_micros(20);

/// A waiting rank that has not looked around for so long is not waiting but stopped.
const FRESH_MS: u64 = 1000;

const TEXT_BYTES: usize = 600;
const NAME_BYTES: usize = 64;

#[repr(C)]
struct Head {
    /// The rank whose record is the verdict, plus one; 0 while all is well.
    verdict: AtomicU32,
    /// The next free place of the arena.
    next_place: AtomicU64,
}

/// One rank's place.
#[repr(C, align(128))]
struct Seat {
    /// 1 once the rank has left the world in good order.
    departed: AtomicU32,
    /// Whom the rank waits for: rank plus one, and the time it last looked around, in ms of the monotonic
    /// clock.
    waiting: AtomicU64,
    /// Written once by this rank, read by all once it is the verdict.
    record: UnsafeCell<Record>,
}

/// A [`CommError`] as plain data.
#[repr(C)]
#[derive(Clone, Copy)]
struct Record {
    kind: u32,
    rank: u32,
    other_rank: u32,
    name_len: u32,
    text_len: u32,
    waited_ms: u64,
    call: [u64; 4],
    other_call: [u64; 4],
    name: [u8; NAME_BYTES],
    text: [u8; TEXT_BYTES],
}

const MISMATCH: u32 = 1;
const DIED: u32 = 2;
const STALLED: u32 = 3;
const LEFT: u32 = 4;
const GAVE_UP: u32 = 5;
const STUCK: u32 = 6;

/// One rank's view of its world.
pub(crate) struct Universe {
    arena: Arc<Arena>,
    head: Mapping,
    rank: usize,
    world_size: usize,
    options: Options,
    spin: Duration,
    /// The groups this rank is in, to wake whoever waits there.
    segments: Mutex<Vec<Weak<Segment>>>,
    /// Held while this rank's record is written.
    recording: Mutex<()>,
}

fn head_bytes(world_size: usize) -> usize {
    whole_pages(size_of::<Seat>() * (world_size + 1))
}

impl Universe {
    /// Makes the memory of a new world: its head, and the segment of the group of all ranks.
    pub(crate) fn found(arena: &Arc<Arena>, world_size: usize, slot_bytes: usize) -> Result<(), CommError> {
        let bytes = head_bytes(world_size);
        let mapping = arena.create(0, bytes, 0..0)?;
        Segment::create(arena, bytes as u64, world_size, slot_bytes)?;
        let next = bytes + whole_pages(Segment::num_bytes(world_size, slot_bytes));
        // SAFETY: the mapping begins with a `Head`, valid when zero.
        let head = unsafe { &*mapping.as_ptr().cast::<Head>() };
        head.next_place.store(next as u64, Ordering::Release);
        Ok(())
    }

    /// Enters a founded world as `rank`; returns also the segment of the group of all ranks.
    pub(crate) fn enter(
        arena: Arc<Arena>,
        rank: usize,
        world_size: usize,
        options: Options,
    ) -> Result<(Arc<Self>, Arc<Segment>), CommError> {
        let head = arena.open(0, head_bytes(world_size))?;
        // Spinning pays only while every rank can be on a core of its own.
        let num_cores = std::thread::available_parallelism().map_or(1, usize::from);
        let spin = if world_size <= num_cores { SPIN } else { Duration::ZERO };
        let slot_bytes = options.slot_bytes;
        let universe = Arc::new(Universe {
            arena,
            head,
            rank,
            world_size,
            options,
            spin,
            segments: Mutex::default(),
            recording: Mutex::default(),
        });
        let segment = Segment::open(&universe.arena, head_bytes(world_size) as u64, world_size, slot_bytes)?;
        let segment = universe.keep(segment);
        Ok((universe, segment))
    }

    pub(crate) fn rank(&self) -> usize {
        self.rank
    }

    pub(crate) fn options(&self) -> &Options {
        &self.options
    }

    /// How long to look before going to sleep.
    pub(crate) fn spin(&self) -> Duration {
        self.spin
    }

    /// Makes the memory of a new group and says where it is.
    pub(crate) fn create_segment(&self, num_members: usize) -> Result<(u64, Arc<Segment>), CommError> {
        let bytes = whole_pages(Segment::num_bytes(num_members, self.options.slot_bytes)) as u64;
        let place = self.head().next_place.fetch_add(bytes, Ordering::AcqRel);
        let segment = Segment::create(&self.arena, place, num_members, self.options.slot_bytes)?;
        Ok((place, self.keep(segment)))
    }

    /// Opens the memory of a group that another rank has made.
    pub(crate) fn open_segment(&self, place: u64, num_members: usize) -> Result<Arc<Segment>, CommError> {
        Ok(self.keep(Segment::open(&self.arena, place, num_members, self.options.slot_bytes)?))
    }

    /// # Errors
    /// The world's verdict, if it has one.
    pub(crate) fn check(&self) -> Result<(), CommError> {
        match self.head().verdict.load(Ordering::Acquire) {
            0 => Ok(()),
            author => Err(self.read_record(author as usize - 1)),
        }
    }

    /// Makes `error` the world's verdict unless it has one, wakes whoever can be woken, and returns the
    /// verdict.
    pub(crate) fn fail(&self, error: &CommError) -> CommError {
        let guard = self.recording.lock().unwrap_or_else(PoisonError::into_inner);
        let head = self.head();
        if head.verdict.load(Ordering::Acquire) == 0 {
            // SAFETY: only this rank writes its record, `recording` admits one thread of it, and as long as
            // there was no verdict it was never read. (If another rank's claim wins below, it never will be.)
            unsafe { *self.seat(self.rank).record.get() = encode(error, self.rank) };
            let author = self.rank as u32 + 1;
            let _ = head.verdict.compare_exchange(0, author, Ordering::AcqRel, Ordering::Acquire);
        }
        drop(guard);
        let mut segments = self.segments.lock().unwrap_or_else(PoisonError::into_inner);
        segments.retain(|segment| segment.upgrade().inspect(|segment| segment.poison()).is_some());
        drop(segments);
        self.check().expect_err("the verdict was set above")
    }

    /// Notes that this rank still waits for `rank` of the world.
    pub(crate) fn note_waiting(&self, rank: usize) {
        self.seat(self.rank).waiting.store((rank as u64 + 1) << 48 | now_ms(), Ordering::Relaxed);
    }

    /// Notes that this rank goes on.
    pub(crate) fn note_going(&self) {
        self.seat(self.rank).waiting.store(0, Ordering::Relaxed);
    }

    /// Who is to blame if `rank` does not come: it, or the one at the end of the chain of those who wait for
    /// each other.
    pub(crate) fn culprit(&self, rank: usize) -> usize {
        let mut last = rank;
        for _ in 0..self.world_size {
            let waiting = self.seat(last).waiting.load(Ordering::Relaxed);
            let age = now_ms().saturating_sub(waiting & ((1 << 48) - 1));
            if waiting == 0 || age > FRESH_MS {
                return last;
            }
            last = (waiting >> 48) as usize - 1;
        }
        // They wait in a circle.
        rank
    }

    /// Notes that this rank leaves the world in good order.
    pub(crate) fn depart(&self) {
        self.seat(self.rank).departed.store(1, Ordering::Release);
    }

    /// Whether `rank` has left the world in good order.
    pub(crate) fn has_departed(&self, rank: usize) -> bool {
        self.seat(rank).departed.load(Ordering::Acquire) != 0
    }

    fn keep(&self, segment: Segment) -> Arc<Segment> {
        let segment = Arc::new(segment);
        self.segments.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::downgrade(&segment));
        segment
    }

    fn head(&self) -> &Head {
        // SAFETY: the mapping begins with a `Head`, valid when zero, alive as long as `self`.
        unsafe { &*self.head.as_ptr().cast() }
    }

    fn seat(&self, rank: usize) -> &Seat {
        assert!(rank < self.world_size, "a rank of the world");
        // SAFETY: one seat's room for the head, then a seat for each rank; valid when zero, aligned.
        unsafe { &*self.head.as_ptr().cast::<Seat>().add(rank + 1) }
    }

    fn read_record(&self, author: usize) -> CommError {
        // SAFETY: the author wrote its record before it became the verdict, and nobody writes it again.
        decode(&unsafe { *self.seat(author).record.get() })
    }
}

/// The monotonic clock, which all processes of a host share.
fn now_ms() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1000 + now.tv_nsec as u64 / 1_000_000
}

fn put(text: &str, bytes: &mut [u8]) -> u32 {
    let limit = text.len().min(bytes.len());
    let len = (0..=limit).rev().find(|&len| text.is_char_boundary(len)).expect("0 is a boundary");
    bytes[..len].copy_from_slice(&text.as_bytes()[..len]);
    len as u32
}

fn get(bytes: &[u8], len: u32) -> String {
    String::from_utf8_lossy(&bytes[..bytes.len().min(len as usize)]).into_owned()
}

fn encode(error: &CommError, author: usize) -> Record {
    let mut record = Record {
        kind: GAVE_UP,
        rank: author as u32,
        other_rank: 0,
        name_len: 0,
        text_len: 0,
        waited_ms: 0,
        call: [0; 4],
        other_call: [0; 4],
        name: [0; NAME_BYTES],
        text: [0; TEXT_BYTES],
    };
    match error {
        CommError::Mismatch { group, rank, call, other_rank, other_call } => {
            record.kind = MISMATCH;
            (record.rank, record.other_rank) = (*rank as u32, *other_rank as u32);
            (record.call, record.other_call) = (encode_call(call), encode_call(other_call));
            record.name_len = put(group, &mut record.name);
        }
        CommError::Died { rank, detail } => {
            record.kind = DIED;
            record.rank = *rank as u32;
            record.text_len = put(detail, &mut record.text);
        }
        CommError::Stalled { rank, waiting_rank, group, call, waited } => {
            record.kind = STALLED;
            (record.rank, record.other_rank) = (*rank as u32, *waiting_rank as u32);
            record.call = encode_call(call);
            record.waited_ms = waited.as_millis() as u64;
            record.name_len = put(group, &mut record.name);
        }
        CommError::Left { rank, waiting_rank, group, call } => {
            record.kind = LEFT;
            (record.rank, record.other_rank) = (*rank as u32, *waiting_rank as u32);
            record.call = encode_call(call);
            record.name_len = put(group, &mut record.name);
        }
        CommError::Stuck { rank, group, call, waited } => {
            record.kind = STUCK;
            record.rank = *rank as u32;
            record.call = encode_call(call);
            record.waited_ms = waited.as_millis() as u64;
            record.name_len = put(group, &mut record.name);
        }
        CommError::GaveUp { rank, reason } => {
            record.rank = *rank as u32;
            record.text_len = put(reason, &mut record.text);
        }
        // An error of the author's own: to the others it is the reason why it does not go on.
        own => record.text_len = put(&own.to_string(), &mut record.text),
    }
    record
}

fn decode(record: &Record) -> CommError {
    let (rank, other) = (record.rank as usize, record.other_rank as usize);
    let group = get(&record.name, record.name_len);
    let text = get(&record.text, record.text_len);
    match record.kind {
        MISMATCH => CommError::Mismatch {
            group,
            rank,
            call: decode_call(record.call),
            other_rank: other,
            other_call: decode_call(record.other_call),
        },
        DIED => CommError::Died { rank, detail: text },
        STALLED => CommError::Stalled {
            rank,
            waiting_rank: other,
            group,
            call: decode_call(record.call),
            waited: Duration::from_millis(record.waited_ms),
        },
        LEFT => CommError::Left { rank, waiting_rank: other, group, call: decode_call(record.call) },
        STUCK => CommError::Stuck {
            rank,
            group,
            call: decode_call(record.call),
            waited: Duration::from_millis(record.waited_ms),
        },
        _ => CommError::GaveUp { rank, reason: text },
    }
}
