//! Which parameters a layer sees, and where their memory is.
//!
//! For each unit there is one [`FlatTensor`], whose storage is pointed at the unit's compute copy when that is whole and
//! at nothing when it is not. A layer's parameters are views of it, made once.

use std::collections::HashMap;

use shardwise_plan::LayerSpec;
use shardwise_torch::{Device, FlatTensor, Tensor};
use shardwise_zero::Zero;

use crate::EngineError;

/// A layer's parameters during one call, by the keys it declared.
#[derive(Debug, Clone, Copy)]
pub struct Params<'a> {
    entries: &'a [(String, Tensor)],
}

impl<'a> Params<'a> {
    /// Parameters given directly, to call a layer without an engine.
    pub fn new(entries: &'a [(String, Tensor)]) -> Self {
        Params { entries }
    }

    /// The parameter `key`.
    ///
    /// # Errors
    /// [`EngineError::NoSuchParam`] if the layer did not declare it.
    pub fn get(&self, key: &str) -> Result<&'a Tensor, EngineError> {
        self.find(key).ok_or_else(|| EngineError::NoSuchParam {
            key: key.to_owned(),
            declared: self.entries.iter().map(|(key, _)| key.clone()).collect(),
        })
    }

    /// The parameter `key`, if the layer declared it.
    pub fn find(&self, key: &str) -> Option<&'a Tensor> {
        self.entries.iter().find(|(k, _)| k == key).map(|(_, tensor)| tensor)
    }
}

/// Where one of a layer's parameters lies.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    pub unit: usize,
    pub slot: usize,
}

/// One layer's parameters.
#[derive(Debug)]
pub(crate) struct Binding {
    entries: Vec<(String, Tensor)>,
    pub places: Vec<Place>,
    /// The units that must be whole while the layer runs, each once.
    pub units: Vec<usize>,
}

impl Binding {
    pub fn params(&self) -> Params<'_> {
        Params { entries: &self.entries }
    }

    /// The trainable parameters, as indices into `places`, and their tensors.
    pub fn trainable(&self) -> impl Iterator<Item = (Place, &Tensor)> {
        let pairs = self.places.iter().copied().zip(self.entries.iter().map(|(_, tensor)| tensor));
        pairs.filter(|(_, tensor)| tensor.requires_grad())
    }
}

/// Makes the tensors of all units and binds the layers' parameters to them. Gathers each unit once.
pub(crate) fn bind(
    zero: &mut Zero,
    specs: &[LayerSpec],
    device: Device,
) -> Result<(Vec<FlatTensor>, Vec<Binding>), EngineError> {
    let mut flats = Vec::new();
    let mut found = HashMap::new();
    let num_units = zero.layouts().len();
    for unit in 0..num_units {
        let ptr = zero.gather(unit)?;
        let layout = zero.layout(unit);
        // SAFETY: the copy stays at `ptr` until `release`; the engine points the tensor elsewhere, or at nothing,
        // whenever the copy moves or goes, and drops all tensors before `zero`.
        let mut flat = unsafe { FlatTensor::new(ptr, layout.padded_numel, zero.compute_dtype(), device)? };
        for (slot, s) in layout.slots.iter().enumerate() {
            let shape: Vec<i64> = s.param.shape.iter().map(|&dim| dim as i64).collect();
            let leaf = flat.leaf(s.offset, &shape, layout.trainable)?;
            found.insert(s.param.name.clone(), (Place { unit, slot }, s.param.shape.clone(), leaf));
        }
        zero.release(unit);
        if zero.gathers() {
            flat.forget_memory()?;
        }
        flats.push(flat);
    }
    let bind_layer = |spec: &LayerSpec| {
        let mut binding = Binding { entries: Vec::new(), places: Vec::new(), units: Vec::new() };
        for param in &spec.params {
            let (place, shape, leaf) = found.get(&param.name).expect("every parameter has a unit");
            if *shape != param.shape {
                let (first, second) = (shape.clone(), param.shape.clone());
                return Err(EngineError::TiedShapes { name: param.name.clone(), first, second });
            }
            binding.entries.push((param.key.clone(), leaf.shallow_clone()));
            binding.places.push(*place);
            if !binding.units.contains(&place.unit) {
                binding.units.push(place.unit);
            }
        }
        Ok(binding)
    };
    let bindings = specs.iter().map(bind_layer).collect::<Result<_, _>>()?;
    Ok((flats, bindings))
}
