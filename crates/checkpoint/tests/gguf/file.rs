//! Writes small GGUF files, as far from the reader's code as the format allows.
#![allow(dead_code)] // each test program uses a part

/// A file to be.
#[derive(Debug, Clone)]
pub struct Gguf {
    pub version: u32,
    pub alignment: usize,
    /// Keys with the type and the bytes of their values.
    pub values: Vec<(String, u32, Vec<u8>)>,
    pub tensors: Vec<Tensor>,
}

/// A tensor to be.
#[derive(Debug, Clone)]
pub struct Tensor {
    pub name: String,
    /// The size that varies fastest comes first, as in the file.
    pub sizes: Vec<u64>,
    pub type_id: u32,
    pub data: Vec<u8>,
    /// Instead of the next free place.
    pub offset: Option<u64>,
}

pub const F32: u32 = 0;
pub const Q4_1: u32 = 3;
pub const Q8_0: u32 = 8;

fn text_bytes(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

impl Gguf {
    pub fn new() -> Self {
        Gguf { version: 3, alignment: 32, values: Vec::new(), tensors: Vec::new() }
    }

    fn with(mut self, key: &str, type_id: u32, bytes: Vec<u8>) -> Self {
        self.values.retain(|(other, ..)| other != key);
        self.values.push((key.to_owned(), type_id, bytes));
        self
    }

    pub fn u32(self, key: &str, value: u32) -> Self {
        self.with(key, 4, value.to_le_bytes().to_vec())
    }

    pub fn f32(self, key: &str, value: f32) -> Self {
        self.with(key, 6, value.to_le_bytes().to_vec())
    }

    pub fn bool(self, key: &str, value: bool) -> Self {
        self.with(key, 7, vec![value.into()])
    }

    pub fn text(self, key: &str, value: &str) -> Self {
        self.with(key, 8, text_bytes(value))
    }

    pub fn texts(self, key: &str, values: &[String]) -> Self {
        let items: Vec<u8> = values.iter().flat_map(|value| text_bytes(value)).collect();
        self.array(key, 8, values.len(), items)
    }

    pub fn i32s(self, key: &str, values: &[i32]) -> Self {
        let items = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.array(key, 5, values.len(), items)
    }

    pub fn array(self, key: &str, type_id: u32, len: usize, items: Vec<u8>) -> Self {
        let head = [&type_id.to_le_bytes()[..], &(len as u64).to_le_bytes()].concat();
        self.with(key, 9, [head, items].concat())
    }

    pub fn without(mut self, key: &str) -> Self {
        self.values.retain(|(other, ..)| other != key);
        self.tensors.retain(|tensor| tensor.name != key);
        self
    }

    /// `shape` is row-major.
    pub fn tensor(mut self, name: &str, shape: &[usize], type_id: u32, data: Vec<u8>) -> Self {
        let sizes = shape.iter().rev().map(|&size| size as u64).collect();
        self.tensors.push(Tensor { name: name.to_owned(), sizes, type_id, data, offset: None });
        self
    }

    pub fn tensor_f32(self, name: &str, shape: &[usize], values: &[f32]) -> Self {
        let data = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.tensor(name, shape, F32, data)
    }

    pub fn header(&self) -> Vec<u8> {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(self.version.to_le_bytes());
        bytes.extend((self.tensors.len() as u64).to_le_bytes());
        bytes.extend((self.values.len() as u64).to_le_bytes());
        for (key, type_id, value) in &self.values {
            bytes.extend(text_bytes(key));
            bytes.extend(type_id.to_le_bytes());
            bytes.extend(value);
        }
        let mut free = 0;
        for tensor in &self.tensors {
            bytes.extend(text_bytes(&tensor.name));
            bytes.extend((tensor.sizes.len() as u32).to_le_bytes());
            tensor.sizes.iter().for_each(|size| bytes.extend(size.to_le_bytes()));
            bytes.extend(tensor.type_id.to_le_bytes());
            bytes.extend(tensor.offset.unwrap_or(free).to_le_bytes());
            free += tensor.data.len().next_multiple_of(self.alignment) as u64;
        }
        bytes
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.header();
        for tensor in &self.tensors {
            bytes.resize(bytes.len().next_multiple_of(self.alignment), 0);
            bytes.extend(&tensor.data);
        }
        bytes
    }
}

/// Sizes of [`tiny_llama`].
pub const HIDDEN: usize = 32;
pub const HEADS: usize = 2;
pub const HEAD_DIM: usize = HIDDEN / HEADS;
pub const FF: usize = 64;
pub const LAYERS: usize = 2;

/// Element `i` of a tensor: different everywhere.
pub fn element(name: &str, i: usize) -> f32 {
    name.bytes().map(f32::from).sum::<f32>() + i as f32 / 64.0
}

/// A matrix in the order of Hugging Face's files.
pub fn matrix(name: &str, numel: usize) -> Vec<f32> {
    (0..numel).map(|i| element(name, i)).collect()
}

/// A byte as byte-level BPE writes it.
fn byte_char(byte: u8) -> char {
    let plain = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    match plain(byte) {
        true => byte.into(),
        false => char::from_u32(256 + (0..byte).filter(|&b| !plain(b)).count() as u32).unwrap(),
    }
}

/// Two special tokens, all bytes, four merges.
pub fn tokens() -> Vec<String> {
    let mut tokens = vec!["<|endoftext|>".to_owned(), "<|im_start|>".to_owned()];
    tokens.extend((0..=255).map(|byte| byte_char(byte).to_string()));
    tokens.extend(["he", "ll", "hell", "hello"].map(str::to_owned));
    tokens
}

/// A whole model: q, k and the norms in F32, v in Q4_1, the embedding in Q8_0 and tied.
pub fn tiny_llama() -> Gguf {
    let tokens = tokens();
    let vocab = tokens.len();
    let mut types = vec![1; vocab];
    types[..2].fill(3);
    let merges = ["h e", "l l", "he ll", "hell o"].map(str::to_owned);
    let mut file = Gguf::new()
        .text("general.architecture", "llama")
        .u32("llama.block_count", LAYERS as u32)
        .u32("llama.context_length", 128)
        .u32("llama.embedding_length", HIDDEN as u32)
        .u32("llama.feed_forward_length", FF as u32)
        .u32("llama.attention.head_count", HEADS as u32)
        .u32("llama.attention.head_count_kv", 1)
        .u32("llama.rope.dimension_count", HEAD_DIM as u32)
        .f32("llama.rope.freq_base", 1e5)
        .f32("llama.attention.layer_norm_rms_epsilon", 1e-5)
        .text("tokenizer.ggml.model", "gpt2")
        .text("tokenizer.ggml.pre", "smollm")
        .texts("tokenizer.ggml.tokens", &tokens)
        .texts("tokenizer.ggml.merges", &merges)
        .i32s("tokenizer.ggml.token_type", &types)
        .u32("tokenizer.ggml.bos_token_id", 1)
        .u32("tokenizer.ggml.eos_token_id", 0)
        .text("tokenizer.chat_template", "{{ messages }}")
        // Row `r` holds `q - 4` for q from 0 to 31, times `r / 4`.
        .tensor("token_embd.weight", &[vocab, HIDDEN], Q8_0, {
            let row = |row: usize| {
                let scale = half::f16::from_f32(row as f32 / 4.0).to_le_bytes();
                scale.into_iter().chain((0..32).map(|q| (q - 4_i8) as u8)).collect::<Vec<u8>>()
            };
            (0..vocab).flat_map(row).collect()
        });
    for layer in 0..LAYERS {
        let name = |part: &str| format!("blk.{layer}.{part}.weight");
        let plain = |file: Gguf, part: &str, shape: &[usize]| {
            let numel = shape.iter().product();
            file.tensor_f32(&name(part), shape, &matrix(&name(part), numel))
        };
        file = plain(file, "attn_norm", &[HIDDEN]);
        file = plain(file, "ffn_norm", &[HIDDEN]);
        for (part, heads) in [("attn_q", HEADS), ("attn_k", 1)] {
            let numel = heads * HEAD_DIM * HIDDEN;
            file = file.tensor_f32(
                &name(part),
                &[heads * HEAD_DIM, HIDDEN],
                &interleave(&matrix(&name(part), numel), heads),
            );
        }
        // Each row is a block: 2 q + 1 for q of 0, 1, .. 15, 15, 14, .. 0.
        let block: Vec<u8> = [half::f16::from_f32(2.0), half::f16::from_f32(1.0)]
            .into_iter()
            .flat_map(half::f16::to_le_bytes)
            .chain((0..16).map(|q| q | (15 - q) << 4))
            .collect();
        file = file.tensor(&name("attn_v"), &[HEAD_DIM, HIDDEN], Q4_1, block.repeat(HEAD_DIM));
        file = plain(file, "attn_output", &[HIDDEN, HIDDEN]);
        file = plain(file, "ffn_gate", &[FF, HIDDEN]);
        file = plain(file, "ffn_up", &[FF, HIDDEN]);
        file = plain(file, "ffn_down", &[HIDDEN, FF]);
    }
    file.tensor_f32("output_norm.weight", &[HIDDEN], &matrix("output_norm.weight", HIDDEN))
}

/// What llama.cpp's converter does to q and k: `[heads, 2, half, width]` to `[heads, half, 2, width]`.
fn interleave(rows: &[f32], heads: usize) -> Vec<f32> {
    let width = HIDDEN;
    let half = rows.len() / heads / width / 2;
    let mut out = Vec::new();
    for head in 0..heads {
        for i in 0..half {
            for part in 0..2 {
                let row = (head * 2 + part) * half + i;
                out.extend(&rows[row * width..][..width]);
            }
        }
    }
    out
}
