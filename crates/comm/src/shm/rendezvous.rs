//! How processes find each other and get the shared memory.
//!
//! Messages are JSON, one a packet: a handful at start-up, readable in a trace, and tolerant of fields that
//! another version adds. Sockets of the abstract namespace obey no file permissions, so both ends check that
//! the other is of the same user.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{MemfdFlags, Mode, SealFlags};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};
use serde::{Deserialize, Serialize};

use super::ShmOptions;
use crate::arena::Arena;
use crate::universe::Universe;
use crate::{CommError, JoinProblem};

/// Changes when the layout of the shared memory or the messages do.
const VERSION: u32 = 1;
/// Bytes of the name of an abstract socket, as the kernel has it.
const NAME_LIMIT: usize = 107;
/// The longest message.
const MESSAGE_BYTES: usize = 64 << 10;
/// After a problem rank 0 waits so long for ranks that have not come yet, so that they hear of it, too.
const GRACE: Duration = Duration::from_secs(2);

/// What a rank says first.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Hello {
    version: u32,
    rank: usize,
    world_size: usize,
    pid: u32,
    fingerprint: String,
}

/// What rank 0 answers.
#[derive(Debug, Serialize, Deserialize)]
enum Reply {
    /// Not all are there.
    Waiting { missing: Vec<usize> },
    /// It will not work.
    Refused { problem: JoinProblem },
    /// All are there; comes with the memory. `pids` of all ranks.
    Welcome { pids: Vec<u32>, slot_bytes: usize },
    /// Comes with a socket to `rank`.
    Peer { rank: usize },
}

/// Another rank's process.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) rank: usize,
    pub(super) pid: u32,
    pub(super) socket: OwnedFd,
}

/// What a rank has when all have met.
pub(super) struct Met {
    pub(super) memory: OwnedFd,
    pub(super) slot_bytes: usize,
    pub(super) peers: Vec<Peer>,
}

/// The error of a rank that cannot join.
pub(super) fn refused(options: &ShmOptions, problem: JoinProblem) -> CommError {
    CommError::Join { rank: options.rank, rendezvous: options.rendezvous.clone(), problem }
}

/// Meets the other ranks.
pub(super) fn meet(options: &ShmOptions) -> Result<Met, CommError> {
    let uid = rustix::process::getuid().as_raw();
    let name = format!("shardwise/{uid}/{}", options.rendezvous);
    let too_long = || refused(options, JoinProblem::NameTooLong { length: name.len(), limit: NAME_LIMIT });
    let address = SocketAddrUnix::new_abstract_name(name.as_bytes()).map_err(|_| too_long())?;
    let hello = Hello {
        version: VERSION,
        rank: options.rank,
        world_size: options.world_size,
        pid: std::process::id(),
        fingerprint: options.fingerprint.clone(),
    };
    let until = Instant::now() + options.join_deadline;
    if options.rank == 0 {
        Host { options, hello, uid, until, guests: Vec::new(), problem: None }.welcome_all(&address)
    } else {
        Guest { options, hello, uid, until }.arrive(&address)
    }
}

/// Another process at rank 0's door.
struct Connection {
    socket: OwnedFd,
    /// What it said, once it has.
    hello: Option<Hello>,
    is_gone: bool,
}

/// Rank 0 while the ranks come together.
struct Host<'a> {
    options: &'a ShmOptions,
    hello: Hello,
    uid: u32,
    until: Instant,
    guests: Vec<Connection>,
    /// The first problem, and when it showed.
    problem: Option<(JoinProblem, Instant)>,
}

impl Host<'_> {
    fn welcome_all(mut self, address: &SocketAddrUnix) -> Result<Met, CommError> {
        let listener = open_socket()?;
        match rustix::net::bind(&listener, address) {
            Err(Errno::ADDRINUSE) => return Err(refused(self.options, JoinProblem::Duplicate { rank: 0 })),
            bound => bound.map_err(|errno| CommError::system("bind the rendezvous socket", errno))?,
        }
        rustix::net::listen(&listener, 128)
            .map_err(|errno| CommError::system("listen at the rendezvous socket", errno))?;
        while !self.is_done() {
            self.hear(&listener)?;
        }
        drop(listener);
        if let Some((problem, _)) = self.problem.take() {
            self.tell_all(&Reply::Refused { problem: problem.clone() });
            return Err(refused(self.options, problem));
        }
        self.hand_out()
    }

    /// Whether to stop listening: all are there, or hope is lost.
    fn is_done(&mut self) -> bool {
        let (now, missing) = (Instant::now(), self.missing());
        if missing.is_empty() {
            return true;
        }
        if now >= self.until && self.problem.is_none() {
            let waited_s = self.options.join_deadline.as_secs();
            let problem = JoinProblem::Missing { missing, world_size: self.options.world_size, waited_s };
            self.problem = Some((problem, now));
        }
        now >= self.until || self.problem.as_ref().is_some_and(|(_, since)| now >= *since + GRACE)
    }

    fn missing(&self) -> Vec<usize> {
        let is_here = |rank: &usize| {
            self.guests.iter().any(|guest| guest.hello.as_ref().is_some_and(|h| h.rank == *rank))
        };
        (1..self.options.world_size).filter(|rank| !is_here(rank)).collect()
    }

    /// Waits for something to happen at the door or among the guests, and deals with it.
    fn hear(&mut self, listener: &OwnedFd) -> Result<(), CommError> {
        let here: Vec<usize> = (0..self.guests.len()).filter(|&i| !self.guests[i].is_gone).collect();
        let until = self.problem.as_ref().map_or(self.until, |(_, since)| self.until.min(*since + GRACE));
        let mut watched = vec![PollFd::new(listener, PollFlags::IN)];
        watched.extend(here.iter().map(|&i| PollFd::new(&self.guests[i].socket, PollFlags::IN)));
        wait_for_any(&mut watched, until)?;
        let ready: Vec<bool> = watched.iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(watched);
        for (&i, _) in here.iter().zip(&ready[1..]).filter(|(_, ready)| **ready) {
            self.hear_guest(i);
        }
        if ready[0] {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            // A guest that has given up again is none.
            if let Ok(socket) = rustix::net::accept_with(listener, flags)
                && peer_uid(socket.as_fd()) == Some(self.uid)
            {
                self.guests.push(Connection { socket, hello: None, is_gone: false });
            }
        }
        Ok(())
    }

    fn hear_guest(&mut self, i: usize) {
        let guest = &mut self.guests[i];
        let hello = match receive::<Hello>(guest.socket.as_fd()) {
            Ok(Some((hello, _))) if guest.hello.is_none() => hello,
            Err(Errno::AGAIN | Errno::INTR) => return,
            // It hung up, or does not speak our language.
            _ => {
                guest.is_gone = true;
                if let Some(hello) = &guest.hello {
                    let problem = JoinProblem::BrokeOff { rank: hello.rank };
                    self.problem.get_or_insert((problem, Instant::now()));
                }
                return;
            }
        };
        if let Some(problem) = self.compare(&hello) {
            self.problem.get_or_insert((problem, Instant::now()));
        }
        self.guests[i].hello = Some(hello);
        let missing = self.missing();
        self.tell_all(&Reply::Waiting { missing });
    }

    /// What keeps the author of `theirs` out, if anything.
    fn compare(&self, theirs: &Hello) -> Option<JoinProblem> {
        let ours = &self.hello;
        if theirs.version != ours.version {
            return Some(JoinProblem::Version {
                rank: ours.rank,
                version: ours.version,
                other_rank: theirs.rank,
                other_version: theirs.version,
            });
        }
        if theirs.world_size != ours.world_size {
            return Some(JoinProblem::WorldSize {
                rank: ours.rank,
                world_size: ours.world_size,
                other_rank: theirs.rank,
                other_world_size: theirs.world_size,
            });
        }
        if theirs.fingerprint != ours.fingerprint {
            return Some(JoinProblem::Fingerprint {
                rank: ours.rank,
                fingerprint: ours.fingerprint.clone(),
                other_rank: theirs.rank,
                other_fingerprint: theirs.fingerprint.clone(),
            });
        }
        let is_taken = self
            .guests
            .iter()
            .filter_map(|guest| guest.hello.as_ref())
            .any(|other| other.rank == theirs.rank);
        is_taken.then_some(JoinProblem::Duplicate { rank: theirs.rank })
    }

    fn tell_all(&self, reply: &Reply) {
        for guest in self.guests.iter().filter(|guest| guest.hello.is_some()) {
            // Who cannot be told has gone, which shows when it is heard next.
            let _ = send(guest.socket.as_fd(), reply, None);
        }
    }

    /// Makes the memory, and gives every rank what it needs to reach all others.
    fn hand_out(self) -> Result<Met, CommError> {
        let slot_bytes = self.options.slot_bytes;
        let memory = make_memory(self.options.world_size, slot_bytes)?;
        let mut guests: Vec<(Hello, OwnedFd)> = Vec::new();
        for guest in self.guests {
            guests.extend(guest.hello.map(|hello| (hello, guest.socket)));
        }
        guests.sort_by_key(|(hello, _)| hello.rank);
        let pids: Vec<u32> =
            [self.hello.pid].into_iter().chain(guests.iter().map(|(hello, _)| hello.pid)).collect();
        let give = |(hello, socket): &(Hello, OwnedFd), reply: &Reply, file: &OwnedFd| {
            let broke_off = |_| refused(self.options, JoinProblem::BrokeOff { rank: hello.rank });
            send(socket.as_fd(), reply, Some(file.as_fd())).map_err(broke_off)
        };
        for guest in &guests {
            give(guest, &Reply::Welcome { pids: pids.clone(), slot_bytes }, &memory)?;
        }
        for (i, one) in guests.iter().enumerate() {
            for other in &guests[i + 1..] {
                let (a, b) = rustix::net::socketpair(
                    AddressFamily::UNIX,
                    SocketType::SEQPACKET,
                    SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
                    None,
                )
                .map_err(|errno| CommError::system("make a pair of sockets", errno))?;
                give(one, &Reply::Peer { rank: other.0.rank }, &a)?;
                give(other, &Reply::Peer { rank: one.0.rank }, &b)?;
            }
        }
        let peers =
            guests.into_iter().map(|(hello, socket)| Peer { rank: hello.rank, pid: hello.pid, socket });
        Ok(Met { memory, slot_bytes, peers: peers.collect() })
    }
}

/// A rank other than 0 while the ranks come together.
struct Guest<'a> {
    options: &'a ShmOptions,
    hello: Hello,
    uid: u32,
    until: Instant,
}

impl Guest<'_> {
    fn arrive(&self, address: &SocketAddrUnix) -> Result<Met, CommError> {
        let socket = self.connect(address)?;
        match peer_uid(socket.as_fd()) {
            Some(uid) if uid == self.uid => {}
            uid => {
                let (uid, expected_uid) = (uid.unwrap_or(u32::MAX), self.uid);
                return Err(refused(self.options, JoinProblem::ForeignUser { uid, expected_uid }));
            }
        }
        send(socket.as_fd(), &self.hello, None).map_err(|_| self.host_broke_off())?;
        let mut missing = vec![0];
        let mut welcome: Option<(OwnedFd, usize, Vec<u32>)> = None;
        let mut peers: Vec<(usize, OwnedFd)> = Vec::new();
        loop {
            if let Some((memory, slot_bytes, pids)) =
                welcome.take_if(|_| peers.len() == self.options.world_size - 2)
            {
                peers.push((0, socket));
                let pid = |rank: usize| pids.get(rank).copied().unwrap_or(0);
                let peers = peers.into_iter().map(|(rank, socket)| Peer { rank, pid: pid(rank), socket });
                return Ok(Met { memory, slot_bytes, peers: peers.collect() });
            }
            let mut watched = [PollFd::new(&socket, PollFlags::IN)];
            // A little more patience than rank 0 has, whose word counts.
            wait_for_any(&mut watched, self.until + GRACE)?;
            match receive::<Reply>(socket.as_fd()) {
                Ok(Some((Reply::Waiting { missing: ranks }, _))) => missing = ranks,
                Ok(Some((Reply::Refused { problem }, _))) => return Err(refused(self.options, problem)),
                Ok(Some((Reply::Welcome { pids, slot_bytes }, Some(memory)))) => {
                    welcome = Some((memory, slot_bytes, pids));
                }
                Ok(Some((Reply::Peer { rank }, Some(socket)))) => peers.push((rank, socket)),
                Err(Errno::AGAIN | Errno::INTR) if Instant::now() < self.until + GRACE => {}
                Err(Errno::AGAIN | Errno::INTR) => return Err(self.timed_out(missing)),
                _ => return Err(self.host_broke_off()),
            }
        }
    }

    /// Rank 0 may not be listening yet.
    fn connect(&self, address: &SocketAddrUnix) -> Result<OwnedFd, CommError> {
        loop {
            let socket = open_socket()?;
            match rustix::net::connect(&socket, address) {
                Ok(()) => return Ok(socket),
                Err(Errno::CONNREFUSED | Errno::AGAIN | Errno::INTR) if Instant::now() < self.until => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                Err(Errno::CONNREFUSED | Errno::AGAIN | Errno::INTR) => return Err(self.timed_out(vec![0])),
                Err(errno) => return Err(CommError::system("connect to the rendezvous socket", errno)),
            }
        }
    }

    fn timed_out(&self, missing: Vec<usize>) -> CommError {
        let (world_size, waited_s) = (self.options.world_size, self.options.join_deadline.as_secs());
        refused(self.options, JoinProblem::Missing { missing, world_size, waited_s })
    }

    fn host_broke_off(&self) -> CommError {
        refused(self.options, JoinProblem::BrokeOff { rank: 0 })
    }
}

/// The memory of a new world. It has no name; whoever holds the file has it, and nobody can take pages away.
fn make_memory(world_size: usize, slot_bytes: usize) -> Result<OwnedFd, CommError> {
    let refused = |errno| CommError::system("make the ranks' shared memory", errno);
    let memory = rustix::fs::memfd_create("shardwise", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
        .map_err(refused)?;
    rustix::fs::fchmod(&memory, Mode::RUSR | Mode::WUSR).map_err(refused)?;
    rustix::fs::fcntl_add_seals(&memory, SealFlags::SHRINK).map_err(refused)?;
    let copy = rustix::io::fcntl_dupfd_cloexec(&memory, 0).map_err(refused)?;
    Universe::found(&std::sync::Arc::new(Arena::File(copy)), world_size, slot_bytes)?;
    Ok(memory)
}

fn open_socket() -> Result<OwnedFd, CommError> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
        .map_err(|errno| CommError::system("make the rendezvous socket", errno))
}

fn peer_uid(socket: BorrowedFd<'_>) -> Option<u32> {
    rustix::net::sockopt::socket_peercred(socket).ok().map(|credentials| credentials.uid.as_raw())
}

/// Waits until something is ready or `until` has come.
fn wait_for_any(watched: &mut [PollFd<'_>], until: Instant) -> Result<(), CommError> {
    let left = until.saturating_duration_since(Instant::now());
    let timeout = rustix::event::Timespec { tv_sec: left.as_secs() as _, tv_nsec: left.subsec_nanos() as _ };
    match poll(watched, Some(&timeout)) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(errno) => Err(CommError::system("wait at the rendezvous socket", errno)),
    }
}

fn send(socket: BorrowedFd<'_>, message: &impl Serialize, file: Option<BorrowedFd<'_>>) -> Result<(), Errno> {
    let text = serde_json::to_vec(message).expect("plain structures become JSON");
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let files = file.as_slice();
    if !files.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(files));
    }
    rustix::net::sendmsg(socket, &[IoSlice::new(&text)], &mut ancillary, SendFlags::NOSIGNAL).map(drop)
}

/// The next message and the file that came with it; `None` at the end, or if it makes no sense.
fn receive<T: for<'a> Deserialize<'a>>(
    socket: BorrowedFd<'_>,
) -> Result<Option<(T, Option<OwnedFd>)>, Errno> {
    let mut text = vec![0; MESSAGE_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let received = rustix::net::recvmsg(socket, &mut [IoSliceMut::new(&mut text)], &mut ancillary, flags)?;
    let mut file = None;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(files) = message {
            file = files.last();
        }
    }
    Ok(serde_json::from_slice(&text[..received.bytes]).ok().map(|message| (message, file)))
}
