//! Meshes of more than one axis: keys, what goes together, and what does not.

use super::*;
use crate::*;

fn loaded(sets: &[&str], ranks: usize) -> Result<Loaded, String> {
    let accum = deepspeed(", \"gradient_accumulation_steps\": 4");
    load(&run_with(&accum), sets, ranks)
}

fn parallel(sets: &[&str], ranks: usize) -> ParallelConfig {
    loaded(sets, ranks).unwrap().config.parallel
}

fn says(sets: &[&str], ranks: usize) -> String {
    loaded(sets, ranks).expect_err("this configuration has errors")
}

#[test]
fn the_rest_of_the_ranks_is_data_parallel() {
    let sets =
        ["parallel={pipeline: 2, tensor: 2, schedule: 'Interleaved:2', stages: 'time', sequence: true}"];
    let config = loaded(&sets, 12).unwrap().config;
    let ParallelConfig { world_size, data, pipeline, tensor, schedule, ref stage_cut, sequence, .. } =
        config.parallel;
    assert_eq!((world_size, pipeline, data, tensor), (12, 2, 3, 2));
    assert_eq!(schedule, ScheduleKind::Interleaved { num_chunks: 2 });
    assert_eq!((stage_cut, sequence), (&StageCut::Time, SequenceParallel::On));
    assert_eq!(config.parallel.mesh().world_size(), 12);
    // Samples are counted by replicas: 2 x 4 x 3.
    assert_eq!(config.batch.global_batch_size, 24);
    let config = loaded(&["parallel.tensor=2", "deepspeed.data_parallel_size=1"], 2).unwrap().config;
    assert_eq!(config.batch.global_batch_size, 8);
    assert_eq!(
        says(&["parallel.tensor=2", "deepspeed.data_parallel_size=2"], 2),
        "error: --set deepspeed.data_parallel_size=2: `deepspeed.data_parallel_size` is 2, but there are 1 data-parallel \
         ranks\nhint: leave it out: it follows from the number of ranks"
    );
    assert_eq!(
        says(&["parallel.tensor=2", "parallel.pipeline=2", "deepspeed.train_batch_size=7"], 8),
        "error: --set deepspeed.train_batch_size=7: `train_batch_size` 7 is not `train_micro_batch_size_per_gpu` 2 x `gradient_accumulation_steps` 4 x \
         2 data-parallel ranks = 16\nhint: set `train_batch_size` to 16, or leave one of the three out"
    );
}

#[test]
fn every_stage_precision_and_policy_goes_with_every_mesh() {
    for stage in 0..4 {
        for precision in ["bf16", "fp16"] {
            for sets in
                [["parallel.pipeline=2", "parallel.tensor=2"], ["parallel.pipeline=4", "parallel.tensor=1"]]
            {
                let stage = format!("deepspeed.zero_optimization.stage={stage}");
                let precision = format!("deepspeed.{precision}.enabled=true");
                let sets = [&sets[..], &[&stage, &precision, "activations.policy=recompute"]].concat();
                assert!(loaded(&sets, 8).is_ok(), "{sets:?}");
            }
        }
    }
}

#[test]
fn deepspeeds_keys_mean_the_same() {
    let degrees = |sets: &[&str]| {
        let config = parallel(sets, 4);
        (config.pipeline, config.tensor)
    };
    assert_eq!(degrees(&["deepspeed.pipeline.stages=2", "deepspeed.tensor_parallel.autotp_size=2"]), (2, 2));
    assert_eq!(degrees(&["deepspeed.pipeline.stages=auto", "parallel.pipeline=4"]), (4, 1));
    assert_eq!(degrees(&["deepspeed.tensor_parallel.autotp_size=0", "parallel.tensor=4"]), (1, 4));
    assert_eq!(degrees(&["deepspeed.tensor_parallel.tp.tp_size=4", "parallel.tensor=4"]), (1, 4));
    let cut = |partition: &str, more: &[&str]| {
        let partition = format!("deepspeed.pipeline.partition={partition}");
        parallel(&[&["parallel.pipeline=2", &partition], more].concat(), 2).stage_cut
    };
    assert_eq!(cut("best", &[]), StageCut::Parameters);
    assert_eq!(cut("best", &["parallel.stages=time"]), StageCut::Time);
    assert_eq!(cut("Uniform", &[]), StageCut::Uniform);
    assert_eq!(cut("type:layers", &["parallel.stages='pattern:*layers*'"]).to_string(), "pattern:*layers*");
    assert_eq!(
        says(&["deepspeed.pipeline.partition=profile", "parallel.pipeline=2"], 2),
        "error: --set deepspeed.pipeline.partition=profile: `deepspeed.pipeline.partition` is `\"profile\"`, expected \
         `parameters`, `uniform`, `best` or `type:NAME`"
    );
    // Without a pipeline it is a key that configurations carry along.
    let idle =
        loaded(&["deepspeed.pipeline.partition=uniform", "deepspeed.tensor_parallel.autotp_size=0"], 2)
            .unwrap();
    let mut notes: Vec<_> = idle.effective().notes().iter().map(|note| note.key.as_str()).collect();
    notes.retain(|key| key.contains("parallel") || key.contains("pipeline"));
    assert_eq!(notes, ["deepspeed.tensor_parallel.autotp_size", "deepspeed.pipeline.partition"]);
}

#[test]
fn settings_that_differ_are_named() {
    assert_eq!(
        says(&["parallel.pipeline=2", "deepspeed.pipeline.stages=4"], 4),
        "error: --set deepspeed.pipeline.stages=4: `parallel.pipeline` is 2, but `deepspeed.pipeline.stages` is 4\n\
         hint: keep one of the two"
    );
    assert_eq!(
        says(&["deepspeed.tensor_parallel={autotp_size: 2, tp_size: 4}"], 4),
        "error: --set deepspeed.tensor_parallel={autotp_size: 2, tp_size: 4}: `deepspeed.tensor_parallel.autotp_size` is 2, but \
         `deepspeed.tensor_parallel.tp_size` is 4\nhint: keep one of the two"
    );
    assert_eq!(
        says(&["parallel={pipeline: 2, stages: 'time'}", "deepspeed.pipeline.partition=uniform"], 4),
        "error: --set deepspeed.pipeline.partition=uniform: `parallel.stages` is \"time\", but \
         `deepspeed.pipeline.partition` is \"uniform\"\nhint: keep one of the two"
    );
}

#[test]
fn what_does_not_fit_the_mesh_says_how_to_mend_it() {
    let cases: [(&[&str], usize, &str); 8] = [
        (
            &["parallel={pipeline: 2, tensor: 2}"],
            6,
            "`6` ranks cannot be split into pipeline `2` x tensor `2`, expected a multiple of `4`\n\
             hint: start another number of ranks with `-n`, or change the degrees",
        ),
        (
            &["parallel.schedule=gpipe"],
            2,
            "`parallel.schedule` is set, but there is one pipeline stage\nhint: leave it out, or raise `parallel.pipeline`",
        ),
        (
            &["parallel.stages=uniform"],
            2,
            "`parallel.stages` is set, but there is one pipeline stage\nhint: leave it out, or raise `parallel.pipeline`",
        ),
        (
            &["parallel.sequence=true"],
            2,
            "`parallel.sequence` is set, but there is one tensor-parallel rank to hold the tokens\n\
             hint: leave it out, or raise `parallel.tensor`",
        ),
        (
            &["parallel={tensor: 3, sequence: true}"],
            3,
            "`data.seq_len` is `64`, of which `3` tensor-parallel ranks have no equal shares\n\
             hint: make it a multiple of `3`, or leave `parallel.sequence` out",
        ),
        (
            &["parallel={pipeline: 8, schedule: 'interleaved'}"],
            8,
            "`4` micro-batches do not fill `8` interleaved stages, expected at least `8` (best a multiple of it), or at most \
             `4` stages, or another schedule\nhint: raise `deepspeed.gradient_accumulation_steps`, the micro-batches of a \
             step, or change `parallel.schedule`",
        ),
        (
            &["parallel={pipeline: 2, schedule: 'dualpipe'}"],
            2,
            "`parallel.schedule` is `\"dualpipe\"`, expected `gpipe`, `1f1b`, `interleaved`, `interleaved:CHUNKS` or \
             `zero-bubble`",
        ),
        (
            &["parallel.tensor=2", "deepspeed.optimizer.type=Muon"],
            2,
            "`Muon` takes a matrix as a whole, and `2` tensor-parallel ranks split it\n\
             hint: choose another optimizer, or set `parallel.tensor` to 1",
        ),
    ];
    for (sets, ranks, expected) in cases {
        let says = says(sets, ranks);
        assert!(says.ends_with(expected) && says.matches("error: ").count() == 1, "{says}");
    }
    assert!(loaded(&["parallel.pipeline=2", "deepspeed.optimizer.type=Muon"], 2).is_ok());
}

#[test]
fn what_the_model_cannot_do_is_said_when_it_is_known() {
    let llama = r#"{"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 128, "vocab_size": 100}"#;
    let files = Files::new(&[
        ("run.json", &run_with(&deepspeed(", \"gradient_accumulation_steps\": 4"))),
        ("model/config.json", llama),
    ]);
    let plan = |sets: &[&str], ranks| files.load("run.json", sets, ranks).unwrap().config.plan(2);
    let says = |sets: &[&str], ranks| plan(sets, ranks).expect_err("the model cannot do this").to_string();
    assert_eq!(
        says(&["parallel.tensor=4"], 4),
        "error: the `2` heads of `model.layers.0.self_attn.q_proj.weight` cannot be cut over `4` tensor-parallel ranks, \
         expected one of `1`, `2`\nhint: choose another `parallel.tensor`"
    );
    let hint = "hint: lower `parallel.pipeline` or the chunks of `parallel.schedule`, or cut by another measure with \
                `parallel.stages`";
    assert_eq!(
        says(&["parallel={pipeline: 2, schedule: 'interleaved:4'}"], 2),
        format!(
            "error: `parallel.pipeline` is `2`, with `4` chunks of layers each: `4` layers cannot be cut into `8` parts, \
             expected 1 to 4\n{hint}"
        )
    );
    assert_eq!(
        says(&["parallel={pipeline: 4, stages: 'pattern:*.layers.*'}"], 4),
        format!(
            "error: `parallel.pipeline` is `4`, with `1` chunks of layers each: `*.layers.*` fits `2` layers, expected at \
             least one for each of `4` parts\n{hint}"
        )
    );
    let shape =
        plan(&["parallel={pipeline: 2, tensor: 2, sequence: true, stages: 'uniform'}"], 8).unwrap().shape;
    assert_eq!(
        (shape.schedule, shape.sequence),
        (Some(ScheduleKind::OneForwardOneBackward), SequenceParallel::On)
    );
    assert_eq!(shape.stages().unwrap().parts(), [0..2, 2..4]);
}
