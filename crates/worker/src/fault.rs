//! Failing on purpose, to test what becomes of a run when one of its ranks does.
//!
//! ```text
//! SHARDWISE_FAULT="kill:rank=1,step=3,phase=backward,after=4"
//!                  ╰─ kill (SIGKILL), stop (SIGSTOP) or panic
//! ```
//!
//! From the beginning of step 3 on, rank 1 counts how often it enters a layer's backward, and the fourth time it kills itself.
//! `after` is 1 unless given; `delay_us` lets a kill or stop come so much later, in the middle of things. The rank says in its log what
//! it is about to do, so nobody looks for the cause of a failure that was asked for.

use std::io::Write;
use std::str::FromStr;
use std::time::Duration;

use rustix::process::{Signal, getpid, kill_process};
use shardwise_engine::{Engine, Phase};

const PHASES: [(&str, Phase); 6] = [
    ("gather", Phase::Gather),
    ("forward", Phase::Forward),
    ("backward", Phase::Backward),
    ("reduce", Phase::Reduce),
    ("step", Phase::Step),
    ("idle", Phase::Idle),
];

/// One failure: of which rank, how and when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    action: Action,
    pub rank: usize,
    /// From 1.
    pub step: u64,
    phase: Phase,
    after: u64,
    delay: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    Signal(Signal),
    Panic,
}

impl Fault {
    /// Has the engine fail; call as the fault's step begins.
    pub fn arm(self, engine: &mut Engine) {
        let mut left = self.after;
        engine.observe(move |phase| {
            if phase == self.phase && left > 0 {
                left -= 1;
                if left == 0 {
                    self.strike();
                }
            }
        });
    }

    fn strike(self) {
        // A log that cannot be written must not turn one failure into another.
        let _ = writeln!(std::io::stderr(), "failing on purpose: {self:?}");
        match self.action {
            Action::Panic => panic!("failing on purpose, as `SHARDWISE_FAULT` says"),
            Action::Signal(signal) if self.delay.is_zero() => send(signal),
            Action::Signal(signal) => {
                std::thread::spawn(move || {
                    std::thread::sleep(self.delay);
                    send(signal);
                });
            }
        }
    }
}

fn send(signal: Signal) {
    kill_process(getpid(), signal).expect("a process may signal itself");
}

impl FromStr for Fault {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (action, rest) = text.split_once(':').ok_or("expected `action:rank=R,step=S,phase=P`")?;
        let action = match action {
            "kill" => Action::Signal(Signal::KILL),
            "stop" => Action::Signal(Signal::STOP),
            "panic" => Action::Panic,
            other => return Err(format!("unknown action `{other}`, expected `kill`, `stop` or `panic`")),
        };
        let (mut rank, mut step, mut phase, mut after, mut delay_us) = (None, None, None, None, None);
        for part in rest.split(',') {
            let (key, value) = part.split_once('=').ok_or_else(|| format!("`{part}` is no `key=value`"))?;
            let slot = match key {
                "phase" => {
                    let known = PHASES.iter().find(|(name, _)| *name == value);
                    let (_, known) = known.ok_or_else(|| format!("unknown phase `{value}`"))?;
                    if phase.replace(*known).is_some() {
                        return Err("`phase` is given twice".into());
                    }
                    continue;
                }
                "rank" => &mut rank,
                "step" => &mut step,
                "after" => &mut after,
                "delay_us" => &mut delay_us,
                other => return Err(format!("unknown key `{other}`")),
            };
            let number: u64 =
                value.parse().map_err(|_| format!("`{key}` is `{value}`, expected a whole number"))?;
            if number == 0 && matches!(key, "step" | "after") {
                return Err(format!("`{key}` counts from 1"));
            }
            if slot.replace(number).is_some() {
                return Err(format!("`{key}` is given twice"));
            }
        }
        if action == Action::Panic && delay_us.is_some() {
            return Err("`delay_us` goes with `kill` and `stop` only".into());
        }
        Ok(Fault {
            action,
            rank: rank.ok_or("`rank` is missing")? as usize,
            step: step.ok_or("`step` is missing")?,
            phase: phase.ok_or("`phase` is missing")?,
            after: after.unwrap_or(1),
            delay: Duration::from_micros(delay_us.unwrap_or(0)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_is_read() {
        let fault: Fault = "stop:rank=1,step=3,phase=backward,after=4,delay_us=250".parse().unwrap();
        let expected = Fault {
            action: Action::Signal(Signal::STOP),
            rank: 1,
            step: 3,
            phase: Phase::Backward,
            after: 4,
            delay: Duration::from_micros(250),
        };
        assert_eq!(fault, expected);
        let short: Fault = "panic:phase=step,rank=0,step=1".parse().unwrap();
        assert_eq!((short.action, short.after, short.delay), (Action::Panic, 1, Duration::ZERO));
    }

    #[test]
    fn nothing_is_guessed() {
        for (text, says) in [
            ("", "action:rank"),
            ("kill", "action:rank"),
            ("crash:rank=1,step=1,phase=step", "`crash`"),
            ("kill:rank=1,step=1", "`phase` is missing"),
            ("kill:step=1,phase=step", "`rank` is missing"),
            ("kill:rank=1,phase=step", "`step` is missing"),
            ("kill:rank=1,step=1,phase=stop", "unknown phase `stop`"),
            ("kill:rank=-1,step=1,phase=step", "`rank` is `-1`"),
            ("kill:rank=1,step=0,phase=step", "`step` counts from 1"),
            ("kill:rank=1,step=1,phase=step,after=0", "`after` counts from 1"),
            ("kill:rank=1,rank=2,step=1,phase=step", "`rank` is given twice"),
            ("kill:rank=1,step=1,phase=step,phase=step", "`phase` is given twice"),
            ("kill:rank=1,step=1,phase=step,", "`` is no `key=value`"),
            ("kill:rank=1,step=1,phase=step,when=now", "unknown key `when`"),
            ("panic:rank=1,step=1,phase=step,delay_us=1", "`delay_us` goes with"),
        ] {
            let error = text.parse::<Fault>().unwrap_err();
            assert!(error.contains(says), "{text}: {error}");
        }
    }
}
