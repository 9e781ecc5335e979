//! What can be wrong with a GGUF file, or with what it asks for.

use crate::gguf::GgmlType;

/// Why a GGUF file is refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)] // each field is named in its message
pub enum GgufProblem {
    /// Another format.
    #[error("it does not begin with `GGUF`")]
    NotGguf,
    /// A version whose layout is not known here.
    #[error("it is GGUF version `{version}`, expected 2 or 3")]
    Version { version: u32 },
    /// Written on a big-endian machine.
    #[error("it is big-endian, expected a little-endian GGUF file")]
    BigEndian,
    /// The file ends inside its header.
    #[error(
        "its header ends too early: {what} at byte `{at}` needs `{needed}` more, the file has `{file_bytes}` in all (truncated?)"
    )]
    Truncated { what: &'static str, at: u64, needed: u64, file_bytes: u64 },
    /// A header that nobody means.
    #[error("its header is larger than `{limit}` bytes")]
    HeaderTooLarge { limit: u64 },
    /// A count that the rest of the file cannot hold.
    #[error("it claims `{count}` {what}, more than the file can hold")]
    Count { what: &'static str, count: u64 },
    /// An unknown type of a value.
    #[error("key `{key}` has a value of type `{id}`, expected 0 to 12")]
    ValueType { key: String, id: u32 },
    /// Arrays of arrays of arrays.
    #[error("key `{key}` has arrays nested deeper than `{limit}`")]
    Nesting { key: String, limit: usize },
    /// Text that is not UTF-8.
    #[error("{what} at byte `{at}` is not UTF-8")]
    Utf8 { what: &'static str, at: u64 },
    /// A boolean that is neither.
    #[error("key `{key}` has a boolean of `{byte}`, expected 0 or 1")]
    Bool { key: String, byte: u8 },
    /// One key, two values.
    #[error("key `{key}` is there twice")]
    DuplicateKey { key: String },
    /// One name, two tensors.
    #[error("tensor `{name}` is there twice")]
    DuplicateTensor { name: String },
    /// More dimensions than the format has.
    #[error("tensor `{name}` has `{num_dims}` dimensions, expected at most 4")]
    Dimensions { name: String, num_dims: u32 },
    /// No elements, more than can be addressed, or rows that are no whole blocks.
    #[error(
        "tensor `{name}`: shape `{shape:?}` of `{ggml_type}` is not a whole, addressable number of blocks"
    )]
    BadShape { name: String, shape: Vec<u64>, ggml_type: GgmlType },
    /// A number that is no tensor type.
    #[error("tensor `{name}` has type `{id}`, which no known version of the format defines")]
    TensorType { name: String, id: u32 },
    /// Data that does not begin where the format demands.
    #[error("tensor `{name}` begins at `{offset}`, expected a multiple of `{alignment}`")]
    Misaligned { name: String, offset: u64, alignment: u64 },
    /// A tensor's bytes lie outside of the file.
    #[error(
        "tensor `{name}`: `{num_bytes}` bytes at `{offset}` lie outside of the `{data_bytes}` bytes of data (truncated?)"
    )]
    OutOfFile { name: String, offset: u64, num_bytes: u64, data_bytes: u64 },
    /// Two tensors share bytes.
    #[error("tensor `{name}` begins at `{offset}`, inside of tensor `{other}`")]
    Overlap { name: String, offset: u64, other: String },
    /// A tensor type that cannot be turned into numbers here.
    #[error("tensor `{name}` has type `{ggml_type}`, expected one of {}", GgmlType::readable_names())]
    UnsupportedType { name: String, ggml_type: GgmlType },
    /// A key that the model cannot do without.
    #[error("key `{key}` is missing")]
    MissingKey { key: String },
    /// A value that cannot be honoured.
    #[error("key `{key}` is `{got}`, expected {expected}")]
    WrongValue { key: String, got: String, expected: String },
    /// A tensor that the model has no place for.
    #[error("tensor `{name}` has no place in a `llama` model of this shape")]
    StrayTensor { name: String },
    /// A tokenizer that cannot be written as a `tokenizer.json` with certainty.
    #[error("its tokenizer cannot be imported: {reason}")]
    Tokenizer { reason: String },
}
