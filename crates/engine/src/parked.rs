//! A layer's input, between its forward and the moment it is computed again.

use shardwise_torch::{Device, Tensor};

use crate::EngineError;

/// An input that waits: where it is, or in host memory.
#[derive(Debug)]
pub(crate) struct Parked {
    tensor: Tensor,
    /// Where it is to be computed with.
    home: Device,
    requires_grad: bool,
}

impl Parked {
    /// Leaves a layer's input where it is.
    pub fn here(input: Tensor) -> Self {
        let (home, requires_grad) = (input.device(), input.requires_grad());
        Parked { tensor: input, home, requires_grad }
    }

    /// Moves a layer's input to host memory. On CPU that is where it is: nothing is copied.
    pub fn in_host_memory(input: &Tensor) -> Result<Self, EngineError> {
        let (home, requires_grad) = (input.device(), input.requires_grad());
        Ok(Parked { tensor: input.f_detach()?.f_to_device(Device::Cpu)?, home, requires_grad })
    }

    /// The input, a leaf as it was before.
    pub fn back(self) -> Result<Tensor, EngineError> {
        let Parked { tensor, home, requires_grad } = self;
        Ok(tensor.f_detach()?.f_to_device(home)?.f_set_requires_grad(requires_grad)?)
    }
}

#[cfg(test)]
mod tests {
    use shardwise_torch::Kind;

    use super::*;

    #[test]
    fn an_input_comes_back_as_the_leaf_it_was_and_is_not_copied_on_cpu() {
        for requires_grad in [false, true] {
            let input = Tensor::ones([3, 2], (Kind::Float, Device::Cpu)).set_requires_grad(requires_grad);
            for parked in [Parked::here(input.shallow_clone()), Parked::in_host_memory(&input).unwrap()] {
                let back = parked.back().unwrap();
                assert_eq!((back.requires_grad(), back.is_leaf()), (requires_grad, true));
                assert_eq!(back.data_ptr(), input.data_ptr());
            }
        }
        let tokens = Tensor::from_slice(&[1i64, 2]);
        assert!(Parked::in_host_memory(&tokens).unwrap().back().unwrap().equal(&tokens));
    }
}
