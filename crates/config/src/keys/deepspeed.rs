//! DeepSpeed's keys, first part: batch, precision, reduction, output.

use super::*;

/// Other names that DeepSpeed accepts: alias, key.
pub(crate) const ALIASES: &[(&str, &str)] = &[
    ("bfloat16", "bf16"),
    ("tensor_parallel.tp", "tensor_parallel.tensor_parallel"),
    ("tensor_parallel.kernel_inject", "tensor_parallel.replace_with_kernel_inject"),
    (
        "zero_optimization.stage3_gather_fp16_weights_on_model_save",
        "zero_optimization.stage3_gather_16bit_weights_on_model_save",
    ),
    (
        "zero_optimization.gather_16bit_weights_on_model_save",
        "zero_optimization.stage3_gather_16bit_weights_on_model_save",
    ),
    ("zero_optimization.prefetch_bucket_size", "zero_optimization.stage3_prefetch_bucket_size"),
    ("zero_optimization.param_persistence_threshold", "zero_optimization.stage3_param_persistence_threshold"),
    ("zero_optimization.model_persistence_threshold", "zero_optimization.stage3_model_persistence_threshold"),
    ("zero_optimization.max_live_parameters", "zero_optimization.stage3_max_live_parameters"),
    ("zero_optimization.max_reuse_distance", "zero_optimization.stage3_max_reuse_distance"),
    (
        "zero_optimization.module_granularity_threshold",
        "zero_optimization.stage3_module_granularity_threshold",
    ),
    (
        "zero_optimization.use_all_reduce_for_fetch_params",
        "zero_optimization.stage3_use_all_reduce_for_fetch_params",
    ),
    ("zero_optimization.allgather_sequential", "zero_optimization.stage3_allgather_sequential"),
];

const AUTOCAST_OFF: &str = "`torch_autocast` is off";
const NO_PYTHON: &str = "it concerns Python code, and there is none";
const ALWAYS_EVENTS: &str = "TensorBoard events are always written to the run's output folder";

pub(crate) const KEYS: &[Key] = &[
    // Batch
    used("train_batch_size", COUNT, NONE),
    used("train_micro_batch_size_per_gpu", COUNT, NONE),
    used("gradient_accumulation_steps", COUNT, NONE),
    always(
        "managed_gradient_accumulation",
        BOOL,
        TRUE,
        &["true"],
        "a step is one optimizer step over all its micro-batches",
    ),
    no_effect("dataloader_drop_last", BOOL, FALSE, "every batch is full"),
    // Precision
    group("fp16"),
    used("fp16.enabled", BOOL, FALSE),
    off("fp16.auto_cast", "layers compute in fp16 throughout, and inputs are token ids"),
    used("fp16.loss_scale", POSITIVE, is("0")),
    // Scales are fp32 numbers.
    used("fp16.initial_scale_power", Kind::Int(0, 127), is("16")),
    used("fp16.loss_scale_window", COUNT, is("1000")),
    used("fp16.hysteresis", COUNT, is("2")),
    used("fp16.consecutive_hysteresis", BOOL, FALSE),
    used("fp16.min_loss_scale", Kind::Above(0.0), is("1")),
    off("fp16.fp16_master_weights_and_grads", "master weights are kept in fp32"),
    group("bf16"),
    used("bf16.enabled", BOOL, FALSE),
    no_effect("bf16.immediate_grad_update", BOOL, FALSE, "gradients join the sum as they are reduced"),
    used("bf16.check_grad_overflow", BOOL, TRUE),
    off("bf16.bf16_master_weights_and_grads", "master weights are kept in fp32"),
    used("bf16.bf16_optimizer_states", BOOL, FALSE),
    group("data_types"),
    used("data_types.grad_accum_dtype", FLOAT, NONE),
    used("data_types.param_dtype", FLOAT, NONE),
    no_effect("data_types.buffer_dtype", TEXT, NONE, "layers keep no buffers"),
    only(
        "data_types.keep_in_fp32_modules",
        ANY,
        is("\"auto\""),
        &["\"auto\"", "[]"],
        "all layers compute in one precision",
    ),
    group("torch_autocast"),
    off("torch_autocast.enabled", "`bf16` and `fp16` compute in 16 bits"),
    no_effect("torch_autocast.dtype", TEXT, NONE, AUTOCAST_OFF),
    no_effect("torch_autocast.lower_precision_safe_modules", TEXTS, NONE, AUTOCAST_OFF),
    // Reduction
    used("communication_data_type", FLOAT, NONE),
    no_effect(
        "seq_parallel_communication_data_type",
        FLOAT,
        is("\"fp32\""),
        "attention sees whole sequences on every rank",
    ),
    used("prescale_gradients", BOOL, FALSE),
    used("gradient_predivide_factor", Kind::Above(0.0), is("1.0")),
    used("gradient_allreduce_op", Kind::Choice(&["mean", "sum"]), is("\"mean\"")),
    off("sparse_gradients", ""),
    off("disable_allgather", ""),
    only(
        "sequence_parallel_size",
        COUNT,
        NONE,
        &["1"],
        "the run file's `parallel.sequence` splits what is between linear layers over tensor-parallel ranks",
    ),
    used("data_parallel_size", COUNT, NONE),
    // Output
    used("steps_per_print", COUNT, NONE),
    no_effect("wall_clock_breakdown", BOOL, FALSE, "the time of every step is in `metrics.jsonl`"),
    no_effect("memory_breakdown", BOOL, FALSE, "the peak memory of every step is in `metrics.jsonl`"),
    no_effect(
        "dump_state",
        BOOL,
        FALSE,
        "the effective configuration is always written to the run's output folder",
    ),
    no_effect("log_level", TEXT, NONE, "there is one level of output"),
    no_effect("disable_python_gc", BOOL, FALSE, NO_PYTHON),
    no_effect("vocabulary_size", COUNT, NONE, "the vocabulary is the model's"),
    group("timers"),
    group("timers.throughput"),
    no_effect("timers.throughput.enabled", BOOL, TRUE, "throughput is always measured"),
    no_effect("timers.throughput.synchronized", BOOL, TRUE, "throughput is measured over whole steps"),
    group("tensorboard"),
    no_effect("tensorboard.enabled", BOOL, FALSE, ALWAYS_EVENTS),
    no_effect("tensorboard.output_path", TEXT, is("\"\""), ALWAYS_EVENTS),
    no_effect("tensorboard.job_name", TEXT, is("\"DeepSpeedJobName\""), ALWAYS_EVENTS),
];
