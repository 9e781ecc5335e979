//! How a language model's head is cut into chunks of rows.
//!
//! The scores of all rows over the vocabulary are often the largest tensor of a step. The head's gradients are known as soon
//! as a row's scores are, so it takes some rows at a time: scores, loss, gradients, and the same memory for the next rows.
//! The gradient of the weight is a sum over the chunks; where weights have 16 bits it is summed in fp32, which costs memory
//! of its own. So rows are cut only where that is the lesser cost.

use crate::Bytes;

/// Scores of this size are made at a time: well beyond any cache, so that matrix products are as fast as whole, and small
/// beside a model whose head has that many.
const CHUNK_BYTES: usize = 64 << 20;

/// The same on a GPU, where a matrix product has to fill many processors.
const GPU_CHUNK_BYTES: usize = 512 << 20;

/// Rows of a chunk, at least: each chunk passes over the gradient of the weight, 10 bytes of traffic an element against six
/// operations for each row. With fewer rows that shows (3% at 600 rows, two cores).
const MIN_CHUNK_ROWS: usize = 1024;

/// Bytes of an element of the sums over chunks.
const SUM_BYTES: usize = 4;

/// Rows of a chunk on a GPU are a multiple of this, as matrix products go by tiles.
const GPU_TILE_ROWS: usize = 256;

/// How many rows' scores a head holds at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeadChunks {
    /// As the host does: [`HeadShape::chunk_rows`].
    Host,
    /// As a GPU does: [`HeadShape::chunk_rows_on_gpu`].
    Gpu,
    /// So many.
    Rows(usize),
}

/// A head at work on the rows (tokens) of one micro-batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadShape {
    /// Tokens.
    pub num_rows: usize,
    /// Width of a token's vector.
    pub width: usize,
    /// Scores of a token.
    pub num_classes: usize,
    /// Bytes of an element of vectors, weights and scores.
    pub element_bytes: usize,
}

impl HeadShape {
    /// Rows to take at a time: all of them, if cutting would not save memory.
    pub fn chunk_rows(&self) -> usize {
        self.chunk_rows_of(CHUNK_BYTES)
    }

    /// [`HeadShape::chunk_rows`] on a GPU.
    pub fn chunk_rows_on_gpu(&self) -> usize {
        self.chunk_rows_of(GPU_CHUNK_BYTES).next_multiple_of(GPU_TILE_ROWS).min(self.num_rows)
    }

    /// Rows to take at a time, as `chunks` says.
    pub fn rows_at_a_time(&self, chunks: HeadChunks) -> usize {
        match chunks {
            HeadChunks::Host => self.chunk_rows(),
            HeadChunks::Gpu => self.chunk_rows_on_gpu(),
            HeadChunks::Rows(rows) => rows,
        }
    }

    fn chunk_rows_of(&self, chunk_bytes: usize) -> usize {
        let row_bytes = self.num_classes * self.element_bytes;
        let rows = (chunk_bytes / row_bytes.max(1)).max(MIN_CHUNK_ROWS);
        if rows >= self.num_rows || self.needed(rows) >= self.needed(self.num_rows) {
            return self.num_rows;
        }
        // Chunks of nearly equal size: a last one of a few rows would be slow.
        self.num_rows.div_ceil(self.num_rows.div_ceil(rows))
    }

    /// The most that scores and the gradient of the weight need, taking `rows` at a time.
    pub fn needed(&self, rows: usize) -> Bytes {
        let scores = Bytes::of(rows * self.num_classes, self.element_bytes);
        let numel = self.num_classes * self.width;
        let grad = Bytes::of(numel, self.element_bytes);
        if rows >= self.num_rows {
            return scores + grad;
        }
        let sum = Bytes::of(numel, SUM_BYTES);
        match self.element_bytes {
            SUM_BYTES => scores + sum,
            // In the end the scores are gone, and the sum is rounded into the gradient.
            _ => sum + scores.max(grad),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(num_rows: usize, width: usize, num_classes: usize, element_bytes: usize) -> HeadShape {
        HeadShape { num_rows, width, num_classes, element_bytes }
    }

    #[test]
    fn rows_are_cut_only_where_that_saves_memory() {
        // 33.5 MB of scores: less than a chunk.
        assert_eq!(head(1024, 1024, 16384, 2).chunk_rows(), 1024);
        // GPT-2 at 8 samples of 1000: 804 MB of scores, in eight chunks.
        assert_eq!(head(8000, 768, 50257, 2).chunk_rows(), 1000);
        // At a sample and a half: the fp32 sum of the gradient is more than what fewer scores save.
        assert_eq!(head(1500, 768, 50257, 2).chunk_rows(), 1500);
        // In fp32 the sum is the gradient itself.
        assert_eq!(head(1500, 768, 50257, 4).chunk_rows(), 750);
        // A small vocabulary has more rows at a time.
        assert_eq!(head(1 << 14, 512, 8192, 2).chunk_rows(), 4096);
        // A large one never fewer than so many.
        assert_eq!(head(1 << 16, 4096, 1 << 18, 2).chunk_rows(), 1024);
        assert_eq!(head(0, 4, 4, 2).chunk_rows(), 0);
        // A GPU takes more at a time, in whole tiles: 64 samples of 1024 in thirteen chunks, the last a little shorter.
        assert_eq!(head(1 << 16, 768, 50257, 2).chunk_rows_on_gpu(), 5120);
        assert_eq!(
            (head(5000, 768, 50257, 2).chunk_rows_on_gpu(), head(9, 4, 4, 2).chunk_rows_on_gpu()),
            (5000, 9)
        );
    }

    #[test]
    fn what_is_needed_does_not_grow_with_the_rows() {
        let (few, many) = (head(1 << 14, 768, 50257, 2), head(1 << 18, 768, 50257, 2));
        let (few, many) = (few.needed(few.chunk_rows()), many.needed(many.chunk_rows()));
        assert!(many.0.abs_diff(few.0) < few.0 / 20, "{few} {many}");
        assert!(many.0 < head(1 << 18, 768, 50257, 2).needed(1 << 18).0 / 50);
    }
}
