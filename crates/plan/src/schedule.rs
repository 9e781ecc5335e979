//! The order in which a rank runs its micro-batches, as data.
//!
//! Without a pipeline there is one order: forward and backward of each micro-batch in turn, then the step. It has the
//! same form that pipeline schedules have, so that the engine walks a plan and never decides.

use std::fmt;

use serde::Serialize;

/// One thing a rank does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// Run this rank's layers on a micro-batch.
    Forward {
        /// Index of the micro-batch in the step.
        microbatch: usize,
    },
    /// Run them backward and reduce their gradients.
    Backward {
        /// Index of the micro-batch in the step.
        microbatch: usize,
    },
    /// Update the parameters.
    Step,
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Action::Forward { microbatch } => write!(f, "F{microbatch}"),
            Action::Backward { microbatch } => write!(f, "B{microbatch}"),
            Action::Step => f.write_str("STEP"),
        }
    }
}

/// The schedule of a rank that holds every layer.
pub fn without_pipeline(num_microbatches: usize) -> Vec<Action> {
    (0..num_microbatches)
        .flat_map(|microbatch| [Action::Forward { microbatch }, Action::Backward { microbatch }])
        .chain([Action::Step])
        .collect()
}

/// Where collectives of units run. The numbers are the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Overlap {
    /// In the caller's thread, when they are needed. Best where ranks have no core to spare: on CPU a collective is
    /// copying, and a second thread would only take the first one's time.
    Inline,
    /// On a side thread, started early: gathers of the next unit during this one's computation, reductions during the
    /// rest of the backward pass.
    SideThread,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_micro_batch_goes_back_before_the_next_begins() {
        let text: Vec<_> = without_pipeline(2).iter().map(Action::to_string).collect();
        assert_eq!(text.join(" "), "F0 B0 F1 B1 STEP");
    }
}
