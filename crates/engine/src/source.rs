//! Where parameters come from.

use std::ops::Range;

use shardwise_kernels::philox;
use shardwise_plan::{Init, ParamSpec};

use crate::ops::threads;

/// Any error, for callers' own sources.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Gives the first values of any range of elements of a parameter.
pub trait ParamSource {
    /// Writes the elements `range` of `param` to `out`.
    ///
    /// # Errors
    /// Whatever keeps the values from being had.
    fn fill(&mut self, param: &ParamSpec, range: Range<usize>, out: &mut [f32]) -> Result<(), BoxError>;
}

/// Parameters born at random: element `i` of a parameter is a pure function of (seed, name, i), so the model is the same for
/// every number of ranks and every layout.
#[derive(Debug, Clone, Copy)]
pub struct RandomInit {
    /// The seed of the whole model.
    pub seed: u64,
}

impl ParamSource for RandomInit {
    fn fill(&mut self, param: &ParamSpec, range: Range<usize>, out: &mut [f32]) -> Result<(), BoxError> {
        let first = range.start as u64;
        match param.init {
            Init::Zeros => out.fill(0.0),
            Init::Ones => out.fill(1.0),
            Init::Normal { std } => {
                philox::fill_normal_on(threads(), self.seed, &param.name, first, 0.0, std, out);
            }
            Init::Uniform { bound } => {
                philox::fill_uniform_on(threads(), self.seed, &param.name, first, -bound, bound, out);
            }
        }
        Ok(())
    }
}
