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
//! backward. If the input waits on the host of a GPU, it is on the GPU for the moments of forward and backward.

use std::collections::HashMap;

use crate::{ActivationPolicy, Bytes, LayerSpec, OffloadTo, UnitLayout};

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
    /// How far gradients go.
    pub learns: Learning,
    /// What becomes of it until its backward.
    pub policy: ActivationPolicy,
    /// Where its input waits for its backward.
    pub input_at: OffloadTo,
}

impl LayerLoad<'_> {
    fn waits_on_host(&self) -> bool {
        self.input_at == OffloadTo::Host
    }
}

/// How far gradients go through a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Learning {
    /// Nowhere: neither it nor a layer before it has a trainable parameter.
    Nothing,
    /// To its parameters.
    Params,
    /// To its input, which a layer before it needs.
    Input,
}

/// How micro-batches go through the layers of a pipeline stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flow {
    /// The most chunk-wise micro-batches whose activations are kept.
    pub alive: usize,
    /// How many of these wait for the gradients of weights only; 0 where those are made with the gradient of the input.
    pub waiting: usize,
    /// Chunks of layers.
    pub num_chunks: usize,
    /// Elements for each token that come from other stages, for all chunks together, and stay as inputs.
    pub received: usize,
    /// Elements for each token that are sent on and not kept: outputs of chunks whose last layer is recomputed from its input.
    pub sent: usize,
    /// Elements for each token of a message to another stage or from it.
    pub message: usize,
    /// Messages that have a buffer: from and to each neighbour one.
    pub num_messages: usize,
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

/// The first layer that goes backward.
pub(crate) fn first_backward(layers: &[LayerLoad<'_>]) -> usize {
    layers.iter().position(|layer| layer.learns != Learning::Nothing).unwrap_or(layers.len())
}

/// The moment at which the layers hold most, in micro-batches of `tokens`.
pub(super) fn peak(
    layers: &[LayerLoad<'_>],
    flow: Option<&Flow>,
    tokens: usize,
    compute_bytes: usize,
) -> Moment {
    let bytes = |per_token: usize| Bytes::of(per_token * tokens, compute_bytes);
    let first = first_backward(layers);
    // Whether an output is needed no more once the next layer, whose input it is, has run: that waits on the host.
    let leaves = |i: usize| {
        let next_waits = layers.get(i + 1).is_some_and(LayerLoad::waits_on_host);
        next_waits && (i < first || layers[i].policy.recomputes())
    };
    // What stays of a layer when its forward is done, and what goes.
    let stays = |i: usize, layer: &LayerLoad<'_>| {
        let LayerActivations { kept, output, .. } = layer.activations;
        match i.checked_sub(first) {
            // Nothing goes backward through it: its input goes, and only the last one's output stays.
            None => {
                if i + 1 == first && !leaves(i) {
                    (output, layer.input)
                } else {
                    (0, layer.input + output)
                }
            }
            // The forward pass holds less without a graph; a bound, for its backward will hold more.
            Some(_) if leaves(i) => (0, kept + output),
            Some(_) if layer.policy.recomputes() => (output, kept),
            Some(_) => (kept + output, 0),
        }
    };
    let dinput = |layer: &LayerLoad<'_>| match layer.learns {
        Learning::Input => bytes(layer.input),
        Learning::Nothing | Learning::Params => Bytes(0),
    };
    // What comes back for a layer's backward, which kept `again` elements of each token the first time.
    let again_of = |layer: &LayerLoad<'_>, again: usize| {
        let input = if layer.waits_on_host() { layer.input } else { 0 };
        if layer.policy.recomputes() { bytes(again + input) } else { Bytes(0) }
    };
    let mut peak = Moment::default();
    let mut kept = vec![flow.map_or(Bytes(0), |flow| waiting_elsewhere(layers, flow, bytes))];
    for (i, layer) in layers.iter().enumerate() {
        let (stays, mut goes) = stays(i, layer);
        if layer.waits_on_host() && i.checked_sub(1).is_none_or(leaves) {
            goes += layer.input;
        }
        let now = kept[i] + bytes(stays);
        kept.push(now);
        let temporaries =
            bytes(layer.activations.forward + goes) + Bytes::of(layer.activations.fixed, compute_bytes);
        peak.raise_to(Moment { activations: now, layer_grads: Bytes(0), temporaries });
    }

    // Where gradients of weights come later, all of a micro-batch stays until then, and gradients of outputs with it.
    let comes_later = flow.is_some_and(|flow| flow.waiting > 0);
    let mut later = vec![kept[0]];
    if comes_later {
        later.extend(layers.iter().scan(kept[0], |sum, layer| {
            *sum += bytes(whole(layer));
            Some(*sum)
        }));
        let all = *later.last().expect("at least what waits elsewhere");
        for (i, layer) in layers.iter().enumerate().skip(first).rev() {
            let LayerActivations { kept: again, output, backward, .. } = layer.activations;
            let again = again_of(layer, again);
            let after = Bytes(all.0 - later[i + 1].0);
            let temporaries = bytes(backward + output) + dinput(layer);
            peak.raise_to(Moment {
                activations: kept[i + 1] + again + after,
                layer_grads: Bytes(0),
                temporaries,
            });
        }
    }

    let num_units = layers.iter().flat_map(|layer| &layer.params.units).max().map_or(0, |last| last + 1);
    let mut uses_left = vec![0usize; num_units];
    layers.iter().flat_map(|layer| &layer.params.units).for_each(|&unit| uses_left[unit] += 1);
    // Gradients that wait for another layer, by unit and slot.
    let mut waiting: Vec<((usize, usize), Bytes)> = Vec::new();
    for (i, layer) in layers.iter().enumerate().skip(first).rev() {
        let dinput = dinput(layer);
        let trained = &layer.params.trained;
        let own: Bytes = trained.iter().map(|&(_, _, numel)| Bytes::of(numel, compute_bytes)).sum();
        let layer_grads = waiting.iter().map(|&(_, grad)| grad).sum::<Bytes>() + own;
        let LayerActivations { kept: again, output, backward, .. } = layer.activations;
        let (activations, temporaries) = if comes_later {
            (later[i + 1], bytes(backward))
        } else {
            let again = again_of(layer, again);
            (kept[i + 1] + again, bytes(backward + output) + dinput)
        };
        peak.raise_to(Moment { activations, layer_grads, temporaries });
        for &(unit, slot, numel) in trained {
            let grad = Bytes::of(numel, compute_bytes);
            if waiting.iter().any(|&(place, _)| place == (unit, slot)) {
                // The sum of the two is a third, for a moment.
                let layer_grads = layer_grads + grad;
                let activations = if comes_later { later[i] } else { kept[i] };
                peak.raise_to(Moment { activations, layer_grads, temporaries: dinput });
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

/// Elements for each token that a layer holds until the gradients of its weights, where those come later: what its graph saved,
/// its output, and the gradient of that.
fn whole(layer: &LayerLoad<'_>) -> usize {
    match layer.learns {
        Learning::Nothing => 0,
        Learning::Params | Learning::Input => layer.activations.kept + 2 * layer.activations.output,
    }
}

/// Inputs that wait on the host, of all micro-batches that are alive.
pub(super) fn waiting_on_host(
    layers: &[LayerLoad<'_>],
    flow: Option<&Flow>,
    tokens: usize,
    compute_bytes: usize,
) -> Bytes {
    let waits = |layer: &&LayerLoad<'_>| layer.waits_on_host() && layer.learns != Learning::Nothing;
    let one: usize = layers.iter().filter(waits).map(|layer| layer.input).sum();
    let num_passes = flow.map_or(1, |flow| flow.alive.div_ceil(flow.num_chunks));
    Bytes::of(one * tokens * num_passes, compute_bytes)
}

/// What a pipeline stage holds besides the micro-batch that it works on: the others that are alive, and the inputs of this one.
fn waiting_elsewhere(layers: &[LayerLoad<'_>], flow: &Flow, bytes: impl Fn(usize) -> Bytes) -> Bytes {
    if first_backward(layers) == layers.len() {
        return Bytes(0);
    }
    let kept = |(i, layer): (usize, &LayerLoad<'_>)| {
        let LayerActivations { kept, output, .. } = layer.activations;
        let next_waits = layers.get(i + 1).is_some_and(LayerLoad::waits_on_host);
        match layer.learns {
            Learning::Nothing => 0,
            _ if layer.policy.recomputes() && next_waits => 0,
            _ if layer.policy.recomputes() => output,
            _ => kept + output,
        }
    };
    let one =
        bytes((flow.received + layers.iter().enumerate().map(kept).sum::<usize>()).saturating_sub(flow.sent));
    let late = bytes(flow.received + layers.iter().map(whole).sum::<usize>());
    // This micro-batch is one that waits, or it is all its chunks.
    let num_late = flow.waiting.saturating_sub(1) as u64;
    let others = flow.alive.saturating_sub(flow.waiting.max(flow.num_chunks)) as u64;
    bytes(flow.received) + Bytes(late.0 * num_late + one.0 * others / flow.num_chunks as u64)
}

#[cfg(test)]
mod tests {
    use std::cmp::Ordering;

    use super::*;
    use crate::layout::units_of;
    use crate::{ActivationRules, Init, ParamSpec};

    fn loads<'a>(
        layers: &[LayerSpec],
        params: &'a [LayerParams],
        activations: &[LayerActivations],
        rules: &ActivationRules,
    ) -> Vec<LayerLoad<'a>> {
        let policies =
            rules.policies(layers.iter().map(|layer| layer.name.as_str()), crate::LossTurn::AtOnce);
        let input = |i: usize| if i > 0 { activations[i - 1].output } else { 0 };
        let first = params.iter().position(|params| !params.trained.is_empty()).unwrap_or(params.len());
        let learns = |i: usize| match i.cmp(&first) {
            Ordering::Less => Learning::Nothing,
            Ordering::Equal => Learning::Params,
            Ordering::Greater => Learning::Input,
        };
        let load = |(i, params)| LayerLoad {
            params,
            activations: activations[i],
            input: input(i),
            learns: learns(i),
            policy: policies[i],
            input_at: OffloadTo::Device,
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
        let load = |policy| LayerLoad {
            params: &params[0],
            activations,
            input: 20,
            learns: Learning::Input,
            input_at: OffloadTo::Device,
            policy,
        };
        let at = |policy, alive, waiting| {
            let sent = if policy == ActivationPolicy::Recompute { 10 } else { 0 };
            let flow =
                Flow { alive, waiting, num_chunks: 1, received: 20, sent, message: 20, num_messages: 4 };
            peak(&[load(policy)], Some(&flow), 1, 1)
        };
        use ActivationPolicy::{Keep, Recompute};
        let expected = |activations, temporaries| Moment {
            activations: Bytes(activations),
            layer_grads: Bytes(100),
            temporaries: Bytes(temporaries),
        };
        // Temporaries are the layer's own and the gradients of its output and its input.
        assert_eq!(at(Keep, 1, 0), expected(20 + 1010, 35));
        assert_eq!(at(Keep, 3, 0), expected(3 * (20 + 1010), 35));
        // Of the other two the inputs stay.
        assert_eq!(at(Recompute, 3, 0), expected(2 * 20 + 20 + 10 + 1000, 35));
        // This one and another wait for the gradients of weights, with those of their outputs.
        assert_eq!(at(Keep, 3, 2), expected(2 * (20 + 1020) + 20 + 1010, 5));
        assert_eq!(at(Recompute, 3, 2), expected(2 * (20 + 1020) + 20, 5));
    }
}
