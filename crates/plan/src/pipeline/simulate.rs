//! A schedule, played through without a device.
//!
//! Each stage does its actions one after the other. A forward or backward takes its time, a message takes its own and passes
//! beside the computation, and the end of the step takes none. A stage waits for a message that is not here yet, and, where
//! sends are synchronous, for the receiver to have room. If nobody can go on, whoever waits for whom is the answer; whether that
//! happens depends on the orders alone, not on how long anything takes.

use super::Schedule;
use super::action::{Action, Payload};
use super::validate::{Fault, InvalidSchedule, Waiting};

/// What a send waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// Nothing: the message leaves a buffer of its own while the stage goes on.
    Buffered,
    /// For the receiver to have posted the receive, and then for the message to pass.
    Rendezvous {
        /// Receives of each channel that are posted ahead of the action that needs them; with 0 that action posts its own.
        posted: usize,
    },
}

/// How long things take, in any unit.
#[derive(Debug, Clone, PartialEq)]
pub struct Durations {
    /// Forward of each part of the model.
    pub forward: Vec<f64>,
    /// Gradient of its input.
    pub backward_input: Vec<f64>,
    /// Gradients of its weights. A whole backward takes both.
    pub backward_weight: Vec<f64>,
    /// A message.
    pub transfer: f64,
}

impl Durations {
    /// Parts that take equally long.
    pub fn uniform(num_parts: usize, forward: f64, backward_input: f64, backward_weight: f64) -> Self {
        Durations {
            forward: vec![forward; num_parts],
            backward_input: vec![backward_input; num_parts],
            backward_weight: vec![backward_weight; num_parts],
            transfer: 0.0,
        }
    }

    /// The usual picture: a forward takes 1, a backward 2, a message nothing.
    pub fn unit(num_parts: usize) -> Self {
        Durations::uniform(num_parts, 1.0, 1.0, 1.0)
    }

    fn of(&self, action: Action, part: usize) -> f64 {
        match action {
            Action::Forward(_) => self.forward[part],
            Action::Backward(_) => self.backward_input[part] + self.backward_weight[part],
            Action::BackwardInput(_) => self.backward_input[part],
            Action::BackwardWeight(_) => self.backward_weight[part],
            _ => 0.0,
        }
    }
}

/// When a stage computed what.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Span {
    /// The computation.
    pub action: Action,
    /// When it began.
    pub start: f64,
    /// When it was done.
    pub end: f64,
}

/// How a schedule went.
#[derive(Debug, Clone, PartialEq)]
pub struct Simulation {
    /// What each stage computed, in order.
    pub spans: Vec<Vec<Span>>,
    /// When the last stage was done.
    pub makespan: f64,
    /// Idle time of all stages as a part of all their time.
    pub bubble: f64,
    /// The most micro-batches of a chunk whose activations each stage keeps: from forward to the weights' gradients.
    pub peak_activations: Vec<usize>,
}

/// Messages of one kind from one stage to another.
#[derive(Debug, Clone, Default)]
struct Channel {
    /// When each message was there.
    arrived: Vec<f64>,
    /// When each was taken.
    taken: Vec<f64>,
    /// When the receiver came to the receive that it stands before.
    awaited: Option<f64>,
}

impl Channel {
    /// When there is room for the next message.
    fn has_room(&self, transport: Transport) -> Option<f64> {
        let next = self.arrived.len();
        match transport {
            Transport::Buffered => Some(0.0),
            Transport::Rendezvous { posted: 0 } => self.awaited.filter(|_| self.taken.len() == next),
            Transport::Rendezvous { posted } if next < posted => Some(0.0),
            Transport::Rendezvous { posted } => self.taken.get(next - posted).copied(),
        }
    }
}

struct Player<'a> {
    schedule: &'a Schedule,
    durations: &'a Durations,
    transport: Transport,
    /// By sender, receiver and payload.
    channels: Vec<[Channel; 2]>,
    /// The next action of each stage, and when the stage is free for it.
    at: Vec<(usize, f64)>,
    spans: Vec<Vec<Span>>,
}

impl Schedule {
    /// Plays the schedule through.
    ///
    /// # Errors
    /// [`Fault::Deadlock`] with the stages that wait for each other, or [`Fault::NeverComes`] for a message that nobody is left to
    /// send or take.
    ///
    /// # Panics
    /// If `durations` are not for this number of parts, or the schedule names stages or chunks that it does not have, which
    /// [`Schedule::validate`] refuses.
    pub fn simulate(
        &self,
        durations: &Durations,
        transport: Transport,
    ) -> Result<Simulation, InvalidSchedule> {
        let n = self.num_stages();
        for parts in [&durations.forward, &durations.backward_input, &durations.backward_weight] {
            assert_eq!(parts.len(), self.num_parts(), "one duration for each part");
        }
        let mut player = Player {
            schedule: self,
            durations,
            transport,
            channels: vec![<[Channel; 2]>::default(); n * n],
            at: vec![(0, 0.0); n],
            spans: vec![Vec::new(); n],
        };
        // A sweep in which no stage does anything is the last one.
        while (0..n).filter(|&stage| player.play(stage)).count() > 0 {}
        if let Some(stage) = (0..n).find(|&stage| player.action(stage).is_some()) {
            return Err(player.locked_up(stage));
        }
        let makespan = player.at.iter().map(|&(_, free)| free).fold(0.0, f64::max);
        let busy: f64 = player.spans.iter().flatten().map(|span| span.end - span.start).sum();
        let bubble = if makespan > 0.0 { 1.0 - busy / (makespan * n as f64) } else { 0.0 };
        let peak_activations = (0..n).map(|stage| self.peak_activations(stage)).collect();
        Ok(Simulation { spans: player.spans, makespan, bubble, peak_activations })
    }

    /// The least number of receives of each channel, from 1, that have to be posted ahead for synchronous sends not to lock the
    /// schedule up.
    ///
    /// # Errors
    /// What locks it up however many are posted.
    pub fn receives_to_post(&self) -> Result<usize, InvalidSchedule> {
        let durations = Durations::unit(self.num_parts());
        self.simulate(&durations, Transport::Buffered)?;
        let runs = |&posted: &usize| self.simulate(&durations, Transport::Rendezvous { posted }).is_ok();
        // A channel carries no more messages than a stage has pieces: with all of them posted nobody waits for room.
        let most = (self.num_chunks() * self.num_microbatches()).max(1);
        Ok((1..most).find(runs).unwrap_or(most))
    }

    /// The most micro-batches of a chunk whose activations a stage keeps. It follows from the stage's order alone.
    pub fn peak_activations(&self, stage: usize) -> usize {
        let (mut alive, mut peak) = (0usize, 0);
        for action in self.actions(stage) {
            match action {
                Action::Forward(_) => alive += 1,
                Action::Backward(_) | Action::BackwardWeight(_) => alive = alive.saturating_sub(1),
                _ => {}
            }
            peak = peak.max(alive);
        }
        peak
    }
}

impl Player<'_> {
    fn action(&self, stage: usize) -> Option<Action> {
        self.schedule.stages[stage].get(self.at[stage].0).copied()
    }

    /// Does what `stage` can do by now, and says whether that was anything.
    fn play(&mut self, stage: usize) -> bool {
        let before = self.at[stage].0;
        while let Some(action) = self.action(stage) {
            let free = self.at[stage].1;
            let Some(end) = self.end(stage, action, free) else { break };
            if action.computes() {
                self.spans[stage].push(Span { action, start: free, end });
            }
            self.at[stage] = (self.at[stage].0 + 1, end);
        }
        self.at[stage].0 > before
    }

    /// When an action that could begin at `free` is done, if it can begin.
    fn end(&mut self, stage: usize, action: Action, free: f64) -> Option<f64> {
        let n = self.schedule.num_stages();
        let (transport, transfer) = (self.transport, self.durations.transfer);
        match action {
            Action::SendActivation { to, .. } => send(
                &mut self.channels[stage * n + to][Payload::Activation as usize],
                free,
                transport,
                transfer,
            ),
            Action::SendGrad { to, .. } => {
                send(&mut self.channels[stage * n + to][Payload::Grad as usize], free, transport, transfer)
            }
            Action::RecvActivation { from, .. } => {
                receive(&mut self.channels[from * n + stage][Payload::Activation as usize], free)
            }
            Action::RecvGrad { from, .. } => {
                receive(&mut self.channels[from * n + stage][Payload::Grad as usize], free)
            }
            _ => {
                let part = action.piece().map_or(0, |piece| piece.part(stage, n));
                Some(free + self.durations.of(action, part))
            }
        }
    }

    /// Follows who waits for whom from a stage that cannot go on.
    fn locked_up(&self, stage: usize) -> InvalidSchedule {
        let mut chain: Vec<Waiting> = Vec::new();
        let mut stage = stage;
        loop {
            let waits = |stage| {
                let action = self.action(stage)?;
                match action {
                    Action::SendActivation { to: peer, .. }
                    | Action::SendGrad { to: peer, .. }
                    | Action::RecvActivation { from: peer, .. }
                    | Action::RecvGrad { from: peer, .. } => Some(Waiting { stage, action, peer }),
                    _ => None,
                }
            };
            let Some(waiting) = waits(stage) else {
                // The peer of the last one has come to its end.
                let last = chain.pop().expect("only a message keeps a stage from going on");
                return InvalidSchedule { stage: last.stage, fault: Fault::NeverComes(last) };
            };
            if let Some(start) = chain.iter().position(|earlier| earlier.stage == stage) {
                return InvalidSchedule { stage, fault: Fault::Deadlock(chain.split_off(start)) };
            }
            chain.push(waiting);
            stage = waiting.peer;
        }
    }
}

fn send(channel: &mut Channel, free: f64, transport: Transport, transfer: f64) -> Option<f64> {
    let room = channel.has_room(transport)?;
    // A channel carries one message at a time.
    let start = free.max(room).max(channel.arrived.last().copied().unwrap_or(0.0));
    channel.arrived.push(start + transfer);
    Some(match transport {
        Transport::Buffered => free,
        Transport::Rendezvous { .. } => start + transfer,
    })
}

fn receive(channel: &mut Channel, free: f64) -> Option<f64> {
    let Some(&arrived) = channel.arrived.get(channel.taken.len()) else {
        channel.awaited = Some(free);
        return None;
    };
    let end = free.max(arrived);
    channel.taken.push(end);
    channel.awaited = None;
    Some(end)
}
