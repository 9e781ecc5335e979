//! The only crate that names tch: tensors over our buffers, autograd per layer.
