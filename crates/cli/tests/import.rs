//! `shardwise import` as people and scripts meet it.

// Helpers of tests may unwrap as tests may.
#![allow(clippy::unwrap_used)]

#[path = "../../checkpoint/tests/gguf/file.rs"]
mod file;

use std::path::Path;
use std::process::{Command, Output};

use file::{Gguf, tiny_llama};
use shardwise_data::Tokenizer;
use tempfile::TempDir;

fn import(folder: &Path, file: &Gguf, args: &[&str]) -> Output {
    std::fs::write(folder.join("m.gguf"), file.bytes()).unwrap();
    run(folder, &[&["m.gguf"], args].concat())
}

fn run(folder: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_shardwise"));
    command.arg("import").args(args).current_dir(folder).output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[test]
fn a_model_is_imported_with_a_tokenizer_that_splits_as_the_file_says() {
    let folder = TempDir::new().unwrap();
    let output = import(folder.path(), &tiny_llama(), &["model", "--dtype", "fp32"]);
    assert_eq!((stderr(&output).as_str(), output.status.code()), ("", Some(0)));
    let said = String::from_utf8(output.stdout).unwrap();
    assert_eq!(
        said,
        "imported into `model`: llama, 26,976 parameters in 20 tensors, fp32, tokenizer of 262 tokens\n"
    );

    let model = folder.path().join("model");
    let tokenizer = Tokenizer::load(model.join("tokenizer.json")).unwrap();
    let id = |text: &str| file::tokens().iter().position(|token| token == text).unwrap() as u32;
    assert_eq!((tokenizer.vocab_size(), tokenizer.end_of_text()), (262, Some(0)));
    assert_eq!(tokenizer.encode("hello").unwrap(), [id("hello")]);
    assert_eq!(tokenizer.encode("hell 42").unwrap(), ["hell", "Ġ", "4", "2"].map(id));
    assert_eq!(tokenizer.encode("<|im_start|>he<|endoftext|>").unwrap(), [1, id("he"), 0]);
    let text = "hello, wörld!\n\t 日本語 🎉 it's 3.14  ";
    assert_eq!(tokenizer.decode(&tokenizer.encode(text).unwrap()).unwrap(), text);
    assert_eq!(tokenizer.encode_prompt("he").unwrap(), [id("he")]);
}

#[test]
fn every_known_way_to_split_text_makes_a_tokenizer_that_loads() {
    // Digits alone, in threes, or as they come.
    for (pre, num_tokens) in
        [("smollm", 5), ("starcoder", 5), ("refact", 5), ("llama-bpe", 2), ("default", 2), ("gpt-2", 1)]
    {
        let folder = TempDir::new().unwrap();
        let mut tokens = file::tokens();
        let digits = ["12", "34", "123", "1234", "12345", "45"].map(str::to_owned);
        tokens.extend(digits);
        let merges = ["1 2", "3 4", "12 3", "12 34", "1234 5", "4 5"].map(str::to_owned);
        let file = tiny_llama().text("tokenizer.ggml.pre", pre);
        let vocab = tokens.len();
        let file = file
            .texts("tokenizer.ggml.tokens", &tokens)
            .texts("tokenizer.ggml.merges", &merges)
            .without("tokenizer.ggml.token_type")
            .without("token_embd.weight")
            .tensor("token_embd.weight", &[vocab, file::HIDDEN], file::Q8_0, vec![0; vocab * 34]);
        let output = import(folder.path(), &file, &["model"]);
        assert_eq!(stderr(&output), "", "{pre}");
        let tokenizer = Tokenizer::load(folder.path().join("model/tokenizer.json")).unwrap();
        let encoded = tokenizer.encode("12345").unwrap();
        assert_eq!(encoded.len(), num_tokens, "{pre}: {encoded:?}");
        assert_eq!(tokenizer.decode(&encoded).unwrap(), "12345");
        // Llama 3's prompts begin with a special token.
        let begins_with_bos = tokenizer.encode_prompt("1").unwrap().first() == Some(&1);
        assert_eq!(begins_with_bos, pre == "llama-bpe", "{pre}");
    }
}

#[test]
fn mistakes_are_usage_errors_with_a_hint() {
    let folder = TempDir::new().unwrap();
    let folder = folder.path();
    let refused = |output: Output, expected: &str| {
        let said = stderr(&output);
        assert!(said.starts_with(expected), "{said}");
        assert!(said.contains("\nhint: "), "{said}");
        assert_eq!(output.status.code(), Some(2), "{said}");
    };
    let unknown = tiny_llama().text("tokenizer.ggml.pre", "tekken");
    let expected =
        "error: cannot use `m.gguf`: its tokenizer cannot be imported: its way to split text is `tekken`";
    refused(import(folder, &unknown, &["model"]), expected);
    assert!(!folder.join("model").exists());

    let output = import(folder, &unknown, &["model", "--no-tokenizer"]);
    assert_eq!((stderr(&output).as_str(), output.status.code()), ("", Some(0)));
    assert!(!folder.join("model/tokenizer.json").exists());
    refused(import(folder, &tiny_llama(), &["model"]), "error: `model` holds files already\nhint: ");
    assert_eq!(import(folder, &tiny_llama(), &["model", "--overwrite"]).status.code(), Some(0));
    assert!(folder.join("model/tokenizer.json").exists());

    let integers = tiny_llama().without("output_norm.weight");
    let integers = integers.tensor("output_norm.weight", &[file::HIDDEN], 26, vec![0; 128]);
    refused(
        import(folder, &integers, &["x"]),
        "error: cannot use `m.gguf`: tensor `output_norm.weight` has type `I32`",
    );
}

#[test]
fn what_is_no_model_is_refused() {
    let folder = TempDir::new().unwrap();
    let folder = folder.path();
    let too_many_heads = tiny_llama().u32("llama.attention.head_count_kv", 3);
    for (output, expected) in [
        (run(folder, &["missing.gguf", "x"]), "error: could not open `missing.gguf`: No such file"),
        (
            import(folder, &Gguf { version: 9, ..Gguf::new() }, &["x"]),
            "error: cannot use `m.gguf`: it is GGUF version `9`, expected 2 or 3\nhint: ",
        ),
        (
            import(folder, &Gguf::new(), &["x"]),
            "error: cannot use `m.gguf`: key `general.architecture` is missing\nhint: ",
        ),
        (
            import(folder, &too_many_heads, &["x"]),
            "error: tensor `blk.0.attn_k.weight` in `m.gguf`: expected shape `[48, 32]`, got `[16, 32]`\nhint: ",
        ),
    ] {
        let said = stderr(&output);
        assert!(said.starts_with(expected), "{said}\n{expected}");
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(!folder.join("x").exists(), "{said}");
    }
}
