//! Who is to blame.
//!
//! When a rank dies its peers fail too, in an order that nobody controls, and the supervisor itself ends those
//! that hang. So each rank's end is judged by what it said and by whether it was asked to end, and the first rank
//! at fault is named. Pure: a history goes in, a [`Failure`] comes out.

use std::process::ExitStatus;

use shardwise_monitor::{ErrorEvent, Event};
use shardwise_plan::Mesh;

use super::name::{name, placed};

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    Exited(i32),
    Killed(i32),
}

impl From<ExitStatus> for Ending {
    fn from(status: ExitStatus) -> Self {
        use std::os::unix::process::ExitStatusExt;
        // A status that is no exit is a signal: stops and continues are not waited for.
        status.code().map_or_else(|| Ending::Killed(status.signal().unwrap_or(0)), Ending::Exited)
    }
}

/// Whether an end was this supervisor's doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// The rank ended on its own.
    No,
    /// The rank was sent the signal it died of, or exited after it was sent one.
    Yes,
}

/// Where a rank was, as far as it said.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Place {
    pub phase: Option<String>,
    pub step: Option<u64>,
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.step, &self.phase) {
            (Some(step), None) => write!(f, "in step {step}"),
            (Some(step), Some(phase)) => write!(f, "after it began step {step}, while {phase}"),
            (None, Some(phase)) => write!(f, "while {phase}"),
            (None, None) => f.write_str("as it started"),
        }
    }
}

/// What one rank said and how it ended, with the time of each on a counter that all ranks share.
#[derive(Debug, Default)]
pub struct RankHistory {
    place: Place,
    done: bool,
    error: Option<(u64, ErrorEvent)>,
    ending: Option<(u64, Ending, Asked)>,
}

impl RankHistory {
    /// The rank said something.
    pub fn say(&mut self, time: u64, event: &Event) {
        match event {
            Event::Phase { phase } => self.place.phase = Some(phase.clone()),
            Event::BeginStep { step } => self.place = Place { phase: None, step: Some(*step) },
            // The first error is the cause; what follows is its wake.
            Event::Error(error) => {
                self.error.get_or_insert_with(|| (time, error.clone()));
            }
            Event::Done => self.done = true,
            Event::Step(_) | Event::Note { .. } | Event::Sample { .. } => {}
        }
    }

    /// The rank ended.
    pub fn end(&mut self, time: u64, (ending, asked): (Ending, Asked)) {
        self.ending = Some((time, ending, asked));
    }

    /// Whether the rank ended in a way that leaves its peers waiting.
    pub fn ended_badly(&self) -> bool {
        match self.ending {
            None | Some((_, _, Asked::Yes)) => false,
            Some((_, Ending::Exited(0), Asked::No)) => !self.done,
            Some((_, _, Asked::No)) => true,
        }
    }

    /// Whether the rank ended without having done all its work, asked to or not: its peers may wait for it.
    pub fn ended_early(&self) -> bool {
        self.ending.is_some() && !self.done
    }

    /// When this rank failed and whether by its own fault; `None` if it did not.
    fn fault(&self) -> Option<(Fault, u64)> {
        match (&self.error, self.ending) {
            (Some((time, error)), _) => {
                Some((if error.secondary { Fault::Secondary } else { Fault::Primary }, *time))
            }
            (None, Some((time, _, _))) if self.ended_badly() => Some((Fault::Primary, time)),
            (None, _) => None,
        }
    }
}

/// In order of blame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    Primary,
    Secondary,
}

/// The rank at fault and all that is known of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    pub rank: usize,
    pub place: Place,
    /// What the rank itself said.
    pub error: Option<ErrorEvent>,
    /// `None` if it was still alive when the supervisor gave up on it.
    pub ending: Option<Ending>,
}

/// The first rank that failed by its own fault, or if none did, the first that failed at all.
pub fn blame<'a>(ranks: impl Iterator<Item = &'a RankHistory>) -> Option<Failure> {
    let (_, rank, history) = ranks
        .enumerate()
        .filter_map(|(rank, history)| Some((history.fault()?, rank, history)))
        .min_by_key(|(fault, _, _)| *fault)?;
    Some(Failure {
        rank,
        place: history.place.clone(),
        error: history.error.as_ref().map(|(_, error)| error.clone()),
        ending: history.ending.map(|(_, ending, _)| ending),
    })
}

impl Failure {
    /// Whether the run never was possible: a rank refused its configuration.
    pub fn is_configuration(&self) -> bool {
        self.ending == Some(Ending::Exited(2))
    }

    /// Whether no rank is known to be at fault: this one only felt that another was gone.
    pub fn is_secondary(&self) -> bool {
        self.error.as_ref().is_some_and(|error| error.secondary)
    }

    /// What happened, in one line, with the places of ranks on the mesh.
    pub fn message(&self, mesh: &Mesh) -> String {
        let Failure { rank, place, error, ending } = self;
        let rank = name(mesh, *rank);
        let end = match ending {
            Some(Ending::Killed(number)) => format!("was killed by signal {}", signal_name(*number)),
            Some(Ending::Exited(0)) => "ended before its work was done".to_owned(),
            Some(Ending::Exited(code)) => format!("exited with code {code}"),
            None => "does not end".to_owned(),
        };
        match error {
            // Every rank reads the same configuration: which one spoke first says nothing.
            Some(error) if self.is_configuration() => {
                error.message.strip_prefix("error: ").unwrap_or(&error.message).to_owned()
            }
            Some(error) => format!("{rank} failed {place}: {}", placed(mesh, &error.message)),
            None => format!("{rank} {end} {place}"),
        }
    }

    /// How to go on from here.
    pub fn hint(&self) -> Option<String> {
        if let Some(error) = &self.error {
            return error.hint.clone();
        }
        let hint = match self.ending? {
            Ending::Killed(9) => {
                "the kernel's out-of-memory killer does this: `dmesg` tells, and a smaller micro-batch, more ranks \
                 or a higher ZeRO stage need less memory"
            }
            Ending::Killed(7) => {
                "a file that the rank had mapped was cut short (token files must stay as they are during a run), or the \
                 host's shared memory is full"
            }
            Ending::Killed(4 | 6 | 8 | 11) => {
                "a crash in native code: the end of the rank's log may say where"
            }
            Ending::Exited(143) => {
                "someone other than this command sent SIGTERM to a rank, and all stopped after that step"
            }
            Ending::Exited(101) => "a panic, which is a bug of ours: the rank's log says where",
            Ending::Killed(_) | Ending::Exited(_) => return None,
        };
        Some(hint.to_owned())
    }
}

/// `9 (SIGKILL)`.
fn signal_name(number: i32) -> String {
    match signal_hook::low_level::signal_name(number) {
        Some(name) => format!("{number} ({name})"),
        None => number.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(message: &str, secondary: bool) -> Event {
        Event::Error(ErrorEvent { message: message.into(), hint: None, secondary })
    }

    /// A world of three ranks in step 7.
    struct World([RankHistory; 3], u64);

    impl World {
        fn new() -> Self {
            let mut world = World(Default::default(), 0);
            (0..3).for_each(|rank| world.say(rank, Event::BeginStep { step: 7 }));
            world
        }
        fn say(&mut self, rank: usize, event: Event) {
            self.1 += 1;
            self.0[rank].say(self.1, &event);
        }
        fn end(&mut self, rank: usize, ending: Ending, asked: Asked) {
            self.1 += 1;
            self.0[rank].end(self.1, (ending, asked));
        }
        fn message(&self) -> Option<String> {
            self.message_on(&Mesh::new(3, 1, 1).unwrap())
        }
        fn message_on(&self, mesh: &Mesh) -> Option<String> {
            blame(self.0.iter()).map(|failure| failure.message(mesh))
        }
    }

    #[test]
    fn a_clean_run_has_no_one_to_blame() {
        let mut world = World::new();
        for rank in 0..3 {
            world.say(rank, Event::Done);
            world.end(rank, Ending::Exited(0), Asked::No);
        }
        assert_eq!(world.message(), None);
    }

    #[test]
    fn the_killed_rank_is_named_though_its_peers_speak_first() {
        let mut world = World::new();
        world.say(0, error("rank 1 is gone", true));
        world.end(0, Ending::Exited(1), Asked::No);
        world.end(1, Ending::Killed(9), Asked::No);
        world.end(2, Ending::Killed(9), Asked::Yes);
        assert_eq!(world.message().unwrap(), "rank 1 was killed by signal 9 (SIGKILL) in step 7");
    }

    #[test]
    fn the_first_fault_wins() {
        let mut world = World::new();
        world.say(2, error("disk full", false));
        world.end(0, Ending::Killed(6), Asked::No);
        world.end(2, Ending::Exited(1), Asked::No);
        assert_eq!(world.message().unwrap(), "rank 2 failed in step 7: disk full");
    }

    #[test]
    fn a_rank_that_crashes_after_a_peers_failure_stays_secondary() {
        let mut world = World::new();
        world.say(0, error("rank 2 is gone", true));
        world.end(0, Ending::Killed(6), Asked::No);
        world.end(2, Ending::Exited(101), Asked::No);
        assert_eq!(world.message().unwrap(), "rank 2 exited with code 101 in step 7");
    }

    #[test]
    fn without_a_culprit_the_first_who_noticed_speaks() {
        let mut world = World::new();
        world.say(2, error("rank 1 did not answer within 5s", true));
        world.say(0, error("poisoned", true));
        (0..3).for_each(|rank| world.end(rank, Ending::Killed(9), Asked::Yes));
        assert_eq!(world.message().unwrap(), "rank 2 failed in step 7: rank 1 did not answer within 5s");
    }

    #[test]
    fn ranks_that_were_asked_to_end_are_not_blamed() {
        let mut world = World::new();
        world.end(0, Ending::Killed(15), Asked::Yes);
        world.end(1, Ending::Exited(143), Asked::Yes);
        world.end(2, Ending::Exited(0), Asked::Yes);
        assert_eq!(world.message(), None);
        assert!(!world.0.iter().any(RankHistory::ended_badly));
        assert!(world.0.iter().all(RankHistory::ended_early), "none of them said that it was done");
    }

    #[test]
    fn an_end_before_the_work_is_done_is_a_failure() {
        let mut world = World::new();
        world.end(1, Ending::Exited(0), Asked::No);
        assert_eq!(world.message().unwrap(), "rank 1 ended before its work was done in step 7");
    }

    #[test]
    fn ranks_of_a_mesh_are_told_with_their_coordinates() {
        let mesh = Mesh::new(3, 3, 1).unwrap();
        let mut world = World::new();
        world.end(1, Ending::Killed(9), Asked::No);
        assert_eq!(
            world.message_on(&mesh).unwrap(),
            "rank 1 (pipeline stage 1, data 0, tensor 0) was killed by signal 9 (SIGKILL) in step 7"
        );
        let mut world = World::new();
        world.say(2, error("rank `1` stalled: rank `2` waited `5` s in barrier (group `world`)", true));
        (0..3).for_each(|rank| world.end(rank, Ending::Killed(9), Asked::Yes));
        assert_eq!(
            world.message_on(&mesh).unwrap(),
            "rank 2 (pipeline stage 2, data 0, tensor 0) failed in step 7: rank `1` (pipeline stage 1, data 0, tensor 0) stalled: \
             rank `2` (pipeline stage 2, data 0, tensor 0) waited `5` s in barrier (group `world`)"
        );
    }

    #[test]
    fn places_and_hints() {
        let mesh = Mesh::new(1, 1, 1).unwrap();
        let mut history = RankHistory::default();
        assert_eq!(history.place.to_string(), "as it started");
        history.say(1, &Event::Phase { phase: "loading model".into() });
        assert_eq!(history.place.to_string(), "while loading model");
        history.say(2, &Event::BeginStep { step: 3 });
        assert_eq!(history.place.to_string(), "in step 3");
        history.say(3, &Event::Phase { phase: "writing the model".into() });
        assert_eq!(history.place.to_string(), "after it began step 3, while writing the model");

        let failure =
            |ending| Failure { rank: 0, place: Place::default(), error: None, ending: Some(ending) };
        assert!(failure(Ending::Killed(9)).hint().unwrap().contains("out-of-memory"));
        assert!(failure(Ending::Killed(7)).hint().unwrap().contains("cut short"));
        assert!(failure(Ending::Killed(11)).hint().unwrap().contains("native code"));
        assert_eq!(
            failure(Ending::Killed(64)).message(&mesh),
            "rank 0 was killed by signal 64 as it started"
        );
        let error = Some(ErrorEvent { message: "error: no such key".into(), hint: None, secondary: false });
        assert_eq!(Failure { error, ..failure(Ending::Exited(2)) }.message(&mesh), "no such key");
        assert_eq!(failure(Ending::Exited(2)).message(&mesh), "rank 0 exited with code 2 as it started");
        assert!(!failure(Ending::Exited(1)).is_configuration());
        assert!(failure(Ending::Exited(143)).hint().unwrap().contains("SIGTERM"));
    }
}
