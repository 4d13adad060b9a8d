//! What the rules of an architecture make of source tensors: outputs whole, stacked from slices or joined, and layers in MLX's packing.

use std::collections::BTreeMap;
use std::sync::Arc;

use mlx_format::checkpoint::{Checkpoint, Tensor};
use mlx_format::{Dtype, FloatType, Scheme};

use crate::SourceError;
use crate::arch::{Architecture, Rule, Share};
use crate::matrix::{Matrix, Part};
use crate::packing::Found;
use crate::view::{Step, View};

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

/// What the rules make of a checkpoint.
pub(super) struct Applied {
    pub(super) tensors: Vec<(String, View)>,
    pub(super) packed: BTreeMap<String, Result<Taken, String>>,
    pub(super) usual: BTreeMap<String, FloatType>,
    pub(super) towers: Vec<(String, View)>,
    pub(super) dropped: Vec<String>,
}

/// Tensors by name as the rules see them: a packed matrix is one tensor of float32.
pub(super) fn decoded_tensors(checkpoint: &Checkpoint, found: &Found) -> BTreeMap<String, Tensor> {
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
pub(super) fn apply(
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
                None => add(&mut towers, [tower.outer, inner].concat(), None, view(&[])?, source)?,
                Some((rule, _)) if rule.outputs.is_empty() => dropped.push(source.clone()),
                Some((rule, captures)) => {
                    for output in &rule.outputs {
                        let mut name = tower.outer.to_owned();
                        captures.expand(&output.name, &mut name);
                        add(&mut towers, name, None, view(&output.steps)?, source)?;
                    }
                }
            }
            continue;
        }
        let renamed = architecture.renamed(source);
        if repeated && renamed.starts_with("lm_head.") {
            add(&mut towers, architecture.place.name(&renamed), None, view(&[])?, source)?;
            continue;
        }
        let rule = architecture.rules.iter().find_map(|rule| Some((rule, rule.captures(&renamed)?)));
        let Some((Rule { outputs, .. }, captures)) = rule else {
            put(architecture.place.name(&renamed), None, &[])?;
            continue;
        };
        if outputs.is_empty() {
            dropped.push(source.clone());
        }
        for output in outputs {
            let mut name = String::new();
            captures.expand(&output.name, &mut name);
            let name = architecture.place.name(&name);
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
