//! The batch triple: one optimizer step sees `micro_batch x grad_accum_steps x data-parallel ranks` samples.
//!
//! Any two of global batch, micro batch and accumulation steps give the third; a single batch size implies
//! one accumulation step. Nothing is rounded: a quotient that is not whole is an error.

use std::fmt;

/// The three sizes, each `None` if it has to be worked out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Triple {
    pub global: Option<u64>,
    pub micro: Option<u64>,
    pub accum: Option<u64>,
}

/// The three sizes, worked out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Solved {
    pub global: u64,
    pub micro: u64,
    pub accum: u64,
}

/// Why a triple has no solution. The texts name DeepSpeed's keys, which users set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unsolved {
    /// Neither batch size is given.
    NoBatchSize,
    /// All three are given and do not multiply out.
    NotEqual(Solved, u64),
    /// The global batch does not divide by what is given.
    NotDivisible { global: u64, known: Known, ranks: u64 },
    /// More samples than can be counted.
    TooLarge,
}

/// What is known beside a global batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Known {
    Micro(u64),
    Accum(u64),
    Neither,
}

impl Triple {
    /// Works out what is missing, for `ranks` data-parallel ranks.
    pub fn solve(self, ranks: u64) -> Result<Solved, Unsolved> {
        let product = |micro: u64, accum: u64| {
            micro.checked_mul(accum).and_then(|n| n.checked_mul(ranks)).ok_or(Unsolved::TooLarge)
        };
        let quotient = |global: u64, known: Known| {
            let divisor = match known {
                Known::Micro(n) | Known::Accum(n) => n.checked_mul(ranks).ok_or(Unsolved::TooLarge)?,
                Known::Neither => ranks,
            };
            match (global / divisor, global % divisor) {
                (whole, 0) if whole > 0 => Ok(whole),
                _ => Err(Unsolved::NotDivisible { global, known, ranks }),
            }
        };
        match (self.global, self.micro, self.accum) {
            (Some(global), Some(micro), Some(accum)) => {
                let solved = Solved { global, micro, accum };
                if product(micro, accum)? == global {
                    Ok(solved)
                } else {
                    Err(Unsolved::NotEqual(solved, ranks))
                }
            }
            (Some(global), Some(micro), None) => {
                Ok(Solved { global, micro, accum: quotient(global, Known::Micro(micro))? })
            }
            (Some(global), None, Some(accum)) => {
                Ok(Solved { global, micro: quotient(global, Known::Accum(accum))?, accum })
            }
            (None, Some(micro), accum) => {
                let accum = accum.unwrap_or(1);
                Ok(Solved { global: product(micro, accum)?, micro, accum })
            }
            (Some(global), None, None) => {
                Ok(Solved { global, micro: quotient(global, Known::Neither)?, accum: 1 })
            }
            (None, None, _) => Err(Unsolved::NoBatchSize),
        }
    }
}

impl fmt::Display for Unsolved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Unsolved::NoBatchSize => {
                f.write_str("neither `train_batch_size` nor `train_micro_batch_size_per_gpu` is set")
            }
            Unsolved::NotEqual(Solved { global, micro, accum }, ranks) => write!(
                f,
                "`train_batch_size` {global} is not `train_micro_batch_size_per_gpu` {micro} x \
                 `gradient_accumulation_steps` {accum} x {ranks} data-parallel ranks = {}",
                u128::from(micro) * u128::from(accum) * u128::from(ranks)
            ),
            Unsolved::NotDivisible { global, known: Known::Micro(micro), ranks } => write!(
                f,
                "`train_batch_size` {global} is not a multiple of `train_micro_batch_size_per_gpu` {micro} x {ranks} \
                 data-parallel ranks = {}",
                u128::from(micro) * u128::from(ranks)
            ),
            Unsolved::NotDivisible { global, known: Known::Accum(accum), ranks } => write!(
                f,
                "`train_batch_size` {global} is not a multiple of `gradient_accumulation_steps` {accum} x {ranks} \
                 data-parallel ranks = {}",
                u128::from(accum) * u128::from(ranks)
            ),
            Unsolved::NotDivisible { global, known: Known::Neither, ranks } => {
                write!(f, "`train_batch_size` {global} is not a multiple of {ranks} data-parallel ranks")
            }
            Unsolved::TooLarge => f.write_str("the batch sizes multiply to more than can be counted"),
        }
    }
}

impl Unsolved {
    /// How to mend it.
    pub fn hint(&self) -> String {
        match *self {
            Unsolved::NoBatchSize => {
                "set `train_micro_batch_size_per_gpu` to the samples of one forward pass".into()
            }
            Unsolved::NotEqual(Solved { micro, accum, .. }, ranks) => format!(
                "set `train_batch_size` to {}, or leave one of the three out",
                u128::from(micro) * u128::from(accum) * u128::from(ranks)
            ),
            Unsolved::NotDivisible { .. } => "change one of them, or the number of ranks".into(),
            Unsolved::TooLarge => "use smaller ones".into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn triple(global: Option<u64>, micro: Option<u64>, accum: Option<u64>) -> Triple {
        Triple { global, micro, accum }
    }

    #[test]
    fn texts_show_the_numbers() {
        let text = |t: Triple, ranks| t.solve(ranks).unwrap_err().to_string();
        assert_eq!(
            text(triple(Some(32), Some(4), Some(2)), 2),
            "`train_batch_size` 32 is not `train_micro_batch_size_per_gpu` 4 x `gradient_accumulation_steps` 2 x 2 \
             data-parallel ranks = 16"
        );
        assert_eq!(
            text(triple(Some(30), Some(4), None), 2),
            "`train_batch_size` 30 is not a multiple of `train_micro_batch_size_per_gpu` 4 x 2 data-parallel ranks = 8"
        );
        assert_eq!(
            text(triple(Some(30), None, Some(4)), 2),
            "`train_batch_size` 30 is not a multiple of `gradient_accumulation_steps` 4 x 2 data-parallel ranks = 8"
        );
        assert_eq!(
            text(triple(Some(3), None, None), 2),
            "`train_batch_size` 3 is not a multiple of 2 data-parallel ranks"
        );
        assert_eq!(
            text(triple(None, None, Some(2)), 2),
            "neither `train_batch_size` nor `train_micro_batch_size_per_gpu` is set"
        );
        assert_eq!(triple(None, Some(u64::MAX), Some(2)).solve(2), Err(Unsolved::TooLarge));
        assert_eq!(triple(Some(1), Some(u64::MAX), None).solve(2), Err(Unsolved::TooLarge));
    }

    proptest! {
        #[test]
        fn any_two_give_the_third(micro in 1u64..100, accum in 1u64..100, ranks in 1u64..100) {
            let solved = Solved { global: micro * accum * ranks, micro, accum };
            let (g, m, a) = (Some(solved.global), Some(micro), Some(accum));
            for given in [triple(g, m, a), triple(g, m, None), triple(g, None, a), triple(None, m, a)] {
                prop_assert_eq!(given.solve(ranks), Ok(solved));
            }
        }

        #[test]
        fn whatever_is_solved_multiplies_out_and_keeps_what_was_given(
            global in prop::option::of(0u64..200),
            micro in prop::option::of(1u64..20),
            accum in prop::option::of(1u64..20),
            ranks in 1u64..9,
        ) {
            if let Ok(solved) = triple(global, micro, accum).solve(ranks) {
                prop_assert_eq!(solved.global, solved.micro * solved.accum * ranks);
                prop_assert!(solved.micro > 0 && solved.accum > 0);
                prop_assert_eq!(global.unwrap_or(solved.global), solved.global);
                prop_assert_eq!(micro.unwrap_or(solved.micro), solved.micro);
                prop_assert_eq!(accum.unwrap_or(solved.accum), solved.accum);
            }
        }
    }
}
