//! Which sample a row of a batch reads.
//!
//! Samples of a run stand in one line, epoch after epoch. Step `s`, accumulation `a`, data-parallel rank `r` and row
//! `b` take place `((s * grad_accum_steps + a) * data_parallel + r) * micro_batch + b` of that line. The product
//! `grad_accum_steps * data_parallel * micro_batch` is the global batch size, so for one global batch size a step
//! reads the same samples however ranks, accumulation and rows split it. The order inside an epoch is that of the
//! file or a seeded shuffle of it; when all samples are read, the next epoch begins, inside of a batch if need be.
//!
//! Everything is a pure function: the state of a sampler is the step, and a resumed run needs nothing else.

use crate::{DataError, Permutation};

/// The order of the samples of an epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// The order of the file, every epoch the same.
    Sequential,
    /// A shuffle of all samples that depends on the seed and the epoch.
    Shuffled {
        /// The seed.
        seed: u64,
    },
}

/// How one global batch is split.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchShape {
    /// Tokens of a sample that are input, one less than it has.
    pub seq_len: usize,
    /// Samples in one forward pass of one rank.
    pub micro_batch: usize,
    /// Forward passes before an optimizer step.
    pub grad_accum_steps: usize,
    /// Ranks that read different samples.
    pub data_parallel: usize,
}

impl BatchShape {
    /// Samples in one optimizer step over all ranks.
    pub fn global_batch_size(&self) -> usize {
        self.grad_accum_steps * self.data_parallel * self.micro_batch
    }
}

/// The samples of a run.
#[derive(Debug, Clone)]
pub struct Sampler {
    order: Order,
    num_samples: u64,
    shape: BatchShape,
}

impl Sampler {
    /// The order of `num_samples` samples, read in batches of `shape`.
    ///
    /// # Errors
    /// [`DataError::Zero`] if a number is 0.
    pub fn new(num_samples: u64, order: Order, shape: BatchShape) -> Result<Sampler, DataError> {
        let numbers = [
            ("num_samples", num_samples),
            ("seq_len", shape.seq_len as u64),
            ("micro_batch", shape.micro_batch as u64),
            ("grad_accum_steps", shape.grad_accum_steps as u64),
            ("data_parallel", shape.data_parallel as u64),
        ];
        match numbers.into_iter().find(|(_, number)| *number == 0) {
            Some((name, _)) => Err(DataError::Zero { name }),
            None => Ok(Sampler { order, num_samples, shape }),
        }
    }

    /// How many samples an epoch has.
    pub fn num_samples(&self) -> u64 {
        self.num_samples
    }

    /// How a global batch is split.
    pub fn shape(&self) -> BatchShape {
        self.shape
    }

    /// Which epoch (from 0) the first sample of step `step` (from 0) belongs to.
    pub fn epoch(&self, step: u64) -> u64 {
        step * self.shape.global_batch_size() as u64 / self.num_samples
    }

    /// The sample that row `row` of data-parallel rank `dp_rank` reads in accumulation `accum` of step `step`.
    ///
    /// # Panics
    /// If `accum`, `dp_rank` or `row` is not inside the batch shape.
    pub fn sample_index(&self, step: u64, accum: usize, dp_rank: usize, row: usize) -> u64 {
        assert!(row < self.shape.micro_batch, "row `{row}` of `{}`", self.shape.micro_batch);
        self.sample_indices(step, accum, dp_rank).nth(row).expect("the row is inside the batch")
    }

    /// The samples of all rows of data-parallel rank `dp_rank` in accumulation `accum` of step `step`.
    ///
    /// # Panics
    /// If `accum` or `dp_rank` is not inside the batch shape.
    pub fn sample_indices(&self, step: u64, accum: usize, dp_rank: usize) -> impl Iterator<Item = u64> {
        let BatchShape { micro_batch, grad_accum_steps, data_parallel, .. } = self.shape;
        assert!(accum < grad_accum_steps, "accumulation `{accum}` of `{grad_accum_steps}`");
        assert!(dp_rank < data_parallel, "data-parallel rank `{dp_rank}` of `{data_parallel}`");
        let micro_batches =
            (step * grad_accum_steps as u64 + accum as u64) * data_parallel as u64 + dp_rank as u64;
        let first = micro_batches * micro_batch as u64;

        let (n, order) = (self.num_samples, self.order);
        let mut shuffle: Option<(u64, Permutation)> = None;
        (first..first + micro_batch as u64).map(move |place| {
            let (epoch, place) = (place / n, place % n);
            match order {
                Order::Sequential => place,
                Order::Shuffled { seed } => match &shuffle {
                    Some((of_epoch, permutation)) if *of_epoch == epoch => permutation.at(place),
                    _ => shuffle.insert((epoch, Permutation::new(n, seed, epoch))).1.at(place),
                },
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn shape(micro_batch: usize, grad_accum_steps: usize, data_parallel: usize) -> BatchShape {
        BatchShape { seq_len: 8, micro_batch, grad_accum_steps, data_parallel }
    }

    /// All samples of a step, in the order of the line.
    fn global_batch(sampler: &Sampler, step: u64) -> Vec<u64> {
        let BatchShape { grad_accum_steps, data_parallel, .. } = sampler.shape();
        (0..grad_accum_steps)
            .flat_map(|accum| (0..data_parallel).map(move |dp_rank| (accum, dp_rank)))
            .flat_map(|(accum, dp_rank)| sampler.sample_indices(step, accum, dp_rank))
            .collect()
    }

    #[test]
    fn sequential_follows_the_contract() {
        let (micro_batch, accum, dp) = (3, 2, 4);
        let sampler = Sampler::new(u64::MAX, Order::Sequential, shape(micro_batch, accum, dp)).unwrap();
        for (s, a, r, b) in [(0, 0, 0, 0), (5, 1, 3, 2), (7, 0, 2, 1)] {
            let expected = ((s * accum + a) * dp + r) * micro_batch + b;
            assert_eq!(sampler.sample_index(s as u64, a, r, b), expected as u64);
        }
    }

    #[test]
    fn sequential_begins_again_after_the_last_sample() {
        let sampler = Sampler::new(5, Order::Sequential, shape(2, 1, 2)).unwrap();
        assert_eq!(global_batch(&sampler, 1), [4, 0, 1, 2]);
        assert_eq!((sampler.epoch(1), sampler.epoch(2)), (0, 1));
    }

    #[test]
    fn a_zero_is_named() {
        let error = Sampler::new(5, Order::Sequential, shape(2, 0, 2)).unwrap_err();
        assert_eq!(error.to_string(), "`grad_accum_steps` is 0, expected at least 1");
    }

    #[test]
    fn epochs_and_seeds_shuffle_differently() {
        let epoch = |seed, step| {
            global_batch(&Sampler::new(100, Order::Shuffled { seed }, shape(100, 1, 1)).unwrap(), step)
        };
        assert_ne!(epoch(1, 0), epoch(1, 1));
        assert_ne!(epoch(1, 0), epoch(2, 0));
        assert_eq!(epoch(1, 0), epoch(1, 0));
    }

    proptest! {
        /// One global batch size, any split: every step reads the same samples in the same places.
        #[test]
        fn the_split_does_not_matter(
            n in 1u64..2000, seed: u64, step in 0u64..500,
            micro_batch in 1usize..6, accum in 1usize..5, dp in 1usize..8,
        ) {
            for order in [Order::Sequential, Order::Shuffled { seed }] {
                let split = Sampler::new(n, order, shape(micro_batch, accum, dp)).unwrap();
                let whole = Sampler::new(n, order, shape(micro_batch * accum * dp, 1, 1)).unwrap();
                prop_assert_eq!(global_batch(&split, step), global_batch(&whole, step));
                let row = micro_batch - 1;
                prop_assert_eq!(
                    split.sample_index(step, accum - 1, dp - 1, row),
                    *global_batch(&whole, step).last().unwrap()
                );
            }
        }

        /// An epoch reads every sample once, also when batches straddle its ends.
        #[test]
        fn an_epoch_reads_each_sample_once(n in 1u64..500, seed: u64, batch in 1usize..40) {
            let sampler = Sampler::new(n, Order::Shuffled { seed }, shape(batch, 1, 1)).unwrap();
            let line: Vec<u64> =
                (0..(3 * n).div_ceil(batch as u64)).flat_map(|step| global_batch(&sampler, step)).collect();
            for epoch in line.chunks_exact(n as usize).take(3) {
                let mut sorted = epoch.to_vec();
                sorted.sort();
                prop_assert!(sorted.into_iter().eq(0..n));
            }
        }
    }
}
