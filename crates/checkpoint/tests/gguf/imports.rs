//! A small model whose every number is known, imported and read back.

use std::path::Path;

use serde_json::{Value, json};
use shardwise_checkpoint::gguf::{GgufReader, ImportOptions, Imported, TokenizerImport, import};
use shardwise_checkpoint::{CheckpointError, FileDType, HfReader};
use tempfile::TempDir;

use crate::file::{FF, Gguf, HEAD_DIM, HEADS, HIDDEN, LAYERS, matrix, tiny_llama, tokens};

const OPTIONS: ImportOptions =
    ImportOptions { dtype: FileDType::F32, max_shard_bytes: 1 << 30, tokenizer: TokenizerImport::Needed };

fn run(file: &Gguf, dir: &Path, options: &ImportOptions) -> Result<Imported, CheckpointError> {
    let source = TempDir::new().unwrap();
    let path = source.path().join("tiny.gguf");
    std::fs::write(&path, file.bytes()).unwrap();
    import(&GgufReader::open(path)?, dir, options, |_| Ok(()))
}

fn json_of(dir: &Path, name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(dir.join(name)).unwrap()).unwrap()
}

/// What is wrong with a file, and that nothing was written.
fn refused(file: &Gguf) -> String {
    let dir = TempDir::new().unwrap();
    let error = run(file, dir.path(), &OPTIONS).unwrap_err();
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "{error}");
    match error {
        CheckpointError::Gguf { problem, .. } => problem.to_string(),
        other => other.to_string(),
    }
}

#[test]
fn every_tensor_arrives_and_heads_are_put_in_order() {
    let dir = TempDir::new().unwrap();
    let imported = run(&tiny_llama(), dir.path(), &OPTIONS).unwrap();
    let reader = HfReader::open(dir.path()).unwrap();
    let mut num_tensors = 0;
    let mut same = |hf: &str, shape: &[usize], expected: &[f32]| {
        assert_eq!(reader.info(hf).unwrap().shape, shape, "{hf}");
        assert!(reader.read_f32(hf).unwrap() == expected, "{hf}");
        num_tensors += 1;
    };
    let vocab = tokens().len();
    let embedding: Vec<f32> =
        (0..vocab).flat_map(|row| (0..32).map(move |q| row as f32 / 4.0 * (q as f32 - 4.0))).collect();
    same("model.embed_tokens.weight", &[vocab, HIDDEN], &embedding);
    let v_row: Vec<f32> = (0..16).chain((0..16).rev()).map(|q| 2.0 * q as f32 + 1.0).collect();
    for layer in 0..LAYERS {
        for (gguf, hf, shape) in [
            ("attn_norm", "input_layernorm", &[HIDDEN][..]),
            ("ffn_norm", "post_attention_layernorm", &[HIDDEN]),
            ("attn_q", "self_attn.q_proj", &[HEADS * HEAD_DIM, HIDDEN]),
            ("attn_k", "self_attn.k_proj", &[HEAD_DIM, HIDDEN]),
            ("attn_output", "self_attn.o_proj", &[HIDDEN, HIDDEN]),
            ("ffn_gate", "mlp.gate_proj", &[FF, HIDDEN]),
            ("ffn_up", "mlp.up_proj", &[FF, HIDDEN]),
            ("ffn_down", "mlp.down_proj", &[HIDDEN, FF]),
        ] {
            let expected = matrix(&format!("blk.{layer}.{gguf}.weight"), shape.iter().product());
            same(&format!("model.layers.{layer}.{hf}.weight"), shape, &expected);
        }
        let v = format!("model.layers.{layer}.self_attn.v_proj.weight");
        same(&v, &[HEAD_DIM, HIDDEN], &v_row.repeat(HEAD_DIM));
    }
    same("model.norm.weight", &[HIDDEN], &matrix("output_norm.weight", HIDDEN));
    assert_eq!((reader.tensors().len(), imported.num_tensors), (num_tensors, num_tensors));
    assert_eq!(imported.num_params, reader.tensors().iter().map(|tensor| tensor.numel()).sum::<usize>());
}

#[test]
fn the_configuration_says_what_the_keys_say() {
    let dir = TempDir::new().unwrap();
    run(&tiny_llama(), dir.path(), &OPTIONS).unwrap();
    let config = json_of(dir.path(), "config.json");
    let expected = json!({
        "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "head_dim": 16,
        "hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.02, "intermediate_size": 64,
        "max_position_embeddings": 128, "mlp_bias": false, "model_type": "llama", "num_attention_heads": 2,
        "num_hidden_layers": 2, "num_key_value_heads": 1, "pretraining_tp": 1, "rms_norm_eps": 1e-5,
        "rope_scaling": null, "rope_theta": 1e5, "tie_word_embeddings": true, "use_cache": true, "vocab_size": 262,
        "torch_dtype": "float32", "bos_token_id": 1, "eos_token_id": 0,
    });
    assert_eq!(config, expected);
    let tokenizer = json_of(dir.path(), "tokenizer_config.json");
    assert_eq!(
        (&tokenizer["bos_token"], &tokenizer["eos_token"]),
        (&json!("<|im_start|>"), &json!("<|endoftext|>"))
    );
    assert_eq!(tokenizer["chat_template"], "{{ messages }}");
}

#[test]
fn an_untied_head_and_biases_come_along() {
    let dir = TempDir::new().unwrap();
    let vocab = tokens().len();
    let mut file =
        tiny_llama().tensor_f32("output.weight", &[vocab, HIDDEN], &matrix("head", vocab * HIDDEN));
    // Rows of one element change places like rows of many.
    let k: Vec<f32> = (0..HEAD_DIM).map(|i| (i % 2 * HEAD_DIM / 2 + i / 2) as f32).collect();
    for layer in 0..LAYERS {
        for (part, bias) in
            [("q", k.repeat(2)), ("k", k.clone()), ("v", k.clone()), ("output", vec![1.0; HIDDEN])]
        {
            file = file.tensor_f32(&format!("blk.{layer}.attn_{part}.bias"), &[bias.len()], &bias);
        }
    }
    run(&file, dir.path(), &OPTIONS).unwrap();
    let reader = HfReader::open(dir.path()).unwrap();
    assert!(reader.read_f32("lm_head.weight").unwrap() == matrix("head", vocab * HIDDEN));
    let in_order: Vec<f32> = (0..HEAD_DIM).map(|i| i as f32).collect();
    assert_eq!(reader.read_f32("model.layers.1.self_attn.k_proj.bias").unwrap(), in_order);
    let config = json_of(dir.path(), "config.json");
    assert_eq!((&config["tie_word_embeddings"], &config["attention_bias"]), (&json!(false), &json!(true)));
}

#[test]
fn types_and_shards_are_as_asked() {
    let dir = TempDir::new().unwrap();
    let options = ImportOptions {
        dtype: FileDType::Bf16,
        max_shard_bytes: 10_000,
        tokenizer: TokenizerImport::LeaveOut,
    };
    run(&tiny_llama().without("tokenizer.ggml.model"), dir.path(), &options).unwrap();
    let reader = HfReader::open(dir.path()).unwrap();
    assert!(reader.tensors().iter().all(|tensor| tensor.dtype == FileDType::Bf16));
    assert!(dir.path().join("model.safetensors.index.json").exists());
    assert!(!dir.path().join("tokenizer.json").exists());
    assert_eq!(json_of(dir.path(), "config.json")["torch_dtype"], "bfloat16");

    let large = tiny_llama().without("output_norm.weight").tensor_f32(
        "output_norm.weight",
        &[HIDDEN],
        &[1e6; HIDDEN],
    );
    let fp16 = ImportOptions { dtype: FileDType::F16, ..OPTIONS };
    let empty = TempDir::new().unwrap();
    let error = run(&large, empty.path(), &fp16).unwrap_err();
    assert!(
        matches!(&error, CheckpointError::Overflow { name, .. } if name == "model.norm.weight"),
        "{error}"
    );
    assert_eq!(std::fs::read_dir(empty.path()).unwrap().count(), 0);
}

#[test]
fn models_that_cannot_be_honoured_are_refused_by_name() {
    let tiny = tiny_llama;
    for (file, expected) in [
        (
            tiny().text("general.architecture", "mamba"),
            "key `general.architecture` is `mamba`, expected `llama`",
        ),
        (tiny().without("llama.block_count"), "key `llama.block_count` is missing"),
        (tiny().u32("llama.block_count", 1), "tensor `blk.1.attn_norm.weight` has no place"),
        (tiny().u32("llama.block_count", 3), "no tensor `blk.2.attn_norm.weight`"),
        (tiny().u32("llama.block_count", u32::MAX), "expected at most the number of tensors"),
        (tiny().u32("llama.expert_count", 8), "mixtures of experts are not supported"),
        (tiny().text("llama.rope.scaling.type", "yarn"), "key `llama.rope.scaling.type` is `yarn`"),
        (tiny().u32("llama.rope.dimension_count", 8), "expected the width of a head, 16"),
        (tiny().u32("llama.attention.head_count", 0), "key `llama.attention.head_count` is `0`"),
        (
            tiny().i32s("llama.attention.head_count", &[2, 2]),
            "is `an array of 2 values`, expected a whole number",
        ),
        (tiny().f32("llama.rope.freq_base", f32::NAN), "key `llama.rope.freq_base` is `NaN`"),
        (tiny().u32("llama.feed_forward_length", 32), "expected shape `[32, 32]`, got `[64, 32]`"),
        (tiny().tensor_f32("rope_freqs.weight", &[8], &[1.0; 8]), "tensor `rope_freqs.weight` has no place"),
        (
            tiny().without("output_norm.weight").tensor("output_norm.weight", &[HIDDEN], 26, vec![0; 128]),
            "tensor `output_norm.weight` has type `I32`, expected one of `F32`",
        ),
    ] {
        let said = refused(&file);
        assert!(said.contains(expected), "{said}\n{expected}");
    }
}

#[test]
fn tokenizers_that_cannot_be_honoured_are_refused_by_name() {
    let tiny = tiny_llama;
    let with_token = |token: &str| {
        let mut tokens = tokens();
        tokens[5] = token.into();
        tiny().texts("tokenizer.ggml.tokens", &tokens)
    };
    for (file, expected) in [
        (
            tiny().text("tokenizer.ggml.model", "llama"),
            "its kind is `llama`, expected `gpt2` (byte-level BPE)",
        ),
        (tiny().without("tokenizer.ggml.model"), "there is none in the file"),
        (
            tiny().text("tokenizer.ggml.pre", "tekken"),
            "its way to split text is `tekken`, expected one of `default`, `gpt-2`, `llama-bpe`, `refact`, `smollm`, \
             `starcoder`",
        ),
        (with_token("<|endoftext|>"), "token `<|endoftext|>` is there twice"),
        (
            with_token("more").texts("tokenizer.ggml.merges", &["h q2".into()]),
            "merge `h q2` needs token `q2`",
        ),
        (tiny().texts("tokenizer.ggml.merges", &["h e".into(), "h e".into()]), "merge `h e` is there twice"),
        (tiny().texts("tokenizer.ggml.merges", &["he".into()]), "merge `he` is not a pair of tokens"),
        (tiny().i32s("tokenizer.ggml.token_type", &[1]), "expected `262` numbers"),
        (tiny().i32s("tokenizer.ggml.token_type", &[9; 262]), "holds `9`, expected 1 to 6"),
        (tiny().u32("tokenizer.ggml.eos_token_id", 262), "is `262`, expected one of its `262` tokens"),
        (tiny().bool("tokenizer.ggml.add_eos_token", true), "it puts a token after every text"),
    ] {
        let said = refused(&file);
        assert!(said.starts_with("its tokenizer cannot be imported: ") && said.contains(expected), "{said}");
    }
}
