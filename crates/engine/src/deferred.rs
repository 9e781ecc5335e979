//! Gradients of matrices that can wait.
//!
//! A zero-bubble schedule sends the gradient of a layer's input on as soon as it is known, and computes those of the weights where
//! the stage would be idle. All that the gradient of a linear map's matrix needs is the map's input and the gradient of its output:
//! while the graph is gone through for the layer's input, both are set aside, and the product is made later, without the graph and
//! without the matrix. What costs little (norms, biases) does not wait.

use std::cell::RefCell;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use shardwise_torch::{Tensor, TorchError};

/// How a matrix lies in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// `[out, in]`: `y = x W^T`.
    OutIn,
    /// `[in, out]`: `y = x W`.
    InOut,
}

/// What the gradient of a matrix follows from.
pub(crate) struct Factors {
    weight: usize,
    pub form: Form,
    pub x: Tensor,
    pub dy: Tensor,
}

/// The matrices of one layer in one micro-batch whose gradients wait.
#[derive(Default)]
pub struct DeferredWeights {
    /// Those whose maps the forward pass has gone through, by identity.
    weights: RefCell<Vec<usize>>,
    factors: Arc<Mutex<Vec<Factors>>>,
    is_closed: Arc<AtomicBool>,
}

/// What a linear map leaves its factors in.
#[derive(Clone)]
pub(crate) struct Shelf {
    weight: usize,
    factors: Arc<Mutex<Vec<Factors>>>,
    is_closed: Arc<AtomicBool>,
}

impl DeferredWeights {
    /// A matrix that a linear map is being made of.
    pub(crate) fn shelf(&self, weight: &Tensor) -> Shelf {
        let weight = identity(weight);
        self.weights.borrow_mut().push(weight);
        Shelf { weight, factors: self.factors.clone(), is_closed: self.is_closed.clone() }
    }

    /// Nothing is set aside from here on: the graph is gone through again, for something else.
    pub(crate) fn close(&self) {
        self.is_closed.store(true, Ordering::Relaxed);
    }

    /// Whether no gradient waits.
    pub(crate) fn is_empty(&self) -> bool {
        self.weights.borrow().is_empty()
    }

    /// Whether the gradient of a parameter waits.
    pub(crate) fn waits(&self, param: &Tensor) -> bool {
        self.weights.borrow().contains(&identity(param))
    }

    /// Whether a backward pass that did not ask for the gradient of a parameter has left something of it out: it has not come
    /// by all linear maps that the matrix is in.
    pub(crate) fn lacks(&self, param: &Tensor) -> bool {
        let param = identity(param);
        let factors = self.factors.lock().unwrap_or_else(PoisonError::into_inner);
        let num_uses = self.weights.borrow().iter().filter(|&&weight| weight == param).count();
        factors.iter().filter(|factors| factors.weight == param).count() < num_uses
    }

    /// Computes the gradient of a parameter; none if it was not used.
    pub(crate) fn grad(&self, param: &Tensor) -> Result<Option<Tensor>, TorchError> {
        let factors = self.factors.lock().unwrap_or_else(PoisonError::into_inner);
        let mut grad: Option<Tensor> = None;
        for factors in factors.iter().filter(|factors| factors.weight == identity(param)) {
            let part = crate::ops::weight_grad(factors.form, &factors.x, &factors.dy)?;
            grad = Some(match grad {
                Some(grad) => grad.f_add(&part)?,
                None => part,
            });
        }
        Ok(grad)
    }
}

impl Shelf {
    /// Sets the factors aside without their history: with it they would hold the graph, which holds this shelf.
    pub fn put(&self, form: Form, x: &Tensor, dy: &Tensor) -> Result<(), TorchError> {
        if self.is_closed.load(Ordering::Relaxed) {
            return Ok(());
        }
        let factors = Factors { weight: self.weight, form, x: x.f_detach()?, dy: dy.f_detach()? };
        self.factors.lock().unwrap_or_else(PoisonError::into_inner).push(factors);
        Ok(())
    }
}

impl fmt::Debug for DeferredWeights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeferredWeights")
            .field("num_weights", &self.weights.borrow().len())
            .finish_non_exhaustive()
    }
}

/// The handle that a layer is given of a parameter is one and the same for the life of the engine.
fn identity(param: &Tensor) -> usize {
    param.as_ptr() as usize
}
