//! Names and shapes: packed layers against config.json, all tensors against the description of the decoder.
//!
//! Two things are not told: biases, which a description reads where there are any; and the inner width of feed-forward
//! networks, which is taken from the tensors and not held against config.json.

use std::collections::BTreeSet;

use mlx_format::checkpoint::is_truthy;
use mlx_format::{Dtype, FloatType, Scheme};
use mlx_quant_model::{Fault, Misfit, Named, View, listed};
use serde_json::{Map, Value};

use super::findings::Findings;
use crate::Model;
use crate::inspect::stored::{Packed, Stored, stored};

/// Returns the rows of the embedding, where the decoder is described.
pub(super) fn check(model: &Model, named: &Named, findings: &mut Findings) -> Option<usize> {
    let layers: Vec<_> = stored(&named.tensors).into_iter().chain(stored(&named.towers)).collect();
    let mut check = Check { named, findings, odd: Vec::new() };
    check.packed_layers(model, &layers);
    check.entries(&layers);
    check.description(model);
    let table = format!("{}.weight", named.decoder.as_ref()?.embedding.path);
    let (_, view) = named.tensors.iter().find(|(name, _)| *name == table)?;
    view.shape().iter().rev().nth(1).copied()
}

struct Check<'a> {
    named: &'a Named,
    findings: &'a mut Findings,
    /// Layers without an entry whose shapes are not those of the shared scheme.
    odd: Vec<(&'a str, Scheme)>,
}

impl<'a> Check<'a> {
    fn packed_layers(&mut self, model: &Model, layers: &[Stored<'a>]) {
        let empty = Map::new();
        let map = self.named.existing.packed();
        let packed = layers.iter().filter_map(|stored| match stored {
            Stored::Packed(packed) => Some(packed),
            Stored::Plain { .. } => None,
        });
        for packed in packed.clone() {
            if self.belongs_together(packed) {
                self.scheme(packed, map.unwrap_or(&empty));
            }
        }
        let said = model.config.0.get("quantization").is_some_and(is_truthy);
        match (packed.clone().next(), map) {
            (Some(packed), None) => self.findings.fatal(
                "quantization",
                format!(
                    "is missing from config.json, though {} is packed: mlx_lm does not know its scales",
                    packed.path
                ),
            ),
            (None, _) if said => {
                self.findings.warning("quantization", "is in config.json, but no layer is packed");
            }
            _ => {}
        }
        self.report_odd(map.unwrap_or(&empty));
    }

    /// Shapes and dtypes of weight, scales and biases.
    fn belongs_together(&mut self, packed: &Packed<'_>) -> bool {
        let outer = |view: &View| {
            let mut shape = view.shape();
            shape.pop();
            shape
        };
        let &Packed { path, weight, scales, biases, .. } = packed;
        let affine = FloatType::from_dtype(scales.dtype).is_some();
        let wrong = if outer(weight) != outer(scales) || weight.shape().len() < 2 {
            format!("weight {:?} and scales {:?} do not belong together", weight.shape(), scales.shape())
        } else if !affine && scales.dtype != Dtype::U8 {
            format!("scales are {}, no mode has such", scales.dtype)
        } else if affine && biases.is_none() {
            "biases are missing, which affine layers have".to_owned()
        } else if !affine && biases.is_some() {
            "biases are there, which layers with uint8 scales do not have".to_owned()
        } else if let Some(biases) = biases.filter(|biases| biases.shape() != scales.shape()) {
            format!("scales {:?} and biases {:?} do not belong together", scales.shape(), biases.shape())
        } else {
            if let Some(biases) = biases.filter(|biases| biases.dtype != scales.dtype) {
                let message = format!("scales are {}, biases {}", scales.dtype, biases.dtype);
                self.findings.warning(path, message);
            }
            return true;
        };
        self.findings.fatal(path, wrong);
        false
    }

    /// The packing as mlx_lm sees it: the layer's entry, else by the shapes.
    fn scheme(&mut self, packed: &Packed<'a>, map: &Map<String, Value>) -> Option<Scheme> {
        let path = packed.path;
        let columns = self.named.columns(path);
        let (words, groups) = (packed.weight.columns(), packed.scales.columns());
        let held = format!("{words} words and {groups} groups a row");
        let right = |scheme: &Scheme| {
            packed.fits(*scheme) && columns.is_none_or(|columns| columns == groups * scheme.group_size())
        };
        let entry = match map.get(path) {
            Some(Value::Object(entry)) if !entry.is_empty() => Some(listed(entry)),
            Some(Value::Bool(true)) => Some(listed(map)),
            // As in Python, an empty object is as good as false.
            Some(Value::Bool(false) | Value::Object(_)) => {
                self.findings.fatal(
                    path,
                    "is packed, config.json says that it is not: mlx_lm does not know its scales",
                );
                return None;
            }
            Some(other) if !matches!(other, Value::Object(_)) => {
                self.findings.fatal(
                    path,
                    format!("has the entry {other} in config.json: mlx_lm takes true or an object"),
                );
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
                self.findings
                    .fatal(path, format!("config.json names no packing that MLX has: {}", map[path]));
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
            None => packed.scheme(self.named),
        };
        if let Some(scheme) = scheme {
            if !map.is_empty() && listed(map) != Some(scheme) {
                self.odd.push((packed.path, scheme));
            }
        } else {
            let columns = columns.map_or_else(String::new, |columns| format!(" for {columns} inputs"));
            self.findings.fatal(packed.path, format!("{held}{columns} are no packing that MLX has"));
        }
        scheme
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
        let packed: BTreeSet<&str> = layers
            .iter()
            .filter_map(|stored| match stored {
                Stored::Packed(packed) => Some(packed.path),
                Stored::Plain { .. } => None,
            })
            .collect();
        for (path, entry) in self.named.existing.packed().into_iter().flatten() {
            if packed.contains(path.as_str())
                || !(entry.is_object() || entry.is_boolean())
                || !is_truthy(entry)
            {
                continue;
            }
            let weight = format!("{path}.weight");
            if self.named.tensors.iter().any(|(name, _)| *name == weight) {
                let message = "config.json says that it is packed, but it is not: mlx_lm misses its scales";
                self.findings.fatal(path, message);
            } else if entry.is_object() {
                self.findings
                    .warning(path, "is in config.json's quantization, but no layer of that name is there");
            }
        }
    }

    /// Missing, misshapen and leftover tensors.
    fn description(&mut self, model: &Model) {
        for Misfit { tensor, fault } in self.named.tower_misfits().0 {
            let what = match fault {
                Fault::Integers(dtype) => format!("is {dtype}, and nothing explains it"),
                _ => "is missing".to_owned(),
            };
            self.findings
                .warning(&tensor, format!("{what}: mlx_lm does without vision, mlx_vlm does not load it"));
        }
        if let Some((key, reason)) = &self.named.wrong {
            self.findings.fatal(key, format!("{reason} in config.json"));
        } else if self.named.decoder.is_none() {
            let model_type = model.config.model_type().unwrap_or("?");
            let reason =
                self.named.undescribed.as_ref().map_or_else(String::new, |reason| format!(" ({reason})"));
            self.findings.notes.push(format!(
                "the decoder of model type {model_type:?} is not described here{reason}: that all tensors are there, each of its \
                 shape, was not checked"
            ));
        }
        for Misfit { tensor, fault } in self.named.misfits().0 {
            let message = match fault {
                Fault::Missing => "is missing".to_owned(),
                Fault::Shape { found, expected } => {
                    let axis = |axis: &Option<usize>| axis.map_or("any".to_owned(), |axis| axis.to_string());
                    let wanted = expected.iter().map(axis).collect::<Vec<_>>().join(", ");
                    format!("has shape {found:?}, config.json asks for [{wanted}]")
                }
                // What is wrong with packed layers without settings was said already.
                Fault::Integers(dtype) if dtype == Dtype::U32 || tensor.ends_with(".scales") => continue,
                Fault::Integers(dtype) => {
                    format!("is {dtype}, and config.json says nothing of how it is quantized")
                }
                Fault::Unread { shape } => {
                    let shape = if shape.is_empty() { String::new() } else { format!(" (shape {shape:?})") };
                    format!("is no tensor of this model{shape}, mlx_lm stops at such")
                }
            };
            self.findings.fatal(tensor, message);
        }
    }
}
