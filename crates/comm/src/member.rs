//! A rank's handle on a group over shared memory: opens each call with the others, waits with a deadline,
//! keeps the ledger.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use shardwise_device::{Slice, SliceMut};

use crate::arguments::{Caller, Demand};
use crate::board::Posted;
use crate::collectives;
use crate::parts::Parts;
use crate::segment::Segment;
use crate::universe::{SLICE, Universe};
use crate::word::{self, Seen, Word};
use crate::{Call, CommError, Group, Ledger, Part, ProcessGroup};

/// Keeps whatever must live as long as a rank uses any group of its world.
pub(crate) type Anchor = Arc<dyn Send + Sync>;

/// [`ProcessGroup`] over shared memory.
pub(crate) struct Member {
    pub(crate) name: String,
    pub(crate) ranks: Vec<usize>,
    pub(crate) me: usize,
    pub(crate) universe: Arc<Universe>,
    pub(crate) segment: Arc<Segment>,
    state: Mutex<State>,
    /// Last: outlives the leave-taking in `drop`.
    anchor: Anchor,
}

/// Where this member is in the group's sequence of calls. The lock also keeps a second thread out of a call.
pub(crate) struct State {
    phase: u32,
    num_collectives: u64,
    /// Chunks and messages sent to, and received from, each member.
    pub(crate) sent: Vec<(u32, u64)>,
    pub(crate) received: Vec<(u32, u64)>,
    ledger: Ledger,
}

impl State {
    /// The phase that this member would publish next.
    pub(crate) fn phase(&self) -> u32 {
        self.phase
    }
}

impl Member {
    pub(crate) fn new(
        name: String,
        ranks: Vec<usize>,
        me: usize,
        universe: Arc<Universe>,
        segment: Arc<Segment>,
        anchor: Anchor,
    ) -> Self {
        let zeros = vec![(0, 0); ranks.len()];
        let state = State {
            phase: 0,
            num_collectives: 0,
            sent: zeros.clone(),
            received: zeros,
            ledger: Ledger::default(),
        };
        Member { name, ranks, me, universe, segment, state: Mutex::new(state), anchor }
    }

    fn size(&self) -> usize {
        self.ranks.len()
    }

    /// This rank, as its arguments are checked.
    pub(crate) fn caller(&self) -> Caller<'_> {
        Caller { name: &self.name, ranks: &self.ranks, me: self.me }
    }

    /// Of arguments that cannot be right the caller gets the error itself; to the others this rank has given up.
    pub(crate) fn accept(&self, demand: Result<Demand, CommError>) -> Result<Demand, CommError> {
        if let Err(error) = &demand {
            self.universe.check()?;
            self.universe.fail(error);
        }
        demand
    }

    /// Runs one call and enters it in the ledger.
    pub(crate) fn account<T>(
        &self,
        demand: Demand,
        body: impl FnOnce(&mut State) -> Result<T, CommError>,
    ) -> Result<T, CommError> {
        let started = Instant::now();
        let mut state: MutexGuard<'_, State> = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        self.universe.check()?;
        let result = body(&mut state)?;
        let Demand { operation, dtype, sent_numel, .. } = demand;
        state.ledger.record(operation, sent_numel, dtype.size_bytes(), started.elapsed());
        Ok(result)
    }

    /// Runs one collective.
    fn collective<T>(
        &self,
        demand: Demand,
        body: impl FnOnce(&mut Exchange<'_>) -> Result<T, CommError>,
    ) -> Result<T, CommError> {
        self.account(demand, |state| {
            let call = demand.call(state.num_collectives);
            state.num_collectives += 1;
            body(&mut Exchange { member: self, phase: &mut state.phase, call, is_open: false })
        })
    }

    /// Waits until `word` of member `peer` reaches `target`. `stuck` is asked now and then whether that can
    /// still happen.
    pub(crate) fn wait_on(
        &self,
        word: &Word,
        target: u32,
        peer: usize,
        call: &Call,
        patience: Patience,
        stuck: impl Fn() -> Option<CommError>,
    ) -> Result<(), CommError> {
        // The first sleep is short, so that what `stuck` finds is found soon.
        let mut seen = word.wait(target, self.universe.spin(), Duration::from_millis(2));
        if seen == Seen::Reached {
            return Ok(());
        }
        let deadline = self.universe.options().deadline;
        let (rank, waiting_rank) = (self.ranks[peer], self.universe.rank());
        let started = Instant::now();
        let result = loop {
            match seen {
                Seen::Reached => break Ok(()),
                Seen::Left => {
                    let group = self.name.clone();
                    break Err(self.universe.fail(&CommError::Left {
                        rank,
                        waiting_rank,
                        group,
                        call: *call,
                    }));
                }
                Seen::Poisoned | Seen::Nothing => {
                    if let Err(verdict) = self.universe.check() {
                        break Err(verdict);
                    }
                }
            }
            if let Some(error) = stuck() {
                break Err(self.universe.fail(&error));
            }
            let left = deadline.saturating_sub(started.elapsed());
            if patience == Patience::Endless {
                seen = word.wait(target, Duration::ZERO, SLICE);
                continue;
            }
            if left.is_zero() {
                let (rank, group) = (self.universe.culprit(rank), self.name.clone());
                break Err(self.universe.fail(&CommError::Stalled {
                    rank,
                    waiting_rank,
                    group,
                    call: *call,
                    waited: deadline,
                }));
            }
            self.universe.note_waiting(rank);
            seen = word.wait(target, Duration::ZERO, left.min(SLICE));
        };
        if patience == Patience::Deadline {
            self.universe.note_going();
        }
        result
    }
}

/// How long a call waits for another rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Patience {
    /// As long as the world's options say; meanwhile this rank counts as waiting.
    Deadline,
    /// As long as it takes, while this rank does something else.
    Endless,
}

impl ProcessGroup for Member {
    fn name(&self) -> &str {
        &self.name
    }

    fn group_rank(&self) -> usize {
        self.me
    }

    fn group_size(&self) -> usize {
        self.size()
    }

    fn ranks(&self) -> &[usize] {
        &self.ranks
    }

    fn all_reduce(&self, buffer: SliceMut<'_>) -> Result<(), CommError> {
        let demand = self.accept(self.caller().all_reduce(buffer.as_slice()))?;
        self.collective(demand, |x| collectives::all_reduce(x, buffer))
    }

    fn reduce_scatter(&self, input: &[Part<'_>], shard: SliceMut<'_>) -> Result<(), CommError> {
        let demand = self.accept(self.caller().reduce_scatter(input, shard.as_slice()))?;
        let parts = Parts::new(input, demand.dtype);
        self.collective(demand, |x| collectives::reduce_scatter(x, &parts, shard))
    }

    fn all_gather(&self, shard: Slice<'_>, full: SliceMut<'_>) -> Result<(), CommError> {
        let demand = self.accept(self.caller().all_gather(shard, full.as_slice()))?;
        self.collective(demand, |x| collectives::all_gather(x, Some(shard), full))
    }

    fn all_gather_in_place(&self, full: SliceMut<'_>) -> Result<(), CommError> {
        let demand = self.accept(self.caller().all_gather_in_place(full.as_slice()))?;
        self.collective(demand, |x| collectives::all_gather(x, None, full))
    }

    fn broadcast(&self, buffer: SliceMut<'_>, root: usize) -> Result<(), CommError> {
        let demand = self.accept(self.caller().broadcast(buffer.as_slice(), root))?;
        self.collective(demand, |x| collectives::broadcast(x, buffer, root))
    }

    fn all_to_all(&self, input: Slice<'_>, output: SliceMut<'_>) -> Result<(), CommError> {
        let demand = self.accept(self.caller().all_to_all(input, output.as_slice()))?;
        self.collective(demand, |x| collectives::all_to_all(x, input, output))
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
        self.collective(Demand::BARRIER, |x| {
            if x.size() > 1 {
                x.publish();
                x.wait()?;
            }
            Ok(())
        })
    }

    fn subgroup(&self, name: &str, ranks: &[usize]) -> Result<Option<Group>, CommError> {
        let demand = self.accept(self.caller().subgroup(name, ranks))?;
        let founder = self.ranks.iter().position(|&rank| rank == ranks[0]).expect("checked above");
        let place = ranks.iter().position(|&rank| rank == self.universe.rank());
        let segment = self
            .collective(demand, |x| collectives::share_segment(x, founder, place.is_some(), ranks.len()))?;
        let anchor = Arc::clone(&self.anchor);
        Ok(place.zip(segment).map(|(me, segment)| {
            let universe = Arc::clone(&self.universe);
            Arc::new(Member::new(name.to_owned(), ranks.to_vec(), me, universe, segment, anchor)) as Group
        }))
    }

    fn post(&self, call: &Call) -> u64 {
        self.segment.board(self.me).post(call)
    }

    fn missing(&self, number: u64, call: &Call) -> Result<Option<usize>, CommError> {
        let mut missing = None;
        for peer in (0..self.size()).filter(|&peer| peer != self.me) {
            let (word, board) = (&self.segment.words()[peer], self.segment.board(peer));
            let has_left = word.look(word::next(word.count())) == Seen::Left;
            // Looked at after the word: who has left has shown all it ever will.
            match board.look(number) {
                Posted::Call(other_call) if other_call != *call => {
                    let ((rank, call), (other_rank, other_call)) = match self.me < peer {
                        true => ((self.me, *call), (peer, other_call)),
                        false => ((peer, other_call), (self.me, *call)),
                    };
                    let (group, rank, other_rank) =
                        (self.name.clone(), self.ranks[rank], self.ranks[other_rank]);
                    let mismatch = CommError::Mismatch { group, rank, call, other_rank, other_call };
                    return Err(self.universe.fail(&mismatch));
                }
                Posted::NotYet if has_left => {
                    let (rank, waiting_rank) = (self.ranks[peer], self.universe.rank());
                    let group = self.name.clone();
                    return Err(self.universe.fail(&CommError::Left {
                        rank,
                        waiting_rank,
                        group,
                        call: *call,
                    }));
                }
                Posted::NotYet => missing = missing.or(Some(self.ranks[peer])),
                Posted::Call(_) | Posted::Forgotten => {}
            }
        }
        Ok(missing.map(|rank| self.universe.culprit(rank)))
    }

    fn ledger(&self) -> Ledger {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).ledger
    }

    fn poison(&self, reason: &str) {
        self.universe.fail(&CommError::GaveUp { rank: self.universe.rank(), reason: reason.to_owned() });
    }

    fn check(&self) -> Result<(), CommError> {
        self.universe.check()
    }

    fn fail(&self, error: &CommError) -> CommError {
        self.universe.fail(error)
    }

    fn deadline(&self) -> Duration {
        self.universe.options().deadline
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.poison("its thread panicked");
        }
        self.segment.leave(self.me);
    }
}

/// One collective in progress: this rank's slots to fill, the peers' to read, phase by phase.
pub(crate) struct Exchange<'a> {
    pub(crate) member: &'a Member,
    phase: &'a mut u32,
    call: Call,
    is_open: bool,
}

impl Exchange<'_> {
    pub(crate) fn size(&self) -> usize {
        self.member.size()
    }

    pub(crate) fn me(&self) -> usize {
        self.member.me
    }

    /// The other members, beginning after this one, so that not all read the same one at once.
    pub(crate) fn peers(&self) -> impl Iterator<Item = usize> + use<> {
        let (n, me) = (self.size(), self.me());
        (1..n).map(move |step| (me + step) % n)
    }

    /// Bytes of a slot.
    pub(crate) fn slot_bytes(&self) -> usize {
        self.member.segment.slot_bytes()
    }

    /// This rank's slot for the coming phase: to be filled, then published.
    pub(crate) fn slot(&self) -> *mut u8 {
        self.member.segment.slot(self.me(), *self.phase)
    }

    /// Shows the slot to the others.
    pub(crate) fn publish(&mut self) {
        let segment = &self.member.segment;
        if !self.is_open {
            // SAFETY: the post of this phase's parity was last read two phases ago, and every peer has
            // published since.
            unsafe { segment.post(self.me(), *self.phase).write(&self.call) };
        }
        segment.words()[self.me()].advance();
        *self.phase = word::next(*self.phase);
    }

    /// Waits until all have published the phase; their slots may then be read until this rank publishes
    /// again.
    pub(crate) fn wait(&mut self) -> Result<(), CommError> {
        let Member { segment, .. } = self.member;
        for peer in self.peers() {
            let word = &segment.words()[peer];
            self.member.wait_on(word, *self.phase, peer, &self.call, Patience::Deadline, || None)?;
        }
        if !self.is_open {
            self.is_open = true;
            self.compare_calls()?;
        }
        Ok(())
    }

    /// The slot that `peer` has published in the present phase.
    pub(crate) fn shown(&self, peer: usize) -> *const u8 {
        self.member.segment.slot(peer, self.phase.wrapping_sub(1))
    }

    /// All ranks compare all calls with the first member's and so come to the same judgement.
    fn compare_calls(&self) -> Result<(), CommError> {
        let Member { segment, ranks, name, .. } = self.member;
        let phase = self.phase.wrapping_sub(1);
        // SAFETY: every member has published this phase, which begins a call, and cannot publish another of
        // this parity before this rank has published the next.
        let posted = |member| unsafe { segment.post(member, phase).read() };
        let call = posted(0);
        let Some((other, other_call)) =
            (1..ranks.len()).map(|i| (i, posted(i))).find(|(_, other)| *other != call)
        else {
            return Ok(());
        };
        let (rank, other_rank) = (ranks[0], ranks[other]);
        Err(self.member.universe.fail(&CommError::Mismatch {
            group: name.clone(),
            rank,
            call,
            other_rank,
            other_call,
        }))
    }
}
