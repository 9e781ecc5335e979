//! Going on from a checkpoint: which one, and what it says.

use std::ffi::OsStr;
use std::path::Path;

use anyhow::Context;
use serde_json::{Value, json};
use shardwise_checkpoint::state::{Checkpoint, PARAM};
use shardwise_config::RunConfig;
use shardwise_device::DType;
use shardwise_engine::{BoxError, Engine, ParamSource, StatePart};
use shardwise_kernels::cast;
use shardwise_plan::ParamSpec;
use shardwise_zero::LossScalerState;

use crate::failure::Failure;
use crate::saving::{file_dtype, region};
use crate::telemetry::Telemetry;

/// Where a run goes on.
pub struct Resumed {
    checkpoint: Checkpoint,
    /// Newer ones that cannot be used, and why.
    left_out: Vec<String>,
}

/// The checkpoint that `--resume` means, if it means one: `auto` takes the newest complete one of the run in `out`.
pub fn find(resume: &OsStr, out: &Path) -> Result<Option<Resumed>, Failure> {
    let found = if resume == "never" {
        return Ok(None);
    } else if resume == "auto" {
        let Some(found) = Checkpoint::newest(out).map_err(Failure::configuration)? else { return Ok(None) };
        found
    } else {
        Checkpoint::find(Path::new(resume)).map_err(Failure::configuration)?
    };
    let left_out = found.damaged.iter().map(|(path, error)| format!("`{}`: {error}", path.display()));
    Ok(Some(Resumed { left_out: left_out.collect(), checkpoint: found.checkpoint }))
}

impl Resumed {
    /// Says where the run goes on, and what keeps it from being the run that stopped.
    pub fn tell(&self, run: &RunConfig, telemetry: &Telemetry) {
        let state = self.checkpoint.run_state();
        for (key, own) in [("seed", run.seed), ("data_seed", run.data.seed)] {
            if let Some(saved) = state[key].as_u64().filter(|saved| *saved != own) {
                telemetry.note(&format!("the checkpoint was saved with {key} {saved}, this run has {own}"));
            }
        }
        self.left_out.iter().for_each(|problem| telemetry.note(&format!("left out: {problem}")));
        telemetry.note(&format!("resuming from `{}`", self.checkpoint.dir().display()));
    }

    /// Steps that the run had done, skipped ones included.
    pub fn step(&self) -> u64 {
        self.checkpoint.step()
    }

    /// What must be the same on all ranks: which save it is.
    pub fn identity(&self) -> &str {
        self.checkpoint.save()
    }

    /// Refuses a run that would not see the data from where this one stopped.
    pub fn check(&self, run: &RunConfig) -> Result<(), Failure> {
        let state = self.checkpoint.run_state();
        let saved = state["global_batch_size"].as_u64();
        let own = run.batch.global_batch_size as u64;
        match saved {
            Some(saved) if saved != own => Err(Failure::usage(
                format!(
                    "the checkpoint was saved with a global batch of `{saved}` samples, this run has `{own}`"
                ),
                format!(
                    "set the batch sizes so that they multiply to {saved}: ranks and accumulation may differ"
                ),
            )),
            None => Err(Failure::configuration(anyhow::anyhow!(
                "`{}` was not saved by a training run",
                self.checkpoint.dir().display()
            ))),
            _ => Ok(()),
        }
    }

    /// Fills the engine's state. Its parameters may be anything before.
    ///
    /// # Collective
    /// Every rank calls.
    pub fn load(&self, engine: &mut Engine) -> Result<(), Failure> {
        let params = engine.specs().iter().flat_map(|spec| &spec.params);
        let expected: std::collections::BTreeMap<_, _> =
            params.map(|param| (param.name.clone(), param.shape.clone())).collect();
        let expected = expected.iter().map(|(name, shape)| (name.as_str(), shape.as_slice()));
        self.checkpoint.expect_exactly(PARAM, expected).map_err(Failure::configuration)?;
        let state = self.checkpoint.run_state();
        let applied = state["applied_steps"]
            .as_u64()
            .context("the checkpoint does not say how many steps were applied")?;
        let scaler =
            scaler_from(&state["loss_scaler"]).context("the checkpoint holds no state of the loss scale")?;
        engine.load_states(applied, |part| self.fill(part)).map_err(|error: anyhow::Error| {
            Failure::from(
                error.context(format!("could not resume from `{}`", self.checkpoint.dir().display())),
            )
        })?;
        engine.zero_mut().restore_loss_scaler(scaler);
        Ok(())
    }

    fn fill(&self, part: StatePart<'_, &mut [u8]>) -> anyhow::Result<()> {
        let region = region(&part);
        let StatePart { param, name: kind, dtype, bytes, .. } = part;
        let name = param.name.as_str();
        let stored = self.checkpoint.tensor(name, kind).with_context(|| {
            format!("`{name}` has no `{kind}`: resume with the optimizer that the run was started with")
        })?;
        if stored.dtype == file_dtype(dtype) {
            return Ok(self.checkpoint.read_bytes(name, kind, &region, bytes)?);
        }
        // Saved in another precision.
        let mut values = vec![0f32; region.numel()];
        self.checkpoint.read_f32(name, kind, &region, &mut values)?;
        match dtype {
            DType::Bf16 => cast::f32_to_bf16(&values, bytemuck::cast_slice_mut(bytes)),
            DType::F16 => cast::f32_to_f16(&values, bytemuck::cast_slice_mut(bytes)),
            _ => bytes.copy_from_slice(bytemuck::cast_slice(&values)),
        }
        Ok(())
    }
}

/// Parameters that are about to be overwritten.
pub struct Blank;

impl ParamSource for Blank {
    fn fill(&mut self, _: &ParamSpec, _: std::ops::Range<usize>, out: &mut [f32]) -> Result<(), BoxError> {
        out.fill(0.0);
        Ok(())
    }
}

/// What continues a run besides tensors.
pub fn run_state(run: &RunConfig, engine: &Engine) -> Value {
    let scaler = engine.zero().loss_scaler_state();
    json!({
        "applied_steps": engine.zero().num_steps(),
        "global_batch_size": run.batch.global_batch_size,
        "seed": run.seed,
        "data_seed": run.data.seed,
        "loss_scaler": {
            "scale": scaler.scale,
            "iter": scaler.iter,
            "last_overflow_iter": scaler.last_overflow_iter,
            "hysteresis_left": scaler.hysteresis_left,
            "num_skipped": scaler.num_skipped,
            "num_consecutive_skips": scaler.num_consecutive_skips,
        },
    })
}

fn scaler_from(value: &Value) -> Option<LossScalerState> {
    Some(LossScalerState {
        scale: value["scale"].as_f64()?,
        iter: value["iter"].as_u64()?,
        last_overflow_iter: value["last_overflow_iter"].as_u64(),
        hysteresis_left: value["hysteresis_left"].as_u64()?.try_into().ok()?,
        num_skipped: value["num_skipped"].as_u64()?,
        num_consecutive_skips: value["num_consecutive_skips"].as_u64()?,
    })
}
