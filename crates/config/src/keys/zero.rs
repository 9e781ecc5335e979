//! DeepSpeed's keys, second part: ZeRO, offload, input and output to disk.

use super::*;

const WHOLE: &str =
    "a unit (one layer's parameters) is gathered and reduced whole, so there is no bucket to size";
const PREFETCH: &str = "the next unit is prefetched whole while the current one computes";
const LIFETIME: &str = "a unit lives from its gather to its release, so nothing else has to be limited";
const MOVED_WHOLE: &str = "a unit (one layer's parameters) is moved whole, so there are no buffers to size";
const PINNED: &str = "what a rank with a GPU keeps on the host is always pinned";
const BESIDE: &str = "gradients go down and parameters come up beside the computation in any case";
const HOST_HOLDS: &str = "`\"cpu\"` keeps it in host memory";
const OFFLOADS: Kind = Kind::Choice(&["none", "cpu", "nvme"]);
const TO_HOST: &[&str] = &["\"none\"", "\"cpu\""];
const NO_NVME: &str = "nothing is offloaded to NVMe";
const NO_HOOKS: &str = "there are no module hooks to tune: a unit is a layer";

pub(crate) const KEYS: &[Key] = &[
    group("zero_optimization"),
    used("zero_optimization.stage", Kind::Int(0, 3), is("0")),
    used("zero_optimization.overlap_comm", BOOL, NONE),
    always(
        "zero_optimization.contiguous_gradients",
        BOOL,
        TRUE,
        &["true"],
        "a unit's gradients are always one contiguous buffer",
    ),
    always(
        "zero_optimization.reduce_scatter",
        BOOL,
        TRUE,
        &["true"],
        "sharded gradients are always reduce-scattered",
    ),
    always(
        "zero_optimization.allgather_partitions",
        BOOL,
        TRUE,
        &["true"],
        "parameters are always all-gathered",
    ),
    no_effect("zero_optimization.reduce_bucket_size", COUNT, is("500000000"), WHOLE),
    no_effect("zero_optimization.allgather_bucket_size", SIZE, is("500000000"), WHOLE),
    no_effect(
        "zero_optimization.use_multi_rank_bucket_allreduce",
        BOOL,
        TRUE,
        "gradients are reduce-scattered, not all-reduced in buckets",
    ),
    always(
        "zero_optimization.compute_grad_norm",
        BOOL,
        TRUE,
        &["true"],
        "the gradient norm is always computed",
    ),
    always(
        "zero_optimization.load_from_fp32_weights",
        BOOL,
        TRUE,
        &["true"],
        "master weights are always kept in fp32",
    ),
    off("zero_optimization.elastic_checkpoint", ""),
    off("zero_optimization.legacy_stage1", "there is one implementation of every stage"),
    no_effect(
        "zero_optimization.ignore_unused_parameters",
        BOOL,
        TRUE,
        "a layer declares the parameters it uses, so none goes unused",
    ),
    no_effect(
        "zero_optimization.round_robin_gradients",
        BOOL,
        FALSE,
        "every unit is split evenly over the ranks already",
    ),
    no_effect(
        "zero_optimization.parameter_alignment",
        BOOL,
        FALSE,
        "units are padded so that all shards are equal",
    ),
    no_effect("zero_optimization.sub_group_size", SIZE, is("1000000000"), "the optimizer steps unit by unit"),
    no_effect("zero_optimization.stage3_prefetch_bucket_size", SIZE, is("50000000"), PREFETCH),
    no_effect(
        "zero_optimization.stage3_param_persistence_threshold",
        SIZE,
        is("100000"),
        "small parameters travel with their unit, so none has to stay behind",
    ),
    no_effect(
        "zero_optimization.stage3_model_persistence_threshold",
        SIZE,
        is("9223372036854775807"),
        "small parameters travel with their unit, so none has to stay behind",
    ),
    no_effect("zero_optimization.stage3_max_live_parameters", SIZE, is("1000000000"), LIFETIME),
    no_effect("zero_optimization.stage3_max_reuse_distance", SIZE, is("1000000000"), LIFETIME),
    no_effect(
        "zero_optimization.stage3_gather_16bit_weights_on_model_save",
        BOOL,
        FALSE,
        "a saved model is always whole",
    ),
    no_effect("zero_optimization.stage3_module_granularity_threshold", SIZE, is("0"), NO_HOOKS),
    off("zero_optimization.stage3_use_all_reduce_for_fetch_params", "parameters are all-gathered"),
    off("zero_optimization.stage3_allgather_sequential", "a unit is gathered in one call"),
    no_effect("zero_optimization.memory_efficient_linear", BOOL, TRUE, NO_HOOKS),
    no_effect("zero_optimization.override_module_apply", BOOL, TRUE, NO_HOOKS),
    no_effect("zero_optimization.log_trace_cache_warnings", BOOL, FALSE, NO_HOOKS),
    no_effect(
        "zero_optimization.enable_sanity_checks",
        BOOL,
        FALSE,
        "every collective is checked across ranks in any case",
    ),
    no_effect(
        "zero_optimization.pipeline_loading_checkpoint",
        BOOL,
        FALSE,
        "each rank reads only its own elements",
    ),
    no_effect(
        "zero_optimization.save_muon_momentum_buffer_in_memory",
        BOOL,
        FALSE,
        "the optimizer's states are always in memory",
    ),
    group("zero_optimization.leaf_module"),
    no_effect("zero_optimization.leaf_module.classes", TEXTS, NONE, NO_HOOKS),
    no_effect("zero_optimization.leaf_module.names", TEXTS, NONE, NO_HOOKS),
    no_effect("zero_optimization.leaf_module.name_suffixes", TEXTS, NONE, NO_HOOKS),
    // Offload
    group("zero_optimization.offload_optimizer"),
    only("zero_optimization.offload_optimizer.device", OFFLOADS, is("\"none\""), TO_HOST, HOST_HOLDS),
    no_effect("zero_optimization.offload_optimizer.nvme_path", TEXT, NONE, NO_NVME),
    no_effect("zero_optimization.offload_optimizer.buffer_count", SIZE, is("4"), MOVED_WHOLE),
    no_effect("zero_optimization.offload_optimizer.pin_memory", BOOL, TRUE, PINNED),
    no_effect("zero_optimization.offload_optimizer.pipeline", BOOL, FALSE, BESIDE),
    no_effect("zero_optimization.offload_optimizer.pipeline_read", BOOL, FALSE, BESIDE),
    no_effect("zero_optimization.offload_optimizer.pipeline_write", BOOL, FALSE, BESIDE),
    no_effect(
        "zero_optimization.offload_optimizer.fast_init",
        BOOL,
        FALSE,
        "state is born where it is kept, element by element",
    ),
    only(
        "zero_optimization.offload_optimizer.ratio",
        Kind::AtLeast(0.0),
        is("1.0"),
        &["1.0"],
        "all of the optimizer's state is offloaded, or none of it",
    ),
    off(
        "zero_optimization.offload_optimizer.super_offload",
        "the host computes a step once its whole gradient is known",
    ),
    no_effect(
        "zero_optimization.offload_optimizer.cpuadam_cores_perc",
        POSITIVE,
        is("0.8"),
        "the run file's `threads_per_rank` says how many threads compute a step",
    ),
    group("zero_optimization.offload_param"),
    only("zero_optimization.offload_param.device", OFFLOADS, is("\"none\""), TO_HOST, HOST_HOLDS),
    no_effect("zero_optimization.offload_param.nvme_path", TEXT, NONE, NO_NVME),
    no_effect("zero_optimization.offload_param.buffer_count", SIZE, is("5"), MOVED_WHOLE),
    no_effect("zero_optimization.offload_param.buffer_size", SIZE, is("100000000"), MOVED_WHOLE),
    no_effect(
        "zero_optimization.offload_param.max_in_cpu",
        SIZE,
        is("1000000000"),
        "host memory holds all that is offloaded",
    ),
    no_effect("zero_optimization.offload_param.pin_memory", BOOL, TRUE, PINNED),
    used("zero_optimization.cpu_offload", BOOL, FALSE),
    used("zero_optimization.cpu_offload_param", BOOL, FALSE),
    used("zero_optimization.cpu_offload_params", BOOL, FALSE),
    no_effect("zero_optimization.cpu_offload_use_pin_memory", BOOL, FALSE, PINNED),
    refused(
        "zero_optimization.zenflow",
        Kind::Group,
        "leave it out: where the optimizer is offloaded, the host computes each step whole",
    ),
    inner("zero_optimization.zenflow.topk_ratio", NUMBER),
    inner("zero_optimization.zenflow.select_strategy", ANY),
    inner("zero_optimization.zenflow.select_interval", ANY),
    inner("zero_optimization.zenflow.update_interval", ANY),
    inner("zero_optimization.zenflow.overlap_step", BOOL),
    inner("zero_optimization.zenflow.offload", BOOL),
    inner("zero_optimization.zenflow.auto_ratio", NUMBER),
    inner("zero_optimization.zenflow.full_warm_up_rounds", SIZE),
    inner("zero_optimization.zenflow.pt_reserved_cores_perc", NUMBER),
    inner("zero_optimization.zenflow.steps_per_epoch", COUNT),
    group("aio"),
    no_effect("aio.block_size", COUNT, is("1048576"), NO_NVME),
    no_effect("aio.queue_depth", COUNT, is("8"), NO_NVME),
    no_effect("aio.intra_op_parallelism", COUNT, is("1"), NO_NVME),
    no_effect("aio.single_submit", BOOL, FALSE, NO_NVME),
    no_effect("aio.overlap_events", BOOL, TRUE, NO_NVME),
    no_effect("aio.use_gds", BOOL, FALSE, NO_NVME),
    misplaced("aio.thread_count", "the key that DeepSpeed reads is `intra_op_parallelism`"),
    // Quantised and hierarchical communication
    only("zero_optimization.zero_hpz_partition_size", SIZE, is("1"), &["1"], ""),
    off("zero_optimization.zero_quantized_weights", ""),
    off("zero_optimization.zero_quantized_nontrainable_weights", ""),
    off("zero_optimization.zero_quantized_gradients", ""),
    only("zero_optimization.mics_shard_size", INT, is("-1"), &["-1"], ""),
    off("zero_optimization.mics_hierarchical_params_gather", ""),
    refused("zero_optimization.zeropp_loco_param", ANY, "leave it out: gradients are not quantised"),
    // What guards the choice of optimizer in DeepSpeed
    no_effect(
        "zero_allow_untested_optimizer",
        BOOL,
        FALSE,
        "every optimizer here is tested with every ZeRO stage",
    ),
    no_effect("zero_force_ds_cpu_optimizer", BOOL, TRUE, "there is one implementation of the optimizer"),
];
