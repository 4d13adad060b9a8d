//! Names and shapes: packed layers against config.json, all tensors against the description of the decoder.

use std::collections::{BTreeMap, BTreeSet};

use mlx_format::{Dtype, FloatType, Scheme};
use mlx_quant_model::{Decoder, ExpectedTensor, Named, View};
use serde_json::{Map, Value};

use super::Findings;
use crate::Model;
use crate::inspect::stored::{Packed, Stored, listed, stored};

/// Returns the rows of the embedding, where the decoder is described.
pub(super) fn check(
    model: &Model,
    named: &Named,
    decoder: Option<&Decoder>,
    findings: &mut Findings,
) -> Option<usize> {
    let views: BTreeMap<&str, &View> =
        named.tensors.iter().map(|(name, view)| (name.as_str(), view)).collect();
    let rows = |name: &str| views.get(name)?.shape().iter().rev().nth(1).copied();
    let expected = decoder.map(|decoder| decoder.expected(rows));
    let layers = stored(named);
    let mut check = Check { named, expected: expected.as_ref(), findings, odd: Vec::new(), shapes: BTreeMap::new() };
    check.packed_layers(&layers);
    check.entries(&layers);
    check.description(model);
    decoder.and_then(|decoder| rows(&format!("{}.weight", decoder.embedding.path)))
}

struct Check<'a> {
    named: &'a Named,
    expected: Option<&'a BTreeMap<String, ExpectedTensor>>,
    findings: &'a mut Findings,
    /// Layers without an entry whose shapes are not those of the shared scheme.
    odd: Vec<(&'a str, Scheme)>,
    /// Shapes after decoding; `None` where something else is wrong with the tensor.
    shapes: BTreeMap<String, Option<Vec<usize>>>,
}

impl<'a> Check<'a> {
    fn packed_layers(&mut self, layers: &[Stored<'a>]) {
        let empty = Map::new();
        let map = self.named.existing.packed();
        for stored in layers {
            match stored {
                Stored::Plain { name, view } => {
                    self.shapes.insert((*name).to_owned(), Some(view.shape()));
                }
                Stored::Packed(packed) => {
                    let scheme =
                        if self.belongs_together(packed) { self.scheme(packed, map.unwrap_or(&empty)) } else { None };
                    let shape = scheme.map(|scheme| packed.shape(scheme));
                    self.shapes.insert(format!("{}.weight", packed.path), shape);
                }
            }
        }
        let packed = layers.iter().find_map(|stored| match stored {
            Stored::Packed(packed) => Some(packed.path),
            Stored::Plain { .. } => None,
        });
        match (packed, map) {
            (Some(path), None) => self.findings.fatal(
                "quantization",
                format!("is missing from config.json, though {path} is packed: mlx_lm does not know its scales"),
            ),
            (None, Some(_)) => {
                self.findings.warning("quantization", "is in config.json, but no layer is packed");
            }
            _ => {}
        }
        self.report_odd(map.unwrap_or(&empty));
    }

    /// Shapes and dtypes of weight, scales and biases.
    fn belongs_together(&mut self, packed: &Packed<'_>) -> bool {
        let of = |view: &View| (view.dtype, view.shape());
        let outer = |view: &View| {
            let mut shape = view.shape();
            shape.pop();
            shape
        };
        let &Packed { path, weight, scales, biases } = packed;
        let affine = FloatType::from_dtype(scales.dtype).is_some();
        let wrong = if outer(weight) != outer(scales) || weight.shape().len() < 2 {
            format!("weight {:?} and scales {:?} do not belong together", weight.shape(), scales.shape())
        } else if !affine && scales.dtype != Dtype::U8 {
            format!("scales are {}, no mode has such", scales.dtype)
        } else if affine && biases.is_none() {
            "biases are missing, which affine layers have".to_owned()
        } else if !affine && biases.is_some() {
            "biases are there, which layers with uint8 scales do not have".to_owned()
        } else if let Some(biases) = biases.filter(|biases| of(biases) != of(scales)) {
            format!("scales {:?} and biases {:?} are not alike", of(scales), of(biases))
        } else {
            return true;
        };
        self.findings.fatal(path, wrong);
        false
    }

    /// The packing as mlx_lm sees it: the layer's entry, else by the shapes.
    fn scheme(&mut self, packed: &Packed<'a>, map: &Map<String, Value>) -> Option<Scheme> {
        let path = packed.path;
        let name = format!("{path}.weight");
        let columns = self.expected.and_then(|expected| *expected.get(&name)?.shape.last()?);
        let (words, groups) = (packed.weight.columns(), packed.scales.columns());
        let held = format!("{words} words and {groups} groups a row");
        let right = |scheme: &Scheme| {
            packed.fits(*scheme) && columns.is_none_or(|columns| columns == groups * scheme.group_size())
        };
        let entry = match map.get(path) {
            Some(Value::Object(entry)) => Some(listed(entry)),
            Some(Value::Bool(true)) => Some(listed(map)),
            Some(Value::Bool(false)) => {
                self.findings.fatal(path, "is packed, config.json says that it is not: mlx_lm does not know its scales");
                return None;
            }
            _ => None,
        };
        match entry {
            Some(Some(scheme)) if right(&scheme) => Some(scheme),
            Some(Some(scheme)) => {
                let columns = columns.map_or_else(String::new, |columns| format!(" for {columns} inputs"));
                let wrong = format!(
                    "config.json says {scheme}, the tensors have {held}{columns}: mlx_lm believes config.json and stops at the shapes"
                );
                self.findings.fatal(path, wrong);
                None
            }
            Some(None) => {
                self.findings.fatal(path, format!("config.json names no packing that MLX has: {}", map[path]));
                None
            }
            None => self.unlisted(packed, map, columns, &held),
        }
    }

    fn unlisted(
        &mut self,
        packed: &Packed<'a>,
        map: &Map<String, Value>,
        columns: Option<usize>,
        held: &str,
    ) -> Option<Scheme> {
        let scheme = match columns {
            Some(columns) => packed.inferred(columns),
            None => packed.scheme(&self.named.existing),
        };
        match scheme {
            Some(scheme) => {
                let shared = listed(map);
                if !map.is_empty() && shared != Some(scheme) {
                    self.odd.push((packed.path, scheme));
                }
                Some(scheme)
            }
            None => {
                let columns = columns.map_or_else(String::new, |columns| format!(" for {columns} inputs"));
                self.findings.fatal(packed.path, format!("{held}{columns} are no packing that MLX has"));
                None
            }
        }
    }

    /// One problem for all of them: they have one cause.
    fn report_odd(&mut self, map: &Map<String, Value>) {
        let Some((path, scheme)) = self.odd.first() else { return };
        let shared = listed(map).map_or("no packing that MLX has".to_owned(), |shared| shared.to_string());
        let message = format!(
            "says {shared}, but {} layer(s) without an entry are packed otherwise ({path}: {scheme}): mlx_lm 0.32.2 goes by the \
             shapes, older versions stop there",
            self.odd.len()
        );
        self.findings.warning("quantization", message);
    }

    /// Entries of config.json for layers that are not packed or not there.
    fn entries(&mut self, layers: &[Stored<'_>]) {
        let packed: BTreeSet<&str> = layers.iter().filter_map(|stored| match stored {
            Stored::Packed(packed) => Some(packed.path),
            Stored::Plain { .. } => None,
        }).collect();
        for (path, entry) in self.named.existing.packed().into_iter().flatten() {
            if packed.contains(path.as_str()) || !matches!(entry, Value::Object(_) | Value::Bool(true)) {
                continue;
            }
            if self.shapes.contains_key(&format!("{path}.weight")) {
                let message = "config.json says that it is packed, but it is not: mlx_lm misses its scales";
                self.findings.fatal(path, message);
            } else if entry.is_object() {
                self.findings.warning(path, "is in config.json's quantization, but no layer of that name is there");
            }
        }
    }

    /// Missing, misshapen and leftover tensors.
    fn description(&mut self, model: &Model) {
        let Some(expected) = self.expected else {
            let model_type = model.config.model_type().unwrap_or("?");
            self.findings.notes.push(format!(
                "the decoder of model type {model_type:?} is not described here: that all tensors are there, each of its shape, \
                 was not checked"
            ));
            return;
        };
        for (name, expected) in expected {
            match self.shapes.get(name) {
                None if !expected.optional => self.findings.fatal(name, "is missing"),
                Some(Some(shape)) if !expected.fits(shape) => {
                    let axis = |axis: &Option<usize>| axis.map_or("any".to_owned(), |axis| axis.to_string());
                    let wanted = expected.shape.iter().map(axis).collect::<Vec<_>>().join(", ");
                    self.findings.fatal(name, format!("has shape {shape:?}, config.json asks for [{wanted}]"));
                }
                _ => {}
            }
        }
        for (name, shape) in &self.shapes {
            if !expected.contains_key(name) {
                let shape = shape.as_ref().map_or_else(String::new, |shape| format!(" (shape {shape:?})"));
                self.findings.fatal(name, format!("is no tensor of this model{shape}, mlx_lm stops at such"));
            }
        }
    }
}
