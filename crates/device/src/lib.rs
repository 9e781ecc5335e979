//! Typed memory on a device: buffers, views and pools.
