//! The optimizers as their papers write them, in f64, one whole parameter at a time.

use shardwise_plan::ParamSpec;
use shardwise_zero::{AdamOptions, BiasCorrection, Direction, Optimizer};

/// What a step of one parameter is told.
pub struct Step<'a> {
    pub optimizer: &'a Optimizer,
    pub lr: f64,
    /// The group's weight decay.
    pub decay: Option<f64>,
    pub step: i32,
}

/// States before the first step.
pub fn first_states(optimizer: &Optimizer, param: &ParamSpec) -> Vec<Vec<f32>> {
    let first = match optimizer {
        Optimizer::Adagrad(adagrad) => adagrad.initial_accumulator_value as f32,
        _ => 0.0,
    };
    optimizer.state_names(param).iter().map(|_| vec![first; param.numel()]).collect()
}

fn is_matrix(optimizer: &Optimizer, param: &ParamSpec) -> bool {
    let Optimizer::Muon(muon) = optimizer else { return false };
    param.shape.len() == 2 && !muon.adamw_for.iter().any(|pattern| pattern.matches(&param.name))
}

impl Step<'_> {
    pub fn take(&self, param: &ParamSpec, grad: &[f64], weight: &mut [f32], states: &mut [Vec<f32>]) {
        let mut wide: Vec<Vec<f64>> =
            states.iter().map(|state| state.iter().map(|&x| x.into()).collect()).collect();
        let mut w: Vec<f64> = weight.iter().map(|&x| x.into()).collect();
        self.take_wide(param, grad, &mut w, &mut wide);
        for (state, wide) in states.iter_mut().zip(wide) {
            state.iter_mut().zip(wide).for_each(|(x, wide)| *x = wide as f32);
        }
        weight.iter_mut().zip(w).for_each(|(x, wide)| *x = wide as f32);
    }

    fn take_wide(&self, param: &ParamSpec, grad: &[f64], w: &mut [f64], states: &mut [Vec<f64>]) {
        let lr = self.lr;
        let decay = |own: f64| self.decay.unwrap_or(own);
        match self.optimizer {
            Optimizer::AdamW(adam) => self.adamw(adam, lr, grad, w, states),
            Optimizer::Adam(adam) => {
                let l2 = decay(adam.weight_decay);
                let grad: Vec<f64> = grad.iter().zip(&*w).map(|(g, w)| g + l2 * w).collect();
                let undecayed = Step { decay: Some(0.0), ..*self };
                undecayed.adamw(adam, lr, &grad, w, states);
            }
            Optimizer::Sgd(sgd) => {
                let l2 = decay(sgd.weight_decay);
                for (i, g) in grad.iter().enumerate() {
                    let g = g + l2 * w[i];
                    let Some(buffer) = states.first_mut() else {
                        w[i] -= lr * g;
                        continue;
                    };
                    buffer[i] = match self.step {
                        1 => g,
                        _ => sgd.momentum * buffer[i] + (1.0 - sgd.dampening) * g,
                    };
                    w[i] -= lr
                        * match sgd.direction {
                            Direction::Momentum => buffer[i],
                            Direction::Nesterov => g + sgd.momentum * buffer[i],
                        };
                }
            }
            Optimizer::Adagrad(adagrad) => {
                let l2 = decay(adagrad.weight_decay);
                let lr = lr / (1.0 + f64::from(self.step - 1) * adagrad.lr_decay);
                for (i, g) in grad.iter().enumerate() {
                    let g = g + l2 * w[i];
                    states[0][i] += g * g;
                    w[i] -= lr * g / (states[0][i].sqrt() + adagrad.eps);
                }
            }
            Optimizer::Lion(lion) => {
                for (i, g) in grad.iter().enumerate() {
                    let direction = lion.beta1 * states[0][i] + (1.0 - lion.beta1) * g;
                    let sign = if direction == 0.0 { 0.0 } else { direction.signum() };
                    w[i] = w[i] * (1.0 - lr * decay(lion.weight_decay)) - lr * sign;
                    states[0][i] = lion.beta2 * states[0][i] + (1.0 - lion.beta2) * g;
                }
            }
            Optimizer::Lamb(lamb) => {
                let [m, v] = states else { panic!("two states") };
                let mut update = vec![0.0; w.len()];
                for (i, g) in grad.iter().enumerate() {
                    m[i] = lamb.beta1 * m[i] + (1.0 - lamb.beta1) * g;
                    v[i] = lamb.beta2 * v[i] + (1.0 - lamb.beta2) * g * g;
                    update[i] = m[i] / (v[i].sqrt() + lamb.eps) + decay(lamb.weight_decay) * w[i];
                }
                let norm = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
                let (of_weight, of_update) = (norm(w), norm(&update));
                let ratio = match of_weight == 0.0 || of_update == 0.0 {
                    true => 1.0,
                    false => (of_weight / of_update).clamp(lamb.min_coeff, lamb.max_coeff),
                };
                let correct = |beta: f64| 1.0 - beta.powi(self.step);
                let rate = lr * correct(lamb.beta2).sqrt() / correct(lamb.beta1);
                w.iter_mut().zip(update).for_each(|(w, update)| *w -= rate * ratio * update);
            }
            Optimizer::Muon(muon) if is_matrix(self.optimizer, param) => {
                let mu = muon.momentum;
                let direction = grad.iter().zip(&mut states[0]).map(|(g, buffer)| {
                    *buffer = mu * *buffer + (1.0 - mu) * g;
                    match muon.direction {
                        Direction::Momentum => *buffer,
                        Direction::Nesterov => (1.0 - mu) * g + mu * *buffer,
                    }
                });
                let (rows, cols) = (param.shape[0], param.shape[1]);
                let update = newton_schulz(direction.collect(), rows, cols, muon.num_newton_schulz_steps);
                let scale = (rows as f64 / cols as f64).max(1.0).sqrt();
                for (w, update) in w.iter_mut().zip(update) {
                    *w = *w * (1.0 - lr * decay(muon.weight_decay)) - lr * scale * update;
                }
            }
            Optimizer::Muon(muon) => self.adamw(&muon.adamw, lr * muon.adamw_lr_scale, grad, w, states),
        }
    }

    fn adamw(&self, adam: &AdamOptions, lr: f64, grad: &[f64], w: &mut [f64], states: &mut [Vec<f64>]) {
        let [m, v] = states else { panic!("two states") };
        let correct = |beta: f64| match adam.bias_correction {
            BiasCorrection::On => 1.0 - beta.powi(self.step),
            BiasCorrection::Off => 1.0,
        };
        let decay = self.decay.unwrap_or(adam.weight_decay);
        for (i, g) in grad.iter().enumerate() {
            m[i] = adam.beta1 * m[i] + (1.0 - adam.beta1) * g;
            v[i] = adam.beta2 * v[i] + (1.0 - adam.beta2) * g * g;
            let update = m[i] / correct(adam.beta1) / ((v[i] / correct(adam.beta2)).sqrt() + adam.eps);
            w[i] = w[i] * (1.0 - lr * decay) - lr * update;
        }
    }
}

/// `x` with singular values near 1, by the published iteration on the rows.
fn newton_schulz(mut x: Vec<f64>, rows: usize, cols: usize, num_steps: u32) -> Vec<f64> {
    let norm = x.iter().map(|x| x * x).sum::<f64>().sqrt().max(1e-7);
    x.iter_mut().for_each(|x| *x /= norm);
    for _ in 0..num_steps {
        // `x xᵀ` has the same eigenvalues and more zeros than the smaller `xᵀ x`: the polynomial of both gives the same.
        let gram: Vec<f64> = (0..rows * rows)
            .map(|n| (0..cols).map(|k| x[n / rows * cols + k] * x[n % rows * cols + k]).sum())
            .collect();
        let poly = |i: usize, j: usize| {
            let square: f64 = (0..rows).map(|k| gram[i * rows + k] * gram[k * rows + j]).sum();
            -4.7750 * gram[i * rows + j] + 2.0315 * square
        };
        let poly: Vec<f64> = (0..rows * rows).map(|n| poly(n / rows, n % rows)).collect();
        let product =
            |i: usize, j: usize| (0..rows).map(|k| poly[i * rows + k] * x[k * cols + j]).sum::<f64>();
        x = (0..rows * cols).map(|n| 3.4445 * x[n] + product(n / cols, n % cols)).collect();
    }
    x
}
