//! Source names to output tensors, by the rules of an architecture.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use mlx_format::checkpoint::{Checkpoint, Config, ConfigError, LeftAside, Tensor};
use mlx_format::{Dtype, FloatType, Scheme};

use crate::arch::{self, Architecture, Language, Rule, Share};
use crate::asked;
use crate::decoder::{Decoder, ExpectedTensor};
use crate::fit::{self, Fault, Held, Misfits};
use crate::matrix::{Matrix, Part};
use crate::packing::Found;
use crate::tied::{Tied, untied};
use crate::view::{Step, View};
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

/// A packed layer as MLX stores it.
#[derive(Clone, Debug, PartialEq)]
pub struct Taken {
    /// Mode, bits, group size.
    pub scheme: Scheme,
    /// uint32 codes, `[.., out, words]`.
    pub weight: View,
    /// `[.., out, groups]`, in the smallest dtype that holds them and the biases exactly.
    pub scales: View,
    /// As the scales; affine only.
    pub biases: Option<View>,
}

/// A checkpoint by MLX's names.
#[derive(Clone, Debug)]
pub struct Named {
    /// Description of the model type.
    pub architecture: Architecture,
    /// How the checkpoint is quantized, entries under MLX's paths.
    pub existing: Existing,
    /// The language model's tensors in natural order; what another quantizer has packed is decoded.
    pub tensors: Vec<(String, View)>,
    /// Layers that another quantizer has packed in a way that MLX has codes for, by path: in MLX's own packing, the same numbers
    /// exactly; or what MLX lacks for them.
    pub packed: BTreeMap<String, Result<Taken, String>>,
    /// The dtype that decoded weights have in a file where nothing asks for another, by name.
    pub usual: BTreeMap<String, FloatType>,
    /// What sees and hears beside it, by mlx-vlm's names, in natural order; mlx-lm and the decoder have no use for it. A head
    /// that is the embedding's table once more is among it.
    pub towers: Vec<(String, View)>,
    /// Blocks of the part that sees, as config.json counts them.
    depth: Option<usize>,
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
        check_shards(checkpoint)?;
        let found = match &existing {
            Existing::Packed(packing) => packing.find(checkpoint)?,
            _ => Found::default(),
        };
        let own;
        let sources = if found.matrices.is_empty() {
            checkpoint.tensors()
        } else {
            own = decoded_tensors(checkpoint, &found);
            &own
        };
        let architecture = language.architecture(sources)?;
        let applied = apply(&architecture, checkpoint, sources, &found, tied.repeated)?;
        let Applied { tensors, packed, usual, towers, dropped } = applied;
        check_layers(&architecture, tensors.iter().map(|(name, _)| name.as_str()))?;
        let existing = existing.renamed(tensors.iter().chain(&towers))?;
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
            packed,
            usual,
            towers,
            depth: depth(config),
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

    /// What of the parts that see and hear cannot be carried along.
    pub fn tower_misfits(&self) -> Misfits {
        Misfits(fit::tower_misfits(&self.towers, self.depth, self.existing.packed().is_some()))
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
        let family = if self.architecture.described { self.architecture.family } else { "language" };
        refuse(checkpoint, family, Misfits(misfits))
    }

    /// Refuses parts that see and hear which are not whole.
    ///
    /// # Errors
    /// [`SourceError::Misfits`] with everything that is wrong.
    pub fn check_towers(&self, checkpoint: &Checkpoint) -> Result<(), SourceError> {
        refuse(checkpoint, "vision", self.tower_misfits())
    }
}

/// Blocks of the part that sees, under the names that models give their number.
fn depth(config: &Config) -> Option<usize> {
    let vision = config.0.get("vision_config")?;
    let count = |key: &str| vision.get(key)?.as_u64().and_then(|count| usize::try_from(count).ok());
    ["depth", "num_hidden_layers", "vt_num_hidden_layers"].into_iter().find_map(count)
}

fn refuse(checkpoint: &Checkpoint, family: &'static str, misfits: Misfits) -> Result<(), SourceError> {
    if misfits.0.is_empty() {
        return Ok(());
    }
    let model = checkpoint.directory().display().into_owned();
    Err(SourceError::Misfits { model, family, misfits })
}

/// What the rules make of a checkpoint.
struct Applied {
    tensors: Vec<(String, View)>,
    packed: BTreeMap<String, Result<Taken, String>>,
    usual: BTreeMap<String, FloatType>,
    towers: Vec<(String, View)>,
    dropped: Vec<String>,
}

/// Tensors by name as the rules see them: a packed matrix is one tensor of float32.
fn decoded_tensors(checkpoint: &Checkpoint, found: &Found) -> BTreeMap<String, Tensor> {
    let plain = checkpoint.tensors().iter().filter(|(name, _)| !found.consumed.contains(*name));
    let plain = plain.map(|(name, tensor)| (name.clone(), tensor.clone()));
    let decoded = found.matrices.iter().filter_map(|(name, matrix)| {
        let mut tensor = checkpoint.tensor(&matrix.codes.tensor)?.clone();
        tensor.dtype = Dtype::F32;
        tensor.shape = vec![matrix.rows, matrix.columns];
        Some((name.clone(), tensor))
    });
    plain.chain(decoded).collect()
}

/// The three tensors of MLX's packing.
const LEAVES: [&str; 3] = [".weight", ".scales", ".biases"];

/// Layers in MLX's packing while their parts come together, and why some cannot be.
#[derive(Default)]
struct Packings {
    parts: Collected,
    layers: BTreeMap<String, Option<String>>,
}

impl Packings {
    /// Adds a matrix that becomes (a part of) the weight `name` by the rule's steps.
    fn add(
        &mut self,
        matrix: &Arc<Matrix>,
        (name, place): (&str, Place),
        steps: &[Step],
        source: &str,
    ) -> Result<(), SourceError> {
        let Some(path) = name.strip_suffix(".weight").filter(|_| matrix.has_codes()) else { return Ok(()) };
        let obstacle = self.layers.entry(path.to_owned()).or_default();
        let scheme = match matrix.scheme() {
            Ok(scheme) => scheme,
            Err(reason) => {
                obstacle.get_or_insert(reason);
                return Ok(());
            }
        };
        let float = matrix.exact();
        for (part, leaf) in [Part::Words, Part::Scales(float), Part::Biases(float)].into_iter().zip(LEAVES) {
            if leaf == LEAVES[2] && !scheme.has_biases() {
                continue;
            }
            match View::packed(matrix, part, steps) {
                Ok(view) => add(&mut self.parts, [path, leaf].concat(), place, view, source)?,
                Err(error) => {
                    obstacle
                        .get_or_insert(format!("MLX wants it cut or turned across its packing ({error})"));
                }
            }
        }
        Ok(())
    }

    fn layers(self) -> BTreeMap<String, Result<Taken, String>> {
        let views = self
            .parts
            .into_values()
            .map(|(name, parts)| (name.clone(), assemble(name, parts).map(|(_, view)| view)));
        let mut views: BTreeMap<String, Result<View, SourceError>> = views.collect();
        let layer = |(path, obstacle): (String, Option<String>)| {
            let mut part = |leaf: &str| views.remove(&[&path, leaf].concat()).transpose();
            let parts = (part(LEAVES[0]), part(LEAVES[1]), part(LEAVES[2]));
            let taken = match (obstacle, parts) {
                (Some(obstacle), _) => Err(obstacle),
                (None, (Ok(Some(weight)), Ok(Some(scales)), Ok(biases))) => {
                    weight.scheme().map(|scheme| Taken { scheme, weight, scales, biases })
                }
                _ => Err("its parts are packed differently".to_owned()),
            };
            (path, taken)
        };
        self.layers.into_iter().map(layer).collect()
    }
}

/// A place among others; one among so many joins them.
type Place = Option<(usize, Option<usize>)>;

/// Tensors, whole or in slices, by name.
type Collected = BTreeMap<NaturalName, (String, Parts)>;

/// Applies `architecture` to every one of `sources`, the tensors of the checkpoint or what its packed matrices decode to; a
/// `repeated` head is there for mlx-vlm, as towers are.
fn apply(
    architecture: &Architecture,
    checkpoint: &Checkpoint,
    sources: &BTreeMap<String, Tensor>,
    found: &Found,
    repeated: bool,
) -> Result<Applied, SourceError> {
    let (mut parts, mut towers) = (Collected::new(), Collected::new());
    let (mut packings, mut usual, mut dropped) = (Packings::default(), BTreeMap::new(), Vec::new());
    for (source, tensor) in sources {
        let matrix = found.matrices.get(source);
        let view = |steps: &[Step]| {
            let view = match matrix {
                Some(matrix) => View::packed(matrix, Part::Values(matrix.decoded()), steps),
                None => View::new(source, tensor, steps),
            };
            view.map_err(|error| SourceError::Shape {
                tensor: source.clone(),
                file: checkpoint.file_of(tensor),
                reason: error.to_string(),
            })
        };
        let mut put = |name: String, place: Place, steps: &[Step]| {
            if let Some(matrix) = matrix {
                packings.add(matrix, (&name, place), steps, source)?;
                usual.insert(name.clone(), matrix.usual());
            }
            add(&mut parts, name, place, view(steps)?, source)
        };
        let tower = architecture.towers.as_ref().and_then(|towers| Some((towers, towers.inner(source)?)));
        if let Some((tower, inner)) = tower {
            match tower.rule(inner).and_then(|rule| Some((rule, rule.captures(inner)?))) {
                None => add(&mut towers, inner.to_owned(), None, view(&[])?, source)?,
                Some((rule, _)) if rule.outputs.is_empty() => dropped.push(source.clone()),
                Some((rule, captures)) => {
                    for output in &rule.outputs {
                        let mut name = String::new();
                        captures.expand(output.name, &mut name);
                        add(&mut towers, name, None, view(&output.steps)?, source)?;
                    }
                }
            }
            continue;
        }
        let renamed = architecture.renamed(source);
        if repeated && renamed.starts_with("lm_head.") {
            add(&mut towers, [architecture.outer, &renamed].concat(), None, view(&[])?, source)?;
            continue;
        }
        let rule = architecture.rules.iter().find_map(|rule| Some((rule, rule.captures(&renamed)?)));
        let Some((Rule { outputs, .. }, captures)) = rule else {
            put([architecture.outer, &renamed].concat(), None, &[])?;
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
            put(name, place, &output.steps)?;
        }
    }
    let whole = |parts: Collected| {
        parts.into_values().map(|(name, parts)| assemble(name, parts)).collect::<Result<Vec<_>, _>>()
    };
    Ok(Applied { tensors: whole(parts)?, packed: packings.layers(), usual, towers: whole(towers)?, dropped })
}

/// Adds a view to the output tensor `name`: whole, or at a place.
fn add(
    parts: &mut Collected,
    name: String,
    place: Place,
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
