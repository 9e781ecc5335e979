//! The loss scale: by how much gradients are enlarged so that 16 bits with five bits of exponent can hold them.
//!
//! A caller starts each backward pass with [`crate::Zero::loss_scale`] as the gradient of the loss, and the step divides
//! by it again. [`LossScaler`] decides what the scale is next. It knows nothing but whether each step's gradient was
//! finite, which all ranks find together, so all ranks keep the same scale without talking about it.
//!
//! ```text
//! window 2, hysteresis 2        x: not finite, skipped
//! step    1    2    3    4x   5x   6    7    8    9x
//! scale   16   16   16   32   32   16   16   16   32
//! after             x2   -    /2             x2   -
//!                        free                     free again: doubling refills the hysteresis
//! ```
//!
//! # Source
//! DeepSpeed's ZeRO optimizers (`DynamicLossScaler`), whose rules hold here in every stage. To know: the scale doubles
//! with the `window + 1`th clean step after an overflow or the start, then each `window` clean steps; a clean step alone
//! does not refill the hysteresis; there is no largest scale. Theirs ends the process at the smallest scale; here
//! the caller is told ([`Verdict::AtMinimum`]).

/// How the loss scale is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum LossScaling {
    /// Always this.
    Static(f64),
    /// Found on the way.
    Dynamic(DynamicLossScale),
}

/// The rules of a dynamic loss scale.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DynamicLossScale {
    /// The first scale is 2 to this power.
    pub initial_power: u32,
    /// Clean steps after which the scale doubles.
    pub window: u64,
    /// The overflow that halves the scale; those before it are free.
    pub hysteresis: u32,
    /// When free overflows are free again.
    pub refill: HysteresisRefill,
    /// Below this the scale never goes. An overflow here ends the training.
    pub min_scale: f64,
}

impl Default for DynamicLossScale {
    fn default() -> Self {
        let refill = HysteresisRefill::default();
        DynamicLossScale { initial_power: 16, window: 1000, hysteresis: 2, refill, min_scale: 1.0 }
    }
}

/// When overflows that change nothing are granted again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum HysteresisRefill {
    /// Whenever the scale doubles.
    #[default]
    WithWindow,
    /// After each clean step, so that only overflows in a row count (`consecutive_hysteresis`).
    WithCleanStep,
}

/// What all ranks found of a step's gradient.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// Every element is finite.
    Finite,
    /// Some element is infinite or not a number.
    NonFinite,
}

/// Whether the scale has anywhere to go.
#[must_use]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Yes.
    GoOn,
    /// The gradient is not finite at the smallest scale.
    AtMinimum,
}

/// All that a scaler remembers, to be saved and restored.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LossScalerState {
    /// The scale of the next step.
    pub scale: f64,
    /// Steps so far, skipped ones included.
    pub iter: u64,
    /// The last step with an overflow, counted from 0.
    pub last_overflow_iter: Option<u64>,
    /// Overflows until the scale halves.
    pub hysteresis_left: u32,
    /// Skipped steps so far.
    pub num_skipped: u64,
    /// Skipped steps since the last that was applied.
    pub num_consecutive_skips: u64,
}

/// The state machine: [`LossScaler::scale`] before a step, [`LossScaler::update`] after it.
#[derive(Debug, Clone, PartialEq)]
pub struct LossScaler {
    scaling: LossScaling,
    state: LossScalerState,
}

impl LossScaler {
    /// Before the first step.
    pub fn new(scaling: LossScaling) -> Self {
        let (scale, hysteresis_left) = match scaling {
            LossScaling::Static(scale) => (scale, 0),
            LossScaling::Dynamic(rules) => (f64::from(rules.initial_power).exp2(), rules.hysteresis),
        };
        let state = LossScalerState {
            scale,
            iter: 0,
            last_overflow_iter: None,
            hysteresis_left,
            num_skipped: 0,
            num_consecutive_skips: 0,
        };
        LossScaler { scaling, state }
    }

    /// The scale of the step that comes.
    pub fn scale(&self) -> f64 {
        self.state.scale
    }

    /// What it remembers.
    pub fn state(&self) -> &LossScalerState {
        &self.state
    }

    /// Goes on from a saved state. A static scale stays what the options say.
    pub fn restore(&mut self, state: LossScalerState) {
        self.state = state;
        if let LossScaling::Static(scale) = self.scaling {
            self.state.scale = scale;
        }
    }

    /// The last step that was applied, counted from 1 with skipped ones; 0 if there was none.
    pub fn last_applied_step(&self) -> u64 {
        self.state.iter - self.state.num_consecutive_skips
    }

    /// Ends a step: what was not finite was skipped.
    pub fn update(&mut self, found: Found) -> Verdict {
        let verdict = match self.scaling {
            LossScaling::Static(_) => Verdict::GoOn,
            LossScaling::Dynamic(rules) => self.adapt(&rules, found),
        };
        let state = &mut self.state;
        match found {
            Found::Finite => state.num_consecutive_skips = 0,
            Found::NonFinite => {
                state.num_skipped += 1;
                state.num_consecutive_skips += 1;
                state.last_overflow_iter = Some(state.iter);
            }
        }
        state.iter += 1;
        verdict
    }

    fn adapt(&mut self, rules: &DynamicLossScale, found: Found) -> Verdict {
        let state = &mut self.state;
        match found {
            Found::NonFinite if state.hysteresis_left > 1 => state.hysteresis_left -= 1,
            Found::NonFinite if state.scale <= rules.min_scale => return Verdict::AtMinimum,
            Found::NonFinite => state.scale = (state.scale / 2.0).max(rules.min_scale),
            Found::Finite => {
                // Clean steps before this one, since the last overflow or the start.
                let num_clean = state.last_overflow_iter.map_or(state.iter, |last| state.iter - last - 1);
                let is_window = num_clean > 0 && num_clean.is_multiple_of(rules.window);
                if is_window {
                    state.scale *= 2.0;
                }
                if is_window || rules.refill == HysteresisRefill::WithCleanStep {
                    state.hysteresis_left = rules.hysteresis;
                }
            }
        }
        Verdict::GoOn
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn dynamic(initial_power: u32, window: u64, hysteresis: u32) -> DynamicLossScale {
        DynamicLossScale { initial_power, window, hysteresis, ..DynamicLossScale::default() }
    }

    /// The scale of the step after each of `steps`, `x` for an overflow and `.` for none.
    fn scales(rules: DynamicLossScale, steps: &str) -> Vec<f64> {
        let mut scaler = LossScaler::new(LossScaling::Dynamic(rules));
        let found = |step| if step == 'x' { Found::NonFinite } else { Found::Finite };
        let mut next = |step| {
            assert_eq!(scaler.update(found(step)), Verdict::GoOn);
            scaler.scale()
        };
        steps.chars().map(&mut next).collect()
    }

    #[test]
    fn without_overflow_the_scale_doubles_after_window_plus_one_steps_and_then_each_window() {
        assert_eq!(
            scales(dynamic(8, 2, 2), ".........."),
            [256.0, 256.0, 512.0, 512.0, 1024.0, 1024.0, 2048.0, 2048.0, 4096.0, 4096.0]
        );
        assert_eq!(scales(dynamic(8, 1, 2), "..."), [256.0, 512.0, 1024.0]);
    }

    #[test]
    fn each_overflow_halves_down_to_the_minimum() {
        let down: Vec<_> = (0..8).rev().map(|power| f64::from(power).exp2()).collect();
        assert_eq!(scales(dynamic(8, 2, 1), "xxxxxxxx"), down);
        let odd = DynamicLossScale { min_scale: 3.0, ..dynamic(4, 2, 1) };
        assert_eq!(scales(odd, "xxx"), [8.0, 4.0, 3.0]);
    }

    #[test]
    fn overflows_and_clean_steps_in_turn() {
        assert_eq!(scales(dynamic(8, 2, 1), "xx...x"), [128.0, 64.0, 64.0, 64.0, 128.0, 64.0]);
    }

    #[test]
    fn free_overflows_come_back_with_the_window_or_with_each_clean_step() {
        // The example at the head of this file.
        let found = scales(dynamic(4, 2, 2), "...xx...x");
        assert_eq!(found, [16.0, 16.0, 32.0, 32.0, 16.0, 16.0, 16.0, 32.0, 32.0]);
        // One clean step between overflows: nothing is refilled ...
        assert_eq!(scales(dynamic(4, 9, 2), "x.x.x."), [16.0, 16.0, 8.0, 8.0, 4.0, 4.0]);
        // ... unless it is asked for.
        let refill = HysteresisRefill::WithCleanStep;
        let consecutive = DynamicLossScale { refill, ..dynamic(4, 9, 2) };
        assert_eq!(scales(consecutive, "x.x.xx"), [16.0, 16.0, 16.0, 16.0, 16.0, 8.0]);
    }

    #[test]
    fn at_the_minimum_an_overflow_is_the_end_but_for_free_ones() {
        let mut scaler = LossScaler::new(LossScaling::Dynamic(dynamic(0, 5, 2)));
        assert_eq!(scaler.update(Found::Finite), Verdict::GoOn);
        assert_eq!(scaler.update(Found::NonFinite), Verdict::GoOn);
        assert_eq!(scaler.update(Found::NonFinite), Verdict::AtMinimum);
        assert_eq!((scaler.scale(), scaler.last_applied_step()), (1.0, 1));
        assert_eq!((scaler.state().num_skipped, scaler.state().num_consecutive_skips), (2, 2));
    }

    #[test]
    fn a_static_scale_never_moves_and_counts() {
        let mut scaler = LossScaler::new(LossScaling::Static(128.0));
        for found in [Found::Finite, Found::NonFinite, Found::NonFinite] {
            assert_eq!((scaler.update(found), scaler.scale()), (Verdict::GoOn, 128.0));
        }
        assert_eq!((scaler.state().iter, scaler.state().num_skipped, scaler.last_applied_step()), (3, 2, 1));
        let saved = *scaler.state();
        let mut other = LossScaler::new(LossScaling::Static(64.0));
        other.restore(saved);
        assert_eq!(*other.state(), LossScalerState { scale: 64.0, ..saved });
    }

    /// The rules told as a function of the whole history: no counters that are kept, all is looked up again.
    fn model(rules: &DynamicLossScale, history: &[Found]) -> (f64, Verdict) {
        let mut scale = f64::from(rules.initial_power).exp2();
        // Overflows since the hysteresis was last full, of which all but the last `hysteresis - 1` halve.
        let mut num_since_full = 0;
        for (now, &found) in history.iter().enumerate() {
            let previous = history[..now].iter().rposition(|&earlier| earlier == Found::NonFinite);
            // Clean steps before this one, since the last overflow or the start.
            let num_clean = match previous {
                Some(at) => now - at - 1,
                None => now,
            };
            let doubles = num_clean > 0 && (num_clean as u64).is_multiple_of(rules.window);
            match found {
                Found::Finite => {
                    if doubles {
                        scale *= 2.0;
                    }
                    if doubles || rules.refill == HysteresisRefill::WithCleanStep {
                        num_since_full = 0;
                    }
                }
                Found::NonFinite => {
                    num_since_full += 1;
                    if num_since_full >= rules.hysteresis {
                        if scale == rules.min_scale {
                            return (scale, Verdict::AtMinimum);
                        }
                        scale = f64::max(scale * 0.5, rules.min_scale);
                    }
                }
            }
        }
        (scale, Verdict::GoOn)
    }

    fn history() -> impl Strategy<Value = Vec<Found>> {
        let found = prop_oneof![3 => Just(Found::Finite), 1 => Just(Found::NonFinite)];
        prop::collection::vec(found, 0..120)
    }

    proptest! {
        #[test]
        fn any_history_gives_the_scale_of_the_model(
            history in history(),
            initial_power in 3u32..12,
            window in 1u64..6,
            hysteresis in 1u32..4,
            refill in prop::sample::select(vec![HysteresisRefill::WithWindow, HysteresisRefill::WithCleanStep]),
            min_scale in prop::sample::select(vec![0.25, 1.0, 3.0, 8.0]),
            saved_after in 0usize..120,
        ) {
            let rules = DynamicLossScale { initial_power, window, hysteresis, refill, min_scale };
            let mut scaler = LossScaler::new(LossScaling::Dynamic(rules));
            let mut num_skipped = 0;
            for (i, &found) in history.iter().enumerate() {
                if i == saved_after {
                    let mut resumed = LossScaler::new(LossScaling::Dynamic(rules));
                    resumed.restore(*scaler.state());
                    scaler = resumed;
                }
                let verdict = scaler.update(found);
                let so_far = &history[..=i];
                prop_assert_eq!((scaler.scale(), verdict), model(&rules, so_far), "{:?}", so_far);
                num_skipped += u64::from(found == Found::NonFinite);
                let in_a_row = so_far.iter().rev().take_while(|&&found| found == Found::NonFinite).count();
                prop_assert_eq!(scaler.state().num_skipped, num_skipped);
                prop_assert_eq!(scaler.state().num_consecutive_skips, in_a_row as u64);
                prop_assert_eq!(scaler.last_applied_step(), (so_far.len() - in_a_row) as u64);
                if verdict == Verdict::AtMinimum {
                    return Ok(());
                }
            }
        }
    }
}
