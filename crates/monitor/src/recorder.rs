//! The record of a run, kept by rank 0.

use std::path::Path;

use crate::{MetricsWriter, MonitorError, RunDir, StepMetrics, TensorBoardWriter};

/// `metrics.jsonl` and the TensorBoard event file of one run, written together.
#[derive(Debug)]
pub struct RunRecorder {
    metrics: MetricsWriter,
    tensorboard: TensorBoardWriter,
}

impl RunRecorder {
    /// Opens both files in `folder`, which is made if it is not there. Metrics of an earlier part of the run stay.
    ///
    /// # Errors
    /// [`MonitorError::File`] if the folder or a file cannot be made.
    pub fn open(folder: &Path) -> Result<Self, MonitorError> {
        std::fs::create_dir_all(folder).map_err(MonitorError::file("open", folder))?;
        Ok(RunRecorder {
            metrics: MetricsWriter::append(&RunDir::new(folder).metrics())?,
            tensorboard: TensorBoardWriter::create(folder)?,
        })
    }

    /// As [`RunRecorder::open`], for a run that goes on after `last_step`; what the files say of later steps is void.
    ///
    /// # Errors
    /// As [`RunRecorder::open`].
    pub fn resume(folder: &Path, last_step: u64) -> Result<Self, MonitorError> {
        std::fs::create_dir_all(folder).map_err(MonitorError::file("open", folder))?;
        let mut tensorboard = TensorBoardWriter::create(folder)?;
        tensorboard.purge_from(last_step + 1)?;
        Ok(RunRecorder {
            metrics: MetricsWriter::resume(&RunDir::new(folder).metrics(), last_step)?,
            tensorboard,
        })
    }

    /// Records one step in both files.
    ///
    /// # Errors
    /// [`MonitorError::File`] if one could not be written.
    pub fn record(&mut self, metrics: &StepMetrics) -> Result<(), MonitorError> {
        self.metrics.write(metrics)?;
        self.tensorboard.write_step(metrics)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::tests::example;

    #[test]
    fn both_files_get_every_step() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("a/b");
        RunRecorder::open(&folder).unwrap().record(&example(1)).unwrap();
        let mut second = RunRecorder::open(&folder).unwrap();
        second.record(&example(2)).unwrap();
        let lines = std::fs::read_to_string(RunDir::new(&folder).metrics()).unwrap();
        assert_eq!(lines.lines().count(), 2);
        let num_event_files = RunDir::new(&folder).event_files().unwrap().len();
        assert_eq!(num_event_files, 2);
    }
}
