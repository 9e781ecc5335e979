//! How the ranks divide the work, and whether the rest of the run suits that.
//!
//! The run file and a DeepSpeed configuration can both give the degrees. They may agree; where they differ it is an error, for
//! neither is more right.

use shardwise_plan::Mesh;
use shardwise_plan::pipeline::StageCut;
use shardwise_plan::zoo::SequenceParallel;

use super::lookup::{Assembler, Found, set, switch, whole};
use crate::check::Setting;
use crate::effective::Source;
use crate::run_config::*;
use crate::schema;
use crate::value::Value;

const PIPELINE: [&str; 2] = ["parallel.pipeline", "deepspeed.pipeline.stages"];
const TENSOR: [&str; 4] = [
    "parallel.tensor",
    "deepspeed.tensor_parallel.autotp_size",
    "deepspeed.tensor_parallel.tp_size",
    "deepspeed.tensor_parallel.tensor_parallel.tp_size",
];
const SCHEDULE: &str = "parallel.schedule";
const SEQUENCE: &str = "parallel.sequence";
const CUT: &str = "parallel.stages";
const PARTITION: &str = "deepspeed.pipeline.partition";

impl Assembler<'_> {
    pub fn parallel(&mut self) -> Option<ParallelConfig> {
        // 0 says that there is no tensor parallelism of DeepSpeed's making, not that there is none.
        if let Some(off) = self.setting(TENSOR[1]).filter(|setting| whole(&setting.value) == Some(0)) {
            self.no_effect(&off.key, "0 leaves the number of tensor-parallel ranks to `parallel.tensor`");
        }
        let pipeline = self.degree(&PIPELINE);
        let tensor = self.degree(&TENSOR);
        let schedule = self.get(SCHEDULE, |value| schema::schedule_kind(value.text()?));
        let sequence = self.get(SEQUENCE, |value| {
            Some(if switch(value)? { SequenceParallel::On } else { SequenceParallel::Off })
        });
        let stage_cut = self.stage_cut();
        let deadline_s = self.get("parallel.deadline_s", Value::number);
        let (pipeline, tensor) = (pipeline?, tensor?);
        let mesh = self.mesh(pipeline.value, tensor.value)?;
        if pipeline.value == 1 {
            self.only_in_a_pipeline();
        }
        if let (1, Some(setting)) = (tensor.value, self.asked_for(SEQUENCE)) {
            let message =
                format!("`{SEQUENCE}` is set, but there is one tensor-parallel rank to hold the tokens");
            self.conflict(setting.value.at, message, "leave it out, or raise `parallel.tensor`");
        }
        let data = mesh.degree(shardwise_plan::Axis::Data);
        if let Some(size) = self.setting("deepspeed.data_parallel_size")
            && whole(&size.value) != Some(data as u64)
        {
            let (at, key) = (size.value.at.clone(), size.value.at.key(&size.key));
            let message = format!("`{key}` is {}, but there are {data} data-parallel ranks", size.value);
            self.conflict(at, message, "leave it out: it follows from the number of ranks");
        }
        self.sources.insert("parallel.world_size".to_string(), Source::Argument("-n"));
        let formula = "ranks / (`pipeline` x `tensor`)";
        self.sources.insert("parallel.data".to_string(), Source::Derived(formula.to_string()));
        Some(ParallelConfig {
            world_size: self.world_size,
            data,
            pipeline: self.keep("parallel.pipeline", pipeline),
            tensor: self.keep("parallel.tensor", tensor),
            schedule: self.keep(SCHEDULE, schedule?),
            stage_cut: self.keep("parallel.stage_cut", stage_cut?),
            sequence: self.keep(SEQUENCE, sequence?),
            deadline_s: self.keep("parallel.deadline_s", deadline_s?),
        })
    }

    /// The degree of an axis, which any of `keys` gives; 1 if none does.
    fn degree(&mut self, keys: &[&str]) -> Option<Found<usize>> {
        if keys.iter().any(|key| self.is_bad(key)) {
            return None;
        }
        let given = |key: &&str| {
            let setting = self.setting(key)?;
            // `"auto"`, and DeepSpeed's 0, leave it to the others.
            let degree = whole(&setting.value).filter(|&degree| degree > 0)?;
            Some((setting, degree))
        };
        let given: Vec<_> = keys.iter().filter_map(given).collect();
        let Some((first, degree)) = given.first() else {
            return Some(Found { value: 1, source: Source::Default });
        };
        match given.iter().find(|(_, other)| other != degree) {
            Some((other, _)) => {
                self.differ(first, other);
                None
            }
            None => Some(Found { value: *degree as usize, source: set(first) }),
        }
    }

    fn stage_cut(&mut self) -> Option<Found<StageCut>> {
        let ours = self.optional(CUT, |value| value.text()?.parse().ok());
        let theirs = self.optional(PARTITION, |value| schema::partition(value.text()?));
        let (ours, theirs) = (ours?, theirs?);
        Some(match (ours.value, theirs.value.flatten()) {
            (Some(ours), Some(theirs)) if ours != theirs => {
                let (first, second) = (self.setting(CUT)?, self.setting(PARTITION)?);
                self.differ(&first, &second);
                return None;
            }
            (Some(value), _) => Found { value, source: ours.source },
            (None, Some(value)) => Found { value, source: theirs.source },
            (None, None) => Found { value: StageCut::Parameters, source: Source::Default },
        })
    }

    fn mesh(&mut self, pipeline: usize, tensor: usize) -> Option<Mesh> {
        match Mesh::new(self.world_size, pipeline, tensor) {
            Ok(mesh) => Some(mesh),
            Err(error) => {
                let set = PIPELINE.iter().chain(&TENSOR).find_map(|key| self.setting(key))?;
                let hint = "start another number of ranks with `-n`, or change the degrees";
                self.conflict(set.value.at, error.to_string(), hint);
                None
            }
        }
    }

    /// Without a pipeline there is nothing to schedule or to cut.
    fn only_in_a_pipeline(&mut self) {
        for key in [SCHEDULE, CUT] {
            if let Some(setting) = self.setting(key) {
                let message = format!("`{key}` is set, but there is one pipeline stage");
                self.conflict(setting.value.at, message, "leave it out, or raise `parallel.pipeline`");
            }
        }
        self.no_effect(PARTITION, "there is one pipeline stage");
    }

    /// Reports what the mesh asks of the data, the batch and the optimizer. What it asks of the model is checked where that is known.
    pub fn suits_mesh(
        &mut self,
        parallel: &ParallelConfig,
        data: Option<&DataConfig>,
        batch: Option<&BatchConfig>,
        optimizer: Option<&Optimizer>,
    ) {
        if let Some(&BatchConfig { grad_accum_steps, .. }) = batch
            && parallel.pipeline > 1
            && let Err(error) = parallel.schedule.check(parallel.pipeline, grad_accum_steps)
            && let Some(at) = self.setting(SCHEDULE).map(|setting| setting.value.at)
        {
            let hint = "raise `deepspeed.gradient_accumulation_steps`, the micro-batches of a step, or change \
                        `parallel.schedule`";
            self.conflict(at, error.to_string(), hint);
        }
        let tensor = parallel.tensor;
        if let Some(&DataConfig { seq_len, .. }) = data
            && parallel.sequence == SequenceParallel::On
            && !seq_len.is_multiple_of(tensor)
            && let Some(setting) = self.setting(SEQUENCE)
        {
            let message = format!(
                "`data.seq_len` is `{seq_len}`, of which `{tensor}` tensor-parallel ranks have no equal shares"
            );
            let hint = format!("make it a multiple of `{tensor}`, or leave `{SEQUENCE}` out");
            self.conflict(setting.value.at, message, &hint);
        }
        if let Some(Optimizer::Muon(_)) = optimizer
            && tensor > 1
            && let Some(setting) = self.setting("deepspeed.optimizer.type")
        {
            let message =
                format!("`Muon` takes a matrix as a whole, and `{tensor}` tensor-parallel ranks split it");
            self.conflict(
                setting.value.at,
                message,
                "choose another optimizer, or set `parallel.tensor` to 1",
            );
        }
    }

    /// Two settings of one thing that differ.
    fn differ(&mut self, first: &Setting, second: &Setting) {
        let (at, other) = (&second.value.at, &first.value.at);
        let message = format!(
            "`{}` is {}, but `{}` is {}",
            other.key(&first.key),
            first.value,
            at.key(&second.key),
            second.value
        );
        self.conflict(at.clone(), message, "keep one of the two");
    }
}
