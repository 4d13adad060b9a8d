//! Layers that another quantizer has packed: which are taken over, and what is said of them.

use std::collections::BTreeMap;

use mlx_format::{FloatType, Scheme};
use mlx_quant_model::{Existing, Named, Taken};

use super::Settings;
use super::check::takes_over;

/// Packed layers that are still to be planned, and what was done with the others.
pub(super) struct PackedLayers {
    method: &'static str,
    layers: BTreeMap<String, Taken>,
    known: BTreeMap<String, Option<Scheme>>,
    usual: BTreeMap<String, FloatType>,
    /// The scheme of most layers, where they are taken over: what config.json says of all.
    pub(super) shared: Option<Scheme>,
    taken: BTreeMap<String, usize>,
    rounded: usize,
    /// dtype of scales as they are held, and as they are written.
    scales: Option<(FloatType, FloatType)>,
    /// dtype of what stands beside them.
    beside: Option<FloatType>,
}

impl PackedLayers {
    pub(super) fn new(named: &Named, settings: &Settings) -> Self {
        let mut counts: Vec<(Scheme, usize)> = Vec::new();
        for taken in named.packed.values().flatten().filter(|_| takes_over(settings)) {
            match counts.iter_mut().find(|(scheme, _)| *scheme == taken.scheme) {
                Some((_, count)) => *count += 1,
                None => counts.push((taken.scheme, 1)),
            }
        }
        // The first of those that are met most often.
        let most = counts.iter().map(|(_, count)| *count).max();
        let shared = counts.iter().find(|(_, count)| Some(*count) == most).map(|(scheme, _)| *scheme);
        let schemes = named
            .packed
            .iter()
            .map(|(path, layer)| (path.clone(), layer.as_ref().ok().map(|taken| taken.scheme)));
        let layers = named
            .packed
            .iter()
            .filter_map(|(path, layer)| Some((path.clone(), layer.as_ref().ok()?.clone())));
        Self {
            method: match &named.existing {
                Existing::Packed(packing) => packing.name(),
                _ => "",
            },
            known: schemes.collect(),
            layers: layers.collect(),
            usual: named.usual.clone(),
            shared,
            taken: BTreeMap::new(),
            rounded: 0,
            scales: None,
            beside: None,
        }
    }

    /// The dtype that a decoded weight has where nothing asks for another.
    pub(super) fn usual(&self, name: &str) -> Option<FloatType> {
        self.usual.get(name).copied()
    }

    /// A layer in MLX's packing, to be written.
    pub(super) fn take(&mut self, path: &str) -> Option<Taken> {
        let taken = self.layers.remove(path)?;
        *self.taken.entry(taken.scheme.to_string()).or_default() += 1;
        Some(taken)
    }

    /// The same if that is the scheme that it is to have.
    pub(super) fn take_if(&mut self, path: &str, scheme: Scheme) -> Option<Taken> {
        self.layers.get(path).filter(|taken| taken.scheme == scheme)?;
        self.take(path)
    }

    /// Notes that a layer is decoded and rounded, if it was packed.
    pub(super) fn rounded(&mut self, path: &str) {
        self.rounded += usize::from(self.known.contains_key(path));
    }

    /// Notes the dtype of scales and biases: as they are held exactly, as they are written, and of what stands beside them.
    pub(super) fn scales(&mut self, held: FloatType, written: FloatType, beside: Option<FloatType>) {
        // What is wider than what stands beside it is what there is to tell.
        if self.scales.is_none_or(|(known, _)| known.size() < held.size()) {
            (self.scales, self.beside) = (Some((held, written)), beside);
        }
    }

    /// What a person should know.
    pub(super) fn notes(&self) -> Vec<String> {
        let (mut notes, method) = (Vec::new(), self.method);
        for (scheme, count) in &self.taken {
            notes.push(format!(
                "{count} layers are taken over as {method} has packed them ({scheme}), nothing is rounded"
            ));
        }
        match self.scales {
            Some((held, written)) if held != written && held.size() >= written.size() => notes.push(format!(
                "their scales and biases are rounded to {}, as --dtype asks; without it they are exact, in {}",
                written.name(),
                held.name()
            )),
            Some((FloatType::F32, FloatType::F32)) if self.beside != Some(FloatType::F32) => notes.push(
                "their scales and biases are float32, which holds every zero point times its scale, and mlx_lm computes such \
                 layers in float32; --dtype float16 or bfloat16 rounds them to 16 bits"
                    .to_owned(),
            ),
            Some((held, _)) if self.beside.is_some_and(|beside| beside != held) => notes.push(format!(
                "their scales and biases stay {}, which the other tensors are not, and mlx_lm computes such layers in float32; \
                 --dtype {} gives all tensors that dtype",
                held.name(),
                held.name()
            )),
            _ => {}
        }
        if self.rounded > 0 {
            notes.push(format!(
                "{} layers that {method} has packed are decoded and rounded anew, which loses more than rounding the original model",
                self.rounded
            ));
        }
        notes
    }
}
