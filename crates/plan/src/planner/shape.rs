//! The model as the planner sees it: what each layer has on one tensor-parallel rank, with equal layers told once.

use std::collections::HashMap;

use super::Job;
use crate::layout::UnitLayout;
use crate::memory::LayerActivations;
use crate::param::{LayerSpec, ParamSpec};
use crate::tensor::SplitError;

/// The model on one of `tensor` ranks.
pub(super) struct LocalModel {
    /// Each layer's kind.
    pub kinds: Vec<usize>,
    /// Each layer's activations, by samples of a micro-batch.
    activations: HashMap<usize, Vec<LayerActivations>>,
    /// For each layer the first layer that declares one of its parameters.
    pub tied_to: Vec<Option<usize>>,
    kinds_params: Vec<KindParams>,
    /// Tensor-parallel ranks.
    pub tensor: usize,
}

/// Parameters of one kind of layer: trainable and frozen, and those that an earlier layer has too.
struct KindParams {
    own: [Vec<ParamSpec>; 2],
    tied: [Vec<ParamSpec>; 2],
}

/// One kind of layer on one rank of a mesh.
pub(super) struct Kind {
    /// All of its units, where it holds its tied parameters itself.
    pub units: Vec<UnitLayout>,
    /// Those that are left where an earlier layer of the stage holds them.
    pub without_tied: Vec<UnitLayout>,
    /// Elements of trainable parameters, whose gradients its backward makes.
    pub trained: usize,
    /// Of these, elements of tied ones.
    pub trained_tied: usize,
}

impl LocalModel {
    pub fn new(
        job: &Job,
        layers: &[LayerSpec],
        tensor: usize,
        micro_batches: &[usize],
    ) -> Result<Self, SplitError> {
        let activations =
            |samples| job.model.activations_on(tensor, job.sequence, samples, job.seq_len, job.compute_bytes);
        let is_frozen = |param: &ParamSpec| job.frozen.iter().any(|pattern| pattern.matches(&param.name));
        let mut first_use: HashMap<&str, usize> = HashMap::new();
        let mut known: HashMap<Vec<(Vec<usize>, bool, bool)>, usize> = HashMap::new();
        let mut model = LocalModel {
            kinds: Vec::with_capacity(layers.len()),
            activations: micro_batches.iter().map(|&samples| (samples, activations(samples))).collect(),
            tied_to: Vec::with_capacity(layers.len()),
            kinds_params: Vec::new(),
            tensor,
        };
        for (index, layer) in layers.iter().enumerate() {
            let mut params = KindParams { own: Default::default(), tied: Default::default() };
            let mut signature = Vec::with_capacity(layer.params.len());
            let mut tied_to = None;
            for param in &layer.params {
                let first = *first_use.entry(&param.name).or_insert(index);
                let (frozen, tied) = (is_frozen(param), first < index);
                if tied {
                    tied_to = Some(tied_to.map_or(first, |other: usize| other.min(first)));
                }
                // Rank 0 has no less than any other.
                let local = param.local(tensor, 0)?;
                signature.push((local.shape.clone(), frozen, tied));
                let of_kind = if tied { &mut params.tied } else { &mut params.own };
                of_kind[usize::from(frozen)].push(local);
            }
            model.tied_to.push(tied_to);
            let next = model.kinds_params.len();
            let kind = *known.entry(signature).or_insert(next);
            if kind == next {
                model.kinds_params.push(params);
            }
            model.kinds.push(kind);
        }
        Ok(model)
    }

    /// What each layer holds of a micro-batch of one of the sizes that it was made for.
    pub fn activations(&self, micro_batch: usize) -> &[LayerActivations] {
        &self.activations[&micro_batch]
    }

    /// Its kinds of layers, laid out for `data` ranks.
    pub fn laid_out(&self, data: usize) -> Vec<Kind> {
        let units = |kinds: [Vec<ParamSpec>; 2]| -> Vec<UnitLayout> {
            let laid_out = |(params, trainable): (Vec<ParamSpec>, bool)| {
                (!params.is_empty()).then(|| UnitLayout::new("", trainable, params, data))
            };
            kinds.into_iter().zip([true, false]).filter_map(laid_out).collect()
        };
        let kind = |params: &KindParams| {
            let all: [Vec<ParamSpec>; 2] = std::array::from_fn(|frozen| {
                params.own[frozen].iter().chain(&params.tied[frozen]).cloned().collect()
            });
            let numel = |params: &[ParamSpec]| params.iter().map(ParamSpec::numel).sum();
            Kind {
                trained: numel(&all[0]),
                trained_tied: numel(&params.tied[0]),
                units: units(all),
                without_tied: units(params.own.clone()),
            }
        };
        self.kinds_params.iter().map(kind).collect()
    }
}
