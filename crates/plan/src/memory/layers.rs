//! What layers hold while a micro-batch goes through them.
//!
//! Between its forward and its backward a layer keeps its output and what its graph saved. Its backward makes the
//! gradients of its parameters, which live until their unit is reduced: at once, or, for a tied parameter, when the
//! last layer that uses it has gone backward. So the most is held somewhere near the turn:
//!
//! ```text
//! kept     | embedding | block 0 | block 1 | head |  backward of the head
//!          | embedding | block 0 | block 1 |         backward of block 1
//! besides                                   gradients of that layer and of tied parameters, temporaries
//! ```
//!
//! A recomputed layer keeps its input only, which is the output of the layer before, and has the rest for the moment of its
//! backward.

use std::collections::HashMap;

use crate::{ActivationPolicy, Bytes, LayerSpec, UnitLayout};

/// What one layer holds, in elements of the compute type for each token of a micro-batch.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LayerActivations {
    /// Kept from forward to backward, apart from input and output.
    pub kept: usize,
    /// The output, which is the next layer's input.
    pub output: usize,
    /// The most that the forward pass needs besides.
    pub forward: usize,
    /// The most that the backward pass needs besides, apart from the gradients of parameters, input and output.
    pub backward: usize,
    /// What the forward pass needs besides, in elements, however many the tokens are: a head's scores, and the gradient of its
    /// weight, which it makes at once (if the weight is frozen, this is too much).
    pub fixed: usize,
}

/// The parameters that a layer uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerParams {
    /// The units that hold them, each once.
    pub units: Vec<usize>,
    /// The trainable ones: unit, slot in the unit, elements.
    trained: Vec<(usize, usize, usize)>,
}

/// A layer as the memory plan sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerLoad<'a> {
    /// What it uses.
    pub params: &'a LayerParams,
    /// What it holds.
    pub activations: LayerActivations,
    /// Elements of its input for each token: the output of the layer before, which may be on another stage.
    pub input: usize,
    /// What becomes of it until its backward.
    pub policy: ActivationPolicy,
}

/// How micro-batches go through the layers of a pipeline stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flow {
    /// The most chunk-wise micro-batches whose activations are kept.
    pub alive: usize,
    /// Chunks of layers.
    pub num_chunks: usize,
    /// Elements for each token that come from other stages, for all chunks together, and stay as inputs.
    pub received: usize,
    /// Elements for each token of a message to another stage or from it.
    pub message: usize,
    /// When gradients of weights are made.
    pub weights: WeightGrads,
}

/// When gradients of weights are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightGrads {
    /// With the gradient of the input.
    AtOnce,
    /// When the stage would be idle; until then gradients of outputs stay.
    Later,
}

/// The most that is held at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Moment {
    pub activations: Bytes,
    pub layer_grads: Bytes,
    pub temporaries: Bytes,
}

impl Moment {
    pub fn total(&self) -> Bytes {
        self.activations + self.layer_grads + self.temporaries
    }

    fn raise_to(&mut self, other: Moment) {
        if other.total() > self.total() {
            *self = other;
        }
    }
}

/// Finds each layer's parameters in the units.
pub fn layer_params(layers: &[LayerSpec], units: &[UnitLayout]) -> Vec<LayerParams> {
    let places: HashMap<&str, (usize, usize)> = (units.iter().enumerate())
        .flat_map(|(u, unit)| {
            unit.slots.iter().enumerate().map(move |(s, slot)| (slot.param.name.as_str(), (u, s)))
        })
        .collect();
    let params = |layer: &LayerSpec| {
        let mut params = LayerParams { units: Vec::new(), trained: Vec::new() };
        for param in &layer.params {
            let (unit, slot) =
                *places.get(param.name.as_str()).expect("units are made of the layers' parameters");
            if !params.units.contains(&unit) {
                params.units.push(unit);
            }
            if units[unit].trainable {
                params.trained.push((unit, slot, param.numel()));
            }
        }
        params
    };
    layers.iter().map(params).collect()
}

/// The first layer that goes backward: there is nothing to do before the first trainable parameter. In a pipeline all do, for
/// the schedule is the same whatever is trained.
pub(crate) fn first_backward(layers: &[LayerLoad<'_>], flow: Option<&Flow>) -> usize {
    if flow.is_some() {
        return 0;
    }
    layers.iter().position(|layer| !layer.params.trained.is_empty()).unwrap_or(layers.len())
}

/// The moment at which the layers hold most, in micro-batches of `tokens`.
pub(super) fn peak(
    layers: &[LayerLoad<'_>],
    flow: Option<&Flow>,
    tokens: usize,
    compute_bytes: usize,
) -> Moment {
    let bytes = |per_token: usize| Bytes::of(per_token * tokens, compute_bytes);
    let first = first_backward(layers, flow);
    // What stays of a layer when its forward is done, and what goes.
    let stays = |i: usize, layer: &LayerLoad<'_>| {
        let LayerActivations { kept, output, .. } = layer.activations;
        match i.checked_sub(first) {
            // Nothing goes backward through it: its input goes, and only the last one's output stays.
            None => {
                if i + 1 == first {
                    (output, layer.input)
                } else {
                    (0, layer.input + output)
                }
            }
            // The forward pass holds less without a graph; a bound, for its backward will hold more.
            Some(_) if layer.policy.recomputes() => (output, kept),
            Some(_) => (kept + output, 0),
        }
    };
    let mut peak = Moment::default();
    let mut kept = vec![flow.map_or(Bytes(0), |flow| waiting_elsewhere(layers, flow, bytes))];
    for (i, layer) in layers.iter().enumerate() {
        let (stays, goes) = stays(i, layer);
        let now = kept[i] + bytes(stays);
        kept.push(now);
        let temporaries =
            bytes(layer.activations.forward + goes) + Bytes::of(layer.activations.fixed, compute_bytes);
        peak.raise_to(Moment { activations: now, layer_grads: Bytes(0), temporaries });
    }

    let num_units = layers.iter().flat_map(|layer| &layer.params.units).max().map_or(0, |last| last + 1);
    let mut uses_left = vec![0usize; num_units];
    layers.iter().flat_map(|layer| &layer.params.units).for_each(|&unit| uses_left[unit] += 1);
    // Gradients that wait for another layer, by unit and slot.
    let mut waiting: Vec<((usize, usize), Bytes)> = Vec::new();
    for (i, layer) in layers.iter().enumerate().skip(first).rev() {
        let doutput = bytes(layer.activations.output);
        let dinput = if i > first || flow.is_some() { bytes(layer.input) } else { Bytes(0) };
        let trained = &layer.params.trained;
        let own: Bytes = trained.iter().map(|&(_, _, numel)| Bytes::of(numel, compute_bytes)).sum();
        let layer_grads = waiting.iter().map(|&(_, grad)| grad).sum::<Bytes>() + own;
        let temporaries = bytes(layer.activations.backward) + doutput + dinput;
        let again = if layer.policy.recomputes() { bytes(layer.activations.kept) } else { Bytes(0) };
        peak.raise_to(Moment { activations: kept[i + 1] + again, layer_grads, temporaries });
        for &(unit, slot, numel) in trained {
            let grad = Bytes::of(numel, compute_bytes);
            if waiting.iter().any(|&(place, _)| place == (unit, slot)) {
                // The sum of the two is a third, for a moment.
                let layer_grads = layer_grads + grad;
                peak.raise_to(Moment { activations: kept[i], layer_grads, temporaries: dinput });
            } else if uses_left[unit] > 1 {
                waiting.push(((unit, slot), grad));
            }
        }
        for &unit in &layer.params.units {
            uses_left[unit] -= 1;
            if uses_left[unit] == 0 {
                waiting.retain(|((waiting_unit, _), _)| *waiting_unit != unit);
            }
        }
    }
    peak
}

/// What a pipeline stage holds besides the micro-batch that it works on: the others that are alive, and the inputs of this one.
fn waiting_elsewhere(layers: &[LayerLoad<'_>], flow: &Flow, bytes: impl Fn(usize) -> Bytes) -> Bytes {
    let kept = |layer: &LayerLoad<'_>| {
        let LayerActivations { kept, output, .. } = layer.activations;
        if layer.policy.recomputes() { output } else { kept + output }
    };
    let deferred = match flow.weights {
        WeightGrads::AtOnce => 0,
        WeightGrads::Later => layers.iter().map(|layer| layer.activations.output).sum(),
    };
    let one = bytes(flow.received + layers.iter().map(kept).sum::<usize>() + deferred);
    let others = flow.alive.saturating_sub(flow.num_chunks) as u64;
    bytes(flow.received) + Bytes(one.0 * others / flow.num_chunks as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::units_of;
    use crate::{ActivationRules, Init, ParamSpec};

    fn loads<'a>(
        layers: &[LayerSpec],
        params: &'a [LayerParams],
        activations: &[LayerActivations],
        rules: &ActivationRules,
    ) -> Vec<LayerLoad<'a>> {
        let policies = rules.policies(layers.iter().map(|layer| layer.name.as_str()));
        let input = |i: usize| if i > 0 { activations[i - 1].output } else { 0 };
        let load = |(i, params)| LayerLoad {
            params,
            activations: activations[i],
            input: input(i),
            policy: policies[i],
        };
        params.iter().enumerate().map(load).collect()
    }

    /// Layers with one parameter each, of 100 elements, the last tied to the first.
    fn tied_layers() -> Vec<LayerSpec> {
        let layer = |name: &str| LayerSpec {
            name: name.into(),
            params: vec![ParamSpec::new(name, "w", &[100], Init::Zeros)],
        };
        let mut layers = vec![layer("embed"), layer("block"), layer("head")];
        layers[2].params = layers[0].params.clone();
        layers
    }

    fn peak_of(layers: &[LayerSpec], frozen: &str, activations: &[LayerActivations]) -> Moment {
        let units = units_of(layers, 2, |name| name == frozen);
        let params = layer_params(layers, &units);
        peak(&loads(layers, &params, activations, &ActivationRules::default()), None, 1, 1)
    }

    #[test]
    fn the_most_is_held_where_the_forward_pass_turns() {
        let mut layers = tied_layers();
        layers[2].params = vec![ParamSpec::new("head", "w", &[50], Init::Zeros)];
        let activations = [
            LayerActivations { output: 10, ..LayerActivations::default() },
            LayerActivations { kept: 1000, output: 10, forward: 3, backward: 5, fixed: 0 },
            LayerActivations { kept: 200, output: 0, forward: 100, backward: 7, fixed: 100 },
        ];
        // The head's forward holds its temporaries: 1220 + 200. Its backward: 1220, 50 gradients, 7 + 10 for the input's.
        let moment = peak_of(&layers, "", &activations);
        assert_eq!(
            moment,
            Moment { activations: Bytes(1220), layer_grads: Bytes(0), temporaries: Bytes(200) }
        );
        let mut less = activations;
        (less[2].forward, less[2].fixed) = (20, 0);
        let moment = peak_of(&layers, "", &less);
        assert_eq!(
            moment,
            Moment { activations: Bytes(1220), layer_grads: Bytes(50), temporaries: Bytes(17) }
        );
    }

    #[test]
    fn gradients_of_tied_parameters_wait_and_are_summed() {
        let activations = [LayerActivations { output: 1, ..LayerActivations::default() }; 3];
        // In the end: the head's gradient, the embedding's and their sum, beside the embedding's output.
        let moment = peak_of(&tied_layers(), "", &activations);
        assert_eq!(moment, Moment { activations: Bytes(0), layer_grads: Bytes(300), temporaries: Bytes(0) });
    }

    #[test]
    fn layers_before_the_first_trained_one_keep_their_output_only() {
        let mut layers = tied_layers();
        layers.pop();
        let activations = [LayerActivations { kept: 1000, output: 10, ..LayerActivations::default() }; 2];
        let moment = peak_of(&layers, "embed.w", &activations);
        assert_eq!(moment.activations, Bytes(10 + 1010));
        assert_eq!(moment.layer_grads, Bytes(100));
    }

    #[test]
    fn recomputed_layers_hold_their_inputs_and_one_of_them_the_rest() {
        let layer = |name: &str| LayerSpec {
            name: name.into(),
            params: vec![ParamSpec::new(name, "w", &[100], Init::Zeros)],
        };
        let layers: Vec<_> = ["embed", "h.0", "h.1", "h.2", "head"].map(layer).into();
        let block = LayerActivations { kept: 1000, output: 10, forward: 3, backward: 5, fixed: 0 };
        let embed = LayerActivations { output: 10, ..LayerActivations::default() };
        let head = LayerActivations { kept: 20, ..LayerActivations::default() };
        let activations = [embed, block, block, block, head];
        let units = units_of(&layers, 2, |_| false);
        let params = layer_params(&layers, &units);
        let at =
            |policy| peak(&loads(&layers, &params, &activations, &ActivationRules::all(policy)), None, 1, 1);
        let kept = at(ActivationPolicy::Keep);
        assert_eq!(kept.activations, Bytes(4 * 10 + 3 * 1000 + 20));
        // The backward of the last block: four outputs, and its own graph.
        let recomputed = at(ActivationPolicy::Recompute);
        let expected =
            Moment { activations: Bytes(4 * 10 + 1000), layer_grads: Bytes(100), temporaries: Bytes(5 + 20) };
        assert_eq!(recomputed, expected);
        assert_eq!(at(ActivationPolicy::Offload), expected);
    }

    #[test]
    fn a_pipeline_stage_holds_other_micro_batches_and_what_it_received() {
        let layers = tied_layers();
        let units = units_of(&layers[1..2], 2, |_| false);
        let params = layer_params(&layers[1..2], &units);
        let activations = LayerActivations { kept: 1000, output: 10, forward: 3, backward: 5, fixed: 0 };
        let load = |policy| LayerLoad { params: &params[0], activations, input: 20, policy };
        let flow = |alive, weights| Flow { alive, num_chunks: 1, received: 20, message: 20, weights };
        let at = |policy, alive, weights| peak(&[load(policy)], Some(&flow(alive, weights)), 1, 1);
        use ActivationPolicy::{Keep, Recompute};
        use WeightGrads::{AtOnce, Later};
        // Temporaries are the layer's own and the gradients of its output and its input.
        let expected = |activations| Moment {
            activations: Bytes(activations),
            layer_grads: Bytes(100),
            temporaries: Bytes(5 + 10 + 20),
        };
        assert_eq!(at(Keep, 1, AtOnce), expected(20 + 1010));
        assert_eq!(at(Keep, 3, AtOnce), expected(3 * (20 + 1010)));
        assert_eq!(at(Keep, 3, Later), expected(3 * (20 + 1010) + 2 * 10));
        assert_eq!(at(Recompute, 3, AtOnce), expected(3 * (20 + 10) + 1000));
    }
}
