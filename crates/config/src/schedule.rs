//! The learning rate as a pure function of the number of optimizer steps already applied.
//!
//! A step that was skipped does not count, so that the rate depends on what happened to the parameters and on
//! nothing else.

use serde::Serialize;

/// How the learning rate moves over a run.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
#[non_exhaustive]
pub enum LrSchedule {
    /// The same rate at every step.
    Constant {
        /// The rate.
        lr: f64,
    },
    /// Rises from `min_lr` to `max_lr` over the first steps, then stays.
    Warmup {
        /// The rate of the first step.
        min_lr: f64,
        /// The rate after warm-up.
        max_lr: f64,
        /// The length of the warm-up in steps.
        num_steps: u64,
        /// How it rises.
        curve: WarmupCurve,
    },
}

/// How the rate rises during warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum WarmupCurve {
    /// By the same amount at each step.
    Linear,
    /// With the logarithm of the step: fast at first.
    Log,
}

impl LrSchedule {
    /// The rate of the step that follows `applied_steps` applied ones.
    ///
    /// # Source
    /// DeepSpeed's `WarmupLR`. It moves the rate after each step and starts counting at 0, so the first *two* steps
    /// run at `min_lr`: step `s` (from 0) uses `t = max(0, s - 1)`. A warm-up shorter than 2 steps counts as 2.
    pub fn lr(&self, applied_steps: u64) -> f64 {
        match *self {
            LrSchedule::Constant { lr } => lr,
            LrSchedule::Warmup { min_lr, max_lr, num_steps, curve } => {
                let length = num_steps.max(2) as f64;
                let t = applied_steps.saturating_sub(1) as f64;
                if t >= length {
                    return max_lr;
                }
                let risen = match curve {
                    WarmupCurve::Linear => t / length,
                    WarmupCurve::Log => (t + 1.0).ln() / length.ln(),
                };
                min_lr + (max_lr - min_lr) * risen
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn warmup(num_steps: u64, curve: WarmupCurve) -> LrSchedule {
        LrSchedule::Warmup { min_lr: 0.0, max_lr: 1.0, num_steps, curve }
    }

    #[test]
    fn linear_warmup_takes_equal_steps() {
        let rates: Vec<f64> = (0..8).map(|s| warmup(4, WarmupCurve::Linear).lr(s)).collect();
        assert_eq!(rates, [0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0]);
    }

    #[test]
    fn log_warmup_follows_the_logarithm() {
        let schedule = warmup(8, WarmupCurve::Log);
        // ln(2)/ln(8) = 1/3, ln(4)/ln(8) = 2/3, ln(8)/ln(8) = 1
        for (step, rate) in [(0, 0.0), (1, 0.0), (2, 1.0 / 3.0), (4, 2.0 / 3.0), (8, 1.0), (9, 1.0)] {
            assert!((schedule.lr(step) - rate).abs() < 1e-12, "step {step}: {}", schedule.lr(step));
        }
    }

    #[test]
    fn a_warmup_of_one_step_counts_as_two() {
        let rates: Vec<f64> = (0..4).map(|s| warmup(1, WarmupCurve::Linear).lr(s)).collect();
        assert_eq!(rates, [0.0, 0.0, 0.5, 1.0]);
    }

    proptest! {
        #[test]
        fn warmup_rises_within_its_bounds_and_stays(
            num_steps in 1u64..500, step in 0u64..1000, min_lr in 0.0..1e-3f64, rise in 0.0..1e-2f64, log: bool,
        ) {
            let curve = if log { WarmupCurve::Log } else { WarmupCurve::Linear };
            let schedule = LrSchedule::Warmup { min_lr, max_lr: min_lr + rise, num_steps, curve };
            let (now, next) = (schedule.lr(step), schedule.lr(step + 1));
            prop_assert!(now <= next + 1e-15);
            prop_assert!(now >= min_lr && now <= min_lr + rise + 1e-15);
            prop_assert_eq!(schedule.lr(num_steps.max(2) + 1), min_lr + rise);
            prop_assert_eq!(LrSchedule::Constant { lr: rise }.lr(step), rise);
        }
    }
}
