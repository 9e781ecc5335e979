//! Arithmetic on buffers: fused optimizers, casts, norms, counter-based random numbers.
