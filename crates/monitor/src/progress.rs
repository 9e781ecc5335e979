//! Where a run is, for people.
//!
//! On a terminal one live line: a spinner with the phase before the first step, then a bar with step, loss,
//! throughput, memory and the time left. Elsewhere (a file, a pipe, CI) plain lines at a pace that fits the run's
//! length. Both draw the same [`step_line`]; nothing is told by colour.

use std::collections::VecDeque;
use std::io::Write;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::text::{format_count, format_duration, format_mib};
use crate::{Outcome, StepMetrics};

/// How many of the last steps set the pace.
const PACE_STEPS: usize = 20;
/// Up to this many steps every one is printed; of longer runs this many lines.
const PLAIN_LINES: u64 = 20;

/// The line that shows one step; `total` is the last step of the run.
pub fn step_line(metrics: &StepMetrics, total: u64, left: Option<Duration>) -> String {
    let norm = format!("norm {:.3}", metrics.grad_norm);
    join_fields(metrics, total, Some(norm), left)
}

/// The same beside a bar: an ordinary screen has 80 columns, and the time left must be among them.
fn live_line(metrics: &StepMetrics, total: u64, left: Option<Duration>) -> String {
    join_fields(metrics, total, None, left)
}

fn join_fields(metrics: &StepMetrics, total: u64, norm: Option<String>, left: Option<Duration>) -> String {
    let width = total.max(metrics.step).to_string().len();
    let mut fields =
        vec![format!("step {:>width$}/{total}", metrics.step), format!("loss {:.4}", metrics.loss)];
    fields.extend(norm);
    fields.push(format!("{} tokens/s", format_count(metrics.tokens_per_s.max(0.0) as u64)));
    fields.push(format_mib(metrics.peak_rss_mb));
    fields.extend(metrics.device_peak_mb.map(|device| format!("device {}", format_mib(device))));
    if metrics.outcome == Outcome::Skipped {
        fields.push("skipped".to_owned());
    }
    fields.extend(left.map(|left| format!("{} left", format_duration(left))));
    fields.join("  ")
}

/// The time a run still needs, from its last steps.
#[derive(Debug, Clone, Default)]
pub struct Pace {
    recent_s: VecDeque<f64>,
    seen: usize,
}

impl Pace {
    /// Takes the time of one more step.
    pub fn push(&mut self, step_s: f64) {
        // The first step warms up caches and allocators: as soon as there is another, it says nothing.
        if self.seen == 1 || self.recent_s.len() == PACE_STEPS {
            self.recent_s.pop_front();
        }
        self.recent_s.push_back(step_s);
        self.seen += 1;
    }

    /// How long `steps` more take; `None` before the first step, and after the last.
    pub fn left(&self, steps: u64) -> Option<Duration> {
        let mean = self.recent_s.iter().sum::<f64>() / self.recent_s.len() as f64;
        (steps > 0).then(|| Duration::try_from_secs_f64(mean * steps as f64).ok()).flatten()
    }
}

/// Which steps get a plain line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PrintEvery {
    /// All of a short run, about twenty of a long one.
    Auto,
    /// Every so many steps.
    Steps(u64),
}

impl PrintEvery {
    /// Whether a step gets a line. The first and the last do, and every one that people must not miss.
    pub fn prints(self, metrics: &StepMetrics, first: u64, total: u64) -> bool {
        let every = match self {
            PrintEvery::Steps(steps) => steps.max(1),
            PrintEvery::Auto => (total / PLAIN_LINES).max(1),
        };
        metrics.step == first
            || metrics.step >= total
            || metrics.step.is_multiple_of(every)
            || metrics.outcome == Outcome::Skipped
            || !metrics.loss.is_finite()
            || !metrics.grad_norm.is_finite()
    }
}

/// Shows one run, live or as plain lines.
pub struct Progress {
    view: View,
    total: u64,
    pace: Pace,
    first: Option<u64>,
}

enum View {
    Live { bar: ProgressBar, spinning: bool, last: Option<String> },
    Plain { out: Box<dyn Write + Send>, every: PrintEvery },
}

impl Progress {
    /// A live line on the terminal behind standard error.
    pub fn live(total_steps: u64) -> Self {
        Self::live_on(total_steps, ProgressDrawTarget::stderr())
    }

    fn live_on(total_steps: u64, target: ProgressDrawTarget) -> Self {
        let bar = ProgressBar::with_draw_target(Some(total_steps), target).with_style(spinner_style());
        Self::with_view(total_steps, View::Live { bar, spinning: true, last: None })
    }

    /// Plain lines on `out`.
    pub fn plain(total_steps: u64, every: PrintEvery, out: impl Write + Send + 'static) -> Self {
        Self::with_view(total_steps, View::Plain { out: Box::new(out), every })
    }

    fn with_view(total: u64, view: View) -> Self {
        Progress { view, total, pace: Pace::default(), first: None }
    }

    /// The run has begun something that is not a step.
    pub fn phase(&mut self, phase: &str) {
        match &mut self.view {
            View::Live { bar, spinning, .. } => {
                bar.set_message(phase.to_owned());
                if *spinning {
                    bar.enable_steady_tick(Duration::from_millis(120));
                }
            }
            View::Plain { out, .. } => print(out, phase),
        }
    }

    /// A step is complete.
    pub fn step(&mut self, metrics: &StepMetrics) {
        let first = *self.first.get_or_insert(metrics.step);
        self.pace.push(metrics.step_s);
        let left = self.pace.left(self.total.saturating_sub(metrics.step));
        match &mut self.view {
            View::Live { bar, spinning, last } => {
                if std::mem::take(spinning) {
                    bar.disable_steady_tick();
                    bar.set_style(bar_style());
                }
                bar.set_position(metrics.step);
                bar.set_message(live_line(metrics, self.total, left));
                *last = Some(step_line(metrics, self.total, None));
            }
            View::Plain { out, every } => {
                if every.prints(metrics, first, self.total) {
                    print(out, &step_line(metrics, self.total, left));
                }
            }
        }
    }

    /// Something people should know: stays on screen above the live line.
    pub fn note(&mut self, text: &str) {
        match &mut self.view {
            View::Live { bar, .. } => bar.suspend(|| print(&mut std::io::stderr(), text)),
            View::Plain { out, .. } => print(out, text),
        }
    }

    /// Takes the live line off the screen, and leaves the last step in its place.
    pub fn finish(&mut self) {
        if let View::Live { bar, last, .. } = &mut self.view {
            bar.finish_and_clear();
            if let Some(line) = last.take() {
                print(&mut std::io::stderr(), &line);
            }
        }
    }
}

/// A reader of progress that went away is no reason to stop a run.
fn print(out: &mut dyn Write, line: &str) {
    let _ = out.write_all(format!("{line}\n").as_bytes()).and_then(|()| out.flush());
}

fn spinner_style() -> ProgressStyle {
    ProgressStyle::with_template("{spinner} {wide_msg} {elapsed}").expect("a fixed template")
}

fn bar_style() -> ProgressStyle {
    ProgressStyle::with_template("{bar:10} {wide_msg}").expect("a fixed template").progress_chars("=> ")
}

impl std::fmt::Debug for Progress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let view = match self.view {
            View::Live { .. } => "live",
            View::Plain { .. } => "plain",
        };
        f.debug_struct("Progress").field("view", &view).field("total", &self.total).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use indicatif::InMemoryTerm;

    use super::*;
    use crate::metrics::tests::example;

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn plain_lines(total: u64, every: PrintEvery, steps: impl Iterator<Item = StepMetrics>) -> Vec<String> {
        let out = Shared::default();
        let mut progress = Progress::plain(total, every, out.clone());
        steps.for_each(|metrics| progress.step(&metrics));
        progress.finish();
        let bytes = out.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap().lines().map(str::to_owned).collect()
    }

    #[test]
    fn a_step_in_words() {
        let line = step_line(&example(7), 300, Some(Duration::from_secs(80)));
        assert_eq!(line, "step   7/300  loss 5.5000  norm 1.250  8,192 tokens/s  812 MiB  1m 20s left");
        let odd = StepMetrics {
            loss: f64::NAN,
            grad_norm: f64::INFINITY,
            outcome: Outcome::Skipped,
            tokens_per_s: f64::NAN,
            device_peak_mb: Some(2048.0),
            ..example(1)
        };
        assert_eq!(
            step_line(&odd, 1, None),
            "step 1/1  loss NaN  norm inf  0 tokens/s  812 MiB  device 2.00 GiB  skipped"
        );
    }

    #[test]
    fn a_live_line_fits_an_ordinary_screen() {
        let usual = live_line(&example(7), 300, Some(Duration::from_secs(80)));
        assert_eq!(usual, "step   7/300  loss 5.5000  8,192 tokens/s  812 MiB  1m 20s left");
        let large = StepMetrics { tokens_per_s: 12_345.0, peak_rss_mb: 12_345.0, ..example(1234) };
        let line = live_line(&large, 3000, Some(Duration::from_secs(725)));
        assert!("=====>     ".len() + line.len() <= 80, "{line}");
    }

    #[test]
    fn the_pace_forgets_the_first_step_and_old_ones() {
        let mut pace = Pace::default();
        assert_eq!(pace.left(3), None);
        pace.push(10.0);
        assert_eq!(pace.left(3), Some(Duration::from_secs(30)));
        pace.push(2.0);
        assert_eq!(pace.left(3), Some(Duration::from_secs(6)));
        (0..PACE_STEPS).for_each(|_| pace.push(1.0));
        assert_eq!(pace.left(3), Some(Duration::from_secs(3)));
        assert_eq!(pace.left(0), None);
        pace.push(f64::INFINITY);
        assert_eq!(pace.left(1), None);
    }

    #[test]
    fn short_runs_print_every_step_and_long_ones_twenty() {
        assert_eq!(plain_lines(20, PrintEvery::Auto, (1..=20).map(example)).len(), 20);
        let lines = plain_lines(1000, PrintEvery::Auto, (1..=1000).map(example));
        assert_eq!(lines.len(), 21);
        assert!(
            lines[0].starts_with("step    1/1000") && lines[20].starts_with("step 1000/1000"),
            "{lines:?}"
        );
        let chosen = plain_lines(10, PrintEvery::Steps(4), (1..=10).map(example));
        let steps: Vec<_> = chosen.iter().map(|line| line.split("  loss").next().unwrap()).collect();
        assert_eq!(steps, ["step  1/10", "step  4/10", "step  8/10", "step 10/10"]);
    }

    #[test]
    fn steps_that_matter_are_never_left_out() {
        let odd = |step| match step {
            33 => StepMetrics { outcome: Outcome::Skipped, ..example(step) },
            44 => StepMetrics { loss: f64::NAN, ..example(step) },
            _ => example(step),
        };
        let lines = plain_lines(100, PrintEvery::Steps(100), (30..=60).map(odd));
        assert_eq!(lines.len(), 3, "{lines:?}");
        assert!(
            lines[0].starts_with("step  30") && lines[1].ends_with("left") && lines[1].contains("skipped")
        );
    }

    #[test]
    fn a_terminal_shows_phase_then_bar() {
        let term = InMemoryTerm::new(10, 80);
        let mut progress = Progress::live_on(10, ProgressDrawTarget::term_like(Box::new(term.clone())));
        progress.phase("loading model");
        if let View::Live { bar, .. } = &progress.view {
            bar.tick();
        }
        assert!(term.contents().contains("loading model"), "{}", term.contents());
        progress.step(&example(5));
        if let View::Live { bar, .. } = &progress.view {
            bar.tick();
        }
        let screen = term.contents();
        assert!(screen.starts_with("=====>     step  5/10  loss 5.5000"), "{screen}");
        assert!(screen.ends_with("2.5s left") && !screen.contains("loading model"), "{screen}");
        progress.finish();
        assert_eq!(term.contents(), "");
    }

    #[test]
    fn a_spinner_leaves_nothing_behind() {
        let term = InMemoryTerm::new(10, 80);
        let mut progress = Progress::live_on(10, ProgressDrawTarget::term_like(Box::new(term.clone())));
        progress.phase("loading model");
        progress.finish();
        assert_eq!(term.contents(), "");
    }
}
