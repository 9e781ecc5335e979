//! Checksums of a file's chunks.
//!
//! Each chunk of fixed size has a CRC-32C of its own, so a rank that reads a part of a file verifies the chunks it
//! touches and no more. All bytes of a file count, its header too.

use serde::{Deserialize, Deserializer, Serializer};

/// CRC-32C of each chunk of a stream.
#[derive(Debug)]
pub(crate) struct Checksums {
    chunk_bytes: usize,
    finished: Vec<u32>,
    current: u32,
    filled: usize,
}

impl Checksums {
    pub(crate) fn new(chunk_bytes: usize) -> Self {
        Checksums { chunk_bytes, finished: Vec::new(), current: 0, filled: 0 }
    }

    pub(crate) fn update(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let (now, rest) = bytes.split_at(bytes.len().min(self.chunk_bytes - self.filled));
            self.current = crc32c::crc32c_append(self.current, now);
            self.filled += now.len();
            bytes = rest;
            if self.filled == self.chunk_bytes {
                self.finished.push(std::mem::take(&mut self.current));
                self.filled = 0;
            }
        }
    }

    /// The last chunk may be shorter than the others.
    pub(crate) fn finish(mut self) -> Vec<u32> {
        if self.filled > 0 {
            self.finished.push(self.current);
        }
        self.finished
    }

    pub(crate) fn of(bytes: &[u8], chunk_bytes: usize) -> Vec<u32> {
        bytes.chunks(chunk_bytes).map(crc32c::crc32c).collect()
    }
}

/// Checksums as one text, eight hexadecimal digits for each.
pub(crate) mod hex {
    use super::*;

    pub(crate) fn serialize<S: Serializer>(checksums: &[u32], serializer: S) -> Result<S::Ok, S::Error> {
        let text: String = checksums.iter().map(|checksum| format!("{checksum:08x}")).collect();
        serializer.serialize_str(&text)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u32>, D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(deserializer)?;
        parse(&text).ok_or_else(|| serde::de::Error::custom("checksums are not groups of 8 lower hex digits"))
    }

    fn parse(text: &str) -> Option<Vec<u32>> {
        let digit = |byte: u8| match byte {
            b'0'..=b'9' => Some(u32::from(byte - b'0')),
            b'a'..=b'f' => Some(u32::from(byte - b'a') + 10),
            _ => None,
        };
        let groups = text.as_bytes().chunks(8);
        groups
            .map(|group| {
                (group.len() == 8)
                    .then(|| group.iter().try_fold(0, |value, &byte| Some(value << 4 | digit(byte)?)))?
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_has_the_checksums_of_its_chunks() {
        let bytes: Vec<u8> = (0..1000u32).map(|i| (i * 7) as u8).collect();
        for (chunk_bytes, pieces) in [(64, 3), (64, 64), (64, 200), (1000, 7), (4096, 1000)] {
            let mut checksums = Checksums::new(chunk_bytes);
            bytes.chunks(pieces).for_each(|piece| checksums.update(piece));
            assert_eq!(checksums.finish(), Checksums::of(&bytes, chunk_bytes));
        }
        assert_eq!(Checksums::new(64).finish(), [0u32; 0]);
    }

    #[test]
    fn text_and_back() {
        #[derive(Debug, PartialEq, serde::Serialize, Deserialize)]
        struct Text(#[serde(with = "hex")] Vec<u32>);
        let text = Text(vec![0, u32::MAX, 0x1234_abcd]);
        let json = serde_json::to_string(&text).unwrap();
        assert_eq!(json, r#""00000000ffffffff1234abcd""#);
        assert_eq!(serde_json::from_str::<Text>(&json).unwrap(), text);
        for bad in [r#""0000000""#, r#""0000000G""#, r#""0000000A""#, r#""+0000000""#] {
            assert!(serde_json::from_str::<Text>(bad).is_err(), "{bad}");
        }
    }
}
