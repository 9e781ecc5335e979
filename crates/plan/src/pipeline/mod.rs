//! Pipelines: which layers a stage holds, and in what order it runs them, as data.
//!
//! A schedule is one list of actions for each stage. It is built for a number of stages and micro-batches, printed, parsed
//! back, checked, simulated and drawn without a device; the engine walks its own list and decides nothing.
//!
//! ```text
//! 1F1B, 3 stages, 4 micro-batches: what each stage computes
//!   stage 0   F0 F1 F2 .  .  .  .  B0 -- F3 B1 -- .  B2 -- .  B3 --
//!   stage 1   .  F0 F1 .  .  B0 -- F2 B1 -- F3 B2 -- .  B3 -- .  .
//!   stage 2   .  .  F0 B0 -- F1 B1 -- F2 B2 -- F3 B3 -- .  .  .  .
//! ```
//!
//! A stage may hold several *chunks* of consecutive layers (interleaving): with `S` stages, chunk `c` of stage `s` is part
//! `c * S + s` of the model. Without interleaving a stage has one chunk, and its part is its own number.
//!
//! | file | its question |
//! |---|---|
//! | `action` | what can a stage do, and how is that written? |
//! | `order` | in what order does a stage compute (GPipe, 1F1B, interleaved, zero-bubble)? |
//! | `text` | how is a schedule written and read back? |
//! | `validate` | is it complete and in order? |
//! | `simulate` | how long does it take, what is idle, what is alive, where does it lock up? |
//! | `draw` | what does that look like? |
//! | `stages` | which layers go where? |
//!
//! # Communication
//!
//! Messages of one kind (activations, or their gradients) from one stage to another arrive in the order in which they were sent:
//! a *channel*. A receive is done when its message is here. What a send waits for is the transport's: [`Transport::Buffered`] waits
//! for nothing; with [`Transport::Rendezvous`] it waits until the receiver has posted the receive. A stage posts the first
//! receives of each of its channels as the step begins and one more whenever it has taken a message: as many as
//! [`Schedule::receives_to_post`] says, which is one but for uneven interleaving. Then every schedule built here runs to its end
//! with synchronous sends too. Posted only when they are needed, receives let 1F1B lock up: two neighbours hold out a message to each
//! other, one an activation, the other a gradient.

mod action;
mod draw;
mod order;
mod simulate;
mod stages;
#[cfg(test)]
mod tests;
mod text;
mod validate;

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

use crate::LossTurn;

pub use action::{Action, Payload, Piece};
pub use draw::{svg, timeline};
pub use simulate::{Durations, Simulation, Span, Transport};
pub use stages::{PartitionError, SharedParam, StageCut, Stages, balanced};
pub use text::ParseError;
pub use validate::{Fault, InvalidSchedule, Waiting};

/// The known ways to fill a pipeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScheduleKind {
    /// All micro-batches forward, then all backward. Every activation is alive at the turn.
    ///
    /// # Source
    /// GPipe (arXiv:1811.06965).
    GPipe,
    /// One forward, one backward, after a warm-up: stage `s` of `S` keeps at most `S - s` micro-batches alive. The bubble is GPipe's.
    ///
    /// # Source
    /// PipeDream-Flush (arXiv:2006.09503).
    OneForwardOneBackward,
    /// 1F1B over several chunks of layers a stage: the bubble shrinks by their number, messages grow by it.
    ///
    /// # Source
    /// Megatron-LM (arXiv:2104.04473) section 2.2. Micro-batches go through a chunk in groups of at least as many as there are
    /// stages. Where their number is no multiple of the stages, ours makes the groups as even as they can be.
    Interleaved {
        /// Chunks of each stage.
        num_chunks: usize,
    },
    /// 1F1B that sends a gradient back as soon as it is known and computes the gradients of weights later, where the stage would be
    /// idle. The memory of every stage is that of the first stage of 1F1B.
    ///
    /// # Source
    /// Zero Bubble (arXiv:2401.10241) section 2.3, ZB-H1.
    ZeroBubble,
}

impl ScheduleKind {
    /// Chunks of each stage.
    pub fn num_chunks(self) -> usize {
        match self {
            ScheduleKind::Interleaved { num_chunks } => num_chunks,
            _ => 1,
        }
    }

    /// Whether there is such a schedule.
    ///
    /// # Errors
    /// [`ScheduleError`], with the numbers that would do.
    pub fn check(self, num_stages: usize, num_microbatches: usize) -> Result<(), ScheduleError> {
        let num_chunks = self.num_chunks();
        if num_stages == 0 || num_chunks == 0 || num_microbatches == 0 {
            return Err(ScheduleError::Empty { num_stages, num_chunks, num_microbatches });
        }
        if num_chunks > 1 && num_microbatches < num_stages {
            return Err(ScheduleError::TooFewMicrobatches { num_stages, num_microbatches });
        }
        Ok(())
    }
}

/// When the last stage runs the loss of a micro-batch backward; without a pipeline there is one schedule.
pub fn loss_turn(schedule: Option<ScheduleKind>, num_microbatches: usize) -> LossTurn {
    match schedule {
        Some(ScheduleKind::GPipe) if num_microbatches > 1 => LossTurn::Later,
        _ => LossTurn::AtOnce,
    }
}

impl fmt::Display for ScheduleKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ScheduleKind::GPipe => f.pad("gpipe"),
            ScheduleKind::OneForwardOneBackward => f.pad("1f1b"),
            ScheduleKind::Interleaved { num_chunks } => f.pad(&format!("interleaved:{num_chunks}")),
            ScheduleKind::ZeroBubble => f.pad("zero-bubble"),
        }
    }
}

impl FromStr for ScheduleKind {
    type Err = String;

    /// Reads a name as it is printed; `interleaved` alone has two chunks.
    fn from_str(name: &str) -> Result<Self, String> {
        let chunks = |text: &str| text.parse().ok().filter(|&chunks: &usize| chunks > 0);
        match name.split_once(':') {
            None => match name {
                "gpipe" => return Ok(ScheduleKind::GPipe),
                "1f1b" => return Ok(ScheduleKind::OneForwardOneBackward),
                "interleaved" => return Ok(ScheduleKind::Interleaved { num_chunks: 2 }),
                "zero-bubble" => return Ok(ScheduleKind::ZeroBubble),
                _ => {}
            },
            Some(("interleaved", number)) => {
                if let Some(num_chunks) = chunks(number) {
                    return Ok(ScheduleKind::Interleaved { num_chunks });
                }
            }
            Some(_) => {}
        }
        Err(format!(
            "schedule `{name}`, expected `gpipe`, `1f1b`, `interleaved`, `interleaved:CHUNKS` or `zero-bubble`"
        ))
    }
}

/// Why a schedule cannot be built.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ScheduleError {
    /// A number that is zero.
    #[error(
        "a schedule of `{num_stages}` stages, `{num_chunks}` chunks and `{num_microbatches}` micro-batches, expected at least 1 of each"
    )]
    Empty {
        /// Stages.
        num_stages: usize,
        /// Chunks of a stage.
        num_chunks: usize,
        /// Micro-batches.
        num_microbatches: usize,
    },
    /// Interleaving needs a micro-batch for every stage.
    #[error(
        "`{num_microbatches}` micro-batches do not fill `{num_stages}` interleaved stages, expected at least `{num_stages}` \
         (best a multiple of it), or at most `{num_microbatches}` stages, or another schedule"
    )]
    TooFewMicrobatches {
        /// Stages.
        num_stages: usize,
        /// Micro-batches.
        num_microbatches: usize,
    },
}

/// What every stage does in one step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Schedule {
    num_chunks: usize,
    num_microbatches: usize,
    stages: Vec<Vec<Action>>,
}

impl Schedule {
    /// The schedule of a kind, complete with messages and the end of the step.
    ///
    /// # Errors
    /// [`ScheduleError`], with the numbers that would do.
    pub fn new(
        kind: ScheduleKind,
        num_stages: usize,
        num_microbatches: usize,
    ) -> Result<Self, ScheduleError> {
        kind.check(num_stages, num_microbatches)?;
        let num_chunks = kind.num_chunks();
        let stages = match kind {
            ScheduleKind::GPipe => order::gpipe(num_stages, num_microbatches),
            ScheduleKind::OneForwardOneBackward | ScheduleKind::Interleaved { num_chunks: 1 } => {
                order::one_forward_one_backward(num_stages, num_microbatches)
            }
            ScheduleKind::Interleaved { num_chunks } => {
                order::interleaved(num_stages, num_chunks, num_microbatches)
            }
            ScheduleKind::ZeroBubble => order::zero_bubble(num_stages, num_microbatches),
        };
        Ok(Schedule::with_messages(num_chunks, num_microbatches, &stages))
    }

    /// Completes the orders in which stages compute: a receive before what needs it, a send after what makes it, and the end of
    /// the step.
    fn with_messages(num_chunks: usize, num_microbatches: usize, computed: &[Vec<Action>]) -> Self {
        let num_stages = computed.len();
        let last_part = num_stages * num_chunks - 1;
        // Between chunks of one stage nothing is sent.
        let neighbour = |stage: usize, part: usize| Some(part % num_stages).filter(|&peer| peer != stage);
        let complete = |(stage, actions): (usize, &Vec<Action>)| {
            let mut all = Vec::with_capacity(3 * actions.len() + 3);
            for &action in actions {
                let Some(piece) = action.piece() else { continue };
                let part = piece.part(stage, num_stages);
                let before = (part > 0).then(|| part - 1).and_then(|part| neighbour(stage, part));
                let after = (part < last_part).then(|| part + 1).and_then(|part| neighbour(stage, part));
                match action {
                    Action::Forward(_) => {
                        all.extend(before.map(|from| Action::RecvActivation { piece, from }));
                        all.push(action);
                        all.extend(after.map(|to| Action::SendActivation { piece, to }));
                    }
                    Action::Backward(_) | Action::BackwardInput(_) => {
                        all.extend(after.map(|from| Action::RecvGrad { piece, from }));
                        all.push(action);
                        all.extend(before.map(|to| Action::SendGrad { piece, to }));
                    }
                    _ => all.push(action),
                }
            }
            all.extend([Action::ReduceTied, Action::ReduceGrads, Action::Step]);
            all
        };
        let stages = computed.iter().enumerate().map(complete).collect();
        Schedule { num_chunks, num_microbatches, stages }
    }

    /// Pipeline stages.
    pub fn num_stages(&self) -> usize {
        self.stages.len()
    }

    /// Chunks of layers of each stage.
    pub fn num_chunks(&self) -> usize {
        self.num_chunks
    }

    /// Parts that the model is cut into: chunks of all stages.
    pub fn num_parts(&self) -> usize {
        self.num_stages() * self.num_chunks
    }

    /// Micro-batches of a step.
    pub fn num_microbatches(&self) -> usize {
        self.num_microbatches
    }

    /// What one stage does, in order.
    pub fn actions(&self, stage: usize) -> &[Action] {
        &self.stages[stage]
    }
}
