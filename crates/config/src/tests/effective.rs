//! The effective configuration: text, JSON, sources.

use super::*;

const RUN: &str = r#"{
  "model": {"config": {"model_type": "llama", "rope_scaling": {"factor": 8.0}}},
  "data": {"text": "a.txt", "tokenizer": {"train_bpe": {"vocab_size": 2048}}, "seq_len": 256},
  "steps": 200,
  "deepspeed": "ds.json"
}"#;

const DEEPSPEED: &str = r#"{
  "train_batch_size": 16,
  "gradient_accumulation_steps": 2,
  "bf16": {"enabled": true},
  "fp16": {"enabled": false, "loss_scale": 0, "hysteresis": 2},
  "optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "betas": [0.9, 0.95]}},
  "zero_optimization": {"stage": 2, "contiguous_gradients": true, "reduce_bucket_size": 5e8}
}"#;

#[test]
fn the_table_says_every_value_and_where_it_came_from() {
    let files = Files::new(&[("run.json", RUN), ("ds.json", DEEPSPEED)]);
    let loaded = files.load("run.json", &["seed=7", "deepspeed.zero_optimization.stage=3"], 2).unwrap();
    let expected = r#"
model.config.model_type              "llama"      run.json:2
model.config.rope_scaling.factor     8.0          run.json:2
model.init_seed                      7            derived from `seed`
data.text                            ["a.txt"]    run.json:3
data.tokenizer.train_bpe.vocab_size  2048         run.json:3
data.seq_len                         256          run.json:3
data.order                           "shuffled"   default
data.seed                            7            derived from `seed`
eval                                 null         default
steps                                200          run.json:4
seed                                 7            --set seed=7
device                               "cpu"        default
cuda.collectives                     "auto"       default
cuda.sharing                         "exclusive"  default
cuda.memory_limit                    null         default
cuda.determinism                     "off"        default
threads_per_rank                     null         default
parallel.world_size                  2            -n
parallel.data                        2            derived from ranks / (`pipeline` x `tensor`)
parallel.pipeline                    1            default
parallel.tensor                      1            default
parallel.schedule                    "1f1b"       default
parallel.stage_cut                   "parameters" default
parallel.sequence                    "off"        default
parallel.deadline_s                  120.0        default
batch.global_batch_size              16           ds.json:2 `train_batch_size`
batch.micro_batch                    4            derived from `global_batch_size` / (`grad_accum_steps` x data-parallel ranks)
batch.grad_accum_steps               2            ds.json:3 `gradient_accumulation_steps`
precision                            "bf16"       ds.json:4 `bf16.enabled`
loss_scaling                         null         derived from `precision`
non_finite_grads                     "skip"       default
reduction.accumulation               "fp32"       default
reduction.communication              null         default
reduction.op                         "mean"       default
reduction.scaling.type               "after"      default
optimizer.type                       "AdamW"      ds.json:6 `optimizer.type`
optimizer.betas                      [0.9,0.95]   ds.json:6 `optimizer.params.betas`
optimizer.eps                        1e-8         default
optimizer.weight_decay               0.0          default
optimizer.bias_correction            true         default
optimizer_state_dtype                "fp32"       default
lr_schedule.type                     "constant"   default
lr_schedule.lr                       0.0003       ds.json:6 `optimizer.params.lr`
clip_grad_norm                       1.0          default
zero.stage                           3            --set deepspeed.zero_optimization.stage=3
zero.overlap_comm                    "automatic"  default
zero.offload.optimizer               "device"     default
zero.offload.params                  "device"     default
activations.policy                   "keep"       default
activations.rules                    []           default
activations.head_chunk_tokens        null         default
train.no_decay                       []           default
train.frozen                         []           default
train.groups                         []           default
train.max_consecutive_skips          20           default
checkpoint.every                     null         default
checkpoint.keep                      null         default
checkpoint.writing                   "blocking"   default
checkpoint.on_failure                "stop"       default
report.steps_per_print               null         default
trace                                null         default
note: `gradient_clipping` is not set: gradients are clipped to a norm of 1.0, as DeepSpeed 0.19 does; older versions did not clip (0 turns it off)
note: `zero_optimization.reduce_bucket_size` (ds.json:7): no effect: a unit (one layer's parameters) is gathered and reduced whole, so there is no bucket to size
note: `fp16.loss_scale` (ds.json:5), `fp16.hysteresis` (ds.json:5): no effect: `fp16` is off
note: `zero_optimization.contiguous_gradients` (ds.json:7): as always: a unit's gradients are always one contiguous buffer
"#;
    // The path of the text file starts at the temporary folder, which widens the column of values.
    let squeeze = |text: &str| -> Vec<String> {
        text.trim().lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect()
    };
    let text = files.relative(loaded.effective());
    assert_eq!(squeeze(&text), squeeze(expected));
    // Columns line up: every value starts where the first one does.
    let start = text.find("\"llama\"").unwrap();
    let rows = text.lines().take(loaded.effective().values().len());
    assert!(rows.into_iter().all(|row| row.as_bytes()[start - 1] == b' ' && row.as_bytes()[start] != b' '));
}

#[test]
fn the_json_holds_the_same() {
    let files = Files::new(&[("run.json", RUN), ("ds.json", DEEPSPEED)]);
    let loaded = files.load("run.json", &[], 2).unwrap();
    let json = loaded.effective().to_json();
    assert_eq!(json["steps"]["value"], 200);
    assert_eq!(
        files.relative(json["zero.stage"]["source"].as_str().unwrap()),
        "ds.json:7 `zero_optimization.stage`"
    );
    assert_eq!(json["optimizer.eps"], serde_json::json!({"value": 1e-8, "source": "default"}));
    assert_eq!(json["notes"].as_array().unwrap().len(), loaded.effective().notes().len());
    let notes = json["notes"].as_array().unwrap();
    let note = notes.iter().find(|note| note["key"] == "fp16.loss_scale").unwrap();
    assert_eq!(note["kind"], "no_effect");
    assert_eq!(note["value"], 0);
}

#[test]
fn every_form_of_configuration_has_a_source_for_every_value() {
    let run = run_with(&deepspeed(""));
    // Loading fails on a value without a source; these are the forms that a configuration can take.
    let forms: [&[&str]; 32] = [
        &[],
        &["model={\"config\": {}}"],
        &["parallel={\"pipeline\": 3, \"schedule\": \"zero-bubble\", \"stages\": \"pattern:*.h.*\"}"],
        &[
            "deepspeed.pipeline={\"stages\": \"auto\", \"partition\": \"best\"}",
            "deepspeed.tensor_parallel.tp_size=3",
        ],
        &["model={\"config\": {\"a\": {\"b\": {}, \"c\": [1, {}], \"d\": null}}}"],
        &["data={\"text\": [\"a\", \"b\"], \"tokenizer\": \"t.json\", \"seq_len\": 1}"],
        &["data={\"text\": \"a\", \"tokenizer\": {\"train_bpe\": {\"vocab_size\": 257}}, \"seq_len\": 1}"],
        &["deepspeed.scheduler={\"type\": \"WarmupLR\"}"],
        &["deepspeed.gradient_clipping=0", "deepspeed.zero_optimization.overlap_comm=false"],
        &["threads_per_rank=2", "deepspeed.steps_per_print=3", "train.frozen=[\"a\"]"],
        &["deepspeed.fp16.enabled=true"],
        &["deepspeed.fp16={\"enabled\": true, \"loss_scale\": 128}"],
        &["deepspeed.gradient_predivide_factor=2"],
        &["deepspeed.optimizer.type=Adam", "deepspeed.optimizer.params.adam_w_mode=false"],
        &["deepspeed.optimizer.type=sgd"],
        &["deepspeed.optimizer.type=Adagrad"],
        &["deepspeed.optimizer.type=LION"],
        &["deepspeed.optimizer.type=lamb"],
        &["deepspeed.optimizer.type=Muon"],
        &["deepspeed.optimizer={\"type\": \"Muon\", \"params\": {\"muon_lr\": 0.02, \"adam_lr\": 1e-3}}"],
        &["deepspeed.scheduler={\"type\": \"WarmupDecayLR\", \"params\": {\"total_num_steps\": 9}}"],
        &["deepspeed.scheduler={\"type\": \"WarmupCosineLR\", \"params\": {\"total_num_steps\": 9}}"],
        &[
            "deepspeed.scheduler={\"type\": \"OneCycle\", \"params\": {\"cycle_min_lr\": 1, \"cycle_max_lr\": 2}}",
        ],
        &["deepspeed.scheduler={\"type\": \"LRRangeTest\"}"],
        &["lr_schedule={\"type\": \"constant\"}"],
        &["lr_schedule={\"type\": \"cosine\"}"],
        &["activations={\"policy\": \"offload\", \"rules\": [{\"match\": \"a\", \"policy\": \"keep\"}]}"],
        &["eval={\"tokens\": \"e.bin\", \"every\": 5}"],
        &["trace={\"first_step\": 3, \"num_steps\": 2}"],
        &[
            "device=cuda",
            "deepspeed.zero_optimization.cpu_offload=true",
            "deepspeed.zero_optimization.stage=1",
        ],
        &[
            "deepspeed.zero_optimization.offload_param.device=cpu",
            "cuda={\"share\": true, \"memory_limit\": 5e9}",
        ],
        &["checkpoint={\"every\": 10, \"async\": true}", "train.groups=[{\"match\": \"a\", \"lr\": 1}]"],
    ];
    for sets in forms {
        let loaded = load(&run, sets, 3).unwrap();
        assert!(loaded.effective().values().len() > 25);
    }
}
