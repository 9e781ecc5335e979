//! Differentiable operations that layers share.
//!
//! Each has a plain form in libtorch's own operations, which works for every element type, and where measured to pay a
//! fused form with a backward of its own; a test holds the two together.

mod add_norm;
mod attention;
mod dropout;
mod gelu;
mod gpu;
mod linear;
mod loss;
mod loss_gpu;
mod norm;
mod norm_gpu;
mod parallel;
mod raw;
mod rotary;
mod swiglu;

pub use add_norm::{add_layer_norm, add_rms_norm, add_rms_norm_plain};
pub use attention::{causal_attention, causal_attention_plain, dropped_causal_attention};
pub use dropout::Dropout;
pub use gelu::conv1d_gelu;
pub(crate) use linear::weight_grad;
pub use linear::{conv1d, linear};
pub use loss::{LinearCrossEntropy, linear_cross_entropy, linear_cross_entropy_plain};
pub use norm::{fork_layer_norm, fork_rms_norm, layer_norm, layer_norm_plain, rms_norm, rms_norm_plain};
pub use parallel::{embedding, enter, gather_classes, leave, own_positions, row_conv1d, row_linear};
pub use raw::multiplies;
pub(crate) use raw::threads;
pub use rotary::{Rotary, RotaryTable};
pub use swiglu::{swiglu, swiglu_plain};

#[cfg(test)]
mod tests;
