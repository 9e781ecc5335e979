//! Which optimizer, and with which hyperparameters.

use shardwise_kernels::optimizer::{BiasCorrection, Direction, WeightDecay};
use shardwise_plan::ParamSpec;
use shardwise_plan::pattern::NamePattern;

use crate::ZeroError;

/// The optimizer. Its learning rate is told with each step.
#[derive(Debug, Clone, PartialEq)]
pub enum Optimizer {
    /// Adam with decoupled weight decay.
    AdamW(AdamOptions),
    /// Adam whose weight decay is added to the gradient.
    Adam(AdamOptions),
    /// Stochastic gradient descent.
    Sgd(SgdOptions),
    /// Adagrad.
    Adagrad(AdagradOptions),
    /// Lion.
    Lion(LionOptions),
    /// LAMB. One exchange more in a step: the norms of every parameter.
    Lamb(LambOptions),
    /// Muon for matrices, AdamW for everything else. Above stage 0 a step gathers the momentum of units with matrices, in fp32.
    Muon(MuonOptions),
}

/// Hyperparameters of Adam and AdamW.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamOptions {
    /// Decay of the mean of gradients.
    pub beta1: f64,
    /// Decay of the mean of squared gradients.
    pub beta2: f64,
    /// Added to the denominator.
    pub eps: f64,
    /// Weight decay.
    pub weight_decay: f64,
    /// Whether the means are corrected for having begun at zero.
    pub bias_correction: BiasCorrection,
}

impl Default for AdamOptions {
    /// As in `torch.optim.AdamW`.
    fn default() -> Self {
        let bias_correction = BiasCorrection::On;
        AdamOptions { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01, bias_correction }
    }
}

/// Hyperparameters of stochastic gradient descent.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SgdOptions {
    /// How much of the last direction is kept; with 0 there is no state.
    pub momentum: f64,
    /// How much of the gradient is left out of the direction, from the second step on.
    pub dampening: f64,
    /// Which way parameters go. `Nesterov` needs momentum and no dampening.
    pub direction: Direction,
    /// Added to the gradient, times the parameter.
    pub weight_decay: f64,
}

/// Hyperparameters of Adagrad.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdagradOptions {
    /// How fast the learning rate falls with the number of steps, on top of what each step is told.
    pub lr_decay: f64,
    /// Where sums of squares begin.
    pub initial_accumulator_value: f64,
    /// Added to the denominator.
    pub eps: f64,
    /// Added to the gradient, times the parameter.
    pub weight_decay: f64,
}

/// Hyperparameters of Lion.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LionOptions {
    /// The mean's share in the direction.
    pub beta1: f64,
    /// Decay of the mean.
    pub beta2: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

/// Hyperparameters of LAMB.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LambOptions {
    /// Decay of the mean of gradients.
    pub beta1: f64,
    /// Decay of the mean of squared gradients.
    pub beta2: f64,
    /// Added to the denominator.
    pub eps: f64,
    /// Weight decay, before the trust ratio.
    pub weight_decay: f64,
    /// The trust ratio is at most this.
    pub max_coeff: f64,
    /// The trust ratio is at least this.
    pub min_coeff: f64,
    /// Whether the means are corrected for having begun at zero.
    pub bias_correction: BiasCorrection,
}

/// Hyperparameters of Muon, and of AdamW beside it. The learning rate that a step is told is Muon's.
#[derive(Debug, Clone, PartialEq)]
pub struct MuonOptions {
    /// Decay of the mean of gradients.
    pub momentum: f64,
    /// Which way parameters go, before it is made orthogonal.
    pub direction: Direction,
    /// Steps of the orthogonalization.
    pub num_newton_schulz_steps: u32,
    /// Decoupled weight decay of matrices.
    pub weight_decay: f64,
    /// For all parameters without exactly two dimensions, and for the matrices named by `adamw_for`.
    pub adamw: AdamOptions,
    /// AdamW's learning rate as a multiple of Muon's.
    pub adamw_lr_scale: f64,
    /// Matrices that AdamW takes: embeddings and the head. See [`MuonOptions::not_hidden`].
    pub adamw_for: Vec<NamePattern>,
}

impl MuonOptions {
    /// Patterns of embeddings and heads as the families of models call them: matrices, but not hidden ones.
    pub fn not_hidden() -> Vec<NamePattern> {
        ["*embed*", "*lm_head*", "*wte*", "*wpe*"].map(NamePattern::new).into()
    }

    fn takes(&self, param: &ParamSpec) -> bool {
        param.shape.len() == 2 && !self.adamw_for.iter().any(|pattern| pattern.matches(&param.name))
    }
}

/// What is done with one parameter.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Algorithm {
    Adam(AdamOptions, WeightDecay),
    Sgd(SgdOptions),
    Adagrad(AdagradOptions),
    Lion(LionOptions),
    Lamb(LambOptions),
    Muon { momentum: f64, direction: Direction, num_steps: u32 },
}

/// [`Algorithm`] with what it is told of one parameter.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Settings {
    pub algorithm: Algorithm,
    /// Times the learning rate of the step.
    pub lr_scale: f64,
    pub weight_decay: f64,
}

impl Algorithm {
    /// The names of its states, in the order in which kernels take them.
    pub fn state_names(&self) -> &'static [&'static str] {
        match self {
            Algorithm::Adam(..) | Algorithm::Lamb(_) => &["exp_avg", "exp_avg_sq"],
            Algorithm::Sgd(sgd) if sgd.momentum == 0.0 => &[],
            Algorithm::Sgd(_) | Algorithm::Muon { .. } => &["momentum_buffer"],
            Algorithm::Adagrad(_) => &["sum"],
            Algorithm::Lion(_) => &["exp_avg"],
        }
    }

    /// Where its states begin.
    pub fn first_value(&self) -> f32 {
        match self {
            Algorithm::Adagrad(adagrad) => adagrad.initial_accumulator_value as f32,
            _ => 0.0,
        }
    }

    /// Whether each element moves for itself, so that parameters that are told the same may be moved together.
    pub fn is_element_wise(&self) -> bool {
        !matches!(self, Algorithm::Lamb(_) | Algorithm::Muon { .. })
    }
}

impl Optimizer {
    /// The names of the states that each element of `param` has.
    pub fn state_names(&self, param: &ParamSpec) -> &'static [&'static str] {
        self.settings(param).algorithm.state_names()
    }

    /// What is done with `param`, but for its group.
    pub(crate) fn settings(&self, param: &ParamSpec) -> Settings {
        let (algorithm, weight_decay) = match self {
            Optimizer::AdamW(adam) => (Algorithm::Adam(*adam, WeightDecay::Decoupled), adam.weight_decay),
            Optimizer::Adam(adam) => (Algorithm::Adam(*adam, WeightDecay::L2), adam.weight_decay),
            Optimizer::Sgd(sgd) => (Algorithm::Sgd(*sgd), sgd.weight_decay),
            Optimizer::Adagrad(adagrad) => (Algorithm::Adagrad(*adagrad), adagrad.weight_decay),
            Optimizer::Lion(lion) => (Algorithm::Lion(*lion), lion.weight_decay),
            Optimizer::Lamb(lamb) => (Algorithm::Lamb(*lamb), lamb.weight_decay),
            Optimizer::Muon(muon) if muon.takes(param) => {
                let MuonOptions { momentum, direction, num_newton_schulz_steps: num_steps, .. } = *muon;
                (Algorithm::Muon { momentum, direction, num_steps }, muon.weight_decay)
            }
            Optimizer::Muon(muon) => {
                let algorithm = Algorithm::Adam(muon.adamw, WeightDecay::Decoupled);
                let (lr_scale, weight_decay) = (muon.adamw_lr_scale, muon.adamw.weight_decay);
                return Settings { algorithm, lr_scale, weight_decay };
            }
        };
        Settings { algorithm, lr_scale: 1.0, weight_decay }
    }

    /// # Errors
    /// [`ZeroError::WrongOption`] for the first hyperparameter out of its range.
    pub(crate) fn check(&self) -> Result<(), ZeroError> {
        match self {
            Optimizer::AdamW(adam) | Optimizer::Adam(adam) => adam.check(),
            Optimizer::Sgd(sgd) => sgd.check(),
            Optimizer::Adagrad(adagrad) => {
                not_negative("optimizer.lr_decay", adagrad.lr_decay)?;
                not_negative("optimizer.initial_accumulator_value", adagrad.initial_accumulator_value)?;
                positive("optimizer.eps", adagrad.eps)?;
                not_negative("optimizer.weight_decay", adagrad.weight_decay)
            }
            Optimizer::Lion(lion) => {
                share("optimizer.beta1", lion.beta1)?;
                share("optimizer.beta2", lion.beta2)?;
                not_negative("optimizer.weight_decay", lion.weight_decay)
            }
            Optimizer::Lamb(lamb) => {
                share("optimizer.beta1", lamb.beta1)?;
                share("optimizer.beta2", lamb.beta2)?;
                positive("optimizer.eps", lamb.eps)?;
                not_negative("optimizer.weight_decay", lamb.weight_decay)?;
                not_negative("optimizer.min_coeff", lamb.min_coeff)?;
                let is_ordered = lamb.max_coeff.is_finite() && lamb.max_coeff >= lamb.min_coeff;
                let expected = "a number, at least `min_coeff`";
                within("optimizer.max_coeff", lamb.max_coeff, is_ordered, expected)
            }
            Optimizer::Muon(muon) => {
                share("optimizer.momentum", muon.momentum)?;
                let steps = muon.num_newton_schulz_steps;
                let is_some = (1..100).contains(&steps);
                within("optimizer.num_newton_schulz_steps", steps, is_some, "`1` to `99`")?;
                not_negative("optimizer.weight_decay", muon.weight_decay)?;
                not_negative("optimizer.adamw_lr_scale", muon.adamw_lr_scale)?;
                muon.adamw.check()
            }
        }
    }
}

impl AdamOptions {
    fn check(&self) -> Result<(), ZeroError> {
        share("optimizer.beta1", self.beta1)?;
        share("optimizer.beta2", self.beta2)?;
        positive("optimizer.eps", self.eps)?;
        not_negative("optimizer.weight_decay", self.weight_decay)
    }
}

impl SgdOptions {
    fn check(&self) -> Result<(), ZeroError> {
        share("optimizer.momentum", self.momentum)?;
        let dampening = self.dampening;
        within("optimizer.dampening", dampening, (0.0..=1.0).contains(&dampening), "a number in `0..=1`")?;
        not_negative("optimizer.weight_decay", self.weight_decay)?;
        let is_plain = self.momentum > 0.0 && dampening == 0.0;
        let is_possible = self.direction == Direction::Momentum || is_plain;
        let expected = "`momentum`, unless there is momentum and no dampening";
        within("optimizer.direction", "nesterov", is_possible, expected)
    }
}

pub(crate) fn within(
    option: &'static str,
    got: impl ToString,
    is_ok: bool,
    expected: &'static str,
) -> Result<(), ZeroError> {
    match is_ok {
        true => Ok(()),
        false => Err(ZeroError::WrongOption { option, got: got.to_string(), expected }),
    }
}

fn share(option: &'static str, x: f64) -> Result<(), ZeroError> {
    within(option, x, (0.0..1.0).contains(&x) && (x as f32) < 1.0, "at least `0` and below `1`, in `f32`")
}

/// For what keeps zeros from being divided by zero, in gaps and padding too.
fn positive(option: &'static str, x: f64) -> Result<(), ZeroError> {
    within(option, x, x > 0.0 && (x as f32).is_normal(), "a positive number in the range of `f32`")
}

pub(crate) fn not_negative(option: &'static str, x: f64) -> Result<(), ZeroError> {
    within(option, x, x >= 0.0 && (x as f32).is_finite(), "a number, `0` or more")
}
