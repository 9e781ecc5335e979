//! Whole parameters, on every rank: for files and for tests.

use std::borrow::Cow;

use shardwise_device::{Slice, SliceMut};
use shardwise_plan::ParamSpec;
use shardwise_zero::ZeroError;

use crate::stage::Stage;
use crate::{Engine, EngineError, Ranks};

impl Engine {
    /// Calls `visit` on every rank with each parameter, whole and in fp32 (master weights). Needs memory for one unit and,
    /// where ranks split layers or share them out, three times the largest parameter at most.
    ///
    /// After an error of `visit` this rank visits nothing more, but goes on gathering: the others need it.
    ///
    /// # Collective
    /// Every rank calls.
    /// # Errors
    /// A failed collective or allocation; what `visit` says.
    pub fn for_each_param<E: From<EngineError>>(
        &mut self,
        mut visit: impl FnMut(&ParamSpec, &[f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut outcome = Ok(());
        let mut visit = |param: &ParamSpec, values: &[f32]| {
            if outcome.is_ok() {
                outcome = visit(param, values);
            }
        };
        let Engine { stage, zero, ranks, .. } = self;
        let whole = stage.whole_params();
        for owner in 0..stage.stages.num_stages() {
            if owner == stage.stage {
                zero.for_each_param::<Stop>(|param, values| {
                    if stage.speaker(&param.name, owner) != owner {
                        return Ok(());
                    }
                    let param = whole[param.name.as_str()];
                    with_whole(stage, ranks, param, values, &mut visit)
                })
                .map_err(|Stop(error)| error)?;
                continue;
            }
            // Another stage tells its parameters, in the order of its units.
            for unit in stage.units(owner, ranks.data.group_size()) {
                for slot in unit.slots {
                    if stage.speaker(&slot.param.name, owner) == owner {
                        let param = whole[slot.param.name.as_str()];
                        let mut values = vec![0f32; param.numel()];
                        ranks
                            .pipeline
                            .broadcast(SliceMut::of(&mut values), owner)
                            .map_err(EngineError::from)?;
                        visit(param, &values);
                    }
                }
            }
        }
        outcome
    }
}

/// Puts a parameter together from the tensor ranks' parts, and gives it to the other stages.
fn with_whole(
    stage: &Stage,
    ranks: &Ranks,
    param: &ParamSpec,
    local: &[f32],
    visit: &mut impl FnMut(&ParamSpec, &[f32]),
) -> Result<(), Stop> {
    let is_split = stage.degree > 1 && param.split.is_some();
    let mut values =
        if is_split { Cow::from(assemble(stage, ranks, param, local)?) } else { Cow::from(local) };
    if stage.stages.num_stages() > 1 {
        let sent = SliceMut::of(values.to_mut().as_mut_slice());
        ranks.pipeline.broadcast(sent, stage.stage).map_err(EngineError::from)?;
    }
    visit(param, &values);
    Ok(())
}

fn assemble(stage: &Stage, ranks: &Ranks, param: &ParamSpec, local: &[f32]) -> Result<Vec<f32>, Stop> {
    let numel_of = |rank: usize| param.local(stage.degree, rank).map(|local| local.numel());
    let sizes = (0..stage.degree).map(numel_of).collect::<Result<Vec<_>, _>>().map_err(EngineError::from)?;
    let most = sizes.iter().copied().max().unwrap_or(0);
    let mut own = Cow::from(local);
    if own.len() < most {
        own.to_mut().resize(most, 0.0);
    }
    let mut all = vec![0f32; most * stage.degree];
    ranks.tensor.all_gather(Slice::of(&own), SliceMut::of(&mut all)).map_err(EngineError::from)?;
    drop(own);
    let mut values = vec![0f32; param.numel()];
    for (rank, &numel) in sizes.iter().enumerate() {
        let part = &all[rank * most..rank * most + numel];
        let runs = param.whole_runs(stage.degree, rank, 0..numel).map_err(EngineError::from)?;
        runs.into_iter().for_each(|(whole, local)| values[whole].copy_from_slice(&part[local]));
    }
    Ok(values)
}

/// An error on the way.
struct Stop(EngineError);

impl From<ZeroError> for Stop {
    fn from(error: ZeroError) -> Self {
        Stop(error.into())
    }
}

impl From<EngineError> for Stop {
    fn from(error: EngineError) -> Self {
        Stop(error)
    }
}
