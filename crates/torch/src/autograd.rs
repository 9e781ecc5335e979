//! Gradients of one layer, as values.

use std::ptr::null;

use tch::Tensor;

use crate::TorchError;
use crate::sys::{adopt, check, raw, sw_grad};

/// Gradients of `outputs`, weighted by `grad_outputs`, with respect to `inputs`; frees the graph.
///
/// A `None` in `grad_outputs` stands for ones and is allowed for a scalar output only. The result holds `None`
/// for an input that the outputs do not depend on. Nothing is accumulated into the inputs.
///
/// # Errors
/// What libtorch says: shapes that do not match, a graph that was freed already.
pub fn grad(
    outputs: &[&Tensor],
    grad_outputs: &[Option<&Tensor>],
    inputs: &[&Tensor],
) -> Result<Vec<Option<Tensor>>, TorchError> {
    run(outputs, grad_outputs, inputs, Graph::Free)
}

/// [`grad()`], but the graph stays for another call.
///
/// # Errors
/// As [`grad()`].
pub fn grad_and_keep(
    outputs: &[&Tensor],
    grad_outputs: &[Option<&Tensor>],
    inputs: &[&Tensor],
) -> Result<Vec<Option<Tensor>>, TorchError> {
    run(outputs, grad_outputs, inputs, Graph::Keep)
}

/// What becomes of a graph that has been gone through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Graph {
    Free,
    Keep,
}

fn run(
    outputs: &[&Tensor],
    grad_outputs: &[Option<&Tensor>],
    inputs: &[&Tensor],
    graph: Graph,
) -> Result<Vec<Option<Tensor>>, TorchError> {
    assert_eq!(outputs.len(), grad_outputs.len(), "one gradient for each output");
    let outputs: Vec<_> = outputs.iter().map(|t| raw(t)).collect();
    let grad_outputs: Vec<_> = grad_outputs.iter().map(|t| t.map_or(null(), raw)).collect();
    let inputs: Vec<_> = inputs.iter().map(|t| raw(t)).collect();
    let mut results = vec![std::ptr::null_mut(); inputs.len()];
    // SAFETY: the arrays hold valid tensors (or null where allowed) and have the lengths given.
    let message = unsafe {
        sw_grad(
            outputs.as_ptr(),
            grad_outputs.as_ptr(),
            outputs.len(),
            inputs.as_ptr(),
            inputs.len(),
            u8::from(graph == Graph::Keep),
            results.as_mut_ptr(),
        )
    };
    // SAFETY: each result is null or a tensor made for us; after an error all are null.
    let results = results.into_iter().map(|pointer| unsafe { adopt(pointer) }).collect();
    check("grad", message)?;
    Ok(results)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_graph_that_is_kept_gives_its_other_gradients_later() {
        let x = Tensor::from_slice(&[1f32, 2.0]).set_requires_grad(true);
        let w = Tensor::from_slice(&[3f32, 4.0]).set_requires_grad(true);
        let y = (&x * &w).tanh();
        let dy = Tensor::from_slice(&[10f32, 100.0]);
        let dx = grad_and_keep(&[&y], &[Some(&dy)], &[&x]).unwrap().remove(0).unwrap();
        let dw = grad(&[&y], &[Some(&dy)], &[&w]).unwrap().remove(0).unwrap();
        assert!((dx / &w).allclose(&(dw / &x), 1e-6, 1e-9, false));
        assert!(grad(&[&y], &[Some(&dy)], &[&w]).is_err(), "freed");
    }

    #[test]
    fn weights_the_outputs_and_reports_unused_inputs() {
        let x = Tensor::from_slice(&[1f32, 2.0]).set_requires_grad(true);
        let unused = Tensor::from_slice(&[1f32]).set_requires_grad(true);
        let y = &x * &x;
        let dy = Tensor::from_slice(&[10f32, 100.0]);
        let grads = grad(&[&y], &[Some(&dy)], &[&x, &unused]).unwrap();
        let dx: Vec<f32> = grads[0].as_ref().unwrap().try_into().unwrap();
        assert_eq!(dx, [20.0, 400.0]);
        assert!(grads[1].is_none());
        assert!(!x.grad().defined(), "nothing accumulates");
    }

    #[test]
    fn a_wrong_shape_is_an_error_not_a_crash() {
        let x = Tensor::from_slice(&[1f32, 2.0]).set_requires_grad(true);
        let y = &x * 2.0;
        let error = grad(&[&y], &[Some(&Tensor::from_slice(&[1f32]))], &[&x]).unwrap_err();
        assert!(error.to_string().contains("grad"), "{error}");
    }
}
