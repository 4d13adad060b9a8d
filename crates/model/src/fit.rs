//! Whether the tensors of a checkpoint are those that its description reads: none missing, none left over, each of its shape
//! and a floating-point number.
//!
//! Everything that does not fit is told, not the first of it, and all of it from headers: a person with an incomplete download
//! wants to know before the work how much of it is missing.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use mlx_format::{Dtype, FloatType};

use crate::View;
use crate::arch::by_names::is_leftover;
use crate::decoder::{Decoder, ExpectedTensor, Linear};

/// How many misfits an error names.
const SHOWN: usize = 10;

/// A tensor that does not fit its model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Misfit {
    /// MLX's name.
    pub tensor: String,
    /// What is wrong with it.
    pub fault: Fault,
}

/// What is wrong with a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It is not there.
    Missing,
    /// It has another shape than config.json asks for; `None` where any length will do.
    Shape {
        /// Axes, outermost first.
        found: Vec<usize>,
        /// Axes, outermost first.
        expected: Vec<Option<usize>>,
    },
    /// It holds integers that no quantization in config.json explains.
    Integers(Dtype),
    /// No part of the model reads it.
    Unread {
        /// Axes, outermost first; empty where the packing is unclear.
        shape: Vec<usize>,
    },
}

impl fmt::Display for Misfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = &self.tensor;
        match &self.fault {
            Fault::Missing => write!(f, "{name} is missing"),
            Fault::Shape { found, expected } => {
                let axis = |axis: &Option<usize>| axis.map_or("any".to_owned(), |axis| axis.to_string());
                let expected: Vec<String> = expected.iter().map(axis).collect();
                write!(f, "{name} has shape {found:?}, config.json asks for [{}]", expected.join(", "))
            }
            Fault::Integers(dtype) => {
                write!(
                    f,
                    "{name} is {dtype}, and nothing in config.json explains it in a form that is read here"
                )
            }
            Fault::Unread { shape } if shape.is_empty() => {
                write!(f, "{name} is read by no part of the model")
            }
            Fault::Unread { shape } => write!(f, "{name} (shape {shape:?}) is read by no part of the model"),
        }
    }
}

/// All that does not fit; at most ten of them are shown.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Misfits(pub Vec<Misfit>);

impl fmt::Display for Misfits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown: Vec<String> = self.0.iter().take(SHOWN).map(Misfit::to_string).collect();
        f.write_str(&shown.join("; "))?;
        match self.0.len().checked_sub(SHOWN) {
            Some(more @ 1..) => write!(f, "; and {more} more"),
            _ => Ok(()),
        }
    }
}

impl Misfits {
    /// What to do about the first of them.
    pub(crate) fn hint(&self) -> &'static str {
        match self.0.first().map(|misfit| &misfit.fault) {
            Some(Fault::Missing) => {
                "download the model again, or give the config.json that belongs to these weights"
            }
            Some(Fault::Integers(_)) => "get the bfloat16 version of this model",
            Some(Fault::Unread { .. }) if self.0.iter().any(|misfit| is_leftover(&misfit.tensor)) => {
                "merge the adapter into its model, or remove what a training left; --allow-unread goes on all the same"
            }
            Some(Fault::Unread { .. }) => {
                "get the model as its makers published it; --allow-unread goes on all the same"
            }
            _ => "config.json and weights do not belong together, download both again",
        }
    }
}

/// A tensor as far as fitting goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Held {
    /// dtype as stored.
    pub(crate) dtype: Dtype,
    /// Whether it is packed, so that its dtype says nothing.
    pub(crate) packed: bool,
    /// Shape after decoding, outermost axis first; `None` where the packing is unclear.
    pub(crate) shape: Option<Vec<usize>>,
}

/// Integers of this dtype under this name are a weight in some packed form. Masks and tables of indices are not.
pub(crate) fn is_packed_weight(name: &str, dtype: Dtype, axes: usize) -> bool {
    let plain =
        FloatType::from_dtype(dtype).is_some() || matches!(dtype, Dtype::F64 | Dtype::BOOL | Dtype::I64);
    let leaf = name.rsplit('.').next().unwrap_or(name);
    let table = ["bias", "ids", "idx", "tid2eid"].iter().any(|end| leaf.ends_with(end))
        || ["mask", "index", "indices", "map"].iter().any(|part| leaf.contains(part));
    !plain && !table && (axes >= 2 || leaf == "weight")
}

/// Everything that does not fit: what is missing first, then shapes, integers, and what is left over. Without `expected` (no
/// decoder description) only integers and well-known leftovers are told.
pub(crate) fn misfits(
    held: &BTreeMap<&str, Held>,
    expected: Option<&BTreeMap<String, ExpectedTensor>>,
) -> Vec<Misfit> {
    let misfit = |tensor: &str, fault: Fault| Misfit { tensor: tensor.to_owned(), fault };
    let (mut missing, mut shapes, mut integers, mut unread) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (name, expected) in expected.into_iter().flatten() {
        match held.get(name.as_str()).map(|held| &held.shape) {
            None if !expected.optional => missing.push(misfit(name, Fault::Missing)),
            Some(Some(found)) if !expected.fits(found) => {
                let (found, expected) = (found.clone(), expected.shape.clone());
                shapes.push(misfit(name, Fault::Shape { found, expected }));
            }
            _ => {}
        }
    }
    missing.extend(halves(held, expected).map(|name| misfit(name, Fault::Missing)));
    for (name, held) in held {
        let axes = held.shape.as_ref().map_or(2, Vec::len);
        // What a decoder reads is a number with a fraction, whatever it is called.
        let read = expected.is_some_and(|expected| expected.contains_key(*name));
        let integers_instead = read && FloatType::from_dtype(held.dtype).is_none();
        if !held.packed && (integers_instead || is_packed_weight(name, held.dtype, axes)) {
            integers.push(misfit(name, Fault::Integers(held.dtype)));
        } else if expected.map_or_else(|| is_leftover(name), |expected| !expected.contains_key(*name)) {
            unread.push(misfit(name, Fault::Unread { shape: held.shape.clone().unwrap_or_default() }));
        }
    }
    [missing, shapes, integers, unread].concat()
}

/// What cannot be carried along of towers: blocks that are not there, though later ones are, and integers that nothing
/// explains. No description says which tensors a block has; what one block has, its siblings should have. `depth` is how
/// many there are of the part that sees.
pub(crate) fn tower_misfits(towers: &[(String, View)], depth: Option<usize>, explains: bool) -> Vec<Misfit> {
    let names: BTreeSet<&str> = towers.iter().map(|(name, _)| name.as_str()).collect();
    // The blocks that each kind of tensor is in, by what stands before and behind their number.
    let mut kinds: BTreeMap<(&str, &str), BTreeSet<usize>> = BTreeMap::new();
    let mut blocks: BTreeMap<&str, usize> = BTreeMap::new();
    for name in &names {
        let found =
            ["blocks.", "layers.", "layer."].iter().find_map(|word| Some(name.find(word)? + word.len()));
        let Some((before, rest)) = found.map(|at| name.split_at(at)) else { continue };
        let Some((number, after)) = rest.split_once('.') else { continue };
        let Ok(number) = number.parse::<usize>() else { continue };
        // Stages of blocks that differ.
        if after.split('.').next().is_some_and(|next| next.parse::<usize>().is_ok()) {
            continue;
        }
        kinds.entry((before, after)).or_default().insert(number);
        let sees = before.starts_with("vision_tower.") || before.starts_with("vision_model.");
        let count = blocks.entry(before).or_insert_with(|| depth.filter(|_| sees).unwrap_or(0));
        *count = (*count).max(number.saturating_add(1));
    }
    let mut misfits = Vec::new();
    for ((before, after), found) in &kinds {
        // At most one more than there are tensors, whatever the numbers say.
        let missing = (0..blocks[before].min(found.len() + 1)).find(|number| !found.contains(number));
        let tensor = missing.map(|number| format!("{before}{number}.{after}"));
        misfits.extend(tensor.map(|tensor| Misfit { tensor, fault: Fault::Missing }));
    }
    for (name, view) in towers {
        let path = name.rsplit_once('.').map_or("", |(path, _)| path);
        let packed = explains && names.contains(format!("{path}.scales").as_str());
        if !packed && is_packed_weight(name, view.dtype, view.shape().len()) {
            misfits.push(Misfit { tensor: name.clone(), fault: Fault::Integers(view.dtype) });
        }
    }
    misfits
}

/// Biases and the like that some blocks have and others lack, although both have what they belong to.
fn halves<'e>(
    held: &BTreeMap<&str, Held>,
    expected: Option<&'e BTreeMap<String, ExpectedTensor>>,
) -> impl Iterator<Item = &'e str> {
    let optional =
        || expected.into_iter().flatten().filter(|(_, expected)| expected.optional).map(|(name, _)| name);
    let there: BTreeSet<String> = optional()
        .filter(|name| held.contains_key(name.as_str()))
        .map(|name| without_numbers(name))
        .collect();
    let lacking: Vec<&str> = optional()
        .filter(|name| !held.contains_key(name.as_str()) && there.contains(&without_numbers(name)))
        .map(String::as_str)
        .collect();
    lacking.into_iter()
}

/// `model.layers.*.self_attn.q_proj.bias`: the same of every block.
pub fn without_numbers(name: &str) -> String {
    let number = |segment: &str| segment.bytes().all(|byte| byte.is_ascii_digit());
    let segments: Vec<&str> =
        name.split('.').map(|segment| if number(segment) { "*" } else { segment }).collect();
    segments.join(".")
}

impl Decoder {
    /// Every tensor that the forward pass reads, by name. The inner width of a feed-forward network is taken from the
    /// rows of its first linear, which `rows` tells by tensor name (rows are not packed).
    pub fn expected(&self, rows: impl Fn(&str) -> Option<usize>) -> BTreeMap<String, ExpectedTensor> {
        let mut expected = self.reads().0;
        let name = |linear: &Linear| format!("{}.weight", linear.path);
        for network in self.networks() {
            let linears = network.gate.linears();
            let Some(found) = linears.into_iter().next().and_then(|linear| rows(&name(linear))) else {
                continue;
            };
            if let Some(down) = expected.get_mut(&name(&network.down)).and_then(|down| down.shape.last_mut())
            {
                *down = Some(found / network.rows_for(1));
            }
            for linear in network.gate.linears() {
                let axis =
                    expected.get_mut(&name(linear)).and_then(|tensor| tensor.shape.iter_mut().rev().nth(1));
                if let Some(axis) = axis {
                    *axis = Some(found);
                }
            }
        }
        expected
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(dtype: Dtype, shape: &[usize]) -> Held {
        Held { dtype, packed: false, shape: Some(shape.to_vec()) }
    }

    fn wanted(shape: &[usize], optional: bool) -> ExpectedTensor {
        ExpectedTensor { shape: shape.iter().copied().map(Some).collect(), optional }
    }

    #[test]
    fn all_kinds_of_misfits_are_told() {
        let expected: BTreeMap<String, ExpectedTensor> = [
            ("layers.0.q.bias", wanted(&[4], true)),
            ("layers.0.q.weight", wanted(&[4, 4], false)),
            ("layers.1.q.bias", wanted(&[4], true)),
            ("layers.1.q.weight", wanted(&[4, 4], false)),
            ("norm.weight", wanted(&[4], false)),
        ]
        .map(|(name, wanted)| (name.to_owned(), wanted))
        .into();
        let tensors = BTreeMap::from([
            ("layers.0.q.weight", held(Dtype::BF16, &[4, 8])),
            ("layers.1.q.bias", held(Dtype::BF16, &[4])),
            ("layers.1.q.weight", held(Dtype::I8, &[4, 4])),
            ("score.weight", held(Dtype::BF16, &[2, 4])),
        ]);
        let found = misfits(&tensors, Some(&expected));
        let names: Vec<&str> = found.iter().map(|misfit| misfit.tensor.as_str()).collect();
        let expected =
            ["norm.weight", "layers.0.q.bias", "layers.0.q.weight", "layers.1.q.weight", "score.weight"];
        assert_eq!(names, expected);
        let text = Misfits(found).to_string();
        assert!(text.starts_with("norm.weight is missing; "), "{text}");
        assert!(text.contains("layers.0.q.weight has shape [4, 8], config.json asks for [4, 4]"), "{text}");
        assert!(text.contains("layers.1.q.weight is I8"), "{text}");
    }

    #[test]
    fn at_most_ten_are_shown() {
        let many = |count: usize| {
            let misfit = |index| Misfit { tensor: format!("t{index}"), fault: Fault::Missing };
            Misfits((0..count).map(misfit).collect()).to_string()
        };
        assert!(many(10).ends_with("t9 is missing"));
        assert!(many(13).ends_with("t9 is missing; and 3 more"));
    }

    #[test]
    fn masks_and_indices_are_no_weights() {
        for (name, dtype, axes) in [
            ("h.0.attn.bias", Dtype::U8, 4),
            ("embeddings.position_ids", Dtype::I32, 2),
            ("relative_position_index", Dtype::I32, 2),
            ("a.weight", Dtype::BF16, 2),
            ("a.num_batches_tracked", Dtype::I32, 0),
        ] {
            assert!(!is_packed_weight(name, dtype, axes), "{name}");
        }
        for (name, dtype, axes) in [
            ("a.weight", Dtype::I8, 2),
            ("a.weight", Dtype::U8, 1),
            ("a.qweight", Dtype::I32, 2),
            ("a.weight_packed", Dtype::U8, 2),
            ("a.weight", Dtype::F8_E4M3, 2),
        ] {
            assert!(is_packed_weight(name, dtype, axes), "{name}");
        }
    }
}
