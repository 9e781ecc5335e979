//! The key tables hold together, and do what they say.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::check::{BATCH_KEYS, literal};
use crate::keys::optimizer::{OPTIMIZERS, SCHEDULERS};
use crate::keys::{DEEPSPEED, TABLES, deepspeed::ALIASES};
use crate::schema::{Fate, Key, Kind, Schema, Unset};
use crate::value::join;

/// A value that the key takes, as JSON: not its default where there is a choice.
fn sample(path: &str, key: &Key) -> String {
    let listed = match key.fate {
        Fate::Only(values, _) | Fate::Always(values, _) => values.first().map(|json| json.to_string()),
        _ => None,
    };
    let by_name = match path {
        "model" => Some(r#"{"path": "m"}"#),
        "data" => Some(r#"{"tokens": "t.bin", "dtype": "u16", "seq_len": 8}"#),
        "data.tokenizer.train_bpe" => Some(r#"{"vocab_size": 300}"#),
        "deepspeed" => Some(r#"{"train_batch_size": 1, "optimizer": {"type": "AdamW"}}"#),
        "deepspeed.optimizer" => Some(r#"{"type": "AdamW"}"#),
        "deepspeed.scheduler" => Some(r#"{"type": "WarmupLR"}"#),
        "deepspeed.optimizer.type" => Some("\"Adam\""),
        "deepspeed.scheduler.type" => Some("\"WarmupLR\""),
        "deepspeed.data_types.grad_accum_dtype" | "deepspeed.data_types.param_dtype" => Some("\"fp32\""),
        "deepspeed.optimizer.params.ns_method" => Some("\"standard\""),
        "deepspeed.optimizer.params.initial_accumulator_value" => Some("0"),
        "deepspeed.optimizer.params.eps_inside_sqrt" | "deepspeed.optimizer.params.per_head_muon" => {
            Some("false")
        }
        "lr_schedule" => Some(r#"{"type": "linear"}"#),
        "lr_schedule.min_lr" => Some("0.0005"),
        "eval" => Some(r#"{"tokens": "e.bin"}"#),
        "deepspeed.data_parallel_size" => Some("1"),
        "parallel.schedule" => Some("\"zero-bubble\""),
        "parallel.stages" => Some("\"time\""),
        "deepspeed.pipeline.partition" => Some("\"type:layers\""),
        _ => None,
    };
    listed.or(by_name.map(str::to_string)).unwrap_or_else(|| match key.kind {
        Kind::Bool => "true".to_string(),
        Kind::Int(min, max) => min.max(0).saturating_add(1).min(max).to_string(),
        Kind::AtLeast(_) | Kind::Within(..) | Kind::Between(..) => "0.5".to_string(),
        Kind::Above(_) => "1.5".to_string(),
        Kind::Text | Kind::TextOrGroup => "\"some\"".to_string(),
        Kind::Bytes => "\"16GB\"".to_string(),
        Kind::Choice(words) => format!("{:?}", words[words.len() - 1]),
        Kind::Texts | Kind::TextOrTexts => "[\"some\"]".to_string(),
        Kind::Betas => "[0.5, 0.25]".to_string(),
        Kind::Groups => "[]".to_string(),
        Kind::IntOrAuto(min, max) => (min + 1).min(max).to_string(),
        Kind::Schedule | Kind::StageCut | Kind::Partition => unreachable!("these have samples by name"),
        Kind::Group | Kind::Object => "{}".to_string(),
        Kind::Any => "1".to_string(),
    })
}

/// The optimizer or scheduler of ours that a parameter belongs to.
fn owner(path: &str) -> Option<&'static str> {
    let Some(Fate::BelongsTo(owners)) = Schema::new().key(path).map(|key| key.fate) else { return None };
    OPTIMIZERS.iter().chain(SCHEDULERS).copied().find(|name| owners.contains(name))
}

/// A scheduler with what it needs.
fn scheduler(name: &str) -> String {
    let params = match name {
        "WarmupDecayLR" | "WarmupCosineLR" => r#"{"total_num_steps": 20, "warmup_num_steps": 10}"#,
        "OneCycle" => r#"{"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-3}"#,
        _ => "{}",
    };
    format!(r#"deepspeed.scheduler={{"type": "{name}", "params": {params}}}"#)
}

/// A configuration with room for the key, and nothing set twice.
fn base(path: &str) -> Vec<String> {
    const TEXT: &str =
        r#"data={"text": "a.txt", "tokenizer": {"train_bpe": {"vocab_size": 300}}, "seq_len": 8}"#;
    let sets: &[&str] = match path {
        _ if path.starts_with("data.text") || path.starts_with("data.tokenizer") => &[TEXT],
        _ if path.starts_with("model.config") => &["model={}"],
        _ if path.starts_with("deepspeed.scheduler") => {
            return vec![scheduler(owner(path).unwrap_or("WarmupLR"))];
        }
        "deepspeed.optimizer.params.nesterov" => {
            &[r#"deepspeed.optimizer={"type": "SGD", "params": {"momentum": 0.9}}"#]
        }
        _ if path.starts_with("deepspeed.optimizer.params.") && owner(path).is_some() => {
            return vec![format!(r#"deepspeed.optimizer={{"type": "{}"}}"#, owner(path).unwrap())];
        }
        "deepspeed.train_batch_size" => &["deepspeed.train_micro_batch_size_per_gpu=null"],
        "deepspeed.fp16.enabled" | "deepspeed.bf16.enabled" => &[],
        _ if path.starts_with("deepspeed.fp16.") => &["deepspeed.fp16.enabled=true"],
        _ if path.starts_with("deepspeed.bf16.") => &["deepspeed.bf16.enabled=true"],
        _ if path.starts_with("lr_schedule.") => &[r#"lr_schedule={"type": "linear"}"#],
        "eval.text" => &[TEXT],
        "parallel.schedule" | "parallel.stages" | "deepspeed.pipeline.partition" => &["parallel.pipeline=2"],
        "parallel.sequence" => &["parallel.tensor=2"],
        "trace.num_steps" => &["trace.first_step=2"],
        "cuda.share" => &["device=cuda"],
        _ if path.starts_with("deepspeed.zero_optimization.cpu_offload") => {
            &["device=cuda", "deepspeed.zero_optimization.stage=3"]
        }
        "eval.every" | "eval.max_tokens" => &[r#"eval={"tokens": "e.bin"}"#],
        _ => &[],
    };
    sets.iter().map(|set| set.to_string()).collect()
}

/// The override that sets `path` to `json`; a member of a list of groups comes with the whole list.
fn set_for(path: &str, json: &str) -> String {
    let Some((list, name)) = path.split_once("[].") else { return format!("{path}={json}") };
    let rest = match (list, name) {
        (_, "policy") => r#""match": "*""#,
        ("activations.rules", _) => r#""policy": "keep""#,
        (_, "match") => r#""lr_scale": 0.5"#,
        _ => r#""match": "*""#,
    };
    format!(r#"{list}=[{{"{name}": {json}, {rest}}}]"#)
}

/// Loads a small configuration in which `path` is set to `json`.
fn load_with(path: &str, json: &str) -> Result<Loaded, String> {
    load_on(base(path), path, json)
}

fn load_on(mut sets: Vec<String>, path: &str, json: &str) -> Result<Loaded, String> {
    sets.push(set_for(path, json));
    let sets: Vec<&str> = sets.iter().map(String::as_str).collect();
    // The degrees of the mesh need ranks.
    let is_mesh = ["parallel.", "deepspeed.pipeline.", "deepspeed.tensor_parallel."];
    let ranks = if is_mesh.iter().any(|group| path.starts_with(group)) { 2 } else { 1 };
    load(&run_with(&deepspeed("")), &sets, ranks)
}

#[test]
fn rows_are_well_formed() {
    let rows = TABLES.iter().flat_map(|(root, table)| table.iter().map(|key| join(root, key.path)));
    let paths: Vec<String> = rows.collect();
    let distinct: BTreeSet<&String> = paths.iter().collect();
    assert_eq!(distinct.len(), paths.len(), "a key has two rows");
    let schema = Schema::new();
    for (path, key) in schema.iter() {
        if let Some((group, _)) = path.rsplit_once('.') {
            let list = group.strip_suffix("[]");
            let group = schema.key(list.unwrap_or(group)).unwrap_or_else(|| panic!("`{path}` has no group"));
            let is_group = matches!(group.kind, Kind::Group | Kind::TextOrGroup);
            assert!(if list.is_some() { group.kind == Kind::Groups } else { is_group }, "{path}");
        }
        let (default, values) = (
            match key.default {
                Unset::Is(json) | Unset::Remarkable(json, _) => Some(json),
                Unset::Nothing | Unset::Required(_) => None,
            },
            match key.fate {
                Fate::Only(values, _) | Fate::Always(values, _) => values,
                _ => &[],
            },
        );
        for json in default.iter().chain(values) {
            let value = literal(json);
            assert!(crate::check::matches(key.kind, &value), "{path}: {json} is not {}", key.kind.describe());
        }
        // What holds when nothing is set must not be something we refuse.
        if let (Some(default), false) = (default, values.is_empty()) {
            assert!(values.iter().any(|value| literal(value).means(&literal(default))), "{path}");
        }
    }
    for (alias, target) in ALIASES {
        assert!(schema.key(&join(DEEPSPEED, alias)).is_none(), "{alias} is a key itself");
        assert!(schema.key(&join(DEEPSPEED, target)).is_some(), "{target} is not a key");
    }
}

/// The keys that DeepSpeed's users set most, so that no row goes missing unseen.
const COMMON: &str = "
    train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping steps_per_print
    wall_clock_breakdown optimizer.type optimizer.params.lr optimizer.params.betas optimizer.params.eps
    optimizer.params.weight_decay optimizer.params.torch_adam optimizer.params.adam_w_mode optimizer.params.freeze_step
    optimizer.params.comm_backend_name optimizer.params.cuda_aware optimizer.params.max_grad_norm
    optimizer.legacy_fusion scheduler.type scheduler.params.warmup_min_lr scheduler.params.warmup_max_lr
    scheduler.params.warmup_num_steps scheduler.params.total_num_steps scheduler.params.warmup_type fp16.enabled
    fp16.loss_scale fp16.initial_scale_power fp16.loss_scale_window fp16.hysteresis fp16.min_loss_scale
    fp16.consecutive_hysteresis fp16.auto_cast bf16.enabled bfloat16.enabled bf16.check_grad_overflow
    data_types.grad_accum_dtype data_types.param_dtype data_types.buffer_dtype data_types.keep_in_fp32_modules
    communication_data_type prescale_gradients gradient_predivide_factor gradient_allreduce_op
    zero_optimization.stage zero_optimization.allgather_partitions zero_optimization.allgather_bucket_size
    zero_optimization.reduce_bucket_size zero_optimization.overlap_comm zero_optimization.reduce_scatter
    zero_optimization.contiguous_gradients zero_optimization.round_robin_gradients
    zero_optimization.ignore_unused_parameters zero_optimization.sub_group_size
    zero_optimization.offload_optimizer.device zero_optimization.offload_optimizer.pin_memory
    zero_optimization.offload_optimizer.nvme_path zero_optimization.offload_optimizer.ratio
    zero_optimization.offload_param.device zero_optimization.offload_param.pin_memory
    zero_optimization.offload_param.nvme_path zero_optimization.offload_param.buffer_count
    zero_optimization.offload_param.buffer_size zero_optimization.offload_param.max_in_cpu
    zero_optimization.stage3_max_live_parameters zero_optimization.stage3_max_reuse_distance
    zero_optimization.stage3_prefetch_bucket_size zero_optimization.stage3_param_persistence_threshold
    zero_optimization.stage3_gather_16bit_weights_on_model_save
    zero_optimization.stage3_gather_fp16_weights_on_model_save zero_optimization.zero_hpz_partition_size
    zero_optimization.zero_quantized_weights zero_optimization.zero_quantized_gradients
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer aio.block_size aio.queue_depth
    aio.intra_op_parallelism aio.single_submit aio.overlap_events aio.thread_count
    activation_checkpointing.partition_activations activation_checkpointing.cpu_checkpointing
    activation_checkpointing.contiguous_memory_optimization activation_checkpointing.number_checkpoints
    activation_checkpointing.synchronize_checkpoint_boundary activation_checkpointing.profile
    pipeline.activation_checkpoint_interval pipeline.seed_layers pipeline.partition tensor_parallel.autotp_size
    checkpoint.tag_validation checkpoint.load_universal checkpoint.use_node_local_storage tensorboard.enabled
    tensorboard.output_path tensorboard.job_name wandb.enabled csv_monitor.enabled csv_monitor.output_path
    csv_monitor.job_name flops_profiler.enabled comms_logger.enabled sequence_parallel_size data_parallel_size
    torch_autocast.enabled torch_autocast.dtype sparse_attention.mode sparse_attention.block amp.enabled
    elasticity.enabled autotuning.enabled compression_training data_efficiency.enabled compile.deepcompile
    managed_gradient_accumulation seq_parallel_communication_data_type disable_allgather dump_state memory_breakdown
    dataloader_drop_last log_level disable_python_gc vocabulary_size use_data_before_expert_parallelism
    weight_quantization";

#[test]
fn the_keys_that_matter_have_rows() {
    let schema = Schema::new();
    for key in COMMON.split_whitespace() {
        let path = join(DEEPSPEED, key);
        // The group may be the alias: `bfloat16.enabled`.
        let (group, name) = path.rsplit_once('.').unwrap();
        let path = join(schema.canonical(group), name);
        assert!(schema.key(schema.canonical(&path)).is_some(), "{key}");
    }
}

#[test]
fn every_key_is_taken_noted_or_refused_by_name() {
    for (path, key) in Schema::new().iter() {
        let json = sample(path, key);
        let outcome = load_with(path, &json);
        let named = format!("`{path}`");
        match key.fate {
            Fate::Used | Fate::Only(..) => {
                drop(outcome.unwrap_or_else(|says| panic!("{path}={json}: {says}")))
            }
            Fate::NoEffect(_) | Fate::Always(..) => {
                let loaded = outcome.unwrap_or_else(|says| panic!("{path}={json}: {says}"));
                assert!(loaded.effective().notes().iter().any(|note| note.key == path), "{path} has no note");
            }
            Fate::Refused(_) => {
                let says = outcome.err().unwrap_or_else(|| panic!("{path} was accepted"));
                assert!(says.contains(&format!("{named} is not supported yet")), "{says}");
            }
            Fate::Inner => {
                let says = outcome.err().unwrap_or_else(|| panic!("{path} was accepted"));
                assert!(says.contains("is not supported yet") && !says.contains("not a known key"), "{says}");
            }
            Fate::BelongsTo(owners) => {
                if owner(path).is_some() {
                    outcome.unwrap_or_else(|says| panic!("{path}={json}: {says}"));
                }
                // And beside each of ours that it does not belong to:
                let (group, ours) = match path.starts_with("deepspeed.optimizer.") {
                    true => ("optimizer", OPTIMIZERS),
                    false => ("scheduler", SCHEDULERS),
                };
                for stranger in ours.iter().filter(|name| !owners.contains(name)) {
                    let base = match group {
                        "scheduler" => scheduler(stranger),
                        _ => format!(r#"deepspeed.optimizer={{"type": "{stranger}"}}"#),
                    };
                    let says = load_on(vec![base], path, &json)
                        .err()
                        .unwrap_or_else(|| panic!("{path} was accepted"));
                    assert!(says.contains(&format!("{named} is a parameter of {}", owners[0])), "{says}");
                    assert!(says.contains(&format!(", not of {stranger}")), "{says}");
                }
            }
            Fate::Misplaced(hint) => {
                let says = outcome.err().unwrap_or_else(|| panic!("{path} was accepted"));
                assert!(says.contains(&format!("{named} is not a setting\nhint: {hint}")), "{says}");
            }
        }
    }
}

#[test]
fn every_used_value_shows_up_in_the_configuration() {
    // These only have to agree with the rest of the configuration, or ask for the default.
    let checked_only = [
        "deepspeed.data_parallel_size",
        "deepspeed.data_types.param_dtype",
        "deepspeed.optimizer.params.adam_w_mode",
        "deepspeed.scheduler.params.cycle_momentum",
    ];
    for (path, key) in Schema::new().iter() {
        let is_noted = matches!(key.fate, Fate::BelongsTo(_)) && owner(path).is_some();
        let is_value = key.kind != Kind::Group && path != DEEPSPEED && !checked_only.contains(&path);
        if !is_value || !(key.fate == Fate::Used || is_noted) {
            continue;
        }
        let json = sample(path, key);
        let loaded = load_with(path, &json).unwrap_or_else(|says| panic!("{path}={json}: {says}"));
        let source = format!("--set {}", set_for(path, &json));
        let rows = loaded.effective().values();
        let shows = rows.iter().any(|row| row.source == source);
        let noted = is_noted && loaded.effective().notes().iter().any(|note| note.key == path);
        assert!(shows || noted, "{path} ends up nowhere");
    }
}

#[test]
fn the_documentation_names_every_key_that_counts() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/run-file.md");
    let docs = fs::read_to_string(path).unwrap();
    for (path, key) in Schema::new().iter() {
        let counts =
            key.fate == Fate::Used || (matches!(key.fate, Fate::BelongsTo(_)) && owner(path).is_some());
        let is_leaf = !matches!(key.kind, Kind::Group | Kind::TextOrGroup);
        let name = path.rsplit('.').next().unwrap();
        let shown = match path.strip_prefix("deepspeed.") {
            // Members of a group may stand under its name.
            Some(_) => docs.contains(&format!("{name}`")),
            None => docs.contains(&format!("`{path}`")),
        };
        assert!(shown || !counts || !is_leaf, "`{path}` is not in docs/run-file.md");
    }
}

#[test]
fn other_values_of_limited_keys_are_refused() {
    let mut tried = 0;
    for (path, key) in Schema::new().iter() {
        let (Fate::Only(values, _) | Fate::Always(values, _)) = key.fate else { continue };
        let others =
            ["true", "false", "2", "-5", "0.25", "\"nvme\"", "\"cpu\"", "\"sum\"", "\"bf16\"", "[\"a\"]"];
        for json in others {
            let value = literal(json);
            if !crate::check::matches(key.kind, &value) || values.iter().any(|v| literal(v).means(&value)) {
                continue;
            }
            let says = load_with(path, json).err().unwrap_or_else(|| panic!("{path}={json} was accepted"));
            assert!(says.contains("is not supported yet") && says.contains(path), "{says}");
            tried += 1;
        }
    }
    assert!(tried > 60, "only {tried}");
}

#[test]
fn every_leaf_refuses_auto_or_knows_it() {
    for (path, key) in Schema::new().iter() {
        if matches!(key.kind, Kind::TextOrTexts | Kind::TextOrGroup) || key.takes_auto() {
            continue;
        }
        // Groups refused as a whole and keys that are no keys have their own words.
        if path.starts_with("deepspeed.") && !matches!(key.fate, Fate::Misplaced(_)) {
            match load_with(path, "auto") {
                Ok(_) => assert!(BATCH_KEYS.contains(&path), "{path}"),
                Err(says) => assert!(says.contains(&format!("`{path}` is `\"auto\"`")), "{path}: {says}"),
            }
        }
    }
}

/// One slip of the finger in the last part of a path.
fn slip(path: &str, at: usize, kind: u8, letter: char) -> String {
    let (group, name) = path.rsplit_once('.').map_or(("", path), |(group, name)| (group, name));
    let mut letters: Vec<char> = name.chars().collect();
    let at = at % letters.len();
    match kind {
        0 => letters.insert(at, letter),
        1 => letters[at] = letter,
        2 if letters.len() > 1 => drop(letters.remove(at)),
        _ => letters.swap(at, (at + 1) % name.len()),
    }
    join(group, &letters.into_iter().collect::<String>())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn a_typo_is_never_accepted(pick: prop::sample::Index, at: usize, kind in 0u8..4, letter in "[a-z_]") {
        let schema = Schema::new();
        let paths: Vec<&str> = schema.iter().map(|(path, _)| path).collect();
        let path = paths[pick.index(paths.len())];
        let typo = slip(path, at, kind, letter.chars().next().unwrap());
        prop_assume!(schema.key(schema.canonical(&typo)).is_none() && path != DEEPSPEED);
        prop_assume!(!path.starts_with("data.tokenizer.") && !path.contains('['));
        let says = load_with(&typo, "1").err();
        let named = format!("`{typo}` is not a known key");
        prop_assert!(says.as_ref().is_some_and(|says| says.contains(&named)), "{:?}", says);
    }
}
