//! What is sent in a step.
//!
//! With Ψ padded elements and N ranks, a reduce-scatter or an all-gather of everything sends (N-1)/N Ψ from each rank.
//!
//! | stage | a step without accumulation |
//! |---|---|
//! | 0 | reduce-scatter and all-gather of gradients: 2Ψ |
//! | 1, 2 | reduce-scatter of gradients, all-gather of parameters: 2Ψ |
//! | 3 | reduce-scatter of gradients, all-gather of parameters for forward and again for backward: 3Ψ |
//!
//! Parameters are sent in the compute type, and so are the gradients of one micro-batch; sums of gradients are sent in fp32.
//!
//! # Source
//! ZeRO (arXiv:1910.02054) section 7.

use serde::Serialize;

use crate::layout::UnitLayout;
use crate::{Bytes, ZeroStage};

/// Bytes of an element of a sum of gradients.
const SUM_BYTES: usize = 4;

/// What each rank sends in one step, apart from a few numbers for the norm and the loss.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Traffic {
    /// Elements.
    pub elements: usize,
    /// Bytes.
    pub bytes: Bytes,
}

impl Traffic {
    /// Counts a step of models that compute in elements of `compute_bytes`.
    ///
    /// `num_gathers` of a unit, by index, is how often a micro-batch uses it in forward and backward: 2, or 4 if two layers
    /// share it.
    pub fn new(
        units: &[UnitLayout],
        stage: ZeroStage,
        grad_accum_steps: usize,
        compute_bytes: usize,
        num_gathers: impl Fn(usize) -> usize,
    ) -> Self {
        let mut sum = Traffic::default();
        let mut send = |numel: usize, element_bytes: usize| {
            sum.elements += numel;
            sum.bytes += Bytes::of(numel, element_bytes);
        };
        for (index, unit) in units.iter().enumerate() {
            let sent = unit.padded_numel - unit.shard_numel();
            if unit.trainable {
                let reduces_sums = !stage.shards_gradients() && grad_accum_steps > 1;
                let num_reduces = if stage.shards_gradients() { grad_accum_steps } else { 1 };
                send(sent * num_reduces, if reduces_sums { SUM_BYTES } else { compute_bytes });
                match stage {
                    ZeroStage::Zero => send(sent, SUM_BYTES),
                    ZeroStage::One | ZeroStage::Two => send(sent, compute_bytes),
                    ZeroStage::Three => {}
                }
            }
            if stage.shards_parameters() {
                send(sent * num_gathers(index) * grad_accum_steps, compute_bytes);
            }
        }
        sum
    }
}

/// Bytes that a rank sends in a step, along each axis.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct AxisTraffic {
    /// Activations, their gradients, and gradients of parameters that stages share.
    pub pipeline: Bytes,
    /// Gradients and parameters.
    pub data: Bytes,
    /// Activations and their gradients within layers.
    pub tensor: Bytes,
}

impl AxisTraffic {
    /// All of it.
    pub fn total(&self) -> Bytes {
        self.pipeline + self.data + self.tensor
    }

    /// The larger of two along each axis.
    pub fn max(self, other: AxisTraffic) -> AxisTraffic {
        AxisTraffic {
            pipeline: self.pipeline.max(other.pipeline),
            data: self.data.max(other.data),
            tensor: self.tensor.max(other.tensor),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::param::{Init, ParamSpec};

    fn unit(trainable: bool, num_shards: usize) -> UnitLayout {
        let param = ParamSpec::new("l", "w", &[1 << 20], Init::Zeros);
        UnitLayout::new("l", trainable, vec![param], num_shards)
    }

    #[test]
    fn the_papers_table() {
        for n in [1usize, 2, 4, 8] {
            let psi = 1 << 20;
            for (stage, times) in ZeroStage::ALL.into_iter().zip([2, 2, 2, 3]) {
                let traffic = Traffic::new(&[unit(true, n)], stage, 1, 2, |_| 2);
                assert_eq!(traffic.elements, times * psi * (n - 1) / n);
            }
        }
    }

    #[test]
    fn bytes_follow_the_type_that_is_sent() {
        let half = 1 << 19;
        for (stage, accum, elements, bytes) in [
            (ZeroStage::Zero, 1, 2 * half, (2 + 4) * half),
            (ZeroStage::Zero, 3, 2 * half, (4 + 4) * half),
            (ZeroStage::One, 1, 2 * half, (2 + 2) * half),
            (ZeroStage::One, 3, 2 * half, (4 + 2) * half),
            (ZeroStage::Two, 3, 4 * half, (3 * 2 + 2) * half),
            (ZeroStage::Three, 3, 9 * half, 9 * 2 * half),
        ] {
            let traffic = Traffic::new(&[unit(true, 2)], stage, accum, 2, |_| 2);
            assert_eq!(traffic, Traffic { elements, bytes: Bytes(bytes as u64) }, "{stage} {accum}");
        }
    }

    #[test]
    fn frozen_parameters_are_gathered_and_never_reduced() {
        let sent = |stage| Traffic::new(&[unit(false, 2)], stage, 1, 2, |_| 1).elements;
        assert_eq!(ZeroStage::ALL.map(sent), [0, 0, 0, 1 << 19]);
    }
}
