//! Messages between pipeline stages: activations forward, their gradients back.
//!
//! A *channel* is the messages of one kind from one stage to another. Each has a group of its two ranks and, where it begins, a
//! thread: who sends hands the tensor over and goes on, so whoever receives waits for one rank only, and no schedule locks up
//! (`shardwise_plan::pipeline::Transport::Buffered`).
//!
//! ```text
//! stage 0   F0 ─ F1 ─ ..            hands the tensor over, goes on
//!            └─► [thread] ─►        header, elements, as the receiver takes them
//! stage 1                    F0     waits until it is here
//! ```
//! A message begins with its shape and type, so stages need not know each other's. A received tensor's memory comes from
//! libtorch's keeping allocator, which has it from the message before.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use shardwise_comm::{CommQueue, Group, ProcessGroup, Work};
use shardwise_device::{Slice, SliceMut};
use shardwise_plan::pipeline::{Action, Payload, Schedule};
use shardwise_torch::{Kind, Tensor};

use crate::EngineError;
use crate::home::Home;

/// From a stage, to a stage, of a kind.
type Key = (usize, usize, Payload);

/// All channels of one stage.
pub(crate) struct Transport {
    stage: usize,
    home: Home,
    outgoing: BTreeMap<Key, Outgoing>,
    incoming: BTreeMap<Key, Group>,
    waited: Duration,
}

struct Outgoing {
    queue: CommQueue,
    group: Group,
    sent: VecDeque<Work<()>>,
}

/// The channel that an action sends on, if it does.
fn key_of(stage: usize, action: Action) -> Option<Key> {
    match action {
        Action::SendActivation { to, .. } => Some((stage, to, Payload::Activation)),
        Action::SendGrad { to, .. } => Some((stage, to, Payload::Grad)),
        _ => None,
    }
}

impl Transport {
    /// The channels that `schedule` uses between the ranks of `pipeline`.
    ///
    /// # Collective
    /// `pipeline`. Every rank calls with the same schedule.
    pub fn new(pipeline: &Group, schedule: &Schedule, home: Home) -> Result<Self, EngineError> {
        let stages = 0..schedule.num_stages();
        let keys: BTreeSet<Key> = stages
            .flat_map(|stage| schedule.actions(stage).iter().filter_map(move |&action| key_of(stage, action)))
            .collect();
        let stage = pipeline.group_rank();
        let (mut outgoing, mut incoming) = (BTreeMap::new(), BTreeMap::new());
        for key in keys {
            let (from, to, payload) = key;
            let name = match payload {
                Payload::Activation => "activations",
                Payload::Grad => "gradients of activations",
            };
            let Some(group) = pipeline.subgroup(name, &[pipeline.ranks()[from], pipeline.ranks()[to]])?
            else {
                continue;
            };
            if from == stage {
                let queue = CommQueue::new(group.clone())?;
                outgoing.insert(key, Outgoing { queue, group, sent: VecDeque::new() });
            } else {
                incoming.insert(key, group);
            }
        }
        Ok(Transport { stage, home, outgoing, incoming, waited: Duration::ZERO })
    }

    /// Sends a tensor, which nobody writes to any more.
    pub fn send(&mut self, payload: Payload, to: usize, tensor: &Tensor) -> Result<(), EngineError> {
        let tensor = tensor.f_detach()?.f_contiguous()?;
        let header = header(&tensor)?;
        let key = (self.stage, to, payload);
        let channel = self.outgoing.get_mut(&key).expect("the schedule names every channel");
        let home = self.home.clone();
        let work = channel.queue.submit(move |group| {
            group.send_ahead(Slice::of(&header), 1)?;
            if tensor.numel() > 0 {
                group.send_ahead(home.slice(&tensor), 1)?;
            }
            Ok(())
        });
        channel.sent.push_back(work);
        channel.settle()
    }

    /// Receives the next tensor of a channel.
    pub fn recv(&mut self, payload: Payload, from: usize) -> Result<Tensor, EngineError> {
        let _still = self.home.stall();
        let start = Instant::now();
        let group =
            self.incoming.get(&(from, self.stage, payload)).expect("the schedule names every channel");
        let tensor = receive(&**group, &self.home)?;
        self.waited += start.elapsed();
        Ok(tensor)
    }

    /// Meets the ends of all messages, which are taken once every stage has come so far.
    pub fn finish(&mut self) -> Result<(), EngineError> {
        for channel in self.outgoing.values_mut() {
            channel.sent.drain(..).try_for_each(Work::wait)?;
        }
        Ok(())
    }

    /// Time that the caller has received and waited for messages so far.
    pub fn waited(&self) -> Duration {
        self.waited
    }

    /// Bytes sent so far. Not while messages are under way.
    pub fn sent_bytes(&self) -> u64 {
        self.outgoing.values().map(|channel| channel.group.ledger().total().sent_bytes).sum()
    }
}

impl Outgoing {
    /// Lets go of what has been taken.
    fn settle(&mut self) -> Result<(), EngineError> {
        while let Some(work) = self.sent.pop_front() {
            match work.try_wait() {
                Ok(done) => done?,
                Err(work) => {
                    self.sent.push_front(work);
                    break;
                }
            }
        }
        Ok(())
    }
}

/// Numbers that a message begins with: type, dimensions, lengths.
const HEADER_NUMEL: usize = 10;

type Header = [u64; HEADER_NUMEL];

/// Types of elements, by their number in a header.
const KINDS: [Kind; 3] = [Kind::Float, Kind::BFloat16, Kind::Half];

fn header(tensor: &Tensor) -> Result<[u8; HEADER_NUMEL * 8], EngineError> {
    let size = tensor.size();
    let kind = KINDS.iter().position(|&kind| kind == tensor.kind());
    let Some(kind) = kind.filter(|_| size.len() <= HEADER_NUMEL - 2) else {
        return Err(EngineError::NotAnActivation { kind: format!("{:?}", tensor.kind()), shape: size });
    };
    let mut numbers: Header = [0; HEADER_NUMEL];
    (numbers[0], numbers[1]) = (kind as u64, size.len() as u64);
    numbers[2..].iter_mut().zip(&size).for_each(|(number, &length)| *number = length as u64);
    let mut bytes = [0; HEADER_NUMEL * 8];
    bytes
        .chunks_exact_mut(8)
        .zip(numbers)
        .for_each(|(bytes, number)| bytes.copy_from_slice(&number.to_le_bytes()));
    Ok(bytes)
}

/// Memory for what a header announces.
fn announced(header: &[u8; HEADER_NUMEL * 8], home: &Home) -> Result<Tensor, EngineError> {
    let number = |i: usize| u64::from_le_bytes(header[8 * i..8 * i + 8].try_into().expect("eight bytes"));
    let size: Vec<i64> = (0..number(1) as usize).map(|dim| number(2 + dim) as i64).collect();
    Ok(Tensor::f_empty(size.as_slice(), (KINDS[number(0) as usize], home.device))?)
}

fn receive(group: &dyn ProcessGroup, home: &Home) -> Result<Tensor, EngineError> {
    let mut header = [0; HEADER_NUMEL * 8];
    group.recv(SliceMut::of(&mut header), 0)?;
    let mut tensor = announced(&header, home)?;
    if tensor.numel() > 0 {
        group.recv(home.slice_mut(&mut tensor), 0)?;
    }
    Ok(tensor)
}

/// Gives all ranks of `group` the tensor that rank `root` has.
///
/// # Collective
/// `group`. Every rank calls; only `root` has a tensor.
pub(crate) fn broadcast(
    group: &Group,
    home: &Home,
    root: usize,
    tensor: Option<Tensor>,
) -> Result<Tensor, EngineError> {
    let mut head = [0; HEADER_NUMEL * 8];
    let contiguous = tensor.map(|tensor| tensor.f_detach()?.f_contiguous()).transpose()?;
    if let Some(tensor) = &contiguous {
        head = header(tensor)?;
    }
    group.broadcast(SliceMut::of(&mut head), root)?;
    let mut tensor = match contiguous {
        Some(tensor) => tensor,
        None => announced(&head, home)?,
    };
    if tensor.numel() > 0 {
        // The root's memory is only read.
        group.broadcast(home.slice_mut(&mut tensor), root)?;
    }
    Ok(tensor)
}
