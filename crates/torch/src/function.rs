//! Differentiable functions whose backward is Rust.
//!
//! Compute the outputs under [`tch::no_grad`], then [`link`] them to the inputs. The graph calls the closure when it
//! needs the inputs' gradients. Saved tensors go through libtorch's own saved-variable mechanism, so that an output
//! can be saved without a cycle, and a parameter whose storage moves is found where it is then.

use std::ffi::{CString, c_char, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::null_mut;

use tch::Tensor;

use crate::TorchError;
use crate::sys::{AtTensor, Backward, borrow, check, raw, sw_link};

/// A tensor kept for the backward pass.
#[derive(Debug, Clone, Copy)]
pub enum Saved<'a> {
    /// One of the inputs, or a tensor computed on the way that is not an output.
    Input(&'a Tensor),
    /// One of the outputs.
    Output(&'a Tensor),
}

/// What a backward closure is given.
#[derive(Debug)]
pub struct BackwardArgs {
    /// The saved tensors, in the order they were saved.
    pub saved: Vec<Tensor>,
    /// The gradient of each output; `None` is zero.
    pub grads: Vec<Option<Tensor>>,
    /// For each input, whether its gradient is wanted.
    pub wanted: Vec<bool>,
}

type Closure = Box<dyn Fn(BackwardArgs) -> Result<Vec<Option<Tensor>>, TorchError> + Send>;

/// Links `outputs` to `inputs` through `backward`, which returns one gradient (or `None`) for each input.
///
/// Does nothing if no input requires a gradient or gradients are off.
///
/// # Errors
/// What libtorch says: an output of an integer type, an output that has a history already.
pub fn link(
    inputs: &[&Tensor],
    outputs: &[&Tensor],
    saved: &[Saved<'_>],
    backward: impl Fn(BackwardArgs) -> Result<Vec<Option<Tensor>>, TorchError> + Send + 'static,
) -> Result<(), TorchError> {
    let closure: Box<Closure> = Box::new(Box::new(backward));
    let inputs: Vec<_> = inputs.iter().map(|t| raw(t)).collect();
    let outputs: Vec<_> = outputs.iter().map(|t| raw(t)).collect();
    let (saved, is_output): (Vec<_>, Vec<u8>) = saved
        .iter()
        .map(|s| match s {
            Saved::Input(t) => (raw(t), 0u8),
            Saved::Output(t) => (raw(t), 1u8),
        })
        .unzip();
    let backward = Backward { context: Box::into_raw(closure).cast(), run, release };
    // SAFETY: the arrays hold valid tensors and have the lengths given; the shim owns the context from here on and
    // calls `release` exactly once.
    let message = unsafe {
        sw_link(
            backward,
            inputs.as_ptr(),
            inputs.len(),
            outputs.as_ptr(),
            outputs.len(),
            saved.as_ptr(),
            is_output.as_ptr(),
            saved.len(),
        )
    };
    check("link", message)
}

unsafe extern "C" fn release(context: *mut c_void) {
    // SAFETY: `context` is the box that `link` leaked, and this is its only release.
    drop(unsafe { Box::from_raw(context.cast::<Closure>()) });
}

unsafe extern "C" fn run(
    context: *mut c_void,
    saved: *const *const AtTensor,
    num_saved: usize,
    grads: *const *const AtTensor,
    num_grads: usize,
    wanted: *const u8,
    results: *mut *mut AtTensor,
    num_results: usize,
) -> *mut c_char {
    // SAFETY: `context` is the box that `link` leaked and lives as long as the graph node that calls us.
    let closure = unsafe { &*context.cast::<Closure>() };
    let tensors = |pointer: *const *const AtTensor, len: usize| -> Vec<Option<Tensor>> {
        // SAFETY: the shim passes arrays of these lengths (possibly empty) of tensors valid during this call.
        (0..len).map(|i| unsafe { borrow(*pointer.add(i)) }).collect()
    };
    let args = BackwardArgs {
        saved: tensors(saved, num_saved).into_iter().flatten().collect(),
        grads: tensors(grads, num_grads),
        // SAFETY: as above.
        wanted: (0..num_results).map(|i| unsafe { *wanted.add(i) } != 0).collect(),
    };
    let outcome = catch_unwind(AssertUnwindSafe(|| tch::no_grad(|| closure(args))));
    let failure = match outcome {
        Ok(Ok(gradients)) if gradients.len() == num_results => {
            for (i, gradient) in gradients.into_iter().enumerate() {
                let pointer = gradient.map_or(null_mut(), into_raw);
                // SAFETY: `results` has `num_results` places; the shim takes ownership of what stands there.
                unsafe { *results.add(i) = pointer };
            }
            return null_mut();
        }
        Ok(Ok(gradients)) => format!("backward gave {} gradients for {num_results} inputs", gradients.len()),
        Ok(Err(error)) => error.to_string(),
        Err(panic) => match panic.downcast_ref::<String>() {
            Some(text) => format!("panic in backward: {text}"),
            None => "panic in backward".to_owned(),
        },
    };
    let text = CString::new(failure.replace('\0', " ")).unwrap_or_default();
    // SAFETY: a copy made by the C library, for the shim to free there.
    unsafe { libc_strdup(text.as_ptr()) }
}

unsafe extern "C" {
    #[link_name = "strdup"]
    fn libc_strdup(text: *const c_char) -> *mut c_char;
}

/// Gives up a tch tensor for the `at::Tensor` it holds.
fn into_raw(tensor: Tensor) -> *mut AtTensor {
    let mut tensor = std::mem::ManuallyDrop::new(tensor);
    tensor.as_mut_ptr().cast()
}

#[cfg(test)]
mod tests {
    use tch::no_grad;

    use super::*;
    use crate::autograd::grad;

    /// `y = x * x`, with a backward that says `3 * x * dy` to be told apart from libtorch's.
    fn odd_square(x: &Tensor) -> Tensor {
        let y = no_grad(|| x * x);
        link(&[x], &[&y], &[Saved::Input(x)], |args| {
            let dy = args.grads[0].as_ref().expect("the only output has a gradient");
            Ok(vec![Some(&args.saved[0] * dy * 3.0)])
        })
        .unwrap();
        y
    }

    #[test]
    fn the_graph_calls_rust_and_goes_on_behind_it() {
        let x = Tensor::from_slice(&[1f32, 2.0]).set_requires_grad(true);
        let z = odd_square(&(&x * 10.0));
        let ones = z.ones_like();
        let dx: Vec<f32> =
            grad(&[&z], &[Some(&ones)], &[&x]).unwrap()[0].as_ref().unwrap().try_into().unwrap();
        assert_eq!(dx, [300.0, 600.0]);
    }

    #[test]
    fn an_error_and_a_panic_in_backward_come_back_as_errors() {
        for panics in [false, true] {
            let x = Tensor::from_slice(&[1f32]).set_requires_grad(true);
            let y = no_grad(|| &x + 1.0);
            link(&[&x], &[&y], &[], move |_| {
                assert!(!panics, "stop here");
                Err(TorchError::Shim { operation: "test", message: "no".into() })
            })
            .unwrap();
            let error = grad(&[&y], &[Some(&y.ones_like())], &[&x]).unwrap_err().to_string();
            assert!(error.contains(if panics { "panic in backward" } else { "no" }), "{error}");
        }
    }

    #[test]
    fn nothing_is_linked_without_gradients() {
        let y = odd_square(&Tensor::from_slice(&[2f32]));
        assert!(!y.requires_grad());
    }
}
