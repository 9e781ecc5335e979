//! Which numbers the elements of a slice draw.
//!
//! ```text
//! whole:     first, first + 1, first + 2, ..
//! of parts:  first + row * row_numel + start .. + end,   row = 0, 1, 2, ..
//! ```

use std::ops::Range;

/// The numbers of elements that are drawn one after the other: runs that follow each other, of the same length and with the
/// same gap between them. A whole is a single run that nothing reaches the end of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Numbers {
    /// The next element's number, if its run goes on.
    next: u64,
    /// Elements until the end of the run.
    left: u64,
    run: u64,
    /// Numbers from the end of a run to the next one.
    gap: u64,
}

/// The numbers of a slice by element: `first + e / run * (run + gap) + e % run`. Kernels read the same structure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Runs {
    first: u64,
    run: u64,
    gap: u64,
}

impl Numbers {
    /// All numbers from `first` on.
    pub fn from(first: u64) -> Self {
        Numbers { next: first, left: u64::MAX, run: u64::MAX, gap: 0 }
    }

    /// Of the rows of `row_numel` elements that begin here, those in `part` only; nothing if it does not lie inside the row, if
    /// these are the numbers of parts already, or if the first part begins beyond 64 bits.
    pub fn of_parts(self, row_numel: u64, part: Range<u64>) -> Option<Self> {
        if self.run != u64::MAX || part.start > part.end || part.end > row_numel {
            return None;
        }
        let run = part.end - part.start;
        Some(Numbers { next: self.next.checked_add(part.start)?, left: run, run, gap: row_numel - run })
    }

    /// These numbers, of which none was taken yet, by element.
    pub fn runs(self) -> Runs {
        debug_assert_eq!(self.left, self.run, "a slice begins with a run");
        // Runs without gaps are one.
        let run = if self.gap == 0 { u64::MAX } else { self.run };
        Runs { first: self.next, run, gap: self.gap }
    }

    /// Whether the numbers of `numel` elements, and one more than the last of them, fit 64 bits.
    pub fn fit(self, numel: usize) -> bool {
        match numel.checked_sub(1) {
            None => true,
            Some(last) => self.after(last as u64).and_then(|last| last.next.checked_add(1)).is_some(),
        }
    }

    /// The numbers after `numel` elements, if they fit 64 bits and there are so many.
    fn after(mut self, mut numel: u64) -> Option<Self> {
        if numel >= self.left {
            numel -= self.left;
            let runs = numel.checked_div(self.run)?;
            let skipped = (self.run + self.gap).checked_mul(runs)?;
            let begin = self.next.checked_add(self.left)?.checked_add(self.gap)?;
            (self.next, self.left) = (begin.checked_add(skipped)?, self.run);
            numel %= self.run;
        }
        Some(Numbers { next: self.next.checked_add(numel)?, left: self.left - numel, ..self })
    }

    /// The numbers after `numel` elements, that [`fit`](Self::fit) with those that follow.
    pub fn skip(self, numel: usize) -> Self {
        self.after(numel as u64).expect("more elements follow, whose numbers fit 64 bits")
    }

    /// The number of the next element, and how many follow each other from there on, up to `numel`, which is at least 1.
    #[inline(always)]
    pub fn run(&mut self, numel: usize) -> (u64, usize) {
        if self.left == 0 {
            (self.next, self.left) = (self.next + self.gap, self.run);
        }
        (self.next, self.left.min(numel as u64) as usize)
    }

    /// Goes on by `numel` elements of a [`run`](Self::run).
    #[inline(always)]
    pub fn take(&mut self, numel: usize) {
        self.next += numel as u64;
        self.left -= numel as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(mut numbers: Numbers, numel: usize) -> Vec<u64> {
        let mut all = Vec::new();
        while all.len() < numel {
            let (first, run) = numbers.run(numel - all.len());
            all.extend(first..first + run as u64);
            numbers.take(run);
        }
        all
    }

    #[test]
    fn parts_of_rows_and_what_follows_any_number_of_them() {
        for part in [0..10, 0..1, 3..7, 9..10, 2..10] {
            let numbers = Numbers::from(1000).of_parts(10, part.clone()).unwrap();
            let expected: Vec<u64> =
                (0..5).flat_map(|row| (part.start..part.end).map(move |i| 1000 + row * 10 + i)).collect();
            assert_eq!(drawn(numbers, expected.len()), expected);
            for at in 0..expected.len() {
                assert_eq!(
                    drawn(numbers.skip(at), expected.len() - at),
                    expected[at..],
                    "{part:?} from {at}"
                );
            }
        }
        assert_eq!(drawn(Numbers::from(7).skip(5), 3), [12, 13, 14]);
    }

    #[test]
    fn numbers_fit_up_to_the_last_but_one() {
        let whole = Numbers::from(u64::MAX - 3);
        assert!(whole.fit(0) && whole.fit(3) && !whole.fit(4));
        // 4 and 5, 14 and 15 before the end.
        let parts = Numbers::from(u64::MAX - 20).of_parts(10, 5..7).unwrap();
        assert!(parts.fit(4) && !parts.fit(5));
        assert_eq!(drawn(parts, 4).last(), Some(&(u64::MAX - 4)));
        let last = Numbers::from(u64::MAX - 10).of_parts(10, 8..10).unwrap();
        assert!(last.fit(2) && !last.fit(3) && !last.fit(usize::MAX));
        assert_eq!(drawn(last, 2), [u64::MAX - 2, u64::MAX - 1]);
        let none = Numbers::from(3).of_parts(10, 4..4).unwrap();
        assert!(none.fit(0) && !none.fit(1) && !none.fit(2));
    }

    #[test]
    fn a_part_lies_inside_its_row() {
        let whole = Numbers::from(5);
        assert_eq!(whole.of_parts(10, 3..11), None);
        #[expect(clippy::reversed_empty_ranges, reason = "that is what is refused")]
        let reversed = 4..3;
        assert_eq!(whole.of_parts(10, reversed), None);
        assert_eq!(whole.of_parts(10, 3..4).unwrap().of_parts(2, 0..1), None);
        assert_eq!(Numbers::from(u64::MAX).of_parts(10, 3..4), None);
    }
}
