//! The run file and the DeepSpeed configuration, read into one checked RunConfig.
