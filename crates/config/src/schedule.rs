//! The learning rate, and where it is cycled the momentum, as pure functions of the number of optimizer steps already applied.
//!
//! A step that was skipped does not count, so that the rate depends on what happened to the parameters and on
//! nothing else, and a resumed run goes on where it was.
//!
//! DeepSpeed's schedulers are made before the first step and moved after each, so step `s` (from 0) runs with what `s` moves
//! have left. Its warm-ups count moves from 0: a new scheduler and one moved once stand at the same place, `t = s - 1`,
//! and step 0 runs with what the constructor sets. The `transformers` ones take the step itself, `t = s`.
//!
//! ```text
//! warmup  _/‾‾‾   warmup_decay  _/\_   warmup_cosine, cosine  _/~\_   one_cycle  /\__   range_test  /   linear  /\_
//! ```

use std::f64::consts::PI;

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
    ///
    /// # Source
    /// DeepSpeed's `WarmupLR`. The first *two* steps run at `min_lr`; a warm-up shorter than 2 steps counts as 2.
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
    /// Rises as [`Warmup`](Self::Warmup), then falls by equal amounts to `min_lr`, which it reaches at `total_steps`.
    ///
    /// # Source
    /// DeepSpeed's `WarmupDecayLR`.
    WarmupDecay {
        /// The rate of the first step and of the end.
        min_lr: f64,
        /// The rate after warm-up.
        max_lr: f64,
        /// The length of the warm-up in steps.
        num_steps: u64,
        /// Steps until the rate is back at `min_lr`.
        total_steps: u64,
        /// How it rises.
        curve: WarmupCurve,
    },
    /// Rises from a ratio of `lr` to `lr`, then falls along half a cosine to another ratio.
    ///
    /// # Source
    /// DeepSpeed's `WarmupCosineLR`. The very first step runs at rate 0, whatever the ratios.
    WarmupCosine {
        /// The rate after warm-up.
        lr: f64,
        /// Where the warm-up starts, as a ratio of `lr`.
        warmup_min_ratio: f64,
        /// Where the cosine ends, as a ratio of `lr`.
        cos_min_ratio: f64,
        /// The length of the warm-up in steps.
        num_steps: u64,
        /// Steps until the end of the cosine.
        total_steps: u64,
        /// How it rises.
        curve: WarmupCurve,
    },
    /// Rises from `min_lr` to `max_lr` and falls back, then decays.
    ///
    /// # Source
    /// DeepSpeed's `OneCycle` (arXiv:1803.09820).
    OneCycle {
        /// The rate of the first step, and of the end of the cycle.
        min_lr: f64,
        /// The rate between the halves of the cycle.
        max_lr: f64,
        /// Steps of the rising half.
        first_steps: u64,
        /// Steps of the falling half.
        second_steps: u64,
        /// Stairs of the rising half; 0 rises at every step.
        first_stairs: u64,
        /// Stairs of the falling half; 0 falls at every step.
        second_stairs: u64,
        /// After the cycle, the rate is divided by `1 + lr_decay * steps / decay_steps`.
        lr_decay: f64,
        /// The unit of the decay in steps; 0 for no decay.
        decay_steps: u64,
        /// The momentum, where it moves against the rate.
        momentum: Option<MomentumCycle>,
    },
    /// Rises from `min_lr` without end: `min_lr * (1 + step_rate * steps / step_size)`.
    ///
    /// # Source
    /// DeepSpeed's `LRRangeTest` (arXiv:1803.09820).
    RangeTest {
        /// The rate of the first step.
        min_lr: f64,
        /// Steps in which the rate rises by `step_rate * min_lr`.
        step_size: u64,
        /// By how much it rises, in units of `min_lr`.
        step_rate: f64,
        /// Whether it rises at every step or in stairs of `step_size` steps.
        rise: Rise,
    },
    /// Rises from 0 to `lr`, then stays.
    ///
    /// # Source
    /// `constant_with_warmup` of the `transformers` package.
    ConstantWithWarmup {
        /// The rate after warm-up.
        lr: f64,
        /// The length of the warm-up in steps.
        warmup_steps: u64,
    },
    /// Rises from 0 to `lr`, then falls by equal amounts to `min_lr`, and stays.
    ///
    /// # Source
    /// `linear` of the `transformers` package, which ends at 0.
    Linear {
        /// The rate after warm-up.
        lr: f64,
        /// The rate from `total_steps` on.
        min_lr: f64,
        /// The length of the warm-up in steps.
        warmup_steps: u64,
        /// Steps until the rate is `min_lr`.
        total_steps: u64,
    },
    /// Rises from 0 to `lr`, then falls along half a cosine to `min_lr`, and stays.
    ///
    /// # Source
    /// `cosine` and `cosine_with_min_lr` of the `transformers` package, whose cosine rises again past `total_steps`; ours
    /// does not.
    Cosine {
        /// The rate after warm-up.
        lr: f64,
        /// The rate from `total_steps` on.
        min_lr: f64,
        /// The length of the warm-up in steps.
        warmup_steps: u64,
        /// Steps until the rate is `min_lr`.
        total_steps: u64,
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

/// How the rate rises in a range test.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Rise {
    /// At every step.
    Continuous,
    /// In stairs.
    Staircase,
}

/// The momentum of a [`LrSchedule::OneCycle`]: it falls from `max` to `min` while the rate rises, and comes back.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct MomentumCycle {
    /// The momentum between the halves of the cycle, and of the very first step.
    pub min: f64,
    /// The momentum at the ends of the cycle.
    pub max: f64,
    /// After the cycle, `max` is multiplied by `1 + decay * steps / decay_steps`.
    pub decay: f64,
}

impl WarmupCurve {
    /// How much of the way is done at `t` of `length` steps.
    fn risen(self, t: f64, length: f64) -> f64 {
        match self {
            WarmupCurve::Linear => t / length,
            WarmupCurve::Log => (t + 1.0).ln() / length.ln(),
        }
    }
}

impl LrSchedule {
    /// The rate of the step that follows `applied_steps` applied ones.
    pub fn lr(&self, applied_steps: u64) -> f64 {
        let step = applied_steps as f64;
        // Where DeepSpeed's warm-ups stand: they do not move with the first step.
        let t = applied_steps.saturating_sub(1) as f64;
        match *self {
            LrSchedule::Constant { lr } => lr,
            LrSchedule::Warmup { min_lr, max_lr, num_steps, curve } => {
                let length = num_steps.max(2) as f64;
                if t < length { min_lr + (max_lr - min_lr) * curve.risen(t, length) } else { max_lr }
            }
            LrSchedule::WarmupDecay { min_lr, max_lr, num_steps, total_steps, curve } => {
                let (length, total) = (num_steps.max(2) as f64, total_steps as f64);
                let part = if t < length {
                    curve.risen(t, length)
                } else {
                    ((total - t) / (total - length).max(1.0)).max(0.0)
                };
                min_lr + (max_lr - min_lr) * part
            }
            LrSchedule::WarmupCosine { .. } if applied_steps == 0 => 0.0,
            LrSchedule::WarmupCosine {
                lr,
                warmup_min_ratio,
                cos_min_ratio,
                num_steps,
                total_steps,
                curve,
            } => {
                let length = num_steps.max(2) as f64;
                if t < length {
                    return lr * (warmup_min_ratio + (1.0 - warmup_min_ratio) * curve.risen(t, length));
                }
                let progress = (t - length + 1.0) / (total_steps as f64 - length).max(1.0);
                lr * (cos_min_ratio + (1.0 - cos_min_ratio) * half_cosine(progress)).max(0.0)
            }
            LrSchedule::OneCycle {
                min_lr, max_lr, first_steps, second_steps, lr_decay, decay_steps, ..
            } => {
                let cycle = first_steps + second_steps;
                if applied_steps <= cycle {
                    return min_lr + (max_lr - min_lr) * self.cycle_height(applied_steps);
                }
                let past = (applied_steps - cycle) as f64;
                if decay_steps == 0 { min_lr } else { min_lr / (1.0 + lr_decay * past / decay_steps as f64) }
            }
            LrSchedule::RangeTest { min_lr, step_size, step_rate, rise } => {
                let units = match rise {
                    Rise::Continuous => step / step_size as f64,
                    Rise::Staircase => (applied_steps / step_size) as f64,
                };
                min_lr * (1.0 + step_rate * units)
            }
            LrSchedule::ConstantWithWarmup { lr, warmup_steps }
            | LrSchedule::Linear { lr, warmup_steps, .. }
            | LrSchedule::Cosine { lr, warmup_steps, .. }
                if applied_steps < warmup_steps =>
            {
                lr * (step / warmup_steps as f64)
            }
            LrSchedule::ConstantWithWarmup { lr, .. } => lr,
            LrSchedule::Linear { lr, min_lr, warmup_steps, total_steps } => {
                min_lr + (lr - min_lr) * (1.0 - progress(applied_steps, warmup_steps, total_steps))
            }
            LrSchedule::Cosine { lr, min_lr, warmup_steps, total_steps } => {
                min_lr + (lr - min_lr) * half_cosine(progress(applied_steps, warmup_steps, total_steps))
            }
        }
    }

    /// The momentum of the step that follows `applied_steps` applied ones, where the schedule moves it: the first of the betas of
    /// an optimizer that has them, else its momentum.
    ///
    /// # Source
    /// DeepSpeed's `OneCycle`. Its constructor sets the lower end, though the cycle starts at the upper one, so the very first
    /// step runs with `min`.
    pub fn momentum(&self, applied_steps: u64) -> Option<f64> {
        let LrSchedule::OneCycle { first_steps, second_steps, decay_steps, momentum, .. } = *self else {
            return None;
        };
        let MomentumCycle { min, max, decay } = momentum?;
        let cycle = first_steps + second_steps;
        Some(match applied_steps {
            0 => min,
            step if step <= cycle => max - (max - min) * self.cycle_height(step),
            _ if decay_steps == 0 => max,
            step => max * (1.0 + decay * (step - cycle) as f64 / decay_steps as f64),
        })
    }

    /// The rate that the schedule is named by: after warm-up, or at the top of the cycle. Parameter groups with a rate of their
    /// own are in proportion to it.
    pub fn peak_lr(&self) -> f64 {
        match *self {
            LrSchedule::Constant { lr }
            | LrSchedule::WarmupCosine { lr, .. }
            | LrSchedule::ConstantWithWarmup { lr, .. }
            | LrSchedule::Linear { lr, .. }
            | LrSchedule::Cosine { lr, .. } => lr,
            LrSchedule::Warmup { max_lr, .. }
            | LrSchedule::WarmupDecay { max_lr, .. }
            | LrSchedule::OneCycle { max_lr, .. } => max_lr,
            LrSchedule::RangeTest { min_lr, .. } => min_lr,
        }
    }

    /// How high a cycle stands `step` steps into it, from 0 to 1. A half with stairs takes the stair it is on.
    fn cycle_height(&self, step: u64) -> f64 {
        let LrSchedule::OneCycle { first_steps, second_steps, first_stairs, second_stairs, .. } = *self
        else {
            return 0.0;
        };
        let rising = step <= first_steps;
        let (done, of, stairs) = if rising {
            (step, first_steps, first_stairs)
        } else {
            (first_steps + second_steps - step, second_steps, second_stairs)
        };
        // A cycle without a falling half is at its start again when it would be at its top.
        if done == of && (rising && second_steps == 0) {
            return 0.0;
        }
        match stairs {
            0 => done as f64 / of as f64,
            // In whole numbers, so that no stair is missed by a rounding.
            _ => (u128::from(done) * u128::from(stairs) / u128::from(of)) as f64 / stairs as f64,
        }
    }
}

/// From 1 to 0 while `progress` goes from 0 to 1, and 0 from there on.
fn half_cosine(progress: f64) -> f64 {
    (1.0 + (PI * progress.min(1.0)).cos()) / 2.0
}

/// How much of the way from the end of warm-up to `total_steps` is done.
fn progress(step: u64, warmup_steps: u64, total_steps: u64) -> f64 {
    let length = total_steps.saturating_sub(warmup_steps).max(1) as f64;
    (step.saturating_sub(warmup_steps) as f64 / length).min(1.0)
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

    /// Any schedule that the configuration lets through, with rates up to about `1e-2`.
    fn any_schedule() -> impl Strategy<Value = LrSchedule> {
        let curve = prop::sample::select(vec![WarmupCurve::Linear, WarmupCurve::Log]);
        let rise = prop::sample::select(vec![Rise::Continuous, Rise::Staircase]);
        let (low, high, steps, few, ratio) = (0.0..1e-3f64, 1e-3..1e-2f64, 1u64..300, 0u64..60, 0.0..1.0f64);
        (0usize..9, low, high, steps.clone(), few, (few_pair(), ratio.clone(), ratio), curve, rise).prop_map(
            |(kind, min_lr, max_lr, total_steps, num_steps, ((a, b), p, q), curve, rise)| match kind {
                0 => LrSchedule::Constant { lr: max_lr },
                1 => LrSchedule::Warmup { min_lr, max_lr, num_steps, curve },
                2 => LrSchedule::WarmupDecay { min_lr, max_lr, num_steps, total_steps, curve },
                3 => {
                    let (warmup_min_ratio, cos_min_ratio) = (p, q);
                    LrSchedule::WarmupCosine {
                        lr: max_lr,
                        warmup_min_ratio,
                        cos_min_ratio,
                        num_steps,
                        total_steps,
                        curve,
                    }
                }
                4 => LrSchedule::OneCycle {
                    min_lr,
                    max_lr,
                    first_steps: total_steps,
                    second_steps: num_steps,
                    first_stairs: a,
                    second_stairs: b,
                    lr_decay: p,
                    decay_steps: a,
                    momentum: Some(MomentumCycle { min: 0.5 * q, max: q, decay: 0.0 }),
                },
                5 => LrSchedule::RangeTest { min_lr, step_size: total_steps, step_rate: p, rise },
                6 => LrSchedule::ConstantWithWarmup { lr: max_lr, warmup_steps: num_steps },
                7 => LrSchedule::Linear { lr: max_lr, min_lr, warmup_steps: num_steps, total_steps },
                _ => LrSchedule::Cosine { lr: max_lr, min_lr, warmup_steps: num_steps, total_steps },
            },
        )
    }

    fn few_pair() -> impl Strategy<Value = (u64, u64)> {
        (0u64..8, 0u64..8)
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

        #[test]
        fn rates_stay_between_nothing_and_the_peak(schedule in any_schedule(), step in 0u64..2000) {
            let lr = schedule.lr(step);
            let peak = match schedule {
                LrSchedule::RangeTest { .. } => f64::MAX,
                _ => schedule.peak_lr() * (1.0 + 1e-12),
            };
            prop_assert!((0.0..=peak).contains(&lr), "{:?} at {}: {}", schedule, step, lr);
            if let Some(momentum) = schedule.momentum(step) {
                prop_assert!((0.0..1.0).contains(&momentum));
            }
        }
    }
}
