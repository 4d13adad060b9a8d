//! What a source says of its own quantization.

use std::collections::BTreeMap;

use mlx_format::checkpoint::{Checkpoint, Config};
use mlx_format::{Dtype, Mode, Scheme};
use serde_json::{Map, Value};

use crate::fit::is_packed_weight;
use crate::packing::Packing;
use crate::{SourceError, View};

/// Quantization found in config.json.
#[derive(Clone, Debug, PartialEq)]
pub enum Existing {
    /// Not quantized.
    None,
    /// An MLX model: its `quantization` object.
    Mlx(Map<String, Value>),
    /// Parts packed as mxfp4 by the hub (gpt-oss), which MLX takes as they are.
    HubMx(Map<String, Value>),
    /// Packed by another quantizer: decoded, or taken over where MLX has codes for the same numbers.
    Packed(Packing),
}

fn object(mode: Mode) -> Map<String, Value> {
    let (bits, group_size) = mode.defaults();
    let mut map = Map::new();
    map.insert("group_size".to_owned(), group_size.into());
    map.insert("bits".to_owned(), bits.into());
    map.insert("mode".to_owned(), mode.name().into());
    map
}

/// Files beside the weights in which other tools say how they quantized (the tool, as people call it).
const SETTINGS: [(&str, &str); 3] = [
    ("hf_quant_config.json", "ModelOpt"),
    ("quantize_config.json", "AutoGPTQ"),
    ("quant_config.json", "AutoAWQ"),
];

impl Existing {
    /// What config.json and the files beside it say of the tensors that are there. Settings that are left over on plain weights
    /// count for nothing; the second value says so.
    ///
    /// # Errors
    /// If the source is quantized in a way that cannot be converted.
    pub fn of(config: &Config, checkpoint: &Checkpoint) -> Result<(Self, Option<String>), SourceError> {
        if checkpoint.is_headers_only() || holds_packed(checkpoint) {
            return match Self::of_config(config)? {
                Self::None if checkpoint.is_headers_only() => Ok((Self::None, None)),
                Self::None => match settings_beside(checkpoint)? {
                    Some(packing) => Ok((Self::Packed(packing), None)),
                    None => match tool(checkpoint) {
                        Some(method) => Err(SourceError::Foreign { method }),
                        None => Ok((Self::None, None)),
                    },
                },
                existing => Ok((existing, None)),
            };
        }
        let settings =
            |key: &str| config.get(key).filter(|value| value.as_object().is_some_and(|map| !map.is_empty()));
        let left_over = settings("quantization").or_else(|| settings("quantization_config"));
        let note = left_over.map(|settings| {
            let method = settings.get("quant_method").and_then(Value::as_str);
            let of = method.map_or_else(String::new, |method| format!(" ({method})"));
            format!("config.json speaks of a quantization{of}, but all weights are plain: these settings are left out")
        });
        Ok((Self::None, note))
    }

    /// Reads `quantization` and `quantization_config`, whatever the tensors are.
    ///
    /// # Errors
    /// If the source is quantized in a way that cannot be converted.
    pub fn of_config(config: &Config) -> Result<Self, SourceError> {
        if let Some(Value::Object(map)) = config.0.get("quantization")
            && !map.is_empty()
        {
            return Ok(Self::Mlx(map.clone()));
        }
        let Some(Value::Object(map)) = config.get("quantization_config") else { return Ok(Self::None) };
        if map.is_empty() {
            return Ok(Self::None);
        }
        let method = map.get("quant_method").and_then(Value::as_str);
        match method {
            // mlx-lm's own copy of `quantization`, from a config that lost the first.
            None if map.contains_key("group_size") && map.contains_key("bits") => Ok(Self::Mlx(map.clone())),
            Some("mxfp4") => Ok(Self::HubMx(object(Mode::Mxfp4))),
            _ => match Packing::of(map)? {
                Some(packing) => Ok(Self::Packed(packing)),
                None => Err(SourceError::Foreign { method: method.unwrap_or("unknown").to_owned() }),
            },
        }
    }

    /// With the entries of single layers under the paths that the layers have in MLX. They are found under the path in the
    /// source, which a family may rename, split or stack, or under MLX's; in either `language_model.` may be missing.
    ///
    /// # Errors
    /// [`SourceError::UnequalEntries`] if one layer is made of several with different entries.
    pub(crate) fn renamed<'t>(
        self,
        tensors: impl Iterator<Item = &'t (String, View)>,
    ) -> Result<Self, SourceError> {
        let Self::Mlx(map) = self else { return Ok(self) };
        // Old key to the new ones that take its place.
        let mut moved: BTreeMap<&str, Vec<(String, &Value)>> = BTreeMap::new();
        for (name, view) in tensors {
            let Some(path) = name.strip_suffix(".weight") else { continue };
            let mut found: Option<(&str, &Value)> = None;
            for source in view.sources().filter_map(|source| source.strip_suffix(".weight")) {
                let Some((key, entry)) = [source, path].into_iter().find_map(|path| entry_of(&map, path))
                else {
                    continue;
                };
                if let Some((_, first)) = found.filter(|(_, first)| *first != entry) {
                    let (path, first, other) = (path.to_owned(), first.to_string(), entry.to_string());
                    return Err(SourceError::UnequalEntries { path, first, other });
                }
                found = Some((key, entry));
                if key != path {
                    moved.entry(key).or_default();
                }
            }
            if let Some((key, entry)) = found.filter(|(key, _)| *key != path) {
                moved.entry(key).or_default().push((path.to_owned(), entry));
            }
        }
        let mut renamed = Map::new();
        for (key, value) in &map {
            match moved.get(key.as_str()) {
                Some(new) => renamed.extend(new.iter().map(|(path, entry)| (path.clone(), (*entry).clone()))),
                None => {
                    renamed.entry(key.clone()).or_insert_with(|| value.clone());
                }
            }
        }
        Ok(Self::Mlx(renamed))
    }

    /// The object that goes into the output's config when the packed parts are kept.
    pub fn packed(&self) -> Option<&Map<String, Value>> {
        match self {
            Self::Mlx(map) | Self::HubMx(map) => Some(map),
            Self::None | Self::Packed(_) => None,
        }
    }

    /// The scheme of a packed module: its own entry, else the shared one, else what the shapes say
    /// (`mlx_lm/utils.py`, `infer_quant_config`). `words` and `groups` are the last axes of weight and scales; `columns` is the
    /// input that the model has there, where its description tells.
    ///
    /// # Errors
    /// [`SourceError::UnclearScheme`] if no scheme fits, or several do and nothing decides.
    pub fn scheme(
        &self,
        path: &str,
        (words, groups): (usize, usize),
        scales: Dtype,
        columns: Option<usize>,
    ) -> Result<Scheme, SourceError> {
        let unclear = || SourceError::UnclearScheme { path: path.to_owned(), words, groups };
        let map = self.packed().ok_or_else(unclear)?;
        let fits = |scheme: &Scheme| {
            let byte_scales = scheme.mode() != Mode::Affine;
            let own = groups.checked_mul(scheme.group_size());
            let fits = |own: usize| {
                scheme.divides(own)
                    && scheme.words(own) == words
                    && columns.is_none_or(|columns| columns == own)
            };
            own.is_some_and(fits) && byte_scales == (scales == Dtype::U8)
        };
        let own = entry_of(map, path).and_then(|(_, entry)| entry.as_object()).and_then(scheme_of);
        let named = own.into_iter().chain(scheme_of(map)).find(fits);
        let affine = |widths: &'static [u32]| {
            let of = |bits: &u32| [32, 64, 128].map(|group| Scheme::affine(*bits, group));
            widths.iter().flat_map(of).filter_map(Result::ok)
        };
        // Shapes alone do not tell 4 bits of 64 from 8 bits of 32.
        let only = |candidates: &mut dyn Iterator<Item = Scheme>| {
            candidates.next().filter(|_| candidates.next().is_none())
        };
        let inferred = || {
            let fp = Mode::ALL[1..].iter().filter_map(|mode| Scheme::new(*mode, None, None).ok());
            only(&mut affine(&[2, 3, 4, 5, 6, 8]).chain(fp).filter(fits))
        };
        // One bit is rare: only where nothing else can be meant.
        let single = || {
            let wider = affine(&[2, 3, 4, 5, 6, 8]).any(|scheme| fits(&scheme));
            if wider { None } else { only(&mut affine(&[1]).filter(fits)) }
        };
        named.or_else(inferred).or_else(single).ok_or_else(unclear)
    }
}

/// The entry of a path, and the key under which it stands.
fn entry_of<'m>(map: &'m Map<String, Value>, path: &str) -> Option<(&'m str, &'m Value)> {
    const OUTER: &str = "language_model.";
    let other = path.strip_prefix(OUTER).map_or_else(|| format!("{OUTER}{path}"), str::to_owned);
    [path, &other].into_iter().find_map(|key| {
        let (key, entry) = map.get_key_value(key)?;
        (entry.is_object() || entry.is_boolean()).then_some((key.as_str(), entry))
    })
}

/// Whether any tensor is not a plain weight but codes, or scales of such.
fn holds_packed(checkpoint: &Checkpoint) -> bool {
    checkpoint.tensors().iter().any(|(name, tensor)| {
        name.ends_with(".scales") || is_packed_weight(name, tensor.dtype, tensor.shape.len())
    })
}

/// The packing that a file beside the weights describes, where config.json is silent.
fn settings_beside(checkpoint: &Checkpoint) -> Result<Option<Packing>, SourceError> {
    for (file, method, inner) in [
        ("hf_quant_config.json", "modelopt", "quantization"),
        ("quantize_config.json", "gptq", ""),
        ("quant_config.json", "awq", ""),
    ] {
        let Some(bytes) = checkpoint.directory().read(file).ok().flatten() else { continue };
        let Ok(Config(mut map)) = Config::parse(&bytes) else { continue };
        if let Some(Value::Object(settings)) = map.get_mut(inner) {
            map = std::mem::take(settings);
        }
        map.entry("quant_method").or_insert_with(|| method.into());
        return Packing::of(&map);
    }
    Ok(None)
}

/// The tool that quantized a checkpoint, by the file that it leaves beside the weights, with what it says of the method.
fn tool(checkpoint: &Checkpoint) -> Option<String> {
    SETTINGS.iter().find_map(|(file, tool)| {
        let bytes = checkpoint.directory().read(file).ok().flatten()?;
        let settings = Config::parse(&bytes).map(|config| Value::Object(config.0)).unwrap_or_default();
        let method = ["/quantization/quant_algo", "/quant_method", "/producer/name"]
            .iter()
            .find_map(|place| settings.pointer(place)?.as_str());
        let method = method.filter(|method| !method.eq_ignore_ascii_case(tool));
        Some(method.map_or_else(|| (*tool).to_owned(), |method| format!("{tool} ({method})")))
    })
}

fn scheme_of(map: &Map<String, Value>) -> Option<Scheme> {
    let number = |key: &str| map.get(key).and_then(Value::as_u64).and_then(|n| u32::try_from(n).ok());
    let mode = map.get("mode").and_then(Value::as_str).map_or(Some(Mode::Affine), Mode::from_name)?;
    Scheme::new(mode, number("bits"), number("group_size").map(|n| n as usize)).ok()
}

/// The scheme that an object of config.json names, with MLX's defaults for what it leaves out.
pub fn listed(entry: &Map<String, Value>) -> Option<Scheme> {
    let number = |key: &str| match entry.get(key) {
        None | Some(Value::Null) => Some(None),
        Some(value) => value.as_u64().and_then(|n| u32::try_from(n).ok()).map(Some),
    };
    let mode = entry.get("mode").and_then(Value::as_str).map_or(Some(Mode::Affine), Mode::from_name)?;
    Scheme::new(mode, number("bits")?, number("group_size")?.map(|n| n as usize)).ok()
}
