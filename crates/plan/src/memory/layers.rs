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

use crate::{ActivationPolicy, ActivationRules, Bytes, LayerSpec, UnitLayout};

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

/// A layer as the memory plan sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerLoad {
    /// The units that hold its parameters, each once.
    pub units: Vec<usize>,
    /// Its trainable parameters: unit, slot in the unit, elements.
    trained: Vec<(usize, usize, usize)>,
    activations: LayerActivations,
    policy: ActivationPolicy,
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

/// Finds each layer's parameters in the units, and its policy in the rules. `activations` has one entry for each layer.
pub fn layer_loads(
    layers: &[LayerSpec],
    units: &[UnitLayout],
    activations: &[LayerActivations],
    rules: &ActivationRules,
) -> Vec<LayerLoad> {
    assert_eq!(layers.len(), activations.len(), "one entry for each layer");
    let places: HashMap<&str, (usize, usize)> = (units.iter().enumerate())
        .flat_map(|(u, unit)| {
            unit.slots.iter().enumerate().map(move |(s, slot)| (slot.param.name.as_str(), (u, s)))
        })
        .collect();
    let policies = rules.policies(layers.iter().map(|layer| layer.name.as_str()));
    let load = |((layer, &activations), policy): ((&LayerSpec, _), _)| {
        let mut load = LayerLoad { units: Vec::new(), trained: Vec::new(), activations, policy };
        for param in &layer.params {
            let (unit, slot) =
                *places.get(param.name.as_str()).expect("units are made of the layers' parameters");
            if !load.units.contains(&unit) {
                load.units.push(unit);
            }
            if units[unit].trainable {
                load.trained.push((unit, slot, param.numel()));
            }
        }
        load
    };
    layers.iter().zip(activations).zip(policies).map(load).collect()
}

/// The first layer that goes backward: there is nothing to do before the first trainable parameter.
pub(crate) fn first_trained(layers: &[LayerLoad]) -> usize {
    layers.iter().position(|layer| !layer.trained.is_empty()).unwrap_or(layers.len())
}

/// The moment of a micro-batch of `tokens` at which layers hold most.
pub(super) fn peak(layers: &[LayerLoad], tokens: usize, compute_bytes: usize) -> Moment {
    let bytes = |per_token: usize| Bytes::of(per_token * tokens, compute_bytes);
    let first = first_trained(layers);
    // What stays of a layer when its forward is done, and what goes.
    let stays = |i: usize, layer: &LayerLoad| {
        let LayerActivations { kept, output, .. } = layer.activations;
        match i.checked_sub(first) {
            // Nothing goes backward through it: its input goes, and only the last one's output stays.
            None => {
                let input = if i > 0 { layers[i - 1].activations.output } else { 0 };
                if i + 1 == first { (output, input) } else { (0, input + output) }
            }
            // The forward pass holds less without a graph; a bound, for its backward will hold more.
            Some(_) if layer.policy.recomputes() => (output, kept),
            Some(_) => (kept + output, 0),
        }
    };
    let mut peak = Moment::default();
    let mut kept = vec![Bytes(0)];
    for (i, layer) in layers.iter().enumerate() {
        let (stays, goes) = stays(i, layer);
        let now = kept[i] + bytes(stays);
        kept.push(now);
        let temporaries =
            bytes(layer.activations.forward + goes) + Bytes::of(layer.activations.fixed, compute_bytes);
        peak.raise_to(Moment { activations: now, layer_grads: Bytes(0), temporaries });
    }

    let mut uses_left: HashMap<usize, usize> = HashMap::new();
    for &unit in layers.iter().flat_map(|layer| &layer.units) {
        *uses_left.entry(unit).or_default() += 1;
    }
    // Gradients that wait for another layer, by unit and slot.
    let mut waiting: HashMap<(usize, usize), Bytes> = HashMap::new();
    for (i, layer) in layers.iter().enumerate().skip(first).rev() {
        let doutput = bytes(layer.activations.output);
        let dinput = if i > first { bytes(layers[i - 1].activations.output) } else { Bytes(0) };
        let own: Bytes = layer.trained.iter().map(|&(_, _, numel)| Bytes::of(numel, compute_bytes)).sum();
        let layer_grads = waiting.values().copied().sum::<Bytes>() + own;
        let temporaries = bytes(layer.activations.backward) + doutput + dinput;
        let again = if layer.policy.recomputes() { bytes(layer.activations.kept) } else { Bytes(0) };
        peak.raise_to(Moment { activations: kept[i + 1] + again, layer_grads, temporaries });
        for &(unit, slot, numel) in &layer.trained {
            let grad = Bytes::of(numel, compute_bytes);
            if waiting.insert((unit, slot), grad).is_some() {
                // The sum of the two is a third, for a moment.
                let layer_grads = layer_grads + grad;
                peak.raise_to(Moment { activations: kept[i], layer_grads, temporaries: dinput });
            }
        }
        for &unit in &layer.units {
            let left = uses_left.get_mut(&unit).expect("counted above");
            *left -= 1;
            if *left == 0 {
                waiting.retain(|(waiting_unit, _), _| *waiting_unit != unit);
            }
        }
    }
    peak
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::units_of;
    use crate::{Init, ParamSpec};

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
        peak(&layer_loads(layers, &units, activations, &ActivationRules::default()), 1, 1)
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
        let at = |policy| {
            let rules = ActivationRules::all(policy);
            peak(&layer_loads(&layers, &units, &activations, &rules), 1, 1)
        };
        let kept = at(ActivationPolicy::Keep);
        assert_eq!(kept.activations, Bytes(4 * 10 + 3 * 1000 + 20));
        // The backward of the last block: four outputs, and its own graph.
        let recomputed = at(ActivationPolicy::Recompute);
        let expected =
            Moment { activations: Bytes(4 * 10 + 1000), layer_grads: Bytes(100), temporaries: Bytes(5 + 20) };
        assert_eq!(recomputed, expected);
        assert_eq!(at(ActivationPolicy::Offload), expected);
    }
}
