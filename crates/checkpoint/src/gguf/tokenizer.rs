//! The tokenizer inside a GGUF file, as a Hugging Face `tokenizer.json`.
//!
//! A byte-level BPE is a vocabulary, merges, and a way to split text into words before merging. The file has the
//! first two and only a name for the third. The names below are those whose splitting is known for certain; another
//! is refused, because a tokenizer that splits slightly differently works, and quietly costs quality.

use std::collections::{HashMap, HashSet};

use serde_json::{Map, Value, json};

use crate::gguf::{GgufReader, GgufValue};

/// What `tokenizer.ggml.pre` may be.
const SPLITS: [&str; 6] = ["default", "gpt-2", "llama-bpe", "refact", "smollm", "starcoder"];

/// Types of tokens.
const NORMAL: u64 = 1;
const UNKNOWN: u64 = 2;
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;
const NUM_TYPES: u64 = 6;

/// Files of a tokenizer.
#[derive(Debug)]
pub(super) struct TokenizerFiles {
    /// `tokenizer.json`
    pub tokenizer: Value,
    /// `tokenizer_config.json`
    pub config: Value,
}

/// The ids that a `config.json` repeats, as its keys.
pub(super) fn special_ids(file: &GgufReader) -> impl Iterator<Item = (&'static str, u64)> + '_ {
    let keys = [("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")];
    keys.into_iter().filter_map(|(key, kind)| {
        Some((key, file.value(&format!("tokenizer.ggml.{kind}_token_id"))?.as_u64()?))
    })
}

/// Builds the files, for a model of `vocab_size` embeddings; the error is the reason why not.
pub(super) fn build(file: &GgufReader, vocab_size: usize) -> Result<TokenizerFiles, String> {
    match text(file, "model")? {
        Some("gpt2") => {}
        Some(other) => return Err(format!("its kind is `{other}`, expected `gpt2` (byte-level BPE)")),
        None => return Err("there is none in the file".into()),
    }
    let split = text(file, "pre")?.unwrap_or("default");
    let tokens = texts(file, "tokens")?;
    if tokens.len() > vocab_size {
        return Err(format!("it has `{}` tokens, the model has `{vocab_size}` embeddings", tokens.len()));
    }
    let ids: HashMap<&str, usize> = tokens.iter().enumerate().map(|(id, &token)| (token, id)).collect();
    if ids.len() < tokens.len() {
        let twice = tokens.iter().enumerate().find(|(id, token)| ids[*token] != *id);
        return Err(format!("token `{}` is there twice", twice.map_or("", |(_, token)| token)));
    }
    let types = token_types(file, tokens.len())?;
    let merges = merges(&texts(file, "merges")?, &ids)?;

    let added = (0..tokens.len()).filter(|&id| [UNKNOWN, CONTROL, USER_DEFINED].contains(&types[id]));
    let added: Vec<Value> = added
        .map(|id| {
            json!({
                "id": id, "content": tokens[id], "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": types[id] != USER_DEFINED,
            })
        })
        .collect();
    let names = Names::read(file, &tokens)?;
    let pre_tokenizer = pre_tokenizer(split, flag(file, "add_space_prefix")?.unwrap_or(false))?;
    let vocab: Map<String, Value> =
        tokens.iter().enumerate().map(|(id, &token)| (token.to_owned(), id.into())).collect();
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": post_processor(file, split, &names)?,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": split == "llama-bpe", "vocab": vocab, "merges": merges,
        },
    });
    Ok(TokenizerFiles { tokenizer, config: names.config(file) })
}

/// How text is split before merging.
fn pre_tokenizer(split: &str, add_prefix_space: bool) -> Result<Value, String> {
    // GPT-2's own pattern is built into the byte-level step.
    let byte_level = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": true, "use_regex": use_regex});
    let by = |regex: &str| json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
    let steps = match split {
        "gpt-2" => return Ok(byte_level(true)),
        "smollm" | "starcoder" | "refact" => {
            vec![json!({"type": "Digits", "individual_digits": true}), byte_level(true)]
        }
        "llama-bpe" => vec![
            by(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            ),
            byte_level(false),
        ],
        "default" => vec![
            by(r"[\p{P}\$\+<=>\^~\|]+"),
            by(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"),
            by(r"\p{N}+"),
            by(r"[0-9][0-9][0-9]"),
            byte_level(false),
        ],
        other => {
            return Err(format!(
                "its way to split text is `{other}`, expected one of `{}`",
                SPLITS.join("`, `")
            ));
        }
    };
    Ok(json!({"type": "Sequence", "pretokenizers": steps}))
}

/// The token put before every prompt, if the file asks for one.
fn post_processor(file: &GgufReader, split: &str, names: &Names<'_>) -> Result<Value, String> {
    if flag(file, "add_eos_token")? == Some(true) {
        return Err("it puts a token after every text (`tokenizer.ggml.add_eos_token`)".into());
    }
    // Llama 3's begins every prompt, and its files do not say so.
    if !flag(file, "add_bos_token")?.unwrap_or(split == "llama-bpe") {
        return Ok(Value::Null);
    }
    let Some((id, name)) = names.bos else {
        return Err("`tokenizer.ggml.add_bos_token` is set, `tokenizer.ggml.bos_token_id` is missing".into());
    };
    let special = json!({"SpecialToken": {"id": name, "type_id": 0}});
    let sequence = |name: &str, type_id: u32| json!({"Sequence": {"id": name, "type_id": type_id}});
    let second = json!({"SpecialToken": {"id": name, "type_id": 1}});
    Ok(json!({
        "type": "TemplateProcessing",
        "single": [special, sequence("A", 0)],
        "pair": [special, sequence("A", 0), second, sequence("B", 1)],
        "special_tokens": {name: {"id": name, "ids": [id], "tokens": [name]}},
    }))
}

/// Tokens with a role.
struct Names<'a> {
    bos: Option<(u64, &'a str)>,
    eos: Option<(u64, &'a str)>,
    unknown: Option<(u64, &'a str)>,
    padding: Option<(u64, &'a str)>,
}

impl<'a> Names<'a> {
    fn read(file: &GgufReader, tokens: &[&'a str]) -> Result<Names<'a>, String> {
        let token = |kind: &str| {
            let key = format!("tokenizer.ggml.{kind}_token_id");
            let Some(value) = file.value(&key) else { return Ok(None) };
            let token = value.as_u64().and_then(|id| Some((id, *tokens.get(usize::try_from(id).ok()?)?)));
            match token {
                Some(token) => Ok(Some(token)),
                None => Err(format!("`{key}` is `{value}`, expected one of its `{}` tokens", tokens.len())),
            }
        };
        Ok(Names {
            bos: token("bos")?,
            eos: token("eos")?,
            unknown: token("unknown")?,
            padding: token("padding")?,
        })
    }

    /// `tokenizer_config.json`
    fn config(&self, file: &GgufReader) -> Value {
        let mut config = Map::new();
        config.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
        config.insert("clean_up_tokenization_spaces".into(), false.into());
        let roles = [
            ("bos_token", self.bos),
            ("eos_token", self.eos),
            ("unk_token", self.unknown),
            ("pad_token", self.padding),
        ];
        for (role, token) in roles {
            if let Some((_, name)) = token {
                config.insert(role.into(), name.into());
            }
        }
        if let Some(length) = file.value("llama.context_length").and_then(GgufValue::as_u64) {
            config.insert("model_max_length".into(), length.into());
        }
        if let Some(GgufValue::Str(template)) = file.value("tokenizer.chat_template") {
            config.insert("chat_template".into(), template.into());
        }
        config.into()
    }
}

/// Merges as pairs, each of which the vocabulary has, with what it makes.
fn merges(lines: &[&str], ids: &HashMap<&str, usize>) -> Result<Vec<Value>, String> {
    let mut seen = HashSet::with_capacity(lines.len());
    let mut joined = String::new();
    let mut pairs = Vec::with_capacity(lines.len());
    for line in lines {
        let wrong = |problem: &str| format!("merge `{line}` {problem}");
        // Byte-level tokens have no spaces.
        let Some((left, right)) = line.split_once(' ').filter(|(_, right)| !right.contains(' ')) else {
            return Err(wrong("is not a pair of tokens"));
        };
        joined.clear();
        joined.extend([left, right]);
        if let Some(missing) = [left, right, &joined].into_iter().find(|token| !ids.contains_key(token)) {
            return Err(wrong(&format!("needs token `{missing}`, which is not there")));
        }
        if !seen.insert((left, right)) {
            return Err(wrong("is there twice"));
        }
        pairs.push(json!([left, right]));
    }
    Ok(pairs)
}

fn token_types(file: &GgufReader, num_tokens: usize) -> Result<Vec<u64>, String> {
    let key = "tokenizer.ggml.token_type";
    let Some(value) = file.value(key) else { return Ok(vec![NORMAL; num_tokens]) };
    let types = match value {
        GgufValue::Array(array) if array.len() == num_tokens => array.scalars(),
        _ => None,
    };
    let Some(types) = types else {
        return Err(format!("`{key}` is `{value}`, expected `{num_tokens}` numbers"));
    };
    types
        .map(|value| match value.as_u64() {
            Some(kind @ 1..=NUM_TYPES) => Ok(kind),
            _ => Err(format!("`{key}` holds `{value}`, expected 1 to {NUM_TYPES}")),
        })
        .collect()
}

fn text<'a>(file: &'a GgufReader, name: &str) -> Result<Option<&'a str>, String> {
    match file.value(&format!("tokenizer.ggml.{name}")) {
        None => Ok(None),
        Some(GgufValue::Str(text)) => Ok(Some(text)),
        Some(other) => Err(format!("`tokenizer.ggml.{name}` is `{other}`, expected text")),
    }
}

fn flag(file: &GgufReader, name: &str) -> Result<Option<bool>, String> {
    match file.value(&format!("tokenizer.ggml.{name}")) {
        None => Ok(None),
        Some(GgufValue::Bool(flag)) => Ok(Some(flag)),
        Some(other) => Err(format!("`tokenizer.ggml.{name}` is `{other}`, expected a boolean")),
    }
}

fn texts<'a>(file: &'a GgufReader, name: &str) -> Result<Vec<&'a str>, String> {
    let key = format!("tokenizer.ggml.{name}");
    match file.value(&key) {
        None => Err(format!("`{key}` is missing")),
        Some(GgufValue::Array(array)) if array.texts().is_some() => {
            Ok(array.texts().into_iter().flatten().collect())
        }
        Some(other) => Err(format!("`{key}` is `{other}`, expected a list of texts")),
    }
}
