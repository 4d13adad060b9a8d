//! mlx-lm's mixed-bit recipes (`mlx_lm/convert.py`, `mixed_quant_predicate_builder`).

use mlx_format::{Scheme, SchemeError};

/// A recipe: low bits, with more for some layers' value and down projections and for the head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MixedRecipe {
    /// 2 and 6 bits.
    Mixed2_6,
    /// 3 and 4 bits.
    Mixed3_4,
    /// 3 and 6 bits.
    Mixed3_6,
    /// 4 and 6 bits.
    Mixed4_6,
}

impl MixedRecipe {
    /// Low and high bits.
    pub const fn bits(self) -> (u32, u32) {
        match self {
            Self::Mixed2_6 => (2, 6),
            Self::Mixed3_4 => (3, 4),
            Self::Mixed3_6 => (3, 6),
            Self::Mixed4_6 => (4, 6),
        }
    }
}

/// A recipe applied to one model.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mixed {
    low: Scheme,
    high: Scheme,
    layers: usize,
    /// Position of the layer number among the segments of a path.
    layer_segment: usize,
}

impl Mixed {
    /// `None` if no path has a `down_proj`, which the recipes need.
    pub(super) fn new<'p>(
        recipe: MixedRecipe,
        group_size: usize,
        layers: usize,
        mut paths: impl Iterator<Item = &'p str>,
    ) -> Result<Option<Self>, SchemeError> {
        let (low, high) = recipe.bits();
        let Some(path) = paths.find(|path| path.contains("down_proj")) else { return Ok(None) };
        let is_number = |segment: &str| segment.bytes().all(|byte| byte.is_ascii_digit());
        let segments = path.split('.').count();
        let layer_segment = path.split('.').position(is_number).unwrap_or(segments - 1);
        let (low, high) = (Scheme::affine(low, group_size)?, Scheme::affine(high, group_size)?);
        Ok(Some(Self { low, high, layers, layer_segment }))
    }

    /// The scheme of the layer at `path`. Matching is by substring, as in mlx-lm.
    pub(super) fn scheme(&self, path: &str) -> Scheme {
        let layer = path
            .split('.')
            .nth(self.layer_segment)
            .and_then(|segment| segment.parse().ok())
            .unwrap_or(0usize);
        let eighth = self.layers / 8;
        // Python's remainder is never negative; below an eighth the first condition holds anyway.
        let more = layer < eighth || layer >= 7 * self.layers / 8 || (layer - eighth) % 3 == 2;
        let value = ["v_proj", "v_a_proj", "v_b_proj"].iter().any(|name| path.contains(name));
        let high = (value || path.contains("down_proj")) && more || path.contains("lm_head");
        if high { self.high } else { self.low }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eight_layers_as_measured() {
        let paths = ["model.layers.0.mlp.down_proj"];
        let mixed = Mixed::new(MixedRecipe::Mixed4_6, 64, 8, paths.into_iter()).unwrap().unwrap();
        let high: Vec<usize> = (0..8)
            .filter(|layer| mixed.scheme(&format!("model.layers.{layer}.mlp.down_proj")).bits() == 6)
            .collect();
        assert_eq!(high, [0, 3, 6, 7]);
        assert_eq!(mixed.scheme("lm_head").bits(), 6);
        assert_eq!(mixed.scheme("model.embed_tokens").bits(), 4);
        assert_eq!(mixed.scheme("model.layers.0.self_attn.qkv_proj").bits(), 6);
        assert!(Mixed::new(MixedRecipe::Mixed4_6, 64, 8, ["a.c_proj"].into_iter()).unwrap().is_none());
    }
}
