//! Ranks as processes of one host, over shared memory.
//!
//! [`join`] brings the processes together, however they were started. They meet at an abstract Unix socket
//! whose name comes from the user and a `rendezvous` text that all ranks know (`MASTER_ADDR:MASTER_PORT`,
//! say); rank 0 hands every rank the memory (a file without a name) and a socket to every other rank. Nothing
//! of this has a name in the file system, so there is nothing to clean up after a crash.
//!
//! ```text
//! rank 0   listen ── hello of 1, 2, .. ── compare ── make memory ── hand out memory and sockets ─┐
//! rank r   connect (and again) ── hello ─────────────────────────── receive both ────────────────┴─► world
//! ```
//!
//! The sockets stay open and silent. A monitor thread sleeps on them: when one closes and its rank has not
//! left in good order, that rank's process is dead, and every other rank knows it at once.

mod monitor;
mod rendezvous;

use std::sync::Arc;
use std::time::Duration;

use crate::arena::Arena;
use crate::member::Member;
use crate::universe::Universe;
use crate::{CommError, Group, JoinProblem, Options};

/// How a process joins a world.
#[derive(Debug, Clone)]
pub struct ShmOptions {
    /// This process's rank.
    pub rank: usize,
    /// How many ranks there are.
    pub world_size: usize,
    /// What the ranks agree on to find each other; two runs of one user at the same time need different ones.
    pub rendezvous: String,
    /// How long to wait for the other ranks to join.
    pub join_deadline: Duration,
    /// What must be equal on all ranks, a digest of the configuration for example. A difference is an error
    /// on all.
    pub fingerprint: String,
    /// See [`Options::deadline`].
    pub deadline: Duration,
    /// See [`Options::slot_bytes`]. Rank 0's counts for all.
    pub slot_bytes: usize,
}

impl ShmOptions {
    /// The defaults: a minute to join, [`Options::default`], no fingerprint.
    pub fn new(rank: usize, world_size: usize, rendezvous: impl Into<String>) -> Self {
        let Options { deadline, slot_bytes } = Options::default();
        ShmOptions {
            rank,
            world_size,
            rendezvous: rendezvous.into(),
            join_deadline: Duration::from_secs(60),
            fingerprint: String::new(),
            deadline,
            slot_bytes,
        }
    }
}

/// Joins the world of all ranks with this `rendezvous`, and returns this rank's handle on the group of all.
///
/// # Errors
/// [`CommError::Join`] saying what keeps the ranks apart; the same on all ranks that came.
/// [`CommError::System`] if the system refuses memory or sockets.
pub fn join(options: ShmOptions) -> Result<Group, CommError> {
    let ShmOptions { rank, world_size, .. } = options;
    if rank >= world_size {
        return Err(rendezvous::refused(&options, JoinProblem::RankOutOfRange { rank, world_size }));
    }
    let Options { deadline, slot_bytes } =
        Options { deadline: options.deadline, slot_bytes: options.slot_bytes };
    if world_size == 1 {
        let mut world = crate::thread::world(1, Options { deadline, slot_bytes });
        return Ok(world.pop().expect("a world of one rank has one handle"));
    }
    let met = rendezvous::meet(&options)?;
    let arena = Arc::new(Arena::File(met.memory));
    let options = Options { deadline, slot_bytes: met.slot_bytes };
    let (universe, segment) = Universe::enter(arena, rank, world_size, options)?;
    let presence = monitor::watch(Arc::clone(&universe), met.peers)?;
    let ranks = (0..world_size).collect();
    Ok(Arc::new(Member::new("world".to_owned(), ranks, rank, universe, segment, Arc::new(presence))))
}
