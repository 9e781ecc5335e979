//! Values of a GGUF header: checked once when the file is opened, decoded from its bytes when they are asked for.

use std::fmt;

/// The type of a value, as the format numbers them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ValueType {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    Str,
    Array,
    U64,
    I64,
    F64,
}

impl ValueType {
    pub(super) fn from_id(id: u32) -> Option<ValueType> {
        use ValueType::*;
        let all = [U8, I8, U16, I16, U32, I32, F32, Bool, Str, Array, U64, I64, F64];
        all.get(usize::try_from(id).ok()?).copied()
    }

    /// Bytes of one value; of texts and arrays, of the shortest one.
    pub(super) fn min_bytes(self) -> usize {
        use ValueType::*;
        match self {
            U8 | I8 | Bool => 1,
            U16 | I16 => 2,
            U32 | I32 | F32 => 4,
            Str | U64 | I64 | F64 => 8,
            Array => 12,
        }
    }
}

/// One value.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum GgufValue<'a> {
    /// An unsigned whole number of any width.
    Unsigned(u64),
    /// A signed whole number of any width.
    Signed(i64),
    /// A number in single precision.
    F32(f32),
    /// A number in double precision.
    F64(f64),
    /// True or false.
    Bool(bool),
    /// Text.
    Str(&'a str),
    /// A list of values of one type.
    Array(GgufArray<'a>),
}

impl GgufValue<'_> {
    /// The value as a whole number from 0.
    pub fn as_u64(self) -> Option<u64> {
        match self {
            GgufValue::Unsigned(value) => Some(value),
            GgufValue::Signed(value) => value.try_into().ok(),
            _ => None,
        }
    }

    /// The value as a number. Single precision gives the number that its shortest decimal form names, which is what
    /// its author wrote: `1e-5`, not `9.999999747378752e-6`.
    pub fn as_f64(self) -> Option<f64> {
        match self {
            GgufValue::F32(value) => value.to_string().parse().ok(),
            GgufValue::F64(value) => Some(value),
            GgufValue::Unsigned(value) => Some(value as f64),
            GgufValue::Signed(value) => Some(value as f64),
            _ => None,
        }
    }
}

impl fmt::Display for GgufValue<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            GgufValue::Unsigned(value) => value.fmt(f),
            GgufValue::Signed(value) => value.fmt(f),
            GgufValue::F32(value) => value.fmt(f),
            GgufValue::F64(value) => value.fmt(f),
            GgufValue::Bool(value) => value.fmt(f),
            GgufValue::Str(text) => text.fmt(f),
            GgufValue::Array(array) => write!(f, "an array of {} values", array.len),
        }
    }
}

/// A list of values of one type.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GgufArray<'a> {
    pub(super) kind: ValueType,
    pub(super) len: usize,
    /// The elements as they are in the file.
    pub(super) bytes: &'a [u8],
}

impl<'a> GgufArray<'a> {
    /// How many values it has.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Its elements, if they are texts.
    pub fn texts(&self) -> Option<impl Iterator<Item = &'a str> + use<'a>> {
        (self.kind == ValueType::Str).then(|| {
            let mut rest = self.bytes;
            (0..self.len).map(move |_| match decode(ValueType::Str, &mut rest) {
                GgufValue::Str(text) => text,
                other => unreachable!("`{other}` was read as text"),
            })
        })
    }

    /// Its elements, if they are whole numbers or something else that is not text or list.
    pub fn scalars(&self) -> Option<impl Iterator<Item = GgufValue<'a>> + use<'a>> {
        let kind = self.kind;
        (!matches!(kind, ValueType::Str | ValueType::Array)).then(|| {
            let mut rest = self.bytes;
            (0..self.len).map(move |_| decode(kind, &mut rest))
        })
    }
}

/// Takes one value from the front of bytes that were checked when the file was opened.
pub(super) fn decode<'a>(kind: ValueType, bytes: &mut &'a [u8]) -> GgufValue<'a> {
    fn take<const N: usize>(bytes: &mut &[u8]) -> [u8; N] {
        let (value, rest) = bytes.split_first_chunk().expect("checked when the file was opened");
        *bytes = rest;
        *value
    }
    match kind {
        ValueType::U8 => GgufValue::Unsigned(u8::from_le_bytes(take(bytes)).into()),
        ValueType::U16 => GgufValue::Unsigned(u16::from_le_bytes(take(bytes)).into()),
        ValueType::U32 => GgufValue::Unsigned(u32::from_le_bytes(take(bytes)).into()),
        ValueType::U64 => GgufValue::Unsigned(u64::from_le_bytes(take(bytes))),
        ValueType::I8 => GgufValue::Signed(i8::from_le_bytes(take(bytes)).into()),
        ValueType::I16 => GgufValue::Signed(i16::from_le_bytes(take(bytes)).into()),
        ValueType::I32 => GgufValue::Signed(i32::from_le_bytes(take(bytes)).into()),
        ValueType::I64 => GgufValue::Signed(i64::from_le_bytes(take(bytes))),
        ValueType::F32 => GgufValue::F32(f32::from_le_bytes(take(bytes))),
        ValueType::F64 => GgufValue::F64(f64::from_le_bytes(take(bytes))),
        ValueType::Bool => GgufValue::Bool(take::<1>(bytes) == [1]),
        ValueType::Str => {
            let len = u64::from_le_bytes(take(bytes)) as usize;
            let (text, rest) = bytes.split_at(len);
            *bytes = rest;
            GgufValue::Str(std::str::from_utf8(text).expect("checked when the file was opened"))
        }
        ValueType::Array => {
            let kind = u32::from_le_bytes(take(bytes));
            let kind = ValueType::from_id(kind).expect("checked when the file was opened");
            let len = u64::from_le_bytes(take(bytes)) as usize;
            // The list ends where the value ends: lists within lists are never taken apart.
            GgufValue::Array(GgufArray { kind, len, bytes: std::mem::take(bytes) })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn single_precision_reads_as_it_was_written() {
        assert_eq!(GgufValue::F32(1e-5).as_f64(), Some(1e-5));
        assert_eq!(GgufValue::F32(500_000.0).as_f64(), Some(500_000.0));
        assert!(GgufValue::F32(f32::NAN).as_f64().is_some_and(f64::is_nan));
        assert_eq!(GgufValue::Signed(-1).as_u64(), None);
    }
}
