//! This rank's state in terms of whole parameters: what a checkpoint keeps, and any mesh reads back.
//!
//! `shardwise_zero` tells state in parts of parameters as this rank has them. Here they become boxes of the whole parameter, which
//! do not say which tensor rank they were of. State that several ranks have alike is told by one of them.

use std::ops::Range;

use shardwise_device::DType;
use shardwise_plan::{LocalBlock, ParamSpec};
use shardwise_zero::{StateSlice, ZeroError};

use crate::{Engine, EngineError};

/// A part of one state of one parameter.
#[derive(Debug)]
pub struct StatePart<'a, B> {
    /// The parameter, whole.
    pub param: &'a ParamSpec,
    /// A box of it.
    pub block: &'a LocalBlock,
    /// Which elements of the box, row by row.
    pub range: Range<usize>,
    /// [`shardwise_zero::PARAM`], or the name of an optimizer's state.
    pub name: &'static str,
    /// Type of the elements.
    pub dtype: DType,
    /// The elements: `&[u8]` or `&mut [u8]`.
    pub bytes: B,
}

/// What a parameter's state is visited with.
struct Whole<'a> {
    param: &'a ParamSpec,
    blocks: Vec<LocalBlock>,
}

impl Engine {
    /// Calls `visit` with the state that this rank speaks for, in every stage: over all ranks each element of each state is
    /// told once. Needs no other rank.
    ///
    /// # Errors
    /// A collective that failed before; what `visit` says.
    pub fn for_each_state<E: From<EngineError>>(
        &mut self,
        mut visit: impl FnMut(StatePart<'_, &[u8]>) -> Result<(), E>,
    ) -> Result<(), E> {
        let Engine { stage, zero, .. } = self;
        let all = stage.whole_params();
        let placement = stage.placement();
        let (degree, rank) = (stage.degree, stage.tensor_rank);
        let mut scratch = Vec::new();
        zero.for_each_state::<Stop<E>>(|slice| {
            let StateSlice { param, param_range, name, dtype, bytes, .. } = slice;
            if !placement.speaks_for(&param.name) {
                return Ok(());
            }
            let whole = Whole::of(all[param.name.as_str()], degree, rank);
            for block in &whole.blocks {
                let range = block.within(param_range.clone());
                if range.is_empty() {
                    continue;
                }
                let bytes = gathered(block, &param_range, &range, dtype, bytes, &mut scratch);
                let param = whole.param;
                visit(StatePart { param, block, range, name, dtype, bytes }).map_err(Stop::Visit)?;
            }
            Ok(())
        })
        .map_err(Stop::into)
    }

    /// Goes on from saved state: calls `visit` to fill in the state that this rank keeps, as
    /// [`shardwise_zero::Zero::load_states`] does.
    ///
    /// # Collective
    /// Every rank calls, between steps.
    /// # Errors
    /// A failed collective; what `visit` says.
    pub fn load_states<E: From<EngineError>>(
        &mut self,
        num_steps: u64,
        mut visit: impl FnMut(StatePart<'_, &mut [u8]>) -> Result<(), E>,
    ) -> Result<(), E> {
        let Engine { stage, zero, .. } = self;
        let all = stage.whole_params();
        let (degree, rank) = (stage.degree, stage.tensor_rank);
        let mut scratch = Vec::new();
        zero.load_states::<Stop<E>>(num_steps, |slice| {
            let StateSlice { param, param_range, name, dtype, bytes, .. } = slice;
            let whole = Whole::of(all[param.name.as_str()], degree, rank);
            let param = whole.param;
            for block in &whole.blocks {
                let range = block.within(param_range.clone());
                if range.is_empty() {
                    continue;
                }
                if range.len() == param_range.len() {
                    let part = StatePart { param, block, range, name, dtype, bytes: &mut *bytes };
                    visit(part).map_err(Stop::Visit)?;
                    continue;
                }
                let size = dtype.size_bytes();
                scratch.clear();
                scratch.resize(range.len() * size, 0);
                let part =
                    StatePart { param, block, range: range.clone(), name, dtype, bytes: &mut scratch[..] };
                visit(part).map_err(Stop::Visit)?;
                for (local, at, len) in block.runs(param_range.clone()) {
                    let (local, at) = (local - param_range.start, at - range.start);
                    bytes[local * size..(local + len) * size]
                        .copy_from_slice(&scratch[at * size..(at + len) * size]);
                }
            }
            Ok(())
        })
        .map_err(Stop::into)
    }
}

impl<'a> Whole<'a> {
    fn of(param: &'a ParamSpec, degree: usize, rank: usize) -> Self {
        let blocks = param.local_blocks(degree, rank).expect("checked when the engine was made");
        Whole { param, blocks }
    }
}

/// The elements `range` of a block, from the local ones of `local_range`: themselves, if the block has all of them.
fn gathered<'a>(
    block: &LocalBlock,
    local_range: &Range<usize>,
    range: &Range<usize>,
    dtype: DType,
    bytes: &'a [u8],
    scratch: &'a mut Vec<u8>,
) -> &'a [u8] {
    if range.len() == local_range.len() {
        return bytes;
    }
    let size = dtype.size_bytes();
    scratch.clear();
    for (local, _, len) in block.runs(local_range.clone()) {
        let local = local - local_range.start;
        scratch.extend_from_slice(&bytes[local * size..(local + len) * size]);
    }
    scratch
}

/// What ends a visit.
enum Stop<E> {
    Zero(ZeroError),
    Visit(E),
}

impl<E> From<ZeroError> for Stop<E> {
    fn from(error: ZeroError) -> Self {
        Stop::Zero(error)
    }
}

impl<E: From<EngineError>> Stop<E> {
    fn into(self) -> E {
        match self {
            Stop::Zero(error) => EngineError::from(error).into(),
            Stop::Visit(error) => error,
        }
    }
}
