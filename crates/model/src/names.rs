//! Source names to output tensors, by the rules of an architecture.

use std::collections::{BTreeMap, BTreeSet};

use mlx_format::checkpoint::{Checkpoint, Config, ConfigError, LeftAside};
use mlx_format::{Dtype, Scheme};

use crate::arch::{self, Architecture, Language, Rule, Share};
use crate::asked;
use crate::decoder::{Decoder, ExpectedTensor};
use crate::fit::{self, Fault, Held, Misfits};
use crate::tied::{Tied, untied};
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
    /// Parts of so many that stand one behind the other.
    Joined(BTreeMap<usize, View>, usize),
}

/// A checkpoint by MLX's names.
#[derive(Clone, Debug)]
pub struct Named {
    /// Description of the model type.
    pub architecture: Architecture,
    /// How the checkpoint is quantized, entries under MLX's paths.
    pub existing: Existing,
    /// All tensors in natural order.
    pub tensors: Vec<(String, View)>,
    /// Source names of tensors that MLX does not load.
    pub dropped: Vec<String>,
    /// The decoder as config.json describes it, whatever the tensors are; none if the type or its form is not described.
    pub decoder: Option<Decoder>,
    /// Why a type that is described has no decoder here.
    pub undescribed: Option<String>,
    /// Key of config.json that no decoder can be built with, and what is wrong with it.
    pub wrong: Option<(String, String)>,
    /// Every tensor that the decoder reads.
    pub expected: Option<BTreeMap<String, ExpectedTensor>>,
    /// Whether the head is the model's own although mlx-lm would take the embedding for it where config.json says nothing.
    pub untied: bool,
    /// What a person should know.
    pub notes: Vec<String>,
}

impl Named {
    /// Reads headers and config.json, and a few rows of a head that may be the embedding's table.
    ///
    /// # Errors
    /// [`SourceError`] if the checkpoint is incomplete or not what config.json says.
    pub fn read(checkpoint: &Checkpoint, config: &Config) -> Result<Self, SourceError> {
        let (existing, left_over) = Existing::of(config, checkpoint)?;
        let tied = Tied::of(checkpoint, config)?;
        let untied_config;
        let config = if tied.untied {
            untied_config = untied(config);
            &untied_config
        } else {
            config
        };
        let language = Language::of(config);
        let architecture = language.architecture(checkpoint.tensors())?;
        let block = if let Existing::Fp8 { block } = existing { Some(block) } else { None };
        check_shards(checkpoint)?;
        let (tensors, dropped) = apply(&architecture, checkpoint, block)?;
        check_layers(&architecture, tensors.iter().map(|(name, _)| name.as_str()))?;
        let existing = existing.renamed(&tensors)?;
        let names: BTreeSet<&str> = tensors.iter().map(|(name, _)| name.as_str()).collect();
        let mut wrong = None;
        let (decoder, undescribed) = match language.headed(&architecture, Some(&names)) {
            Ok(decoder) => (decoder, arch::obstacle(config)),
            Err(ConfigError::Undescribed { key, reason }) => {
                (None, Some(format!("{key} {reason}, which is not described here")))
            }
            Err(ConfigError::Key { key, reason }) => {
                wrong = Some((key, reason));
                (None, None)
            }
            Err(error) => return Err(error.into()),
        };
        let rows = |name: &str| {
            let view = tensors.iter().find(|(own, _)| own == name).map(|(_, view)| view)?;
            view.shape().iter().rev().nth(1).copied()
        };
        let mut expected = decoder.as_ref().map(|decoder| decoder.expected(rows));
        if let Some(expected) = &mut expected {
            asked::settle(expected, decoder.as_ref(), &language);
        }
        let left_aside = checkpoint.left_aside().map(|index| {
            format!(
                "{} names {}, which is not here; it is left aside, the files that are here are read",
                index.file, index.names
            )
        });
        let notes = left_over.into_iter().chain(left_aside).chain(tied.note).collect();
        let untied = tied.untied;
        Ok(Self {
            architecture,
            existing,
            tensors,
            dropped,
            decoder,
            undescribed,
            wrong,
            expected,
            untied,
            notes,
        })
    }

    /// The scheme of a packed module, by config.json, the inputs that the decoder has there, or the shapes.
    ///
    /// # Errors
    /// [`SourceError::UnclearScheme`].
    pub fn scheme(&self, path: &str, weight: &View, scales: &View) -> Result<Scheme, SourceError> {
        let row = (weight.columns(), scales.columns());
        self.existing.scheme(path, row, scales.dtype, self.columns(path))
    }

    /// Inputs of the linear at `path`, where the decoder tells.
    pub fn columns(&self, path: &str) -> Option<usize> {
        *self.expected.as_ref()?.get(&format!("{path}.weight"))?.shape.last()?
    }

    /// Everything that does not fit the model.
    pub fn misfits(&self) -> Misfits {
        let by_name: BTreeMap<&str, &View> =
            self.tensors.iter().map(|(name, view)| (name.as_str(), view)).collect();
        let explains = self.existing.packed().is_some();
        let held = by_name.iter().filter_map(|(name, view)| {
            let (path, leaf) = name.rsplit_once('.').unwrap_or(("", name));
            let beside = |leaf: &str| by_name.get(format!("{path}.{leaf}").as_str()).copied();
            let packed = beside("weight").filter(|weight| weight.dtype == Dtype::U32).zip(beside("scales"));
            if packed.is_some() && matches!(leaf, "scales" | "biases") {
                return None;
            }
            let Some((weight, scales)) = packed.filter(|_| explains) else {
                // Nobody knows the shape of what is packed in a way that nothing explains.
                let shape = (packed.is_none() || leaf != "weight").then(|| view.shape());
                return Some((*name, Held { dtype: view.dtype, packed: false, shape }));
            };
            let mut shape = view.shape();
            let packed = leaf == "weight";
            if packed {
                let scheme = self.scheme(path, weight, scales).ok();
                let columns = scheme.map(|scheme| scales.columns() * scheme.group_size());
                if let (Some(last), Some(columns)) = (shape.last_mut(), columns) {
                    *last = columns;
                } else {
                    return Some((*name, Held { dtype: view.dtype, packed, shape: None }));
                }
            }
            Some((*name, Held { dtype: view.dtype, packed, shape: Some(shape) }))
        });
        Misfits(fit::misfits(&held.collect(), self.expected.as_ref()))
    }

    /// Refuses a checkpoint that is not a whole model; `allow_unread` lets pass what no part of it reads.
    ///
    /// # Errors
    /// [`SourceError::Misfits`] with everything that is wrong; [`SourceError::LeftAside`] if nothing tells whether the files
    /// are complete without the index that was left aside.
    pub fn check(&self, checkpoint: &Checkpoint, allow_unread: bool) -> Result<(), SourceError> {
        if let Some((key, reason)) = self.wrong.clone() {
            return Err(ConfigError::Key { key, reason }.into());
        }
        if let (None, Some(LeftAside { file, names, lacks: Some(lacks) })) =
            (&self.decoder, checkpoint.left_aside())
        {
            let (file, names, lacks) = (file.clone(), names.clone(), lacks.clone());
            return Err(SourceError::LeftAside { file, names, lacks });
        }
        let Misfits(mut misfits) = self.misfits();
        misfits.retain(|misfit| !(allow_unread && matches!(misfit.fault, Fault::Unread { .. })));
        if misfits.is_empty() {
            return Ok(());
        }
        let model = checkpoint.directory().display().into_owned();
        let family = if self.architecture.described { self.architecture.family } else { "language" };
        Err(SourceError::Misfits { model, family, misfits: Misfits(misfits) })
    }
}

/// Ends of names of what fp8 checkpoints hold beside the weights.
const FP8_SCALES: [&str; 3] = ["_scale_inv", "activation_scale", ".input_scale"];

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
        if fp8_block.is_some() && (FP8_SCALES.iter().any(|end| source.ends_with(end))) {
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
            add(&mut parts, [architecture.outer, &renamed].concat(), None, view(&[])?, source)?;
            continue;
        };
        if outputs.is_empty() {
            dropped.push(source.clone());
        }
        for output in outputs {
            let mut name = architecture.outer.to_owned();
            captures.expand(output.name, &mut name);
            let index = || captures.name("e").and_then(|index| index.as_str().parse().ok());
            let place = match output.share {
                Share::Whole => None,
                Share::Stacked => index().map(|index| (index, None)),
                Share::Joined { part, of } => Some((part, Some(of))),
            };
            add(&mut parts, name, place, view(&output.steps)?, source)?;
        }
    }
    let tensors = parts.into_values().map(|(name, parts)| assemble(name, parts)).collect::<Result<_, _>>()?;
    Ok((tensors, dropped))
}

/// Adds a view to the output tensor `name`: whole, or at a place among others; a place among so many joins them.
fn add(
    parts: &mut BTreeMap<NaturalName, (String, Parts)>,
    name: String,
    place: Option<(usize, Option<usize>)>,
    view: View,
    source: &str,
) -> Result<(), SourceError> {
    let twice = |name: &str| SourceError::Twice { output: name.to_owned(), source_name: source.to_owned() };
    let key = NaturalName::new(&name);
    match (place, parts.get_mut(&key)) {
        (None, None) => {
            parts.insert(key, (name, Parts::Whole(view)));
        }
        (Some((index, of)), None) => {
            let first = BTreeMap::from([(index, view)]);
            let new = of.map_or_else(|| Parts::Stacked(first.clone()), |of| Parts::Joined(first.clone(), of));
            parts.insert(key, (name, new));
        }
        (Some((index, _)), Some((_, Parts::Stacked(held) | Parts::Joined(held, _))))
            if !held.contains_key(&index) =>
        {
            held.insert(index, view);
        }
        _ => return Err(twice(&name)),
    }
    Ok(())
}

fn assemble(name: String, parts: Parts) -> Result<(String, View), SourceError> {
    let slices = match parts {
        Parts::Whole(view) => return Ok((name, view)),
        Parts::Joined(held, of) => {
            let sources: Vec<String> = held.values().flat_map(View::sources).map(str::to_owned).collect();
            let joined = (held.len() == of).then(|| View::join(held.into_values().collect())).flatten();
            let unlike = || SourceError::Parts { output: name.clone(), of, sources };
            return joined.ok_or_else(unlike).map(|view| (name.clone(), view));
        }
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
    if checkpoint.is_indexed() {
        return Ok(());
    }
    // Stem and count of a series, and the numbers that are here.
    let mut series: BTreeMap<(&str, usize), BTreeSet<usize>> = BTreeMap::new();
    for name in checkpoint.shards() {
        let parts = || {
            let (before, count) = name.strip_suffix(".safetensors")?.rsplit_once("-of-")?;
            let (stem, number) = before.rsplit_once('-')?;
            Some((stem, count.parse::<usize>().ok()?, number.parse::<usize>().ok()?))
        };
        if let Some((stem, count, number)) = parts() {
            series.entry((stem, count)).or_default().insert(number);
        }
    }
    match series.into_iter().find(|((_, count), numbers)| *count > numbers.len()) {
        Some(((_, expected), numbers)) => {
            let directory = checkpoint.directory().display().into_owned();
            Err(SourceError::MissingShards { directory, found: numbers.len(), expected })
        }
        None => Ok(()),
    }
}

/// Every layer of a described model must have some weights.
fn check_layers<'n>(
    architecture: &Architecture,
    names: impl Iterator<Item = &'n str>,
) -> Result<(), SourceError> {
    let layer = |name: &'n str| {
        let holders = name.split('.').zip(name.split('.').skip(1));
        holders
            .filter(|(holder, _)| matches!(*holder, "layers" | "h" | "blocks"))
            .find_map(|(_, number)| number.parse::<usize>().ok())
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
