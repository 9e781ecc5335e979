//! Whether collectives run beside the computation.

use serde::Serialize;

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
