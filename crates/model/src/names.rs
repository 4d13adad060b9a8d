//! Source names to output tensors, by the rules of an architecture.

use std::collections::{BTreeMap, BTreeSet};

use mlx_format::Dtype;
use mlx_format::checkpoint::{Checkpoint, Config};

use crate::arch::{self, Architecture, Rule, Source};
use crate::view::View;
use crate::{Existing, SourceError};

/// Orders names as people do: numbers by value, so that layer 2 comes before layer 10.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct NaturalName(Vec<Segment>);

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Segment {
    Number(u64),
    Text(String),
}

impl NaturalName {
    fn new(name: &str) -> Self {
        let segment =
            |text: &str| text.parse().map_or_else(|_| Segment::Text(text.to_owned()), Segment::Number);
        Self(name.split('.').map(segment).collect())
    }
}

/// Views of one output tensor: itself, or its slices by index.
enum Parts {
    Whole(View),
    Stacked(BTreeMap<usize, View>),
}

/// A checkpoint by MLX's names.
#[derive(Clone, Debug)]
pub struct Named {
    /// Description of the model type.
    pub architecture: Architecture,
    /// How the checkpoint is quantized.
    pub existing: Existing,
    /// All tensors in natural order.
    pub tensors: Vec<(String, View)>,
    /// Source names of tensors that MLX does not load.
    pub dropped: Vec<String>,
}

impl Named {
    /// Reads headers and config.json only.
    ///
    /// # Errors
    /// [`SourceError`] if the checkpoint is incomplete or not what config.json says.
    pub fn read(checkpoint: &Checkpoint, config: &Config) -> Result<Self, SourceError> {
        let existing = Existing::of(config)?;
        let architecture = arch::describe(Source { config, tensors: checkpoint.tensors() })?;
        let block = if let Existing::Fp8 { block } = existing { Some(block) } else { None };
        check_shards(checkpoint)?;
        let (tensors, dropped) = apply(&architecture, checkpoint, block)?;
        check_layers(&architecture, tensors.iter().map(|(name, _)| name.as_str()))?;
        Ok(Self { architecture, existing, tensors, dropped })
    }
}

/// Tensors and dropped names.
type Names = (Vec<(String, View)>, Vec<String>);

/// Applies `architecture` to every tensor of the checkpoint. `fp8_block` turns fp8 weights with
/// `weight_scale_inv` beside them into bfloat16.
fn apply(
    architecture: &Architecture,
    checkpoint: &Checkpoint,
    fp8_block: Option<[usize; 2]>,
) -> Result<Names, SourceError> {
    let mut parts: BTreeMap<NaturalName, (String, Parts)> = BTreeMap::new();
    let mut dropped = Vec::new();
    for (source, tensor) in checkpoint.tensors() {
        if fp8_block.is_some() && (source.ends_with("_scale_inv") || source.ends_with("activation_scale")) {
            continue;
        }
        let view = |rule_steps: &[_]| {
            let mut view = View::new(source, tensor, rule_steps).map_err(|error| SourceError::Shape {
                tensor: source.clone(),
                file: checkpoint.file_of(tensor),
                reason: error.to_string(),
            })?;
            if let Some(block) = fp8_block
                && tensor.dtype == Dtype::F8_E4M3
            {
                let scale = format!("{source}_scale_inv");
                let scales = checkpoint.tensor(&scale);
                if !scales.is_some_and(|scales| view.decode_fp8(tensor, &scale, scales, block)) {
                    return Err(SourceError::Fp8 {
                        tensor: source.clone(),
                        scale,
                        shape: tensor.shape.clone(),
                        block,
                    });
                }
            }
            Ok(view)
        };
        let renamed = architecture.renamed(source);
        let rule = architecture.rules.iter().find_map(|rule| Some((rule, rule.captures(&renamed)?)));
        let Some((Rule { outputs, .. }, captures)) = rule else {
            add(&mut parts, renamed.clone(), None, view(&[])?, source)?;
            continue;
        };
        if outputs.is_empty() {
            dropped.push(source.clone());
        }
        for output in outputs {
            let mut name = String::new();
            captures.expand(output.name, &mut name);
            let index =
                captures.name("e").filter(|_| output.stacked).and_then(|index| index.as_str().parse().ok());
            add(&mut parts, name, index, view(&output.steps)?, source)?;
        }
    }
    let tensors = parts.into_values().map(|(name, parts)| assemble(name, parts)).collect::<Result<_, _>>()?;
    Ok((tensors, dropped))
}

fn add(
    parts: &mut BTreeMap<NaturalName, (String, Parts)>,
    name: String,
    index: Option<usize>,
    view: View,
    source: &str,
) -> Result<(), SourceError> {
    let twice = |name: &str| SourceError::Twice { output: name.to_owned(), source_name: source.to_owned() };
    let key = NaturalName::new(&name);
    match (index, parts.get_mut(&key)) {
        (None, None) => {
            parts.insert(key, (name, Parts::Whole(view)));
        }
        (Some(index), None) => {
            parts.insert(key, (name, Parts::Stacked(BTreeMap::from([(index, view)]))));
        }
        (Some(index), Some((_, Parts::Stacked(slices)))) if !slices.contains_key(&index) => {
            slices.insert(index, view);
        }
        _ => return Err(twice(&name)),
    }
    Ok(())
}

fn assemble(name: String, parts: Parts) -> Result<(String, View), SourceError> {
    let slices = match parts {
        Parts::Whole(view) => return Ok((name, view)),
        Parts::Stacked(slices) => slices,
    };
    // Indices are sorted: the first that is not its own position is missing.
    if let Some((missing, _)) = slices.keys().enumerate().find(|(position, index)| position != *index) {
        return Err(SourceError::MissingExpert { output: name, missing, found: slices.len() });
    }
    let shapes: Vec<_> = slices.values().map(|view| (view.dtype, view.shape())).collect();
    let odd = shapes.iter().position(|shape| *shape != shapes[0]).unwrap_or(0);
    View::stack(slices.into_values().collect())
        .ok_or_else(|| SourceError::UnequalExperts {
            output: name.clone(),
            odd,
            first: shapes[0].clone(),
            other: shapes[odd].clone(),
        })
        .map(|view| (name, view))
}

/// Without an index, shards that call themselves one of several must all be there.
fn check_shards(checkpoint: &Checkpoint) -> Result<(), SourceError> {
    let expected =
        |name: &str| name.strip_suffix(".safetensors")?.rsplit_once("-of-")?.1.parse::<usize>().ok();
    let found = checkpoint.shards().count();
    match checkpoint.shards().filter_map(expected).max() {
        Some(expected) if expected > found => {
            let directory = checkpoint.directory().display().into_owned();
            Err(SourceError::MissingShards { directory, found, expected })
        }
        _ => Ok(()),
    }
}

/// Every layer of a described model must have some weights.
fn check_layers<'n>(
    architecture: &Architecture,
    names: impl Iterator<Item = &'n str>,
) -> Result<(), SourceError> {
    let layer = |name: &'n str| {
        let mut segments = name.split('.');
        segments.find(|segment| matches!(*segment, "layers" | "h"))?;
        segments.next()?.parse::<usize>().ok()
    };
    let found: BTreeSet<usize> = names.filter_map(layer).collect();
    let layers = architecture.layers;
    // At most one step more than there are layers with weights.
    match (0..layers).find(|layer| !found.contains(layer)) {
        Some(missing) if architecture.described => Err(SourceError::MissingLayer { missing, layers }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_sort_by_value() {
        let mut names =
            ["m.layers.10.x", "lm_head.weight", "m.layers.2.x", "m.norm.weight", "m.embed.weight"]
                .map(NaturalName::new);
        names.sort();
        let expected = ["lm_head.weight", "m.embed.weight", "m.layers.2.x", "m.layers.10.x", "m.norm.weight"]
            .map(NaturalName::new);
        assert_eq!(names, expected);
    }
}
