//! Process groups and collectives on device buffers.
