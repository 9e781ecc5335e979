//! Metrics as JSON lines and TensorBoard events, and the live progress line.
