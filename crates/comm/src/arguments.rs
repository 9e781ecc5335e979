//! What a call's arguments must be, and what follows from them: the facts that ranks compare, and what the ledger counts.
//!
//! The same for every back end.

use shardwise_device::{DType, Slice};

use crate::{Call, CommError, Operation, Part};

/// The group that is called, and by whom.
pub(crate) struct Caller<'a> {
    pub(crate) name: &'a str,
    pub(crate) ranks: &'a [usize],
    /// The caller's place in the group.
    pub(crate) me: usize,
}

/// A call whose arguments can be right.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Demand {
    pub(crate) operation: Operation,
    pub(crate) dtype: DType,
    /// As [`Call::numel`].
    pub(crate) numel: usize,
    /// As [`Call::detail`].
    pub(crate) detail: u64,
    /// Elements that the operation makes this rank send.
    pub(crate) sent_numel: usize,
}

impl Demand {
    pub(crate) const BARRIER: Demand =
        Demand { operation: Operation::Barrier, dtype: DType::U8, numel: 0, detail: 0, sent_numel: 0 };

    /// What the ranks compare.
    pub(crate) fn call(&self, sequence: u64) -> Call {
        let Demand { operation, dtype, numel, detail, .. } = *self;
        Call { operation, sequence, dtype, numel: numel as u64, detail }
    }
}

/// Whether a rank may name itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum OrSelf {
    Yes,
    No,
}

impl Caller<'_> {
    fn size(&self) -> usize {
        self.ranks.len()
    }

    pub(crate) fn all_reduce(&self, buffer: Slice<'_>) -> Result<Demand, CommError> {
        let operation = Operation::AllReduce;
        let (dtype, numel, n) = (buffer.dtype(), buffer.numel(), self.size());
        self.check_sum(operation, dtype)?;
        let sent_numel = (2 * (n - 1) * numel).div_ceil(n);
        Ok(Demand { operation, dtype, numel, detail: 0, sent_numel })
    }

    pub(crate) fn reduce_scatter(&self, input: &[Part<'_>], shard: Slice<'_>) -> Result<Demand, CommError> {
        let operation = Operation::ReduceScatter;
        let dtype = input.iter().find_map(Part::dtype).unwrap_or(shard.dtype());
        let numel = shard.numel();
        self.check_sum(operation, dtype)?;
        for part in input {
            self.check_dtype(operation, "a part", part.dtype().unwrap_or(dtype), dtype)?;
        }
        if shard.dtype() != DType::F32 {
            self.check_dtype(operation, "the shard", shard.dtype(), dtype)?;
        }
        let got = input.iter().map(Part::numel).sum();
        self.check_numel(operation, "the input", got, numel.checked_mul(self.size()))?;
        Ok(Demand { operation, dtype, numel, detail: 0, sent_numel: (self.size() - 1) * numel })
    }

    pub(crate) fn all_gather(&self, shard: Slice<'_>, full: Slice<'_>) -> Result<Demand, CommError> {
        let operation = Operation::AllGather;
        let (dtype, numel) = (shard.dtype(), shard.numel());
        self.check_dtype(operation, "the result", full.dtype(), dtype)?;
        self.check_numel(operation, "the result", full.numel(), numel.checked_mul(self.size()))?;
        Ok(Demand { operation, dtype, numel, detail: 0, sent_numel: (self.size() - 1) * numel })
    }

    pub(crate) fn all_gather_in_place(&self, full: Slice<'_>) -> Result<Demand, CommError> {
        let operation = Operation::AllGather;
        let numel = self.check_divisible(operation, full.numel())?;
        Ok(Demand { operation, dtype: full.dtype(), numel, detail: 0, sent_numel: (self.size() - 1) * numel })
    }

    pub(crate) fn broadcast(&self, buffer: Slice<'_>, root: usize) -> Result<Demand, CommError> {
        let operation = Operation::Broadcast;
        let (dtype, numel) = (buffer.dtype(), buffer.numel());
        self.check_rank(operation, root, OrSelf::Yes)?;
        let sent_numel = if self.me == root { (self.size() - 1) * numel } else { 0 };
        Ok(Demand { operation, dtype, numel, detail: self.ranks[root] as u64, sent_numel })
    }

    pub(crate) fn all_to_all(&self, input: Slice<'_>, output: Slice<'_>) -> Result<Demand, CommError> {
        let operation = Operation::AllToAll;
        let (dtype, numel) = (input.dtype(), input.numel());
        self.check_dtype(operation, "the output", output.dtype(), dtype)?;
        self.check_numel(operation, "the output", output.numel(), Some(numel))?;
        let piece = self.check_divisible(operation, numel)?;
        Ok(Demand { operation, dtype, numel, detail: 0, sent_numel: (self.size() - 1) * piece })
    }

    /// A message to `to`.
    pub(crate) fn send(&self, buffer: Slice<'_>, to: usize) -> Result<Demand, CommError> {
        self.check_rank(Operation::Send, to, OrSelf::No)?;
        let (dtype, numel) = (buffer.dtype(), buffer.numel());
        let detail = self.ranks[to] as u64;
        Ok(Demand { operation: Operation::Send, dtype, numel, detail, sent_numel: numel })
    }

    /// A message from `from`.
    pub(crate) fn recv(&self, buffer: Slice<'_>, from: usize) -> Result<Demand, CommError> {
        self.check_rank(Operation::Recv, from, OrSelf::No)?;
        let (dtype, numel) = (buffer.dtype(), buffer.numel());
        let detail = self.ranks[from] as u64;
        Ok(Demand { operation: Operation::Recv, dtype, numel, detail, sent_numel: 0 })
    }

    pub(crate) fn subgroup(&self, name: &str, ranks: &[usize]) -> Result<Demand, CommError> {
        let distinct = ranks.iter().enumerate().all(|(i, rank)| !ranks[..i].contains(rank));
        if ranks.is_empty() || !distinct || !ranks.iter().all(|rank| self.ranks.contains(rank)) {
            return Err(CommError::BadSubgroup {
                name: name.to_owned(),
                group: self.name.to_owned(),
                ranks: ranks.to_vec(),
                parent_ranks: self.ranks.to_vec(),
            });
        }
        let detail = digest(name, ranks);
        Ok(Demand { operation: Operation::Subgroup, dtype: DType::U8, numel: 0, detail, sent_numel: 0 })
    }

    fn check_sum(&self, operation: Operation, dtype: DType) -> Result<(), CommError> {
        if dtype != DType::U8 {
            return Ok(());
        }
        let expected = "`f32`, `bf16` or `f16`: bytes have no sum".to_owned();
        let group = self.name.to_owned();
        Err(CommError::WrongDType { operation, group, what: "the input", got: dtype, expected })
    }

    fn check_numel(
        &self,
        operation: Operation,
        what: &'static str,
        got: usize,
        expected: Option<usize>,
    ) -> Result<(), CommError> {
        let expected = expected.unwrap_or(usize::MAX);
        if got == expected {
            return Ok(());
        }
        let (group, group_size) = (self.name.to_owned(), self.size());
        Err(CommError::WrongLength { operation, group, group_size, what, got, expected })
    }

    fn check_dtype(
        &self,
        operation: Operation,
        what: &'static str,
        got: DType,
        expected: DType,
    ) -> Result<(), CommError> {
        if got == expected {
            return Ok(());
        }
        let (group, expected) = (self.name.to_owned(), format!("`{expected}`"));
        Err(CommError::WrongDType { operation, group, what, got, expected })
    }

    fn check_divisible(&self, operation: Operation, numel: usize) -> Result<usize, CommError> {
        let (group, group_size) = (self.name.to_owned(), self.size());
        if numel.is_multiple_of(group_size) {
            return Ok(numel / group_size);
        }
        Err(CommError::NotDivisible { operation, group, group_size, numel })
    }

    /// `rank` must be in the group, and another than this one unless `or_self`.
    fn check_rank(&self, operation: Operation, rank: usize, or_self: OrSelf) -> Result<(), CommError> {
        if rank < self.size() && (rank != self.me || or_self == OrSelf::Yes) {
            return Ok(());
        }
        let (group, group_size) = (self.name.to_owned(), self.size());
        Err(CommError::NoSuchRank { operation, group, group_size, rank })
    }
}

/// FNV-1a: enough to tell a different name or list by accident, not by design.
fn digest(name: &str, ranks: &[usize]) -> u64 {
    let ranks = ranks.iter().flat_map(|rank| rank.to_le_bytes());
    name.bytes()
        .chain([0])
        .chain(ranks)
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}
