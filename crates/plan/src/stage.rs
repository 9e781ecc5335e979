//! The stages of ZeRO.

use serde::{Deserialize, Serialize};

/// How much of the model's state is split over the data-parallel ranks.
///
/// # Source
/// ZeRO (arXiv:1910.02054) section 3: P_os, P_os+g, P_os+g+p.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
pub enum ZeroStage {
    /// Plain data parallelism: every rank holds everything.
    Zero,
    /// Optimizer states are split.
    One,
    /// Gradients too.
    Two,
    /// Parameters too.
    Three,
}

impl ZeroStage {
    /// All stages, in order.
    pub const ALL: [ZeroStage; 4] = [ZeroStage::Zero, ZeroStage::One, ZeroStage::Two, ZeroStage::Three];

    /// Whether optimizer states (and master weights) are split.
    pub fn shards_optimizer(self) -> bool {
        self >= ZeroStage::One
    }

    /// Whether gradients are split, and so reduced in every micro-batch.
    pub fn shards_gradients(self) -> bool {
        self >= ZeroStage::Two
    }

    /// Whether the gradients of micro-batches are summed where they are made, and only their sum is sent: to other ranks, or to the host
    /// if state is offloaded.
    pub fn sums_before_it_sends(self, grad_accum_steps: usize) -> bool {
        grad_accum_steps > 1 && self.keeps_whole_gradients(grad_accum_steps)
    }

    /// Whether a rank keeps the whole fp32 gradient while a step accumulates, rather than its shard. Without accumulation stage 1
    /// needs no more than stage 2.
    pub fn keeps_whole_gradients(self, grad_accum_steps: usize) -> bool {
        match self {
            ZeroStage::Zero => true,
            ZeroStage::One => grad_accum_steps > 1,
            ZeroStage::Two | ZeroStage::Three => false,
        }
    }

    /// Whether parameters are split, and so gathered for each use.
    pub fn shards_parameters(self) -> bool {
        self >= ZeroStage::Three
    }
}

impl From<ZeroStage> for u8 {
    fn from(stage: ZeroStage) -> u8 {
        stage as u8
    }
}

impl TryFrom<u8> for ZeroStage {
    type Error = String;

    fn try_from(number: u8) -> Result<Self, String> {
        ZeroStage::ALL
            .get(usize::from(number))
            .copied()
            .ok_or_else(|| format!("ZeRO stage `{number}`, expected 0, 1, 2 or 3"))
    }
}

impl std::fmt::Display for ZeroStage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", *self as u8)
    }
}
