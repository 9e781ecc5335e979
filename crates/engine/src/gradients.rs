//! From a layer's gradients to its units': uses of tied parameters are added up, and so are the parts that tensor-parallel ranks
//! have of the gradient of a parameter they all hold.

use std::collections::HashMap;

use shardwise_comm::Group;
use shardwise_device::{DType, Slice};
use shardwise_torch::{Kind, Tensor};

use crate::home::Home;
use crate::slices::dtype_of;
use crate::{Engine, EngineError, Phase};

/// Gradients of a step, until every layer that uses a unit has added its own.
#[derive(Default)]
pub(crate) struct Gradients {
    /// By unit and micro-batch.
    pending: HashMap<(usize, usize), Pending>,
    /// Micro-batches that each unit has been reduced for.
    num_reduced: HashMap<usize, usize>,
}

struct Pending {
    grads: Vec<Option<Tensor>>,
    num_left: usize,
}

/// Where this rank has only a part of the gradient of a parameter that other tensor-parallel ranks hold too.
pub(crate) struct PartialGradient {
    pub slot: usize,
    /// The ranks that hold it.
    pub group: Group,
}

impl Engine {
    /// Adds a layer's gradients to its units', and reduces the units that are complete.
    pub(crate) fn add_grads(
        &mut self,
        layer: usize,
        microbatch: usize,
        grads: Vec<Option<Tensor>>,
        gradients: &mut Gradients,
    ) -> Result<(), EngineError> {
        let places: Vec<_> = self.bindings[layer].trainable().map(|(place, _)| place).collect();
        let units = self.bindings[layer].units.clone();
        for &unit in &units {
            gradients.pending.entry((unit, microbatch)).or_insert_with(|| Pending {
                grads: self.zero.layout(unit).slots.iter().map(|_| None).collect(),
                num_left: self.num_users[unit],
            });
        }
        for (place, grad) in places.iter().zip(grads) {
            let Some(mut grad) = grad else { continue };
            if grad.is_sparse() {
                grad = grad.f_to_dense(None::<Kind>, false)?;
            }
            let pending = gradients.pending.get_mut(&(place.unit, microbatch)).expect("made above");
            let slot = &mut pending.grads[place.slot];
            // A tied parameter: the other layer's gradient came first.
            *slot = Some(match slot.take() {
                Some(other) => other.f_add(&grad)?,
                None => grad,
            });
        }
        for unit in units {
            let pending = gradients.pending.get_mut(&(unit, microbatch)).expect("made above");
            pending.num_left -= 1;
            if pending.num_left == 0 {
                let mut grads = gradients.pending.remove(&(unit, microbatch)).expect("just seen").grads;
                for grad in grads.iter_mut().flatten() {
                    // Libtorch lays out a gradient as it likes.
                    *grad = grad.f_contiguous()?;
                }
                self.sum_partial(unit, &mut grads)?;
                // Schedules take micro-batches through a layer in one order on all ranks, not always in that of their numbers.
                let turn = gradients.num_reduced.entry(unit).or_default();
                let nth = *turn;
                *turn += 1;
                self.reduce(unit, nth, &grads)?;
            }
        }
        Ok(())
    }

    /// Sums what ranks have in parts, all parameters of a group in one call.
    fn sum_partial(&self, unit: usize, grads: &mut [Option<Tensor>]) -> Result<(), EngineError> {
        let mut rest: &[PartialGradient] = &self.partial[unit];
        while let Some(first) = rest.first() {
            let same = |other: &&PartialGradient| std::sync::Arc::ptr_eq(&other.group, &first.group);
            let (now, later) = rest.split_at(rest.iter().take_while(same).count());
            rest = later;
            let slots = &self.zero.layout(unit).slots;
            let kind = shardwise_torch::kind_of(self.zero.compute_dtype());
            let flat = now.iter().map(|partial| match &grads[partial.slot] {
                Some(grad) => grad.f_view([-1]),
                None => {
                    let numel = slots[partial.slot].param.numel() as i64;
                    Tensor::f_zeros([numel], (kind, self.home.device))
                }
            });
            let mut sum = Tensor::f_cat(&flat.collect::<Result<Vec<_>, _>>()?, 0)?;
            self.tensor.timed(|| first.group.all_reduce(self.home.slice_mut(&mut sum)))?;
            let mut start = 0;
            for partial in now {
                let param = &slots[partial.slot].param;
                let shape: Vec<i64> = param.shape.iter().map(|&size| size as i64).collect();
                let numel = param.numel() as i64;
                grads[partial.slot] = Some(sum.f_narrow(0, start, numel)?.f_view(shape.as_slice())?);
                start += numel;
            }
        }
        Ok(())
    }

    fn reduce(
        &mut self,
        unit: usize,
        microbatch: usize,
        grads: &[Option<Tensor>],
    ) -> Result<(), EngineError> {
        (self.observer)(Phase::Reduce);
        let dtype = self.zero.compute_dtype();
        let home = &self.home;
        let slices: Vec<_> =
            grads.iter().map(|grad| grad.as_ref().map(|grad| checked(home, grad, dtype))).collect();
        Ok(self.zero.reduce(unit, microbatch, &slices)?)
    }
}

/// A gradient's memory. Autograd gives a gradient its parameter's type: were it another, we would read other numbers in silence.
fn checked<'a>(home: &Home, grad: &'a Tensor, dtype: DType) -> Slice<'a> {
    assert_eq!(dtype_of(grad), Some(dtype), "a gradient is {:?}", grad.kind());
    home.slice(grad)
}
