//! What a stage can do, and how it is written.
//!
//! | text | meaning |
//! |---|---|
//! | `F3` | run the layers forward on micro-batch 3 |
//! | `B3` | run them backward: gradients of the input and of the weights |
//! | `I3`, `W3` | the two halves of it: the gradient of the input, the gradients of the weights |
//! | `F3>1`, `F3<0` | send the activation to stage 1, receive it from stage 0 |
//! | `B3>0`, `B3<1` | send its gradient to stage 0, receive it from stage 1 |
//! | `TIED`, `REDUCE`, `STEP` | the end of the step |
//!
//! `F3.1` is micro-batch 3 in chunk 1; chunk 0 is not written. The chunk is always the acting stage's own.

use std::fmt;
use std::str::FromStr;

/// A micro-batch in one chunk of the acting stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Piece {
    /// Index of the micro-batch in the step.
    pub microbatch: usize,
    /// Index of the chunk among the stage's own; 0 without interleaving.
    pub chunk: usize,
}

impl Piece {
    /// The part of the model that this chunk of `stage` is, in the order in which parts run.
    pub fn part(self, stage: usize, num_stages: usize) -> usize {
        self.chunk * num_stages + stage
    }
}

/// What a message holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Payload {
    /// The output of a part, for the next.
    Activation,
    /// The gradient of a part's input, for the one before.
    Grad,
}

/// One thing that a stage does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// Run a chunk's layers on a micro-batch. The first part reads the batch, the last one makes the loss.
    Forward(Piece),
    /// Run them backward, for the gradients of input and weights.
    Backward(Piece),
    /// Run them backward for the gradient of the input only, and keep what the weights' gradients need.
    BackwardInput(Piece),
    /// Compute the weights' gradients of an earlier [`Action::BackwardInput`], and let go of the activations.
    BackwardWeight(Piece),
    /// Give the output of a chunk to the stage that has the next part.
    SendActivation {
        /// Whose output.
        piece: Piece,
        /// The stage.
        to: usize,
    },
    /// Take the input of a chunk from the stage that has the part before. Done when it is here.
    RecvActivation {
        /// Whose input.
        piece: Piece,
        /// The stage.
        from: usize,
    },
    /// Give the gradient of a chunk's input to the stage that made the input.
    SendGrad {
        /// Whose input.
        piece: Piece,
        /// The stage.
        to: usize,
    },
    /// Take the gradient of a chunk's output from the stage that used it. Done when it is here.
    RecvGrad {
        /// Whose output.
        piece: Piece,
        /// The stage.
        from: usize,
    },
    /// Sum the gradients of parameters that several stages hold. Nothing on a stage that shares none.
    ReduceTied,
    /// Finish the reduction of gradients over the data axis: what was not reduced with its micro-batch.
    ReduceGrads,
    /// Update the parameters.
    Step,
}

impl Action {
    /// What it is done to, but for the end of the step.
    pub fn piece(self) -> Option<Piece> {
        match self {
            Action::Forward(piece)
            | Action::Backward(piece)
            | Action::BackwardInput(piece)
            | Action::BackwardWeight(piece)
            | Action::SendActivation { piece, .. }
            | Action::RecvActivation { piece, .. }
            | Action::SendGrad { piece, .. }
            | Action::RecvGrad { piece, .. } => Some(piece),
            Action::ReduceTied | Action::ReduceGrads | Action::Step => None,
        }
    }

    /// Whether it computes, rather than communicates or ends the step.
    pub fn computes(self) -> bool {
        matches!(
            self,
            Action::Forward(_) | Action::Backward(_) | Action::BackwardInput(_) | Action::BackwardWeight(_)
        )
    }
}

impl fmt::Display for Piece {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.chunk {
            0 => write!(f, "{}", self.microbatch),
            chunk => write!(f, "{}.{chunk}", self.microbatch),
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Action::Forward(piece) => write!(f, "F{piece}"),
            Action::Backward(piece) => write!(f, "B{piece}"),
            Action::BackwardInput(piece) => write!(f, "I{piece}"),
            Action::BackwardWeight(piece) => write!(f, "W{piece}"),
            Action::SendActivation { piece, to } => write!(f, "F{piece}>{to}"),
            Action::RecvActivation { piece, from } => write!(f, "F{piece}<{from}"),
            Action::SendGrad { piece, to } => write!(f, "B{piece}>{to}"),
            Action::RecvGrad { piece, from } => write!(f, "B{piece}<{from}"),
            Action::ReduceTied => f.write_str("TIED"),
            Action::ReduceGrads => f.write_str("REDUCE"),
            Action::Step => f.write_str("STEP"),
        }
    }
}

impl FromStr for Action {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "TIED" => return Ok(Action::ReduceTied),
            "REDUCE" => return Ok(Action::ReduceGrads),
            "STEP" => return Ok(Action::Step),
            _ => {}
        }
        parse(text).ok_or_else(|| {
            format!("`{text}` is no action, expected such as `F3`, `B3.1`, `F3>1`, `B3<1` or `STEP`")
        })
    }
}

fn parse(text: &str) -> Option<Action> {
    let (letter, rest) = text.split_at_checked(1)?;
    let (piece, peer) = match rest.find(['<', '>']) {
        Some(at) => (&rest[..at], Some((&rest[at..=at], number(&rest[at + 1..])?))),
        None => (rest, None),
    };
    let piece = match piece.split_once('.') {
        Some((microbatch, chunk)) => {
            Piece { microbatch: number(microbatch)?, chunk: number(chunk).filter(|&chunk| chunk > 0)? }
        }
        None => Piece { microbatch: number(piece)?, chunk: 0 },
    };
    Some(match (letter, peer) {
        ("F", None) => Action::Forward(piece),
        ("B", None) => Action::Backward(piece),
        ("I", None) => Action::BackwardInput(piece),
        ("W", None) => Action::BackwardWeight(piece),
        ("F", Some((">", to))) => Action::SendActivation { piece, to },
        ("F", Some((_, from))) => Action::RecvActivation { piece, from },
        ("B", Some((">", to))) => Action::SendGrad { piece, to },
        ("B", Some((_, from))) => Action::RecvGrad { piece, from },
        _ => return None,
    })
}

/// Digits only, unlike `str::parse`, which takes a sign.
pub(super) fn number(text: &str) -> Option<usize> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}
