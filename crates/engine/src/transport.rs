//! Messages between pipeline stages: activations forward, their gradients back.
//!
//! A *channel* is the messages of one kind from one stage to another. Each has a group of its two ranks and a thread at both
//! ends, so that nobody who sends waits for who receives, and receives are posted before they are needed: what
//! `shardwise_plan::pipeline` asks for so that no schedule locks up.
//!
//! ```text
//! stage 0   F0 ─ F1 ─ ..            caller:  hands the tensor over, goes on
//!            └─► [channel 0>1] ─►   thread:  header, elements
//! stage 1        [posted] ─► F0     caller:  waits only if it is not there yet
//! ```
//! A message begins with its shape and type, so stages need not know each other's. A received tensor's memory comes from
//! libtorch's keeping allocator, which has it from the message before.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use shardwise_comm::{CommError, CommQueue, Group, ProcessGroup, Work};
use shardwise_device::{Slice, SliceMut};
use shardwise_plan::pipeline::{Action, Payload, Schedule};
use shardwise_torch::{Device, Kind, Tensor};

use crate::EngineError;
use crate::slices::{slice, slice_mut};

/// From a stage, to a stage, of a kind.
type Key = (usize, usize, Payload);

/// All channels of one stage.
pub(crate) struct Transport {
    stage: usize,
    channels: BTreeMap<Key, Channel>,
    /// Receives that a channel has under way at the same time.
    num_posted: usize,
}

struct Channel {
    queue: CommQueue,
    group: Group,
    sent: VecDeque<Work<()>>,
    posted: VecDeque<Work<Tensor>>,
    /// Messages of this step that no receive was posted for yet.
    num_expected: usize,
}

/// The channel that an action uses, seen from `stage`, if it is a message.
fn key_of(stage: usize, action: Action) -> Option<Key> {
    match action {
        Action::SendActivation { to, .. } => Some((stage, to, Payload::Activation)),
        Action::RecvActivation { from, .. } => Some((from, stage, Payload::Activation)),
        Action::SendGrad { to, .. } => Some((stage, to, Payload::Grad)),
        Action::RecvGrad { from, .. } => Some((from, stage, Payload::Grad)),
        _ => None,
    }
}

impl Transport {
    /// The channels that `schedule` uses between the ranks of `pipeline`.
    ///
    /// # Collective
    /// `pipeline`. Every rank calls with the same schedule.
    pub fn new(pipeline: &Group, schedule: &Schedule) -> Result<Self, EngineError> {
        let stages = 0..schedule.num_stages();
        let keys: BTreeSet<Key> = stages
            .flat_map(|stage| schedule.actions(stage).iter().filter_map(move |&action| key_of(stage, action)))
            .collect();
        let mut channels = BTreeMap::new();
        for key in keys {
            let (from, to, payload) = key;
            let name = match payload {
                Payload::Activation => "activations",
                Payload::Grad => "gradients of activations",
            };
            let ranks = [pipeline.ranks()[from], pipeline.ranks()[to]];
            if let Some(group) = pipeline.subgroup(name, &ranks)? {
                let queue = CommQueue::new(group.clone())?;
                let (sent, posted) = (VecDeque::new(), VecDeque::new());
                channels.insert(key, Channel { queue, group, sent, posted, num_expected: 0 });
            }
        }
        let num_posted = schedule.receives_to_post().expect("schedules that are built run to their end");
        Ok(Transport { stage: pipeline.group_rank(), channels, num_posted: num_posted.max(1) })
    }

    /// Posts the first receives of a step that consists of `actions`.
    pub fn begin(&mut self, actions: &[Action]) {
        for &action in actions {
            let is_receive = matches!(action, Action::RecvActivation { .. } | Action::RecvGrad { .. });
            if let (true, Some(key)) = (is_receive, key_of(self.stage, action)) {
                self.channel(key).num_expected += 1;
            }
        }
        let num_posted = self.num_posted;
        for channel in self.channels.values_mut() {
            (0..num_posted).for_each(|_| channel.post());
        }
    }

    /// Sends a tensor, which nobody writes to any more.
    pub fn send(&mut self, payload: Payload, to: usize, tensor: &Tensor) -> Result<(), EngineError> {
        let tensor = tensor.f_detach()?.f_contiguous()?;
        let header = header(&tensor);
        let channel = self.channel((self.stage, to, payload));
        let work = channel.queue.submit(move |group| {
            group.send(Slice::of(&header), 1)?;
            if tensor.numel() > 0 {
                group.send(slice(&tensor), 1)?;
            }
            Ok(())
        });
        channel.sent.push_back(work);
        // What has arrived is let go of; an error is met by the next wait in any case.
        while let Some(work) = channel.sent.pop_front() {
            match work.try_wait() {
                Ok(done) => done?,
                Err(work) => {
                    channel.sent.push_front(work);
                    break;
                }
            }
        }
        Ok(())
    }

    /// Receives the next tensor of a channel.
    pub fn recv(&mut self, payload: Payload, from: usize) -> Result<Tensor, EngineError> {
        let key = (from, self.stage, payload);
        let channel = self.channel(key);
        if channel.posted.is_empty() {
            channel.num_expected = channel.num_expected.max(1);
            channel.post();
        }
        let tensor = channel.posted.pop_front().expect("posted above").wait()?;
        channel.post();
        Ok(tensor)
    }

    /// Waits until everything sent has been taken.
    pub fn finish(&mut self) -> Result<(), EngineError> {
        for channel in self.channels.values_mut() {
            channel.sent.drain(..).try_for_each(Work::wait)?;
        }
        Ok(())
    }

    /// Time that the caller has waited for messages so far.
    pub fn waited(&self) -> Duration {
        self.channels.values().map(|channel| channel.queue.waited()).sum()
    }

    /// Bytes sent so far.
    pub fn sent_bytes(&self) -> u64 {
        self.channels.values().map(|channel| channel.group.ledger().total().sent_bytes).sum()
    }

    fn channel(&mut self, key: Key) -> &mut Channel {
        self.channels.get_mut(&key).expect("the schedule of all stages names every channel")
    }
}

impl Channel {
    /// Posts a receive, if a message is still expected.
    fn post(&mut self) {
        if self.num_expected > 0 {
            self.num_expected -= 1;
            self.posted.push_back(self.queue.submit(|group| receive(group)));
        }
    }
}

/// Numbers that a message begins with: type, dimensions, lengths.
const HEADER_NUMEL: usize = 10;

type Header = [u64; HEADER_NUMEL];

/// Types of elements, by their number in a header.
const KINDS: [Kind; 3] = [Kind::Float, Kind::BFloat16, Kind::Half];

fn header(tensor: &Tensor) -> [u8; HEADER_NUMEL * 8] {
    let size = tensor.size();
    assert!(size.len() <= HEADER_NUMEL - 2, "an activation of {} dimensions", size.len());
    let kind = KINDS.iter().position(|&kind| kind == tensor.kind());
    let kind = kind.unwrap_or_else(|| panic!("stages exchange floats, this is {:?}", tensor.kind()));
    let mut numbers: Header = [0; HEADER_NUMEL];
    (numbers[0], numbers[1]) = (kind as u64, size.len() as u64);
    numbers[2..].iter_mut().zip(&size).for_each(|(number, &length)| *number = length as u64);
    let mut bytes = [0; HEADER_NUMEL * 8];
    bytes
        .chunks_exact_mut(8)
        .zip(numbers)
        .for_each(|(bytes, number)| bytes.copy_from_slice(&number.to_le_bytes()));
    bytes
}

/// Memory for what a header announces.
fn announced(header: &[u8; HEADER_NUMEL * 8]) -> Tensor {
    let number = |i: usize| u64::from_le_bytes(header[8 * i..8 * i + 8].try_into().expect("eight bytes"));
    let size: Vec<i64> = (0..number(1) as usize).map(|dim| number(2 + dim) as i64).collect();
    Tensor::empty(size.as_slice(), (KINDS[number(0) as usize], Device::Cpu))
}

fn receive(group: &dyn ProcessGroup) -> Result<Tensor, CommError> {
    let mut header = [0; HEADER_NUMEL * 8];
    group.recv(SliceMut::of(&mut header), 0)?;
    let mut tensor = announced(&header);
    if tensor.numel() > 0 {
        group.recv(slice_mut(&mut tensor), 0)?;
    }
    Ok(tensor)
}

/// Gives all ranks of `group` the tensor that rank `root` has.
///
/// # Collective
/// `group`. Every rank calls; only `root` has a tensor.
pub(crate) fn broadcast(group: &Group, root: usize, tensor: Option<Tensor>) -> Result<Tensor, EngineError> {
    let mut head = [0; HEADER_NUMEL * 8];
    let contiguous = tensor.map(|tensor| tensor.f_detach()?.f_contiguous()).transpose()?;
    if let Some(tensor) = &contiguous {
        head = header(tensor);
    }
    group.broadcast(SliceMut::of(&mut head), root)?;
    let mut tensor = contiguous.unwrap_or_else(|| announced(&head));
    if tensor.numel() > 0 {
        // The root's memory is only read.
        group.broadcast(slice_mut(&mut tensor), root)?;
    }
    Ok(tensor)
}
