//! The optimizers and their constants. The learning rate is [`crate::RunConfig::lr_schedule`]'s alone.

use serde::Serialize;

/// The optimizer and its constants.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "type")]
#[non_exhaustive]
pub enum Optimizer {
    /// Adam with decoupled weight decay.
    AdamW(AdamConfig),
    /// Adam whose weight decay is added to the gradient.
    Adam(AdamConfig),
    /// Stochastic gradient descent; weight decay is added to the gradient.
    #[serde(rename = "SGD")]
    Sgd(SgdConfig),
    /// Adagrad; weight decay is added to the gradient.
    Adagrad(AdagradConfig),
    /// Lion, with decoupled weight decay.
    Lion(LionConfig),
    /// LAMB.
    Lamb(LambConfig),
    /// Muon for matrices between layers' activations, AdamW for everything else.
    Muon(MuonConfig),
}

/// The constants of Adam.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct AdamConfig {
    /// Decay rates of the first and second moment.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Weight decay.
    pub weight_decay: f64,
    /// Whether moments are corrected for their start at 0.
    pub bias_correction: bool,
}

/// The constants of stochastic gradient descent.
///
/// # Source
/// `torch.optim.SGD`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct SgdConfig {
    /// How much of the last direction is kept; 0 needs no state.
    pub momentum: f64,
    /// How much of a gradient is left out of the momentum, from its second gradient on.
    pub dampening: f64,
    /// Whether a step looks ahead along the momentum. Only with momentum above 0 and no dampening.
    pub nesterov: bool,
    /// Weight decay, added to the gradient.
    pub weight_decay: f64,
}

/// The constants of Adagrad.
///
/// # Source
/// `torch.optim.Adagrad`, its sum starting at 0.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct AdagradConfig {
    /// The rate is divided by `1 + lr_decay * steps`.
    pub lr_decay: f64,
    /// Added to the root of the sum of squares.
    pub eps: f64,
    /// Weight decay, added to the gradient.
    pub weight_decay: f64,
}

/// The constants of Lion.
///
/// # Source
/// Symbolic Discovery of Optimization Algorithms (arXiv:2302.06675).
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct LionConfig {
    /// The weight of the momentum in a step, and in the next momentum.
    pub betas: [f64; 2],
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

/// The constants of LAMB.
///
/// # Source
/// Large Batch Optimization for Deep Learning (arXiv:1904.00962), with DeepSpeed's bounds on the trust ratio.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct LambConfig {
    /// Decay rates of the first and second moment.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Weight decay, part of the direction whose norm the trust ratio sees.
    pub weight_decay: f64,
    /// The largest trust ratio.
    pub max_coeff: f64,
    /// The smallest trust ratio.
    pub min_coeff: f64,
    /// Whether moments are corrected for their start at 0.
    pub bias_correction: bool,
}

/// The constants of Muon, and of the AdamW beside it. The schedule's rate is Muon's.
///
/// # Source
/// <https://kellerjordan.github.io/posts/muon>, with Nesterov momentum as in DeepSpeed.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct MuonConfig {
    /// How much of the momentum is kept.
    pub momentum: f64,
    /// Newton-Schulz iterations.
    pub ns_steps: u32,
    /// Decoupled weight decay, of both halves.
    pub weight_decay: f64,
    /// The learning rate of the AdamW half, in units of the schedule's.
    pub adam_lr_scale: f64,
    /// Decay rates of the AdamW half.
    pub adam_betas: [f64; 2],
    /// Added to the root of the second moment of the AdamW half.
    pub adam_eps: f64,
}

impl Optimizer {
    /// The weight decay of parameters that no group exempts.
    pub fn weight_decay(&self) -> f64 {
        match self {
            Optimizer::AdamW(adam) | Optimizer::Adam(adam) => adam.weight_decay,
            Optimizer::Sgd(sgd) => sgd.weight_decay,
            Optimizer::Adagrad(adagrad) => adagrad.weight_decay,
            Optimizer::Lion(lion) => lion.weight_decay,
            Optimizer::Lamb(lamb) => lamb.weight_decay,
            Optimizer::Muon(muon) => muon.weight_decay,
        }
    }

    /// The states it keeps for each element. Those of Muon are the AdamW half's; its own half keeps one.
    pub fn num_states(&self) -> usize {
        match self {
            Optimizer::AdamW(_) | Optimizer::Adam(_) | Optimizer::Lamb(_) | Optimizer::Muon(_) => 2,
            Optimizer::Adagrad(_) | Optimizer::Lion(_) => 1,
            Optimizer::Sgd(sgd) => usize::from(sgd.momentum > 0.0),
        }
    }
}
