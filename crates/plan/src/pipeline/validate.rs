//! Whether a schedule is one.
//!
//! A schedule may be written by hand. This finds what would make an engine fail, hang or compute something else: a piece of work
//! that is missing, done twice or done before what it needs; messages that do not pair up in order; stages that wait for each
//! other.

use std::collections::HashMap;
use std::fmt;

use super::action::{Action, Payload, Piece};
use super::{Durations, Schedule, Transport};

/// What is wrong, and on which stage.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("stage `{stage}`: {fault}")]
pub struct InvalidSchedule {
    /// The stage.
    pub stage: usize,
    /// What is wrong there.
    pub fault: Fault,
}

/// A stage that cannot go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Waiting {
    /// The stage.
    pub stage: usize,
    /// What it wants to do.
    pub action: Action,
    /// The stage that it waits for.
    pub peer: usize,
}

impl fmt::Display for Waiting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "stage {} waits in `{}` for stage {}", self.stage, self.action, self.peer)
    }
}

/// What can be wrong with a schedule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// A micro-batch, chunk or stage that there is not.
    #[error("`{0}` is out of range")]
    OutOfRange(Action),
    /// Done more than once.
    #[error("`{0}` is there twice")]
    Twice(Action),
    /// Not done at all.
    #[error("`{0}` is missing")]
    Missing(Action),
    /// Done before something that it needs.
    #[error("`{action}` comes before `{needs}`")]
    TooEarly {
        /// What is done.
        action: Action,
        /// What it needs.
        needs: Action,
    },
    /// A message to or from a stage that has neither the part before nor the part after.
    #[error("`{action}` is with the wrong stage, expected {}", expected.map_or("no message".to_owned(), |peer| format!("stage `{peer}`")))]
    WrongPeer {
        /// The message.
        action: Action,
        /// The right stage, if there is one.
        expected: Option<usize>,
    },
    /// The channel brings another message than the one expected.
    #[error(
        "`{receive}` gets what stage `{from}` sends with `{send}`: messages of a channel arrive in the order they are sent"
    )]
    OutOfOrder {
        /// The receive.
        receive: Action,
        /// The sender.
        from: usize,
        /// Its send at the same place.
        send: Action,
    },
    /// Stages that wait for each other.
    #[error("deadlock: {}", .0.iter().map(Waiting::to_string).collect::<Vec<_>>().join(", "))]
    Deadlock(Vec<Waiting>),
    /// The other stage has come to its end.
    #[error("{0}, which has come to its end")]
    NeverComes(Waiting),
}

impl Schedule {
    /// Checks that every stage runs every micro-batch through every chunk once, forward and backward, with what each needs before
    /// it; that messages pair up in order; and that nobody waits for ever with buffered sends.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn validate(&self) -> Result<(), InvalidSchedule> {
        for stage in 0..self.num_stages() {
            self.check_stage(stage).map_err(|fault| InvalidSchedule { stage, fault })?;
        }
        self.check_channels()?;
        // What crosses stages: with all messages paired up, a dependency that is not met is a stage that waits for ever.
        self.simulate(&Durations::unit(self.num_parts()), Transport::Buffered).map(|_| ())
    }

    fn check_stage(&self, stage: usize) -> Result<(), Fault> {
        let actions = self.actions(stage);
        let mut places: HashMap<Action, usize> = HashMap::with_capacity(actions.len());
        for (place, &action) in actions.iter().enumerate() {
            self.check_range(stage, action)?;
            if places.insert(action, place).is_some() {
                return Err(Fault::Twice(action));
            }
        }
        let place = |action| places.get(&action).copied().ok_or(Fault::Missing(action));
        let in_order = |needs: Action, action: Action| {
            if place(needs)? < place(action)? { Ok(()) } else { Err(Fault::TooEarly { action, needs }) }
        };
        for chunk in 0..self.num_chunks {
            for microbatch in 0..self.num_microbatches {
                let piece = Piece { microbatch, chunk };
                let neighbours = self.neighbours(stage, piece);
                let forward = Action::Forward(piece);
                // The backward pass is one action or two.
                let split = places.contains_key(&Action::BackwardInput(piece));
                let backward = if split { Action::BackwardInput(piece) } else { Action::Backward(piece) };
                let weights = Action::BackwardWeight(piece);
                if split && places.contains_key(&Action::Backward(piece)) {
                    return Err(Fault::Twice(Action::Backward(piece)));
                }
                in_order(forward, backward)?;
                if split {
                    in_order(backward, weights)?;
                } else if places.contains_key(&weights) {
                    return Err(Fault::Missing(Action::BackwardInput(piece)));
                }
                match neighbours.before {
                    Neighbour::Stage(peer) => {
                        in_order(Action::RecvActivation { piece, from: peer }, forward)?;
                        in_order(backward, Action::SendGrad { piece, to: peer })?;
                    }
                    Neighbour::Same(other) => in_order(Action::Forward(other), forward)?,
                    Neighbour::None => {}
                }
                match neighbours.after {
                    Neighbour::Stage(peer) => {
                        in_order(forward, Action::SendActivation { piece, to: peer })?;
                        in_order(Action::RecvGrad { piece, from: peer }, backward)?;
                    }
                    Neighbour::Same(other) => {
                        let needs = [Action::BackwardInput(other), Action::Backward(other)];
                        let needs = needs.into_iter().find(|needs| places.contains_key(needs));
                        in_order(needs.unwrap_or(Action::Backward(other)), backward)?;
                    }
                    Neighbour::None => {}
                }
            }
        }
        let end = [Action::ReduceTied, Action::ReduceGrads, Action::Step];
        for (back, &action) in end.iter().rev().enumerate() {
            if let Some(&after) = actions.get(place(action)? + back + 1) {
                return Err(Fault::TooEarly { action, needs: after });
            }
        }
        Ok(())
    }

    /// Whether an action names what there is, and a message the right stage.
    fn check_range(&self, stage: usize, action: Action) -> Result<(), Fault> {
        let Some(piece) = action.piece() else { return Ok(()) };
        if piece.microbatch >= self.num_microbatches || piece.chunk >= self.num_chunks {
            return Err(Fault::OutOfRange(action));
        }
        let neighbours = self.neighbours(stage, piece);
        let (peer, neighbour) = match action {
            Action::RecvActivation { from: peer, .. } | Action::SendGrad { to: peer, .. } => {
                (peer, neighbours.before)
            }
            Action::RecvGrad { from: peer, .. } | Action::SendActivation { to: peer, .. } => {
                (peer, neighbours.after)
            }
            _ => return Ok(()),
        };
        match neighbour {
            Neighbour::Stage(expected) if expected == peer => Ok(()),
            Neighbour::Stage(expected) => Err(Fault::WrongPeer { action, expected: Some(expected) }),
            _ => Err(Fault::WrongPeer { action, expected: None }),
        }
    }

    fn check_channels(&self) -> Result<(), InvalidSchedule> {
        let n = self.num_stages();
        let mut sent: HashMap<(usize, usize, Payload), Vec<Action>> = HashMap::new();
        for stage in 0..n {
            for &action in self.actions(stage) {
                match action {
                    Action::SendActivation { to, .. } => {
                        sent.entry((stage, to, Payload::Activation)).or_default().push(action);
                    }
                    Action::SendGrad { to, .. } => {
                        sent.entry((stage, to, Payload::Grad)).or_default().push(action)
                    }
                    _ => {}
                }
            }
        }
        let mut num_taken: HashMap<(usize, usize, Payload), usize> = HashMap::new();
        for stage in 0..n {
            for &receive in self.actions(stage) {
                let (from, payload, sender_part) = match receive {
                    Action::RecvActivation { piece, from } => {
                        (from, Payload::Activation, piece.part(stage, n).checked_sub(1))
                    }
                    Action::RecvGrad { piece, from } => (from, Payload::Grad, Some(piece.part(stage, n) + 1)),
                    _ => continue,
                };
                let taken = num_taken.entry((from, stage, payload)).or_default();
                let send = sent.get(&(from, stage, payload)).and_then(|sent| sent.get(*taken)).copied();
                *taken += 1;
                // Every send and every receive is there, as each stage was checked: there are as many.
                let Some(send) = send else {
                    return Err(InvalidSchedule { stage, fault: Fault::Missing(receive) });
                };
                let same = send.piece().zip(receive.piece()).is_some_and(|(sent, received)| {
                    sent.microbatch == received.microbatch && Some(sent.part(from, n)) == sender_part
                });
                if !same {
                    return Err(InvalidSchedule { stage, fault: Fault::OutOfOrder { receive, from, send } });
                }
            }
        }
        Ok(())
    }

    fn neighbours(&self, stage: usize, piece: Piece) -> Neighbours {
        let n = self.num_stages();
        let part = piece.part(stage, n);
        let neighbour = |part: Option<usize>| match part.filter(|&part| part < self.num_parts()) {
            None => Neighbour::None,
            Some(part) if part % n == stage => Neighbour::Same(Piece { chunk: part / n, ..piece }),
            Some(part) => Neighbour::Stage(part % n),
        };
        Neighbours { before: neighbour(part.checked_sub(1)), after: neighbour(Some(part + 1)) }
    }
}

/// Who has the parts before and after a piece.
struct Neighbours {
    before: Neighbour,
    after: Neighbour,
}

enum Neighbour {
    None,
    Same(Piece),
    Stage(usize),
}
