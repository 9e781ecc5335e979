//! Watches the ranks of one run from their start to their end.
//!
//! One loop on the main thread decides everything; it sleeps until something is said or a deadline passes.
//!
//! ```text
//! rank r  stdout ══► reader thread ─ Said, OutputClosed ─┐
//!         death  ──► waiter thread ─ Ended ──────────────┼─► inbox ─► loop ─► Watcher (screen)
//! Ctrl-C, SIGTERM ─► signal thread ─ Interrupt ──────────┘              └───► signals to the ranks
//! ```
//!
//! Ranks depend on each other in every collective: when one fails the others cannot go on, so the rest is ended
//! too ([`teardown`]), and the fault is found afterwards from what all of them said and how they died
//! ([`verdict`]). No rank outlives this process: the kernel kills them with the thread that started them, which
//! is why the loop and the starting share the main thread.

mod name;
mod rank;
mod teardown;
mod verdict;

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::process::Signal;
use shardwise_monitor::Event;
use shardwise_plan::Mesh;
use signal_hook::consts::{SIGINT, SIGTERM};

use name::name;
pub use rank::Launch;
use rank::RankProcess;
use teardown::{Next, Teardown};
pub use verdict::Failure;
use verdict::RankHistory;
#[cfg(test)]
pub use verdict::{Ending, Place};

/// How long lines that a rank wrote before it died may still take to arrive.
const DRAIN: Duration = Duration::from_secs(1);

/// What the threads around the loop tell it.
enum Message {
    /// A rank wrote an event.
    Said { rank: usize, event: Event },
    /// A rank will write no more.
    OutputClosed { rank: usize },
    /// A rank is dead and waits to be reaped.
    Ended { rank: usize },
    /// Someone asks this process to end.
    Interrupt { signal: i32 },
}

/// Shows what happens.
pub trait Watcher {
    /// A rank said something that is not about its end.
    fn event(&mut self, rank: usize, event: &Event);
    /// The supervisor itself has something to say.
    fn note(&mut self, text: &str);
}

/// How a run ended.
#[derive(Debug)]
pub enum Outcome {
    /// Every rank did all its work.
    Finished,
    /// Someone asked for the end; a rank may have failed on the way.
    Stopped { signal: i32, failure: Option<Failure> },
    /// A rank failed.
    Failed(Failure),
}

/// Starts the ranks and stays with them until all are gone. Call on the main thread.
///
/// # Errors
/// If the ranks could not be started or watched. How they fare is an [`Outcome`].
pub fn run(launch: &Launch, watcher: &mut dyn Watcher) -> anyhow::Result<Outcome> {
    let (sender, inbox) = channel();
    forward_interrupts(sender.clone())?;
    let mut supervisor = Supervisor {
        mesh: launch.mesh,
        ranks: Vec::with_capacity(launch.num_ranks()),
        inbox,
        clock: 0,
        interrupt: None,
        teardown: None,
        watcher,
    };
    for rank in 0..launch.num_ranks() {
        // On an error the ranks that already run are killed as `supervisor` is dropped.
        let process = RankProcess::start(launch, rank, &sender)?;
        supervisor.ranks.push(Watched { process, history: RankHistory::default(), output_open: true });
    }
    supervisor.watch()
}

/// Turns Ctrl-C and SIGTERM into messages.
fn forward_interrupts(sender: Sender<Message>) -> anyhow::Result<()> {
    let mut signals =
        signal_hook::iterator::Signals::new([SIGINT, SIGTERM]).context("could not handle Ctrl-C")?;
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || signals.forever().all(|signal| sender.send(Message::Interrupt { signal }).is_ok()))
        .context("could not start the signal thread")?;
    Ok(())
}

struct Watched {
    process: RankProcess,
    history: RankHistory,
    output_open: bool,
}

struct Supervisor<'a> {
    mesh: Mesh,
    ranks: Vec<Watched>,
    inbox: Receiver<Message>,
    /// Counts what happened to the ranks, so that it can be put in order later.
    clock: u64,
    /// The first request to end.
    interrupt: Option<i32>,
    /// Set once the ranks are being ended against their will.
    teardown: Option<Teardown>,
    watcher: &'a mut dyn Watcher,
}

impl Supervisor<'_> {
    fn watch(mut self) -> anyhow::Result<Outcome> {
        while self.ranks.iter().any(|rank| rank.process.is_alive()) {
            match self.receive(self.teardown.map(Teardown::deadline)) {
                Some(message) => self.handle(message)?,
                None => {
                    if self.escalate() == Next::GiveUp {
                        self.name_survivors();
                        break;
                    }
                }
            }
        }
        let drained_by = Instant::now() + DRAIN;
        while self.ranks.iter().any(|rank| rank.output_open) {
            match self.receive(Some(drained_by)) {
                Some(message) => self.handle(message)?,
                None => break,
            }
        }
        Ok(self.outcome())
    }

    /// The next message; `None` once the deadline has passed. Without a deadline it waits for ever.
    fn receive(&self, deadline: Option<Instant>) -> Option<Message> {
        let received = match deadline {
            None => self.inbox.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(deadline) => self.inbox.recv_timeout(deadline.saturating_duration_since(Instant::now())),
        };
        match received {
            Ok(message) => Some(message),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => unreachable!("the signal thread keeps its end for ever"),
        }
    }

    fn handle(&mut self, message: Message) -> anyhow::Result<()> {
        self.clock += 1;
        match message {
            Message::Said { rank, event } => {
                self.ranks[rank].history.say(self.clock, &event);
                match event {
                    Event::Error(_) => self.begin_teardown(),
                    event => self.watcher.event(rank, &event),
                }
            }
            Message::OutputClosed { rank } => self.ranks[rank].output_open = false,
            Message::Ended { rank } => {
                let watched = &mut self.ranks[rank];
                let ending = watched.process.reap().with_context(|| format!("could not reap rank {rank}"))?;
                watched.history.end(self.clock, ending);
                if watched.history.ended_badly() || watched.history.ended_early() {
                    self.begin_teardown();
                }
            }
            Message::Interrupt { signal } => self.interrupted(signal),
        }
        Ok(())
    }

    /// Once: the ranks finish their step. Twice, or while they are being ended anyway: at once.
    fn interrupted(&mut self, signal: i32) {
        if self.interrupt.is_none() && self.teardown.is_none() {
            self.interrupt = Some(signal);
            self.watcher.note("stopping after this step, press Ctrl-C again to stop at once");
            self.signal_all(Signal::TERM);
        } else {
            self.teardown = Some(Teardown::killed(Instant::now()));
            self.signal_all(Signal::KILL);
        }
    }

    fn begin_teardown(&mut self) {
        self.teardown.get_or_insert_with(|| Teardown::begin(Instant::now()));
    }

    /// A deadline of the teardown has passed.
    fn escalate(&mut self) -> Next {
        let Some(teardown) = &mut self.teardown else { return Next::Wait };
        let next = teardown.escalate(Instant::now());
        match next {
            Next::Terminate => self.signal_all(Signal::TERM),
            Next::Kill => self.signal_all(Signal::KILL),
            Next::Wait | Next::GiveUp => {}
        }
        next
    }

    /// The kernel ends these as soon as it lets go of them; nothing is left to do here.
    fn name_survivors(&mut self) {
        for (rank, watched) in self.ranks.iter().enumerate().filter(|(_, watched)| watched.process.is_alive())
        {
            let id = watched.process.id();
            self.watcher.note(&format!(
                "{}, process {id}, was killed but is stuck in the kernel",
                name(&self.mesh, rank)
            ));
        }
    }

    fn signal_all(&mut self, signal: Signal) {
        for rank in &mut self.ranks {
            rank.process.signal(signal);
        }
    }

    fn outcome(self) -> Outcome {
        let failure = verdict::blame(self.ranks.iter().map(|rank| &rank.history));
        match (self.interrupt, failure) {
            (Some(signal), failure) => {
                // A rank that cannot listen yet dies of the request, and its peers miss it: nobody's fault.
                let failure = failure.filter(|failure| !failure.is_secondary());
                Outcome::Stopped { signal, failure }
            }
            (None, Some(failure)) => Outcome::Failed(failure),
            (None, None) => Outcome::Finished,
        }
    }
}
