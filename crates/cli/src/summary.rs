//! The last words of a run: what it reached and where it left it.

use std::time::Duration;

use shardwise_monitor::{Outcome, RunDir, StepMetrics, format_count, format_duration, format_mib};

/// What the steps of a run add up to.
#[derive(Debug, Default)]
pub struct Summary {
    ends: Option<(StepMetrics, StepMetrics)>,
    tokens_per_s: Vec<f64>,
    num_skipped: u64,
    sample: Option<String>,
}

impl Summary {
    pub fn step(&mut self, metrics: &StepMetrics) {
        self.tokens_per_s.push(metrics.tokens_per_s);
        self.num_skipped += u64::from(metrics.outcome == Outcome::Skipped);
        match &mut self.ends {
            None => self.ends = Some((metrics.clone(), metrics.clone())),
            Some((_, last)) => last.clone_from(metrics),
        }
    }

    pub fn sample(&mut self, text: &str) {
        self.sample = Some(text.to_owned());
    }

    /// The last step that is complete, 0 if none is.
    pub fn last_step(&self) -> u64 {
        self.ends.as_ref().map_or(0, |(_, last)| last.step)
    }

    /// The whole text, for a run that took `elapsed`.
    pub fn text(&self, run: &RunDir, elapsed: Duration) -> String {
        let mut text = String::new();
        if let Some((first, last)) = &self.ends {
            text += &format!(
                "{} steps in {}: loss {:.4} -> {:.4}, {} tokens/s (median), peak memory {} a rank\n",
                self.tokens_per_s.len(),
                format_duration(elapsed),
                first.loss,
                last.loss,
                format_count(self.median_tokens_per_s().max(0.0) as u64),
                format_mib(last.peak_rss_mb),
            );
        }
        if self.num_skipped > 0 {
            text += &format!("{} of them skipped, as gradients were not finite\n", self.num_skipped);
        }
        text += &places(run);
        if let Some(sample) = &self.sample {
            text += &format!("sample:\n{}\n", sample.trim_end());
        }
        text
    }

    fn median_tokens_per_s(&self) -> f64 {
        let mut sorted = self.tokens_per_s.clone();
        sorted.sort_by(f64::total_cmp);
        sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
    }
}

/// What the folder holds, as commands and paths that can be copied.
fn places(run: &RunDir) -> String {
    let mut text = String::new();
    let mut line = |what: &str, place: String| text += &format!("  {what:<12} {place}\n");
    if run.model().is_dir() {
        line("model", run.model().display().to_string());
    }
    if run.checkpoints().is_dir() {
        line("checkpoints", run.checkpoints().display().to_string());
    }
    if run.metrics().is_file() {
        line("metrics", run.metrics().display().to_string());
    }
    if run.event_files().is_ok_and(|files| !files.is_empty()) {
        line("TensorBoard", format!("tensorboard --logdir {}", run.path().display()));
    }
    line("logs", run.ranks().display().to_string());
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metrics(step: u64, loss: f64, tokens_per_s: f64) -> StepMetrics {
        StepMetrics {
            step,
            loss,
            grad_norm: 1.0,
            lr: 0.1,
            loss_scale: None,
            outcome: if step == 2 { Outcome::Skipped } else { Outcome::Applied },
            tokens: 10,
            tokens_per_s,
            step_s: 0.1,
            skipped_steps: 0,
            group_lrs: Vec::new(),
            exposed_comm_s: 0.0,
            host_wait_s: None,
            comm_bytes: 0,
            peak_rss_mb: 100.0 + step as f64,
            device_peak_mb: None,
            device_allocated_mb: None,
        }
    }

    #[test]
    fn says_what_was_reached_and_where_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::new(folder.path());
        std::fs::write(run.metrics(), "").unwrap();
        let mut summary = Summary::default();
        assert_eq!(summary.last_step(), 0);
        for (step, rate) in [(1, 10.0), (2, 3000.0), (3, 2000.0)] {
            summary.step(&metrics(step, 5.0 / step as f64, rate));
        }
        summary.sample("Once upon\n");
        let text = summary.text(&run, Duration::from_secs(41));
        let path = folder.path().display();
        assert_eq!(
            text,
            format!(
                "3 steps in 41s: loss 5.0000 -> 1.6667, 2,000 tokens/s (median), peak memory 103 MiB a rank\n\
                 1 of them skipped, as gradients were not finite\n  metrics      {path}/metrics.jsonl\n  logs         {path}/ranks\n\
                 sample:\nOnce upon\n"
            )
        );
        assert_eq!(summary.last_step(), 3);
    }

    #[test]
    fn a_run_without_steps_only_has_places() {
        let text = Summary::default().text(&RunDir::new("nowhere"), Duration::ZERO);
        assert_eq!(text, "  logs         nowhere/ranks\n");
    }
}
