//! What was sent, by operation.

use std::fmt;
use std::time::Duration;

/// What a call does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Operation {
    /// [`ProcessGroup::all_reduce`](crate::ProcessGroup::all_reduce)
    AllReduce,
    /// [`ProcessGroup::reduce_scatter`](crate::ProcessGroup::reduce_scatter)
    ReduceScatter,
    /// [`ProcessGroup::all_gather`](crate::ProcessGroup::all_gather), in place or not
    AllGather,
    /// [`ProcessGroup::broadcast`](crate::ProcessGroup::broadcast)
    Broadcast,
    /// [`ProcessGroup::all_to_all`](crate::ProcessGroup::all_to_all)
    AllToAll,
    /// [`ProcessGroup::send`](crate::ProcessGroup::send)
    Send,
    /// [`ProcessGroup::recv`](crate::ProcessGroup::recv)
    Recv,
    /// [`ProcessGroup::barrier`](crate::ProcessGroup::barrier)
    Barrier,
    /// [`ProcessGroup::subgroup`](crate::ProcessGroup::subgroup)
    Subgroup,
}

impl Operation {
    /// All of them, in the ledger's order.
    pub const ALL: [Operation; 9] = [
        Operation::AllReduce,
        Operation::ReduceScatter,
        Operation::AllGather,
        Operation::Broadcast,
        Operation::AllToAll,
        Operation::Send,
        Operation::Recv,
        Operation::Barrier,
        Operation::Subgroup,
    ];

    /// The name used in messages and reports: the method's.
    pub const fn name(self) -> &'static str {
        match self {
            Operation::AllReduce => "all_reduce",
            Operation::ReduceScatter => "reduce_scatter",
            Operation::AllGather => "all_gather",
            Operation::Broadcast => "broadcast",
            Operation::AllToAll => "all_to_all",
            Operation::Send => "send",
            Operation::Recv => "recv",
            Operation::Barrier => "barrier",
            Operation::Subgroup => "subgroup",
        }
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One operation's share of a [`Ledger`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LedgerEntry {
    /// Calls that came back without error.
    pub num_calls: u64,
    /// Elements this rank sent.
    pub sent_numel: u64,
    /// Bytes this rank sent.
    pub sent_bytes: u64,
    /// Time inside the calls, waiting included.
    pub time: Duration,
}

/// What one rank sent in one group since the group was made.
///
/// "Sent" is the volume that the operation demands of a rank in a group of `n`, whatever the back end really
/// moves: `all_reduce` `2 (n-1)/n` of the buffer, `reduce_scatter` and `all_to_all` `(n-1)/n` of the input,
/// `all_gather` `n-1` shards, `broadcast` `n-1` buffers at the root, `send` the buffer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Ledger {
    entries: [LedgerEntry; Operation::ALL.len()],
}

impl Ledger {
    /// The entry of one operation.
    pub fn of(&self, operation: Operation) -> LedgerEntry {
        self.entries[operation as usize]
    }

    /// All operations with their entries.
    pub fn iter(&self) -> impl Iterator<Item = (Operation, LedgerEntry)> + '_ {
        Operation::ALL.into_iter().zip(self.entries)
    }

    /// The sum over all operations.
    pub fn total(&self) -> LedgerEntry {
        self.entries.iter().fold(LedgerEntry::default(), |sum, entry| LedgerEntry {
            num_calls: sum.num_calls + entry.num_calls,
            sent_numel: sum.sent_numel + entry.sent_numel,
            sent_bytes: sum.sent_bytes + entry.sent_bytes,
            time: sum.time + entry.time,
        })
    }

    /// What happened since `earlier`, a snapshot of the same group.
    pub fn since(&self, earlier: &Ledger) -> Ledger {
        let mut difference = *self;
        for (entry, before) in difference.entries.iter_mut().zip(&earlier.entries) {
            entry.num_calls -= before.num_calls;
            entry.sent_numel -= before.sent_numel;
            entry.sent_bytes -= before.sent_bytes;
            entry.time -= before.time;
        }
        difference
    }

    pub(crate) fn record(
        &mut self,
        operation: Operation,
        sent_numel: usize,
        element_bytes: usize,
        time: Duration,
    ) {
        let entry = &mut self.entries[operation as usize];
        entry.num_calls += 1;
        entry.sent_numel += sent_numel as u64;
        entry.sent_bytes += (sent_numel * element_bytes) as u64;
        entry.time += time;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_is_what_came_later() {
        let mut ledger = Ledger::default();
        ledger.record(Operation::Send, 3, 4, Duration::from_millis(1));
        let earlier = ledger;
        ledger.record(Operation::Send, 5, 2, Duration::from_millis(2));
        ledger.record(Operation::Barrier, 0, 1, Duration::from_millis(4));
        let entry = ledger.since(&earlier).of(Operation::Send);
        assert_eq!((entry.num_calls, entry.sent_numel, entry.sent_bytes), (1, 5, 10));
        assert_eq!(ledger.total().sent_bytes, 22);
        assert_eq!(ledger.total().time, Duration::from_millis(7));
    }
}
