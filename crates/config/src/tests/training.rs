//! Precision, reduction, optimizers, schedules, activations and saving: what settings become, and what they say when they
//! do not go together.

use super::*;
use crate::*;

fn with(sets: &[&str]) -> Result<Loaded, String> {
    load(&run_with(&deepspeed("")), sets, 2)
}

fn config(sets: &[&str]) -> RunConfig {
    with(sets).unwrap_or_else(|says| panic!("{sets:?}: {says}")).config
}

/// The one error, without the place.
fn says(sets: &[&str]) -> String {
    let text = with(sets).err().unwrap_or_else(|| panic!("{sets:?} was accepted"));
    assert_eq!(text.matches("error: ").count(), 1, "{text}");
    let place = format!("error: --set {}: ", sets.last().unwrap());
    text.strip_prefix(&place).map_or(text.clone(), str::to_string)
}

fn remarks(sets: &[&str]) -> Vec<String> {
    let loaded = with(sets).unwrap();
    let notes = loaded.effective().notes().iter().filter(|note| note.kind == NoteKind::Remark);
    notes.map(|note| format!("{}: {}", note.key, note.reason)).collect()
}

/// The keys with a note that they change nothing.
fn idle(sets: &[&str]) -> Vec<String> {
    let loaded = with(sets).unwrap();
    let notes = loaded.effective().notes().iter().filter(|note| note.kind == NoteKind::NoEffect);
    notes.map(|note| note.key.rsplit('.').next().unwrap_or_default().to_string()).collect()
}

#[test]
fn fp16_scales_its_loss() {
    let dynamic = DynamicLossScale {
        initial_power: 16,
        window: 1000,
        hysteresis: 2,
        refill: HysteresisRefill::OnGrowth,
        min_scale: 1.0,
    };
    let run = config(&["deepspeed.fp16.enabled=true"]);
    assert_eq!((run.precision, run.loss_scaling), (Precision::Fp16, Some(LossScaling::Dynamic(dynamic))));
    assert_eq!(run.train.max_consecutive_skips, None);
    let fp16 = r#"deepspeed.fp16={"enabled": true, "loss_scale": 0.0, "initial_scale_power": 4, "loss_scale_window": 2,
        "hysteresis": 1, "consecutive_hysteresis": true, "min_loss_scale": 0.25}"#;
    let all = DynamicLossScale {
        initial_power: 4,
        window: 2,
        hysteresis: 1,
        refill: HysteresisRefill::EveryGoodStep,
        min_scale: 0.25,
    };
    assert_eq!(config(&[fp16]).loss_scaling, Some(LossScaling::Dynamic(all)));
    assert_eq!(
        says(&[fp16, "train.max_consecutive_skips=3"]),
        "`train.max_consecutive_skips` is set, but skips end at the minimum of a dynamic loss scale\nhint: leave it out"
    );
    let fixed = [fp16, "deepspeed.fp16.loss_scale=128"];
    let run = config(&[&fixed[..], &["train.max_consecutive_skips=3"]].concat());
    assert_eq!(run.train.max_consecutive_skips, Some(3));
    let run = config(&fixed);
    assert_eq!(run.loss_scaling, Some(LossScaling::Static { scale: 128.0 }));
    assert_eq!(run.train.max_consecutive_skips, Some(20));
    assert_eq!(idle(&fixed).len(), 5);
    assert_eq!(config(&["deepspeed.bf16.enabled=true"]).loss_scaling, None);

    let on = "deepspeed.fp16.enabled=true";
    for (set, expected) in [
        ("deepspeed.fp16.loss_scale=true", "a number of at least 0"),
        ("deepspeed.fp16.loss_scale=-1", "a number of at least 0"),
        ("deepspeed.fp16.loss_scale=1e999", "a number of at least 0"),
        ("deepspeed.fp16.loss_scale_window=0", "a whole number of at least 1"),
        ("deepspeed.fp16.min_loss_scale=0", "a number above 0"),
        ("deepspeed.fp16.initial_scale_power=128", "a whole number from 0 to 127"),
    ] {
        let says = says(&[on, set]);
        assert!(says.contains(&format!("expected {expected}")), "{says}");
    }
    assert_eq!(
        says(&[on, "deepspeed.fp16.initial_scale_power=2", "deepspeed.fp16.min_loss_scale=8"]),
        "`fp16.min_loss_scale` is `8`, above the first scale, 2^2 = `4`\nhint: raise `fp16.initial_scale_power`"
    );
}

#[test]
fn bf16_may_apply_what_is_not_finite() {
    let unchecked = "deepspeed.bf16.check_grad_overflow=false";
    assert_eq!(config(&["deepspeed.bf16.enabled=true"]).non_finite_grads, NonFiniteGrads::Skip);
    let applied = config(&["deepspeed.bf16.enabled=true", unchecked]);
    assert_eq!(
        (applied.non_finite_grads, applied.train.max_consecutive_skips),
        (NonFiniteGrads::Apply, None)
    );
    assert_eq!(config(&[unchecked]).non_finite_grads, NonFiniteGrads::Skip);
    assert_eq!(idle(&[unchecked]), ["check_grad_overflow"]);
}

#[test]
fn gradients_are_reduced_as_asked() {
    let bf16 = "deepspeed.bf16.enabled=true";
    let reduction = config(&[
        bf16,
        "deepspeed.data_types.grad_accum_dtype=bf16",
        "deepspeed.communication_data_type=fp32",
        "deepspeed.gradient_allreduce_op=sum",
    ])
    .reduction;
    let expected = ReductionConfig {
        accumulation: FloatType::Bf16,
        communication: Some(FloatType::Fp32),
        op: ReduceOp::Sum,
        scaling: GradScaling::After,
    };
    assert_eq!(reduction, expected);
    let scaling = |sets: &[&str]| config(sets).reduction.scaling;
    let (before, split) = ("deepspeed.prescale_gradients=true", "deepspeed.gradient_predivide_factor=8");
    assert_eq!(scaling(&[before]), GradScaling::Before);
    assert_eq!(scaling(&[split]), GradScaling::Split { factor: 8.0 });
    assert_eq!(scaling(&["deepspeed.gradient_predivide_factor=1"]), GradScaling::After);
    assert_eq!(scaling(&[before, "deepspeed.gradient_predivide_factor=1.0"]), GradScaling::Before);
    assert_eq!(
        says(&[before, split]),
        "`deepspeed.prescale_gradients` and `deepspeed.gradient_predivide_factor` are both set, but gradients are \
         divided either at once or in two parts\nhint: keep one of the two"
    );
    for set in [before, split] {
        let key = set.split('=').next().unwrap();
        assert_eq!(
            says(&["deepspeed.gradient_allreduce_op=sum", set]),
            format!(
                "`{key}` is set, but `gradient_allreduce_op` is `sum`, which divides nothing\nhint: leave it out"
            )
        );
    }
}

#[test]
fn optimizers_have_the_defaults_of_their_classes() {
    let of = |kind: &str| {
        let run = config(&[&format!("deepspeed.optimizer={{\"type\": \"{kind}\"}}")]);
        (run.optimizer, run.lr_schedule)
    };
    let constant = |lr| LrSchedule::Constant { lr };
    let adam = AdamConfig { betas: [0.9, 0.999], eps: 1e-8, weight_decay: 0.0, bias_correction: true };
    assert_eq!(of("Adam"), (Optimizer::AdamW(adam), constant(1e-3)));
    let sgd = SgdConfig { momentum: 0.0, dampening: 0.0, nesterov: false, weight_decay: 0.0 };
    assert_eq!(of("SGD"), (Optimizer::Sgd(sgd), constant(1e-3)));
    let adagrad = AdagradConfig { lr_decay: 0.0, eps: 1e-10, weight_decay: 0.0 };
    assert_eq!(of("adagrad"), (Optimizer::Adagrad(adagrad), constant(1e-2)));
    let lion = LionConfig { betas: [0.9, 0.999], weight_decay: 0.0 };
    assert_eq!(of("Lion"), (Optimizer::Lion(lion), constant(1e-3)));
    let lamb = LambConfig {
        betas: [0.9, 0.999],
        eps: 1e-8,
        weight_decay: 0.0,
        max_coeff: 10.0,
        min_coeff: 0.01,
        bias_correction: true,
    };
    assert_eq!(of("Lamb"), (Optimizer::Lamb(lamb), constant(1e-3)));
    let muon = MuonConfig {
        momentum: 0.95,
        ns_steps: 5,
        weight_decay: 0.0,
        adam_lr_scale: 3e-4 / 0.02,
        adam_betas: [0.9, 0.95],
        adam_eps: 1e-10,
    };
    assert_eq!(of("Muon"), (Optimizer::Muon(muon), constant(0.02)));
}

#[test]
fn optimizers_take_their_own_parameters() {
    let of = |text: &str| config(&[&format!("deepspeed.optimizer={text}")]);
    let coupled = of(r#"{"type": "Adam", "params": {"adam_w_mode": false, "weight_decay": 0.1}}"#).optimizer;
    assert!(matches!(coupled, Optimizer::Adam(AdamConfig { weight_decay: 0.1, .. })));
    // The name `AdamW` says it, and DeepSpeed listens to the name.
    let named = of(r#"{"type": "AdamW", "params": {"adam_w_mode": false}}"#).optimizer;
    assert!(matches!(named, Optimizer::AdamW(_)));
    let torch = |mode: bool| {
        let text = format!(r#"{{"type": "Adam", "params": {{"torch_adam": true, "adam_w_mode": {mode}}}}}"#);
        of(&text).optimizer.weight_decay()
    };
    assert_eq!((torch(true), torch(false)), (0.01, 0.0));
    let sgd = of(
        r#"{"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9, "nesterov": true, "weight_decay": 1e-4}}"#,
    );
    let expected = SgdConfig { momentum: 0.9, dampening: 0.0, nesterov: true, weight_decay: 1e-4 };
    assert_eq!(sgd.optimizer, Optimizer::Sgd(expected));
    assert_eq!((sgd.optimizer.num_states(), sgd.lr_schedule), (1, LrSchedule::Constant { lr: 0.1 }));
    let muon =
        of(r#"{"type": "Muon", "params": {"lr": 0.1, "muon_lr": 0.04, "adam_lr": 0.002, "ns_steps": 6}}"#);
    assert_eq!(muon.lr_schedule, LrSchedule::Constant { lr: 0.04 });
    let Optimizer::Muon(params) = muon.optimizer else { panic!("Muon") };
    assert_eq!((params.adam_lr_scale, params.ns_steps), (0.05, 6));
    let shared = of(r#"{"type": "Muon", "params": {"lr": 0.0}}"#).optimizer;
    assert!(matches!(shared, Optimizer::Muon(MuonConfig { adam_lr_scale: 1.0, .. })));

    let refuses = |text: &str| says(&[&format!("deepspeed.optimizer={text}")]);
    let params = "deepspeed.optimizer.params";
    for (text, expected) in [
        (
            r#"{"type": "SGD", "params": {"nesterov": true}}"#,
            format!(
                "`{params}.nesterov` needs a momentum above 0 and no dampening, got `0` and `0`\nhint: set `momentum`, \
                 for example to 0.9, and leave `dampening` out"
            ),
        ),
        (
            r#"{"type": "SGD", "params": {"eps": 1e-8}}"#,
            format!(
                "`{params}.eps` is a parameter of AdamW, Adam, Adagrad, Lamb or Muon, not of SGD\nhint: leave it out"
            ),
        ),
        (
            r#"{"type": "Adagrad", "params": {"initial_accumulator_value": 0.5}}"#,
            format!(
                "`{params}.initial_accumulator_value` = `0.5` is not supported yet\nhint: set it to `0` or leave it out"
            ),
        ),
        (
            r#"{"type": "Lamb", "params": {"max_coeff": 0.001}}"#,
            "`min_coeff` is `0.01`, above `max_coeff`, `0.001`\nhint: the trust ratio lies between the two"
                .to_string(),
        ),
        (
            r#"{"type": "Muon", "params": {"ns_method": "gram"}}"#,
            format!(
                "`{params}.ns_method` = `\"gram\"` is not supported yet\nhint: set it to `\"standard\"` or leave it \
                 out; in exact arithmetic the two are one"
            ),
        ),
        (
            r#"{"type": "Muon", "params": {"muon_lr": 0}}"#,
            format!(
                "`{params}.muon_lr` is `0`, but the rate of the AdamW half is `0.0003`: the two move in proportion\n\
                 hint: raise it, or set `adam_lr` to 0 as well"
            ),
        ),
    ] {
        assert_eq!(refuses(text), expected);
    }
    for lr in ["-1e-3", "1e999", "\"inf\"", "\"nan\""] {
        let says = says(&[&format!("{params}.lr={lr}")]);
        assert!(says.contains("expected a number of at least 0"), "{says}");
    }
}

#[test]
fn states_have_one_type() {
    let dtype = |sets: &[&str]| config(sets).optimizer_state_dtype;
    let (bf16, ours) = ("deepspeed.bf16.enabled=true", "optimizer.state_dtype=bf16");
    let theirs = "deepspeed.bf16.bf16_optimizer_states=true";
    let fp32 = "deepspeed.optimizer.params.fp32_optimizer_states";
    let (on, off) = (format!("{fp32}=true"), format!("{fp32}=false"));
    assert_eq!(dtype(&[]), FloatType::Fp32);
    assert_eq!(dtype(&[ours]), FloatType::Bf16);
    assert_eq!(dtype(&[bf16, theirs, ours, &off]), FloatType::Bf16);
    assert_eq!(
        (dtype(&[bf16, &off]), dtype(&[&off]), dtype(&[bf16, &on])),
        (FloatType::Bf16, FloatType::Fp32, FloatType::Fp32)
    );
    assert_eq!(dtype(&[theirs]), FloatType::Fp32);
    assert_eq!(idle(&[theirs]), ["bf16_optimizer_states"]);
    assert_eq!(
        says(&[ours, &on]),
        format!(
            "`optimizer.state_dtype` and `{fp32}` are both set, but they ask for different types of the optimizer's states\nhint: keep one of the two"
        )
    );
    assert!(says(&["deepspeed.fp16.enabled=true", &off]).contains("states overflow in fp16"));
}

#[test]
fn groups_decide_rate_and_decay_by_name() {
    let run = config(&[
        "deepspeed.optimizer.params.weight_decay=0.1",
        "train.no_decay=['*.bias', '*norm*']",
        "train.groups=[{'match': 'head.bias', 'lr': 0.0005, 'weight_decay': 0.2}, {'match': ['head.*', 'embed*'], 'lr_scale': 3}]",
    ]);
    let of = |name: &str| {
        let ParamSettings { group, lr_scale, weight_decay } = run.param_settings(name);
        (group, lr_scale, weight_decay)
    };
    assert_eq!(of("layers.0.weight"), (None, 1.0, 0.1));
    assert_eq!(of("layers.0.bias"), (None, 1.0, 0.0));
    assert_eq!(of("head.bias"), (Some(0), 0.5, 0.2));
    assert_eq!(of("head.weight"), (Some(1), 3.0, 0.1));
    assert_eq!(of("embed_norm"), (Some(1), 3.0, 0.0));

    let refuses = |group: &str| says(&[&format!("train.groups=[{group}]")]);
    let each = [
        (
            "{'match': 'a', 'lr': 1, 'lr_scale': 1}",
            "`train.groups[0].lr` and `train.groups[0].lr_scale` are both set, but each sets the group's rate\nhint: keep one of the two",
        ),
        ("{'match': 'a'}", "`train.groups[0]` changes nothing\nhint: set `lr`, `lr_scale` or `weight_decay`"),
        (
            "{'lr': 1}",
            "`train.groups[0].match` is missing\nhint: names of parameters, for example `\"*.bias\"`",
        ),
        (
            "{'match': 'a', 'lr': 1, 'lr_sclae': 1}",
            "`train.groups[0].lr_sclae` is not a known key\nhint: did you mean `lr_scale`?",
        ),
        ("{'match': [], 'lr': 1}", "`train.groups[0].match` is `[]`, expected text or a list of texts"),
        ("{'match': 'b', 'lr': -1}", "`train.groups[0].lr` is `-1`, expected a number of at least 0"),
        ("1", "`train.groups` is `[1]`, expected a list of objects"),
    ];
    for (group, expected) in each {
        let says = refuses(group);
        assert!(says == expected, "{says}");
    }
    assert_eq!(
        says(&["deepspeed.optimizer.params.lr=0", "train.groups=[{'match': 'a', 'lr': 1}]"]),
        "`train.groups[0].lr` is `1`, but the schedule's rate is `0`, to which it is in proportion\nhint: raise the rate, \
         or freeze the other parameters with `train.frozen`"
    );
}

#[test]
fn schedules_that_do_not_fit() {
    let scheduler = |kind: &str, params: &str| {
        format!(r#"deepspeed.scheduler={{"type": "{kind}", "params": {{{params}}}}}"#)
    };
    for (set, expected) in [
        (
            scheduler("WarmupDecayLR", ""),
            "`deepspeed.scheduler.params.total_num_steps` is missing\nhint: the number of optimizer steps until the rate \
             is at its end, usually `steps`",
        ),
        (
            scheduler("OneCycle", r#""cycle_max_lr": 1"#),
            "`deepspeed.scheduler.params.cycle_min_lr` is missing\nhint: a cycle has two ends",
        ),
        (
            scheduler("WarmupLR", r#""total_num_steps": 5"#),
            "`deepspeed.scheduler.params.total_num_steps` is a parameter of WarmupDecayLR or WarmupCosineLR, not of \
             WarmupLR\nhint: leave it out",
        ),
        (
            scheduler(
                "OneCycle",
                r#""cycle_min_lr": 0, "cycle_max_lr": 1, "cycle_first_step_size": 2, "decay_step_size": 1, "decay_mom_rate": 0.5"#,
            ),
            "the momentum would grow to `3.15` by the last step, and it has to stay below 1\nhint: lower \
             `decay_mom_rate`, or raise `decay_step_size`",
        ),
        (
            r#"lr_schedule={"type": "cosine", "warmup_steps": 11}"#.to_string(),
            "`lr_schedule.warmup_steps` is `11`, the whole schedule has `10` steps\nhint: shorten the warm-up, or raise \
             `lr_schedule.total_steps`",
        ),
        (
            r#"lr_schedule={"type": "linear", "min_lr": 0.1}"#.to_string(),
            "`lr_schedule.min_lr` is `0.1`, above the rate, `0.001`\nhint: lower it, or raise \
             `deepspeed.optimizer.params.lr`",
        ),
        (
            r#"lr_schedule={"type": "constant", "min_lr": 0.1}"#.to_string(),
            "`lr_schedule.min_lr` is set, but it says something about `a schedule that falls` only\nhint: leave it out",
        ),
    ] {
        assert_eq!(says(&[&set]), expected);
    }
    let both = says(&[&scheduler("WarmupLR", ""), r#"lr_schedule={"type": "linear"}"#]);
    assert!(both.contains("are both set, but a run has one schedule"), "{both}");
    let cycle = scheduler("OneCycle", r#""cycle_min_lr": 0, "cycle_max_lr": 1, "cycle_momentum": true"#);
    for kind in ["Adagrad", "Muon"] {
        let optimizer = format!("deepspeed.optimizer={{\"type\": \"{kind}\"}}");
        let says = says(&[&optimizer, &cycle]);
        assert!(says.contains(&format!("`{kind}` has no momentum that a schedule could move")), "{says}");
    }
    assert_eq!(
        remarks(&[&scheduler("WarmupCosineLR", r#""total_num_steps": 5, "warmup_num_steps": 9"#)]),
        [
            "deepspeed.scheduler.params.total_num_steps: the warm-up takes 9 steps, so that the rate is at its end right after it"
        ]
    );
}

#[test]
fn the_momentum_is_cycled_where_there_is_one() {
    let cycle = |more: &str| {
        format!(
            r#"deepspeed.scheduler={{"type": "OneCycle", "params": {{"cycle_min_lr": 0, "cycle_max_lr": 1{more}}}}}"#
        )
    };
    let momentum = |optimizer: &str, more: &str| {
        let run = config(&[&format!("deepspeed.optimizer={{\"type\": \"{optimizer}\"}}"), &cycle(more)]);
        (run.lr_schedule.momentum(0), run.optimizer)
    };
    let (first, optimizer) = momentum("AdamW", "");
    assert_eq!(first, Some(0.8));
    assert!(
        matches!(optimizer, Optimizer::AdamW(AdamConfig { betas: [_, 0.99], .. })),
        "as DeepSpeed sets it"
    );
    let (first, optimizer) = momentum("AdamW", r#", "cycle_momentum": false"#);
    assert_eq!(first, None);
    assert!(matches!(optimizer, Optimizer::AdamW(AdamConfig { betas: [0.9, 0.999], .. })));
    assert_eq!(momentum("SGD", "").0, None, "it has no betas");
    assert_eq!(momentum("SGD", r#", "cycle_momentum": true, "cycle_min_mom": 0.5"#).0, Some(0.5));
    assert_eq!(momentum("Muon", "").0, None);
    let sgd = ["deepspeed.optimizer={\"type\": \"SGD\"}", &cycle(r#", "cycle_min_mom": 0.5"#)];
    assert_eq!(idle(&sgd), ["cycle_min_mom"]);
}

#[test]
fn a_scheduler_that_sets_the_rate_sets_both_of_muons() {
    let muon = r#"deepspeed.optimizer={"type": "Muon", "params": {"muon_lr": 0.02, "adam_lr": 0.001}}"#;
    let scale = |scheduler: &str| match config(&[muon, &format!("deepspeed.scheduler={scheduler}")]).optimizer
    {
        Optimizer::Muon(muon) => muon.adam_lr_scale,
        other => panic!("{other:?}"),
    };
    assert_eq!(scale(r#"{"type": "WarmupLR"}"#), 0.05);
    assert_eq!(scale(r#"{"type": "WarmupLR", "params": {"warmup_max_lr": 0.01}}"#), 1.0);
    let set = r#"deepspeed.scheduler={"type": "LRRangeTest"}"#;
    assert_eq!(idle(&[muon, set]), ["adam_lr", "muon_lr"]);
    let says =
        says(&[muon, r#"deepspeed.scheduler={"type": "WarmupLR", "params": {"warmup_min_lr": 1e-5}}"#]);
    assert!(says.contains("`warmup_min_lr` is one rate for both halves of Muon"), "{says}");
}

#[test]
fn activations_are_kept_unless_asked_otherwise() {
    let block = |members: &str| format!("deepspeed.activation_checkpointing={{{members}}}");
    let policy = |set: &str| config(&[set]).activations.policy;
    assert_eq!(policy("steps=10"), ActivationPolicy::Keep);
    assert_eq!(
        policy(&block(r#""partition_activations": false, "number_checkpoints": null"#)),
        ActivationPolicy::Keep
    );
    assert_eq!(policy(&block(r#""number_checkpoints": 4"#)), ActivationPolicy::Recompute);
    assert_eq!(policy(&block(r#""partition_activations": true"#)), ActivationPolicy::Recompute);
    let all = block(r#""partition_activations": true, "cpu_checkpointing": true, "number_checkpoints": 4"#);
    assert_eq!(policy(&all), ActivationPolicy::Offload);
    assert_eq!(remarks(&[&all]).len(), 4);
    let run = config(&[
        "activations={policy: 'recompute', rules: [{match: ['*.0', '*.1'], policy: 'keep'}, {match: 'lm_head', policy: 'offload'}]}",
        "activations.head_chunk_tokens=256",
    ]);
    use ActivationPolicy::{Keep, Offload, Recompute};
    let policies = run
        .activations
        .to_rules()
        .policies(["l.0", "l.1", "l.2", "lm_head", "last"], shardwise_plan::LossTurn::AtOnce);
    assert_eq!(policies, [Keep, Keep, Recompute, Offload, Keep]);
    assert_eq!(run.activations.head_chunk_tokens, Some(256));
    let offload = ["activations.policy=offload"];
    assert_eq!(
        remarks(&offload),
        [
            "activations.policy: on `cpu` host memory is where the inputs of layers are anyway: offload saves what recompute saves"
        ]
    );
    assert!(remarks(&["activations.policy=recompute"]).is_empty());
    // Rules go with DeepSpeed's block, a policy does not.
    let rules = "activations.rules=[{match: '*.0', policy: 'keep'}]";
    assert_eq!(
        config(&[&all, rules])
            .activations
            .to_rules()
            .policies(["l.0", "l.1", "last"], shardwise_plan::LossTurn::AtOnce),
        [Keep, Offload, Keep]
    );
    let both = says(&["activations.policy=recompute", &all]);
    assert!(both.contains("are both set, but each says what layers hold"), "{both}");
    assert_eq!(
        says(&["activations.rules=[{match: 'a', policy: 'keep'}, {match: 'b', policy: 'drop'}]"]),
        "`activations.rules[1].policy` is `\"drop\"`, expected `\"keep\"`, `\"recompute\"` or `\"offload\"`"
    );
    assert_eq!(
        says(&["activations.rules=[{policy: 'keep'}]"]),
        "`activations.rules[0].match` is missing\nhint: names of layers, for example `\"*.layers.1*\"`"
    );
}

#[test]
fn checkpoints_and_evaluation() {
    let run = config(&[
        "checkpoint={every: 50, keep: 2, async: true, on_failure: 'continue'}",
        "eval.tokens=held.bin",
        "eval.every=25",
    ]);
    let checkpoint = CheckpointConfig {
        every: Some(50),
        keep: Some(2),
        writing: CheckpointWriting::Background,
        on_failure: OnSaveFailure::Continue,
    };
    assert_eq!(run.checkpoint, checkpoint);
    let eval = run.eval.unwrap();
    assert!(matches!(&eval.source, EvalSource::Tokens(path) if path.ends_with("held.bin")));
    assert_eq!((eval.every, eval.max_tokens), (Some(25), None));
    assert_eq!(idle(&["checkpoint.keep=2"]), ["keep"]);
    assert_eq!(
        says(&["eval.text=held.txt"]),
        "`eval.text` is set, but the run reads `data.tokens`\nhint: held-out data has the form of the run's own"
    );
    assert_eq!(
        says(&["eval={every: 3}"]),
        "`eval.text` is missing\nhint: set it, or name a token file as `eval.tokens`"
    );
}

#[test]
fn threads_are_the_run_files_or_the_launchers_or_a_share() {
    let (plain, set) = (config(&[]), config(&["threads_per_rank=3"]));
    assert_eq!((plain.threads(None, 8), plain.threads(Some(5), 8), set.threads(Some(5), 8)), (4, 5, 3));
    assert_eq!((plain.threads(None, 1), plain.threads(Some(0), 8)), (1, 1));
}

/// Rates and momenta as DeepSpeed and `transformers` set them, recorded by `scripts/golden/lr_schedules.py`.
#[test]
fn schedules_have_the_values_of_those_they_are_named_after() {
    let golden: serde_json::Value = serde_json::from_str(include_str!("lr_schedules.json")).unwrap();
    let lr = format!("deepspeed.optimizer.params.lr={}", golden["lr"]);
    let cases = golden["cases"].as_array().unwrap();
    assert!(cases.len() > 20);
    for case in cases {
        let set = &case["set"];
        let set = match set.get("scheduler") {
            Some(scheduler) => format!("deepspeed.scheduler={scheduler}"),
            None => format!("lr_schedule={}", set["lr_schedule"]),
        };
        let run = config(&[&lr, &set]);
        let near = |ours: f64, golden: &serde_json::Value, step: usize| {
            let golden = golden.as_f64().unwrap();
            assert!(
                (ours - golden).abs() <= 1e-12 * golden.abs().max(1e-6),
                "{set} at {step}: {ours}, expected {golden}"
            );
        };
        for (step, rate) in case["lr"].as_array().unwrap().iter().enumerate() {
            near(run.lr_schedule.lr(step as u64), rate, step);
            match &case["momentum"][step] {
                serde_json::Value::Null => assert_eq!(run.lr_schedule.momentum(step as u64), None, "{set}"),
                momentum => near(run.lr_schedule.momentum(step as u64).unwrap(), momentum, step),
            }
        }
        let Optimizer::AdamW(adam) = run.optimizer else { panic!("AdamW") };
        near(adam.betas[1], &case["betas"][1], 0);
    }
}
