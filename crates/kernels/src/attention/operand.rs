//! What attention works on: sizes, and bf16 memory seen as `[batch, head, position, dim]`.

use std::marker::PhantomData;

use half::bf16;

/// The sizes of an attention call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Independent sequences.
    pub batch: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; each serves `heads / kv_heads` query heads in a row.
    pub kv_heads: usize,
    /// Positions of a sequence.
    pub seq: usize,
    /// Elements of a head's vectors.
    pub head_dim: usize,
}

/// How many elements lie between neighbours along each dimension; a head's vectors are contiguous.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Strides {
    /// From a sequence to the next.
    pub batch: usize,
    /// From a head to the next.
    pub head: usize,
    /// From a position to the next.
    pub position: usize,
}

/// An operand that is read.
#[derive(Debug, Clone, Copy)]
pub struct Operand<'a> {
    data: &'a [bf16],
    strides: Strides,
}

/// An operand that is written.
#[derive(Debug)]
pub struct OperandMut<'a> {
    data: *mut bf16,
    numel: usize,
    strides: Strides,
    memory: PhantomData<&'a mut [bf16]>,
}

// SAFETY: it stands for a `&mut [bf16]`, which may go to other threads; through a shared reference nothing can be
// done with it but `row`, whose callers promise to keep to different rows.
unsafe impl Send for OperandMut<'_> {}
// SAFETY: as above.
unsafe impl Sync for OperandMut<'_> {}

impl Shape {
    /// Query heads of each key head.
    pub(super) fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    pub(super) fn check(&self, scale: f32, lse: &[f32]) {
        let Shape { batch, heads, kv_heads, seq, .. } = *self;
        assert!(
            kv_heads > 0 && heads.is_multiple_of(kv_heads),
            "`{heads}` heads over `{kv_heads}` key heads"
        );
        assert!(scale > 0.0 && scale.is_finite(), "the scale `{scale}` is not positive");
        assert_eq!(lse.len(), batch * heads * seq, "log-sum-exps of `{self:?}`");
    }
}

impl Strides {
    /// Of a contiguous `[batch, heads, seq, head_dim]`.
    pub fn heads_first(shape: &Shape, heads: usize) -> Self {
        let head = shape.seq * shape.head_dim;
        Strides { batch: heads * head, head, position: shape.head_dim }
    }

    /// Of a contiguous `[batch, seq, heads, head_dim]`.
    pub fn positions_first(shape: &Shape, heads: usize) -> Self {
        let position = heads * shape.head_dim;
        Strides { batch: shape.seq * position, head: shape.head_dim, position }
    }

    /// The elements from the first to the last, both included; `None` where that is no number.
    fn span(&self, shape: &Shape, heads: usize) -> Option<usize> {
        let sizes = [shape.batch, heads, shape.seq, shape.head_dim];
        if sizes.contains(&0) {
            return Some(0);
        }
        let steps = sizes.into_iter().zip([self.batch, self.head, self.position, 1]);
        steps
            .map(|(size, stride)| (size - 1).checked_mul(stride))
            .try_fold(1, |sum, last| last?.checked_add(sum))
    }

    /// Whether no two elements share memory: each stride steps over all that the smaller ones reach.
    fn keep_apart(&self, shape: &Shape, heads: usize) -> bool {
        let mut dims = [(self.batch, shape.batch), (self.head, heads), (self.position, shape.seq)];
        dims.sort_unstable();
        let mut reach = shape.head_dim;
        dims.into_iter().filter(|&(_, size)| size > 1).all(|(stride, size)| {
            let apart = stride >= reach;
            reach += (size - 1) * stride;
            apart
        })
    }
}

impl<'a> Operand<'a> {
    /// The first element of `data` is that of batch 0, head 0, position 0. Operands may share memory, as the three
    /// of a fused projection do.
    pub fn new(data: &'a [bf16], strides: Strides) -> Self {
        Operand { data, strides }
    }

    pub(super) fn check(&self, shape: &Shape, heads: usize) {
        let span = self.strides.span(shape, heads);
        let fits = span.is_some_and(|span| span <= self.data.len());
        assert!(fits, "`{:?}` of {shape:?} reach past `{}` elements", self.strides, self.data.len());
    }

    /// The vectors of one head: position `i` begins at `i * stride` of the slice.
    pub(super) fn head(&self, shape: &Shape, batch: usize, head: usize) -> Rows<'a> {
        let data = &self.data[batch * self.strides.batch + head * self.strides.head..];
        Rows { data, stride: self.strides.position, seq: shape.seq, dim: shape.head_dim }
    }
}

/// The vectors of one head.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rows<'a> {
    data: &'a [bf16],
    stride: usize,
    seq: usize,
    dim: usize,
}

impl<'a> Rows<'a> {
    /// The vector at `position`; zeros behind the last, so that blocks are always whole.
    #[inline(always)]
    pub fn get(&self, position: usize) -> &'a [bf16] {
        if position < self.seq {
            &self.data[position * self.stride..][..self.dim]
        } else {
            &ZEROS[..self.dim]
        }
    }
}

static ZEROS: [bf16; 256] = [bf16::ZERO; 256];

impl<'a> OperandMut<'a> {
    /// The first element of `data` is that of batch 0, head 0, position 0.
    pub fn new(data: &'a mut [bf16], strides: Strides) -> Self {
        OperandMut { data: data.as_mut_ptr(), numel: data.len(), strides, memory: PhantomData }
    }

    /// As [`new`](Self::new), where other operands are interleaved in the same memory, as the three gradients of
    /// a fused projection are.
    ///
    /// # Safety
    /// `data` is valid for reads and writes of `numel` elements for `'a`, and while the operand lives nobody else
    /// touches the elements that a shape reaches with these strides.
    pub unsafe fn from_raw_parts(data: *mut bf16, numel: usize, strides: Strides) -> Self {
        OperandMut { data, numel, strides, memory: PhantomData }
    }

    pub(super) fn check(&self, shape: &Shape, heads: usize) {
        let span = self.strides.span(shape, heads);
        let fits = span.is_some_and(|span| span <= self.numel);
        assert!(fits, "`{:?}` of {shape:?} reach past `{}` elements", self.strides, self.numel);
        assert!(self.strides.keep_apart(shape, heads), "`{:?}` of {shape:?} overlap", self.strides);
    }

    /// One vector.
    ///
    /// # Safety
    /// `check` passed for `shape`, the indices lie within it, and nobody else holds this vector.
    #[inline(always)]
    #[allow(clippy::mut_from_ref)] // the caller keeps the vectors apart
    pub(super) unsafe fn row(
        &self,
        shape: &Shape,
        batch: usize,
        head: usize,
        position: usize,
    ) -> &mut [bf16] {
        let Strides { batch: b, head: h, position: p } = self.strides;
        // SAFETY: `check` found the last element within the memory and no two vectors overlapping.
        unsafe {
            let first = self.data.add(batch * b + head * h + position * p);
            std::slice::from_raw_parts_mut(first, shape.head_dim)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: Shape = Shape { batch: 2, heads: 3, kv_heads: 3, seq: 5, head_dim: 8 };

    fn passes(numel: usize, strides: Strides) -> bool {
        let mut data = vec![bf16::ZERO; numel];
        std::panic::catch_unwind(move || OperandMut::new(&mut data, strides).check(&SHAPE, 3)).is_ok()
    }

    #[test]
    fn strides_must_fit_the_memory() {
        let strides = Strides::heads_first(&SHAPE, 3);
        assert_eq!(strides, Strides { batch: 120, head: 40, position: 8 });
        assert!(passes(240, strides) && !passes(239, strides));
        let data = [bf16::ZERO; 239];
        assert!(std::panic::catch_unwind(|| Operand::new(&data, strides).check(&SHAPE, 3)).is_err());
        assert!(!passes(240, Strides { batch: usize::MAX, ..strides }));
    }

    #[test]
    fn written_vectors_must_not_overlap() {
        let strides = Strides::positions_first(&SHAPE, 3);
        assert_eq!(strides, Strides { batch: 120, head: 8, position: 24 });
        assert!(passes(1000, strides));
        assert!(passes(1000, Strides { batch: 200, head: 9, position: 30 }));
        assert!(!passes(1000, Strides { position: 23, ..strides }));
        assert!(!passes(1000, Strides { head: 7, ..strides }));
        assert!(!passes(1000, Strides { batch: 0, ..strides }));
    }

    #[test]
    fn behind_the_last_position_are_zeros() {
        let data = vec![bf16::ONE; 240];
        let rows = Operand::new(&data, Strides::heads_first(&SHAPE, 3)).head(&SHAPE, 1, 2);
        assert_eq!(rows.get(4), [bf16::ONE; 8]);
        assert_eq!(rows.get(5), [bf16::ZERO; 8]);
    }
}
