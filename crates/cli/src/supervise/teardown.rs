//! Ending ranks that will not end by themselves.
//!
//! ```text
//! failure ──2 s──► SIGTERM ──1 s──► SIGKILL ──5 s──► give up
//! ```
//!
//! The two seconds are for the peers of a dead rank: their collectives fail, and each says so and exits. The last
//! five are for a process stuck in the kernel, which no signal reaches before the kernel lets go.

use std::time::{Duration, Instant};

const GRACE: Duration = Duration::from_secs(2);
const TERMINATE: Duration = Duration::from_secs(1);
const KILL: Duration = Duration::from_secs(5);

/// How far the end has been pressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Grace,
    Terminated,
    Killed,
}

/// What to do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    Wait,
    Terminate,
    Kill,
    GiveUp,
}

/// The stage, and until when it lasts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Teardown {
    stage: Stage,
    until: Instant,
}

impl Teardown {
    /// A rank has failed; its peers may end by themselves.
    pub fn begin(now: Instant) -> Self {
        Teardown { stage: Stage::Grace, until: now + GRACE }
    }

    /// All ranks have been killed.
    pub fn killed(now: Instant) -> Self {
        Teardown { stage: Stage::Killed, until: now + KILL }
    }

    /// When to ask [`Teardown::escalate`] again.
    pub fn deadline(self) -> Instant {
        self.until
    }

    /// Moves on if the stage's time is over.
    pub fn escalate(&mut self, now: Instant) -> Next {
        if now < self.until {
            return Next::Wait;
        }
        match self.stage {
            Stage::Grace => {
                *self = Teardown { stage: Stage::Terminated, until: now + TERMINATE };
                Next::Terminate
            }
            Stage::Terminated => {
                *self = Teardown::killed(now);
                Next::Kill
            }
            Stage::Killed => Next::GiveUp,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presses_harder_step_by_step_and_ends_within_ten_seconds() {
        let start = Instant::now();
        let mut teardown = Teardown::begin(start);
        assert_eq!(teardown.escalate(start), Next::Wait);
        let mut seen = Vec::new();
        loop {
            let next = teardown.escalate(teardown.deadline());
            seen.push(next);
            if next == Next::GiveUp {
                break;
            }
        }
        assert_eq!(seen, [Next::Terminate, Next::Kill, Next::GiveUp]);
        assert!(teardown.deadline() + super::super::DRAIN < start + Duration::from_secs(10));
    }

    #[test]
    fn after_a_kill_only_waiting_is_left() {
        let now = Instant::now();
        let mut teardown = Teardown::killed(now);
        assert_eq!(teardown.escalate(now), Next::Wait);
        assert_eq!(teardown.escalate(teardown.deadline()), Next::GiveUp);
    }
}
