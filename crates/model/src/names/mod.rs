//! Source names to output tensors, by the rules of an architecture.

mod collect;
mod drafter;
mod shared;

use std::collections::{BTreeMap, BTreeSet};

use mlx_format::checkpoint::{Checkpoint, Config, ConfigError, LeftAside};
use mlx_format::{Dtype, FloatType, Mode, Scheme};

pub use self::collect::Taken;
use self::collect::{Applied, apply, decoded_tensors};
pub use self::drafter::Heads;
pub use self::shared::SharedNames;
use crate::arch::{self, Architecture, Language};
use crate::asked;
use crate::decoder::{Decoder, ExpectedTensor};
use crate::fit::{self, Fault, Held, Misfits};
use crate::packing::Found;
use crate::tied::{Tied, untied};
use crate::view::View;
use crate::{Existing, SourceError};

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

    /// Whether a `global_scale` belongs to a packed module: one float32 for each of stacked experts in nvfp4
    /// (`mlx_lm/models/switch_layers.py`, `QuantizedSwitchLinear`).
    ///
    /// # Errors
    /// [`SourceError::GlobalScale`] if it does not; as [`Named::scheme`].
    pub fn spreads(
        &self,
        path: &str,
        weight: &View,
        scales: &View,
        global: &View,
    ) -> Result<(), SourceError> {
        let scheme = self.scheme(path, weight, scales)?;
        let (experts, found) = (weight.shape(), global.shape());
        let fits = experts.len() == 3 && found == experts[..1] && global.dtype == Dtype::F32;
        if fits && scheme.mode() == Mode::Nvfp4 {
            return Ok(());
        }
        let (path, dtype) = (path.to_owned(), global.dtype);
        Err(SourceError::GlobalScale { path, scheme, weight: experts, dtype, found })
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
            let spread = leaf == "global_scale"
                && packed.is_some_and(|(weight, scales)| {
                    explains && self.spreads(path, weight, scales, view).is_ok()
                });
            if spread {
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
