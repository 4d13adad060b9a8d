//! What config.json asks of the tensors beyond what the decoder's description fixes: inner widths, kernels, biases.
//!
//! The forward pass takes these as they come. mlx_lm does not: it makes its model from config.json and stops at any
//! other shape.

use std::collections::BTreeMap;

use crate::arch::Language;
use crate::decoder::{Decoder, ExpectedTensor};
use crate::headers;

/// Makes `expected` as strict as config.json allows.
pub(crate) fn settle(
    expected: &mut BTreeMap<String, ExpectedTensor>,
    decoder: Option<&Decoder>,
    language: &Language<'_>,
) {
    settle_axes(expected, decoder, language);
    settle_biases(expected, language);
}

fn settle_axes(
    expected: &mut BTreeMap<String, ExpectedTensor>,
    decoder: Option<&Decoder>,
    language: &Language<'_>,
) {
    let (Some(family), config) = (language.family, &*language.config) else { return };
    let decoder = decoder.filter(|_| family.has_even_widths(config));
    let widths = decoder.and_then(|decoder| headers::widths(family, config, decoder).ok());
    for (path, axes) in widths.into_iter().flatten() {
        let Some(tensor) = expected.get_mut(&format!("{path}.weight")) else { continue };
        for (axis, length) in tensor.shape.iter_mut().zip(axes) {
            *axis = length.or(*axis);
        }
    }
    for (name, tensor) in expected.iter_mut().filter(|(_, tensor)| tensor.shape.contains(&None)) {
        if let Ok(length) = family.length(config, name.strip_suffix(".weight").unwrap_or(name)) {
            tensor.shape.iter_mut().for_each(|axis| *axis = axis.or(Some(length)));
        }
    }
}

/// Makes biases that a model type always or never has required, or unread.
fn settle_biases(expected: &mut BTreeMap<String, ExpectedTensor>, language: &Language<'_>) {
    let (Some(family), config) = (language.family, &*language.config) else { return };
    let paths: Vec<String> =
        expected.keys().filter_map(|name| name.strip_suffix(".bias")).map(str::to_owned).collect();
    for path in paths {
        let norm = expected.get(&format!("{path}.weight")).is_some_and(|weight| weight.shape.len() == 1);
        let name = format!("{path}.bias");
        match family.has_bias(config, &path, norm) {
            Some(false) => {
                expected.remove(&name);
            }
            Some(true) => {
                expected.entry(name).and_modify(|bias| bias.optional = false);
            }
            None => {}
        }
    }
}
