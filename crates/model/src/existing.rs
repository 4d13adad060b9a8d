//! What a source says of its own quantization.

use mlx_format::checkpoint::Config;
use mlx_format::{Dtype, Mode, Scheme};
use serde_json::{Map, Value};

use crate::SourceError;

/// Quantization found in config.json.
#[derive(Clone, Debug, PartialEq)]
pub enum Existing {
    /// Not quantized.
    None,
    /// An MLX model: its `quantization` object.
    Mlx(Map<String, Value>),
    /// Parts packed as mxfp4 or mxfp8 by the hub (gpt-oss), which MLX takes as they are.
    HubMx(Map<String, Value>),
    /// fp8 weights with block scales, decoded to bfloat16 before anything else.
    Fp8 {
        /// Rows and columns of a block.
        block: [usize; 2],
    },
}

fn object(mode: Mode) -> Map<String, Value> {
    let (bits, group_size) = mode.defaults();
    let mut map = Map::new();
    map.insert("group_size".to_owned(), group_size.into());
    map.insert("bits".to_owned(), bits.into());
    map.insert("mode".to_owned(), mode.name().into());
    map
}

impl Existing {
    /// Reads `quantization` and `quantization_config`.
    ///
    /// # Errors
    /// If the source is quantized in a way that cannot be converted.
    pub fn of(config: &Config) -> Result<Self, SourceError> {
        if let Some(Value::Object(map)) = config.0.get("quantization") {
            return Ok(Self::Mlx(map.clone()));
        }
        let Some(Value::Object(map)) = config.get("quantization_config") else { return Ok(Self::None) };
        if map.is_empty() {
            return Ok(Self::None);
        }
        let method = map.get("quant_method").and_then(Value::as_str);
        let block = || {
            let sizes = map.get("weight_block_size")?.as_array()?;
            let size =
                |index: usize| Some(usize::try_from(sizes.get(index)?.as_u64()?).ok()?.clamp(1, 1 << 20));
            Some([size(0)?, size(1)?])
        };
        match method {
            // mlx-lm's own copy of `quantization`, from a config that lost the first.
            None if map.contains_key("group_size") && map.contains_key("bits") => Ok(Self::Mlx(map.clone())),
            Some("mxfp4") => Ok(Self::HubMx(object(Mode::Mxfp4))),
            Some("mxfp8") => Ok(Self::HubMx(object(Mode::Mxfp8))),
            Some("fp8") => Ok(Self::Fp8 { block: block().unwrap_or([128, 128]) }),
            _ => Err(SourceError::Foreign { method: method.unwrap_or("unknown").to_owned() }),
        }
    }

    /// The object that goes into the output's config when the packed parts are kept.
    pub fn packed(&self) -> Option<&Map<String, Value>> {
        match self {
            Self::Mlx(map) | Self::HubMx(map) => Some(map),
            Self::None | Self::Fp8 { .. } => None,
        }
    }

    /// The scheme of a packed module: its own entry, else the shared one, else what the shapes say
    /// (`mlx_lm/utils.py`, `infer_quant_config`). `words` and `groups` are the last axes of weight and scales.
    pub fn scheme(
        &self,
        path: &str,
        words: usize,
        groups: usize,
        scales: Dtype,
    ) -> Result<Scheme, SourceError> {
        let unclear = || SourceError::UnclearScheme { path: path.to_owned(), words, groups };
        let map = self.packed().ok_or_else(unclear)?;
        let fits = |scheme: &Scheme| {
            let byte_scales = scheme.mode() != Mode::Affine;
            let columns = groups.checked_mul(scheme.group_size());
            let fits = |columns| scheme.divides(columns) && scheme.words(columns) == words;
            columns.is_some_and(fits) && byte_scales == (scales == Dtype::U8)
        };
        let own = map.get(path).and_then(Value::as_object).and_then(scheme_of);
        let named = own.into_iter().chain(scheme_of(map)).find(fits);
        let inferred = || {
            let affine = [2, 3, 4, 5, 6, 8]
                .into_iter()
                .flat_map(|bits| [32, 64, 128].map(|group| Scheme::affine(bits, group)));
            let fp = Mode::ALL[1..].iter().map(|mode| Scheme::new(*mode, None, None));
            let mut candidates = affine.chain(fp).filter_map(Result::ok).filter(fits);
            // Shapes alone do not tell 4 bits of 64 from 8 bits of 32.
            candidates.next().filter(|_| candidates.next().is_none())
        };
        named.or_else(inferred).ok_or_else(unclear)
    }
}

fn scheme_of(map: &Map<String, Value>) -> Option<Scheme> {
    let number = |key: &str| map.get(key).and_then(Value::as_u64).and_then(|n| u32::try_from(n).ok());
    let mode = map.get("mode").and_then(Value::as_str).map_or(Some(Mode::Affine), Mode::from_name)?;
    Scheme::new(mode, number("bits"), number("group_size").map(|n| n as usize)).ok()
}
