//! The heads of a checkpoint that predict tokens beyond the next one, by the names of the drafter that mlx-vlm loads.

use std::collections::BTreeSet;

use mlx_format::checkpoint::{Checkpoint, Config};

use super::collect::{Applied, apply, decoded_tensors};
use super::{Named, check_shards};
use crate::arch::{Drafter, Source};
use crate::packing::Found;
use crate::{Existing, SourceError};

/// How many names an error has.
const SHOWN: usize = 5;

/// Heads that become a model of their own.
#[derive(Debug)]
pub struct Heads {
    /// Their tensors.
    pub named: Named,
    /// config.json of the drafter, without what says how it is quantized.
    pub config: Config,
    /// Files of the tokenizer that lie beside it, where the source has them.
    pub files: &'static [&'static str],
}

impl Heads {
    /// Reads headers and config.json.
    ///
    /// # Errors
    /// [`SourceError::Heads`] if nothing loads heads of this model type, [`SourceError::NoHeads`] if there are none, and
    /// [`SourceError::HeadsMisfit`] if they are not whole.
    pub fn read(checkpoint: &Checkpoint, config: &Config) -> Result<Self, SourceError> {
        let model_type = config.model_type()?.to_owned();
        let drafter =
            Drafter::of(config).map_err(|why| SourceError::Heads { model_type: model_type.clone(), why })?;
        let (existing, _) = Existing::of(config, checkpoint)?;
        if existing.packed().is_some() {
            let why = "the model is quantized already, and heads are split from the original".to_owned();
            return Err(SourceError::Heads { model_type, why });
        }
        check_shards(checkpoint)?;
        let found = match &existing {
            Existing::Packed(packing) => packing.find(checkpoint)?,
            _ => Found::default(),
        };
        let sources = decoded_tensors(checkpoint, &found);
        let architecture = drafter.architecture(Source { config, tensors: &sources })?;
        let Applied { tensors, usual, .. } = apply(&architecture, checkpoint, &sources, &found, false)?;
        let model = checkpoint.directory().display().into_owned();
        if tensors.is_empty() {
            return Err(SourceError::NoHeads { model });
        }
        let wanted = drafter.tensors(config)?;
        let wanted: BTreeSet<&str> = wanted.iter().map(String::as_str).collect();
        let names: BTreeSet<&str> = tensors.iter().map(|(name, _)| name.as_str()).collect();
        // Biases are there or not, as config.json has it; what has one is known.
        let has_place = |name: &str| {
            let module = name.strip_suffix(".bias").map(|path| format!("{path}.weight"));
            wanted.contains(name) || module.is_some_and(|weight| wanted.contains(weight.as_str()))
        };
        let missing: Vec<&str> = wanted.iter().copied().filter(|name| !names.contains(name)).collect();
        let unread: Vec<&str> = names.iter().copied().filter(|name| !has_place(name)).collect();
        for (what, list) in [("missing", missing), ("unknown", unread)] {
            if let [first, ..] = list[..] {
                let shown = list[..list.len().min(SHOWN)].join(", ");
                let more = if list.len() > SHOWN { ", ..." } else { "" };
                let what = if list.len() > 1 {
                    format!("{shown}{more} are {what}")
                } else {
                    format!("{first} is {what}")
                };
                return Err(SourceError::HeadsMisfit { model, drafter: drafter.model_type, what });
            }
        }
        let named = Named {
            architecture,
            existing: Existing::None,
            tensors,
            packed: std::collections::BTreeMap::new(),
            usual,
            towers: Vec::new(),
            depth: None,
            dropped: Vec::new(),
            decoder: None,
            undescribed: None,
            wrong: None,
            expected: None,
            untied: false,
            notes: Vec::new(),
        };
        Ok(Self { named, config: drafter.config(config), files: drafter.files })
    }
}
