//! The run file's own keys.

use super::*;
use Unset::Required;

pub(crate) const KEYS: &[Key] = &[
    used(
        "model",
        Kind::Group,
        Required("set `model.path` to a Hugging Face folder, or write `model.config` inline"),
    ),
    used("model.path", TEXT, NONE),
    used("model.config", Kind::Object, NONE),
    used("model.init_seed", SIZE, NONE),
    used("data", Kind::Group, Required("set `data.tokens` or `data.text`, and `data.seq_len`")),
    used("data.tokens", TEXT, NONE),
    used("data.dtype", Kind::Choice(&["u16", "u32"]), NONE),
    used("data.text", Kind::TextOrTexts, NONE),
    used("data.tokenizer", Kind::TextOrGroup, NONE),
    used("data.tokenizer.train_bpe", Kind::Group, Required(r#"write {"train_bpe": {"vocab_size": 8192}}"#)),
    // A byte-level vocabulary starts with the 256 bytes.
    used(
        "data.tokenizer.train_bpe.vocab_size",
        Kind::Int(256, u32::MAX as i64),
        Required("8192 suits a few megabytes of text"),
    ),
    used("data.seq_len", COUNT, Required("tokens of one sample, for example 512")),
    used("data.order", Kind::Choice(&["shuffled", "sequential"]), is("\"shuffled\"")),
    used("data.seed", SIZE, NONE),
    used("steps", COUNT, Required("the number of optimizer steps to train")),
    used("seed", SIZE, is("0")),
    only("device", Kind::Choice(&["cpu", "cuda"]), is("\"cpu\""), &["\"cpu\""], ""),
    used("threads_per_rank", COUNT, NONE),
    group("parallel"),
    only("parallel.pipeline", COUNT, is("1"), &["1"], ""),
    only("parallel.tensor", COUNT, is("1"), &["1"], ""),
    refused("parallel.schedule", TEXT, "leave it out: there are no pipeline stages to schedule"),
    used("parallel.deadline_s", Kind::Above(0.0), is("120")),
    group("checkpoint"),
    refused("checkpoint.every", COUNT, "leave it out: the model is written once, when the run is done"),
    refused("checkpoint.keep", COUNT, "leave it out"),
    refused("checkpoint.async", BOOL, "leave it out"),
    group("train"),
    used("train.no_decay", TEXTS, is("[]")),
    used("train.frozen", TEXTS, is("[]")),
    used(
        DEEPSPEED,
        Kind::TextOrGroup,
        Required(
            "name a DeepSpeed configuration file, or write its content inline: batch size and optimizer come from it",
        ),
    ),
];
