//! Tensors as layers: a packed weight with its scales and biases is one thing, everything else is itself.

use std::collections::BTreeMap;

use mlx_format::{Dtype, Mode, Scheme};
use mlx_quant_model::{Existing, Named, View};
use serde_json::Map;

/// A packed layer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Packed<'n> {
    pub(super) path: &'n str,
    pub(super) weight: &'n View,
    pub(super) scales: &'n View,
    pub(super) biases: Option<&'n View>,
    /// nvfp4: one number for each expert.
    pub(super) global: Option<&'n View>,
}

/// A tensor or a packed layer.
#[derive(Clone, Copy, Debug)]
pub(super) enum Stored<'n> {
    Plain { name: &'n str, view: &'n View },
    Packed(Packed<'n>),
}

/// Tensors of a model, in natural order.
pub(super) fn stored(tensors: &[(String, View)]) -> Vec<Stored<'_>> {
    let by_name: BTreeMap<&str, &View> = tensors.iter().map(|(name, view)| (name.as_str(), view)).collect();
    let packed = |path: &'_ str| {
        let of = |leaf: &str| by_name.get(format!("{path}.{leaf}").as_str()).copied();
        let weight = of("weight").filter(|weight| weight.dtype == Dtype::U32)?;
        Some(Packed {
            path: "",
            weight,
            scales: of("scales")?,
            biases: of("biases"),
            global: of("global_scale"),
        })
    };
    let each = tensors.iter().filter_map(|(name, view)| {
        let parts = name.rsplit_once('.').and_then(|(path, leaf)| Some((path, leaf, packed(path)?)));
        match parts {
            Some((_, "scales" | "biases" | "global_scale", _)) => None,
            Some((path, "weight", packed)) => Some(Stored::Packed(Packed { path, ..packed })),
            _ => Some(Stored::Plain { name, view }),
        }
    });
    each.collect()
}

/// Bytes of a view as MLX holds it.
pub(super) fn bytes(view: &View) -> u64 {
    (view.rows() * view.row_bytes()) as u64
}

impl<'n> Packed<'n> {
    /// Weight, scales and biases, with their names.
    pub(super) fn parts(&self) -> impl Iterator<Item = (String, &'n View)> + use<'n> {
        let Self { path, weight, scales, biases, global } = *self;
        let parts = [
            ("weight", Some(weight)),
            ("scales", Some(scales)),
            ("biases", biases),
            ("global_scale", global),
        ];
        parts.into_iter().filter_map(move |(leaf, view)| Some((format!("{path}.{leaf}"), view?)))
    }

    /// Bytes of all its tensors.
    pub(super) fn bytes(&self) -> u64 {
        self.parts().map(|(_, view)| bytes(view)).sum()
    }

    /// Words and groups of a row.
    fn row(&self) -> (usize, usize) {
        (self.weight.columns(), self.scales.columns())
    }

    /// Whether its rows can be of this scheme.
    pub(super) fn fits(&self, scheme: Scheme) -> bool {
        let (words, groups) = self.row();
        let columns = groups.checked_mul(scheme.group_size());
        let fits = |columns| scheme.divides(columns) && scheme.words(columns) == words;
        columns.is_some_and(fits) && (scheme.mode() == Mode::Affine) != (self.scales.dtype == Dtype::U8)
    }

    /// Shape of the weight after decoding, `[.., out, in]`.
    pub(super) fn shape(&self, scheme: Scheme) -> Vec<usize> {
        let mut shape = self.weight.shape();
        if let Some(columns) = shape.last_mut() {
            *columns = self.scales.columns() * scheme.group_size();
        }
        shape
    }

    /// The scheme that the shapes have where the layer has `columns` inputs
    /// (`mlx_lm/utils.py`, `infer_quant_config`).
    pub(super) fn inferred(&self, columns: usize) -> Option<Scheme> {
        let (words, groups) = self.row();
        let group_size = columns.checked_div(groups)?;
        let bits = u32::try_from((words * 32).checked_div(columns)?).ok()?;
        let of_mode = |mode: Mode| Scheme::new(mode, Some(bits), Some(group_size)).ok();
        Mode::ALL.into_iter().filter_map(of_mode).find(|scheme| self.fits(*scheme))
    }

    /// The scheme by config.json where it fits, else by the inputs or the shapes where only one does.
    pub(super) fn scheme(&self, named: &Named) -> Option<Scheme> {
        let unlisted = Existing::Mlx(Map::new());
        let existing = if named.existing.packed().is_some() { &named.existing } else { &unlisted };
        existing.scheme(self.path, self.row(), self.scales.dtype, named.columns(self.path)).ok()
    }
}
