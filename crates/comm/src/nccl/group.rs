//! The calls of a process group, each as NCCL's exchanges, or handed on.

use std::sync::{Arc, PoisonError};

use shardwise_device::cuda::Access;
use shardwise_device::{Slice, SliceMut};

use super::communicator::{Fault, Op};
use super::pieces::{self, AllReduce, ReduceScatter};
use super::{DIRECT_BYTES, Nccl, Places, starts_at};
use crate::arguments::Demand;
use crate::member::Patience;
use crate::{CommError, Group, Ledger, Part, ProcessGroup};

impl ProcessGroup for Nccl {
    crate::group::as_inner!();

    fn group_size(&self) -> usize {
        self.size()
    }

    fn all_reduce(&self, buffer: SliceMut<'_>) -> Result<(), CommError> {
        let demand = self.accept(self.caller().all_reduce(buffer.as_slice()))?;
        match self.places(&demand, &[buffer.as_slice()])? {
            Places::Gpu { is_unlogged } => self.collective(demand, is_unlogged, |exchange| {
                let (n, num_bytes) = (self.size(), buffer.num_bytes());
                let is_small = num_bytes <= DIRECT_BYTES && n * num_bytes <= self.shared.staging_bytes;
                match n {
                    1 => Ok(()),
                    // Of two ranks each sends as much either way.
                    _ if n == 2 || is_small => self.run(exchange, AllReduce::direct(self, buffer)),
                    _ => self.run(exchange, AllReduce::divided(self, buffer)),
                }
            }),
            _ => self.elsewhere(demand, |group| group.all_reduce(buffer)),
        }
    }

    fn reduce_scatter(&self, input: &[Part<'_>], shard: SliceMut<'_>) -> Result<(), CommError> {
        let demand = self.accept(self.caller().reduce_scatter(input, shard.as_slice()))?;
        let data = input.iter().filter_map(|part| match part {
            Part::Data(data) => Some(*data),
            Part::Zeros(_) => None,
        });
        let views: Vec<_> = data.chain([shard.as_slice()]).collect();
        match self.places(&demand, &views)? {
            Places::Gpu { is_unlogged } => self.collective(demand, is_unlogged, |exchange| {
                if self.size() == 1 {
                    let parts = input.iter().copied().filter(|part| part.numel() > 0);
                    return Ok(self.sums.pack(&pieces::pieces_of(parts), 1.0, shard)?);
                }
                self.run(exchange, ReduceScatter::new(self, input, shard, demand.dtype))
            }),
            _ => self.elsewhere(demand, |group| group.reduce_scatter(input, shard)),
        }
    }

    fn all_gather(&self, shard: Slice<'_>, full: SliceMut<'_>) -> Result<(), CommError> {
        let demand = self.accept(self.caller().all_gather(shard, full.as_slice()))?;
        match self.places(&demand, &[shard, full.as_slice()])? {
            Places::Gpu { is_unlogged } => self.collective(demand, is_unlogged, |exchange| {
                if self.size() == 1 {
                    return Ok(self.wire.copy(shard, full)?);
                }
                let into = starts_at(full.as_slice());
                let op = Op::AllGather { from: shard.as_ptr(), into, num_bytes: shard.num_bytes() };
                // SAFETY: reads the shard, and writes as many bytes for each rank, which `full` has.
                unsafe { exchange.run(&[op], &[(shard, Access::Read), (full.as_slice(), Access::Write)]) }
            }),
            _ => self.elsewhere(demand, |group| group.all_gather(shard, full)),
        }
    }

    fn all_gather_in_place(&self, full: SliceMut<'_>) -> Result<(), CommError> {
        let demand = self.accept(self.caller().all_gather_in_place(full.as_slice()))?;
        match self.places(&demand, &[full.as_slice()])? {
            Places::Gpu { is_unlogged } => self.collective(demand, is_unlogged, |exchange| {
                if self.size() == 1 {
                    return Ok(());
                }
                let full = full.as_slice();
                // SAFETY: reads and writes `full` alone.
                unsafe { exchange.run(&[self.gather_op(full)], &[(full, Access::Write)]) }
            }),
            _ => self.elsewhere(demand, |group| group.all_gather_in_place(full)),
        }
    }

    fn broadcast(&self, buffer: SliceMut<'_>, root: usize) -> Result<(), CommError> {
        let demand = self.accept(self.caller().broadcast(buffer.as_slice(), root))?;
        match self.places(&demand, &[buffer.as_slice()])? {
            Places::Gpu { is_unlogged } => self.collective(demand, is_unlogged, |exchange| {
                if self.size() == 1 {
                    return Ok(());
                }
                let view = buffer.as_slice();
                let access = if self.group_rank() == root { Access::Read } else { Access::Write };
                let op = Op::Broadcast { buffer: starts_at(view), num_bytes: view.num_bytes(), root };
                // SAFETY: reads the buffer at the root, where it writes the same bytes in place, and writes it elsewhere.
                unsafe { exchange.run(&[op], &[(view, access)]) }
            }),
            _ => self.elsewhere(demand, |group| group.broadcast(buffer, root)),
        }
    }

    fn all_to_all(&self, input: Slice<'_>, mut output: SliceMut<'_>) -> Result<(), CommError> {
        let demand = self.accept(self.caller().all_to_all(input, output.as_slice()))?;
        match self.places(&demand, &[input, output.as_slice()])? {
            Places::Gpu { is_unlogged } => self.collective(demand, is_unlogged, |exchange| {
                let (n, me) = (self.size(), self.group_rank());
                let of_rank = input.numel() / n;
                let range = |rank: usize| rank * of_rank..(rank + 1) * of_rank;
                self.wire.copy(input.range(range(me)), output.range_mut(range(me)))?;
                if n == 1 {
                    return Ok(());
                }
                let output = output.as_slice();
                let (mut ops, mut uses) = (Vec::new(), Vec::new());
                for peer in (0..n).filter(|&peer| peer != me) {
                    let (from, into) = (input.range(range(peer)), output.range(range(peer)));
                    let num_bytes = from.num_bytes();
                    ops.push(Op::Send { from: from.as_ptr(), num_bytes, to: peer });
                    ops.push(Op::Recv { into: starts_at(into), num_bytes, from: peer });
                    uses.extend([(from, Access::Read), (into, Access::Write)]);
                }
                // SAFETY: each view of a peer's piece is in `uses`.
                unsafe { exchange.run(&ops, &uses) }
            }),
            _ => self.elsewhere(demand, |group| group.all_to_all(input, output)),
        }
    }

    fn send(&self, buffer: Slice<'_>, to: usize) -> Result<(), CommError> {
        self.send_message(buffer, to, Patience::Deadline)
    }

    fn send_ahead(&self, buffer: Slice<'_>, to: usize) -> Result<(), CommError> {
        self.send_message(buffer, to, Patience::Endless)
    }

    fn recv(&self, buffer: SliceMut<'_>, from: usize) -> Result<(), CommError> {
        self.receive_message(buffer, from)
    }

    fn barrier(&self) -> Result<(), CommError> {
        self.elsewhere(Demand::BARRIER, |group| group.barrier())
    }

    fn subgroup(&self, name: &str, ranks: &[usize]) -> Result<Option<Group>, CommError> {
        let demand = self.accept(self.caller().subgroup(name, ranks))?;
        let inner = self.account(demand, |state| {
            state.num_collectives += 1;
            self.inner.subgroup(name, ranks).map_err(Fault::World)
        })?;
        let over = |inner| Nccl::over(inner, Arc::clone(&self.shared));
        Ok(inner.map(over).transpose()?.map(|group| Arc::new(group) as Group))
    }

    fn ledger(&self) -> Ledger {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).ledger
    }
}
