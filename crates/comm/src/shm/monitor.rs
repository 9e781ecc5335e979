//! Seeing that a rank's process is gone.
//!
//! The kernel closes a process's sockets however it ends. So a thread that sleeps in `poll` on one socket per
//! peer sees every death at once and costs nothing meanwhile. A rank that leaves in good order says so in
//! shared memory before it closes its sockets.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

use super::rendezvous::Peer;
use crate::CommError;
use crate::universe::Universe;

/// This process's presence in the world: ends in good order when dropped.
pub(super) struct Presence {
    universe: Arc<Universe>,
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

/// Starts the monitor. It owns the sockets.
pub(super) fn watch(universe: Arc<Universe>, peers: Vec<Peer>) -> Result<Presence, CommError> {
    let stop =
        eventfd(0, EventfdFlags::CLOEXEC).map_err(|errno| CommError::system("make an event", errno))?;
    let stop = Arc::new(stop);
    let (watched, until) = (Arc::clone(&universe), Arc::clone(&stop));
    let thread = std::thread::Builder::new()
        .name("comm-monitor".to_owned())
        .spawn(move || monitor(&watched, peers, &until))
        .map_err(|error| CommError::system("start the monitor thread", error))?;
    Ok(Presence { universe, stop, thread: Some(thread) })
}

impl Drop for Presence {
    fn drop(&mut self) {
        self.universe.depart();
        // Cannot fail: an event counter takes 2^64 - 2 such writes.
        let _ = rustix::io::write(&*self.stop, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            // The thread does not panic; if it did, its sockets are closed as well.
            let _ = thread.join();
        }
    }
}

fn monitor(universe: &Universe, mut peers: Vec<Peer>, stop: &OwnedFd) {
    loop {
        let mut watched: Vec<_> = peers.iter().map(|peer| PollFd::new(&peer.socket, PollFlags::IN)).collect();
        watched.push(PollFd::new(stop, PollFlags::IN));
        match poll(&mut watched, None) {
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(errno) => {
                drop(watched);
                let reason = format!("its monitor could not poll: {errno}");
                universe.fail(&CommError::GaveUp { rank: universe.rank(), reason });
                return;
            }
        }
        let mut closed: Vec<bool> = watched.iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(watched);
        if closed.pop() == Some(true) {
            return;
        }
        let mut closed = closed.into_iter();
        // Nobody sends anything on these sockets, so whatever happens there is the end.
        peers.retain(|peer| {
            let is_closed = closed.next().unwrap_or(false);
            if is_closed && !universe.has_departed(peer.rank) {
                let detail = format!("its process `{}` ended without leaving", peer.pid);
                universe.fail(&CommError::Died { rank: peer.rank, detail });
            }
            !is_closed
        });
    }
}
