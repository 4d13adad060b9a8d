//! Looking at a model, converted or not: what it is, how each layer is stored, and whether mlx_lm loads it.
//!
//! [`inspect`] reads headers and config.json only. [`verify`] reads every tensor, and reports everything that is wrong
//! rather than the first of it: a person with a damaged model wants to know whether one file is to be fetched
//! again or all of them.

mod stored;
mod verify;

use std::collections::BTreeMap;
use std::sync::Arc;

use mlx_format::Scheme;
use mlx_quant_model::{Named, View};
use serde::Serialize;

pub use self::verify::{Problem, Verdict, Verification, verify};

use self::stored::{Packed, Stored, bytes, stored};
use crate::parameters::{OuterModules, bits_per_weight};
use crate::plan::{PlanError, Towers};
use crate::{Error, Model};

/// Whether and how a model is quantized.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Form {
    /// Nothing is packed.
    Dense,
    /// Layers are packed as MLX packs them.
    Quantized,
}

/// How a layer is packed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Packing {
    /// Bits of one code.
    pub bits: u32,
    /// Weights that share a scale.
    pub group_size: usize,
    /// `affine`, `mxfp4`, `mxfp8` or `nvfp4`.
    pub mode: &'static str,
}

/// A linear or embedding layer, or another packed one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Layer {
    /// Module path.
    pub path: String,
    /// Shape of the weight after decoding, `[.., out, in]`; as stored where the packing is unclear.
    pub shape: Vec<usize>,
    /// `4 bits, group size 64`, `mxfp4`, the dtype of what is not quantized, or `unclear packing`.
    pub scheme: String,
    /// How it is packed, if it is and the config and shapes say how.
    pub packing: Option<Packing>,
    /// dtype of the scales, or of the weight where it is not packed.
    pub dtype: String,
    /// Weights.
    pub weights: u64,
    /// Bytes, scales and biases included.
    pub bytes: u64,
}

/// All layers of one scheme.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Total {
    /// Layers (or tensors).
    pub layers: usize,
    /// Weights.
    pub weights: u64,
    /// Bytes, scales and biases included.
    pub bytes: u64,
}

/// Sizes that only a decoder description tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Dimensions {
    /// Decoder layers.
    pub layers: usize,
    /// Features of the residual stream.
    pub hidden_size: usize,
    /// Rows of the embedding.
    pub vocabulary: usize,
}

/// What a model is.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Inspection {
    /// The directory.
    pub model: String,
    /// `model_type` of config.json.
    pub model_type: String,
    /// Family whose description is used.
    pub family: &'static str,
    /// Whether the names of the model type are described (else: by tensor names).
    pub described: bool,
    /// Whether its decoder is, so that it can be evaluated and calibrated.
    pub decoder_described: bool,
    /// Whether layers are packed.
    pub form: Form,
    /// Sizes, where the decoder is described.
    pub dimensions: Option<Dimensions>,
    /// The parts that see and hear, where there are any; they are in all sums.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub towers: Option<Towers>,
    /// Number of weights, as mlx-lm counts them.
    pub parameters: u64,
    /// Stored bits per weight of the whole model, as mlx-lm counts them.
    pub bits_per_weight: f64,
    /// Bytes of all tensors, as MLX holds them.
    pub tensor_bytes: u64,
    /// Bytes of all safetensors files.
    pub file_bytes: u64,
    /// Files and their bytes.
    pub files: Vec<(String, u64)>,
    /// Bytes by dtype.
    pub dtypes: BTreeMap<String, u64>,
    /// Layers by scheme.
    pub schemes: BTreeMap<String, Total>,
    /// Tensors that are no linear or embedding layer: norms, biases, convolutions.
    pub other: Total,
    /// Every linear and embedding layer.
    pub layers: Vec<Layer>,
}

/// Tells what an opened model is; reads headers and config.json only.
///
/// # Errors
/// [`Error::Plan`] if the checkpoint is incomplete, or not what config.json says.
pub fn inspect(model: &Model) -> Result<Inspection, Error> {
    let named = read(model)?;
    let decoder = named.decoder.as_ref();
    let counted = count(&named);
    let directory = model.checkpoint.directory();
    let mut files = Vec::new();
    let stored = model.checkpoint.tensors().values().map(|tensor| tensor.bytes() as u64).sum();
    for shard in model.checkpoint.shards() {
        files.push((shard.to_owned(), directory.identity(shard)?.0));
    }
    Ok(Inspection {
        model: directory.display().into_owned(),
        model_type: model.config.model_type()?.to_owned(),
        family: named.architecture.family,
        described: named.architecture.described,
        decoder_described: decoder.is_some(),
        form: if counted.packed { Form::Quantized } else { Form::Dense },
        dimensions: decoder.map(|decoder| Dimensions {
            layers: decoder.blocks.len(),
            hidden_size: decoder.hidden_size,
            vocabulary: decoder.vocabulary,
        }),
        towers: counted.towers,
        parameters: counted.parameters,
        bits_per_weight: bits_per_weight(counted.tensor_bytes, counted.parameters),
        tensor_bytes: counted.tensor_bytes,
        file_bytes: if model.checkpoint.is_headers_only() {
            stored
        } else {
            files.iter().map(|(_, bytes)| bytes).sum()
        },
        files,
        dtypes: counted.dtypes,
        schemes: counted.schemes,
        other: counted.other,
        layers: counted.layers,
    })
}

fn read(model: &Model) -> Result<Arc<Named>, Error> {
    Ok(model.named().map_err(PlanError::from)?)
}

/// What is counted over all tensors.
#[derive(Default)]
struct Counted {
    packed: bool,
    towers: Option<Towers>,
    parameters: u64,
    tensor_bytes: u64,
    dtypes: BTreeMap<String, u64>,
    schemes: BTreeMap<String, Total>,
    other: Total,
    layers: Vec<Layer>,
}

fn count(named: &Named) -> Counted {
    let all = || named.tensors.iter().chain(&named.towers);
    let modules = OuterModules::of(all().map(|(name, _)| name.as_str()));
    let mut counted = Counted::default();
    // What another quantizer has packed counts as MLX would hold it.
    let taken = |name: &str| {
        let (path, taken) = named.packed.get_key_value(name.strip_suffix(".weight")?)?;
        let taken = taken.as_ref().ok()?;
        let (weight, scales, biases) = (&taken.weight, &taken.scales, taken.biases.as_ref());
        Some((Packed { path, weight, scales, biases, global: None }, taken.scheme))
    };
    let mut add = |view: &View| {
        *counted.dtypes.entry(view.dtype.to_string()).or_default() += bytes(view);
        counted.tensor_bytes += bytes(view);
    };
    for (name, view) in all() {
        match taken(name) {
            Some((packed, _)) => packed.parts().for_each(|(_, view)| add(view)),
            None => add(view),
        }
    }
    for stored in stored(&named.tensors) {
        let stored = match stored {
            Stored::Packed(packed) => Ok((packed, packed.scheme(named))),
            Stored::Plain { name, view } => match taken(name) {
                Some((packed, scheme)) => Ok((packed, Some(scheme))),
                None => Err((name, view)),
            },
        };
        let layer = match stored {
            Ok((packed, scheme)) => {
                let layer = packed_layer(packed, scheme);
                counted.packed = true;
                counted.parameters += layer.weights;
                layer
            }
            Err((name, view)) => {
                counted.parameters += modules.plain(name, view.elements());
                let path = name.strip_suffix(".weight");
                let path = path.filter(|path| named.architecture.is_linear(path, view.shape().len()));
                let Some(path) = path else {
                    counted.other.add(view.elements() as u64, bytes(view));
                    continue;
                };
                let dtype = view.dtype.to_string();
                Layer {
                    path: path.to_owned(),
                    shape: view.shape(),
                    scheme: dtype.clone(),
                    packing: None,
                    dtype,
                    weights: view.elements() as u64,
                    bytes: bytes(view),
                }
            }
        };
        counted.schemes.entry(layer.scheme.clone()).or_default().add(layer.weights, layer.bytes);
        counted.layers.push(layer);
    }
    let mut towers = Towers { tensors: named.towers.len(), ..Towers::default() };
    for stored in stored(&named.towers) {
        let (weights, size) = match stored {
            Stored::Packed(packed) => {
                let layer = packed_layer(packed, packed.scheme(named));
                counted.packed = true;
                (layer.weights, layer.bytes)
            }
            Stored::Plain { name, view } => (modules.plain(name, view.elements()), bytes(view)),
        };
        towers.weights += weights;
        towers.bytes += size;
        counted.other.add(weights, size);
    }
    counted.parameters += towers.weights;
    counted.towers = Some(towers).filter(|towers| towers.tensors > 0);
    counted
}

fn packed_layer(packed: Packed<'_>, scheme: Option<Scheme>) -> Layer {
    let shape = scheme.map_or_else(|| packed.weight.shape(), |scheme| packed.shape(scheme));
    let packing = |scheme: Scheme| Packing {
        bits: scheme.bits(),
        group_size: scheme.group_size(),
        mode: scheme.mode().name(),
    };
    Layer {
        path: packed.path.to_owned(),
        scheme: scheme.map_or("unclear packing".to_owned(), |scheme| scheme.to_string()),
        packing: scheme.map(packing),
        dtype: packed.scales.dtype.to_string(),
        weights: OuterModules::packed(&shape),
        bytes: packed.bytes(),
        shape,
    }
}

impl Total {
    fn add(&mut self, weights: u64, bytes: u64) {
        self.layers += 1;
        self.weights += weights;
        self.bytes += bytes;
    }
}
