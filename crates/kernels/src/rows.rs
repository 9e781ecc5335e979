//! Matrices cut between rows, for kernels on several threads.

use std::ops::Range;

use crate::Threads;
use crate::parallel::{PIECE_NUMEL, Split, for_each_piece_of};

/// Rows of `width` elements, one after the other. `width` is at least 1.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rows<'a, T> {
    pub data: &'a [T],
    pub width: usize,
}

/// [`Rows`] to be written.
#[derive(Debug)]
pub(crate) struct RowsMut<'a, T> {
    pub data: &'a mut [T],
    pub width: usize,
}

impl<T: Sync> Split for Rows<'_, T> {
    fn numel(&self) -> usize {
        self.data.len() / self.width
    }
    fn split_at(self, at: usize) -> (Self, Self) {
        let (low, high) = self.data.split_at(at * self.width);
        (Rows { data: low, width: self.width }, Rows { data: high, width: self.width })
    }
}

impl<T: Send> Split for RowsMut<'_, T> {
    fn numel(&self) -> usize {
        self.data.len() / self.width
    }
    fn split_at(self, at: usize) -> (Self, Self) {
        let (low, high) = self.data.split_at_mut(at * self.width);
        (RowsMut { data: low, width: self.width }, RowsMut { data: high, width: self.width })
    }
}

/// The numbers of the rows in a piece.
impl Split for Range<usize> {
    fn numel(&self) -> usize {
        self.len()
    }
    fn split_at(self, at: usize) -> (Self, Self) {
        (self.start..self.start + at, self.start + at..self.end)
    }
}

/// Rows that make a piece, for rows of `width` elements: never fewer than one.
pub(crate) fn rows_per_piece(width: usize) -> usize {
    (PIECE_NUMEL / width.max(1)).max(1)
}

/// Calls `run` on all rows of `work`, in one go on one thread, or piece by piece on several.
pub(crate) fn for_each_rows<W: Split>(threads: Threads, width: usize, work: W, run: impl Fn(W) + Sync) {
    for_each_piece_of(rows_per_piece(width), threads, work, run);
}
