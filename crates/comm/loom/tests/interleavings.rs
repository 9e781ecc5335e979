//! The model checker's view of the protocol: every interleaving of small worlds.
//!
//! The code under test is the real `word.rs` of `shardwise-comm`; only the atomic number and the kernel's
//! futex are loom's. A slot that is read while it is written, or read before it is published, is a failure;
//! so is a wake-up that gets lost, as sleeping has no timeout here and the model would never end.

use std::time::Duration;

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::thread;
use shardwise_comm_loom::word::{Seen, Word, next};

const LONG: Duration = Duration::from_secs(1);

/// Two slots for each of `N` ranks, guarded by nothing but the words.
struct World<const N: usize> {
    words: [Word; N],
    slots: [[UnsafeCell<u32>; 2]; N],
}

impl<const N: usize> World<N> {
    fn new() -> Arc<Self> {
        let words = std::array::from_fn(|_| Word::default());
        let slots = std::array::from_fn(|_| std::array::from_fn(|_| UnsafeCell::new(0)));
        Arc::new(World { words, slots })
    }

    /// One phase as in `Exchange`: fill, publish, wait for all, read all. `Err` says what was seen instead.
    fn phase(&self, me: usize, phase: u32, spin: Duration) -> Result<(), Seen> {
        let parity = (phase % 2) as usize;
        // SAFETY: what is tested: loom fails if anyone reads it meanwhile.
        self.slots[me][parity].with_mut(|slot| unsafe { *slot = 10 * phase + me as u32 });
        self.words[me].advance();
        for peer in (0..N).filter(|peer| *peer != me) {
            loop {
                match self.words[peer].wait(next(phase), spin, LONG) {
                    Seen::Reached => break,
                    Seen::Nothing => {}
                    seen => return Err(seen),
                }
            }
            // SAFETY: likewise, if anyone writes to it meanwhile.
            self.slots[peer][parity].with(|slot| assert_eq!(unsafe { *slot }, 10 * phase + peer as u32));
        }
        Ok(())
    }
}

fn model(preemptions: usize, f: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(f);
}

#[test]
fn two_ranks_exchange_without_races_or_lost_wakeups() {
    model(3, || {
        let world = World::<2>::new();
        let other = Arc::clone(&world);
        let peer =
            thread::spawn(move || (0..3).for_each(|phase| other.phase(1, phase, Duration::ZERO).unwrap()));
        (0..3).for_each(|phase| world.phase(0, phase, Duration::ZERO).unwrap());
        peer.join().unwrap();
    });
}

#[test]
fn a_look_before_sleeping_changes_nothing() {
    model(2, || {
        let world = World::<2>::new();
        let other = Arc::clone(&world);
        let peer = thread::spawn(move || (0..2).for_each(|phase| other.phase(1, phase, LONG).unwrap()));
        (0..2).for_each(|phase| world.phase(0, phase, LONG).unwrap());
        peer.join().unwrap();
    });
}

#[test]
fn three_ranks_exchange() {
    model(2, || {
        let world = World::<3>::new();
        let peers = [1, 2].map(|me| {
            let world = Arc::clone(&world);
            thread::spawn(move || (0..2).for_each(|phase| world.phase(me, phase, Duration::ZERO).unwrap()))
        });
        (0..2).for_each(|phase| world.phase(0, phase, Duration::ZERO).unwrap());
        peers.into_iter().for_each(|peer| peer.join().unwrap());
    });
}

#[test]
fn poison_wakes_everyone_whenever_it_comes() {
    model(3, || {
        let world = World::<2>::new();
        // Rank 1 comes to the first phase only; a third thread (a monitor) poisons at any time.
        let (peer, monitor) = (Arc::clone(&world), Arc::clone(&world));
        let peer = thread::spawn(move || peer.phase(1, 0, Duration::ZERO));
        let monitor = thread::spawn(move || monitor.words.iter().for_each(Word::poison));
        let seen = world.phase(0, 0, Duration::ZERO).and_then(|()| world.phase(0, 1, Duration::ZERO));
        assert_eq!(seen, Err(Seen::Poisoned));
        assert!(matches!(peer.join().unwrap(), Ok(()) | Err(Seen::Poisoned)));
        monitor.join().unwrap();
    });
}

#[test]
fn leaving_wakes_those_who_wait_and_hides_no_finished_phase() {
    model(3, || {
        let world = World::<2>::new();
        let peer = Arc::clone(&world);
        let peer = thread::spawn(move || {
            let done = peer.phase(1, 0, Duration::ZERO);
            peer.words[1].leave();
            done
        });
        assert_eq!(world.phase(0, 0, Duration::ZERO), Ok(()));
        assert_eq!(world.phase(0, 1, Duration::ZERO), Err(Seen::Left));
        assert_eq!(peer.join().unwrap(), Ok(()));
    });
}
