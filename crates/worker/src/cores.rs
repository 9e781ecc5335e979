//! Which cores a rank runs on.
//!
//! Ranks of one host that are left to the scheduler often share a core for a while, since each wakes the other; a rank
//! that stays on its own cores trains faster and more evenly. So where the ranks' threads are just as many as the cores
//! that this process may use, each rank takes its share of them. A run that uses only some of the cores is left to the
//! scheduler: another run may be using the others.

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Keeps this process, and every thread it starts, on `threads` cores of its own, if all ranks together use all cores
/// exactly. Does nothing if the system does not say or allow.
pub fn take_share(local_rank: usize, num_ranks: usize, threads: usize) {
    let Ok(allowed) = sched_getaffinity(None) else { return };
    let cores: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|&core| allowed.is_set(core)).collect();
    if num_ranks < 2 || num_ranks * threads != cores.len() {
        return;
    }
    let mut mine = CpuSet::new();
    for &core in cores.iter().skip(local_rank * threads).take(threads) {
        mine.set(core);
    }
    // A refusal costs speed, not correctness.
    let _ = sched_setaffinity(None, &mine);
}
