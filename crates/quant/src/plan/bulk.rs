//! What of a quantized model is not quantized.

use std::collections::HashMap;

use mlx_format::FloatType;
use mlx_format::checkpoint::TensorSpec;
use mlx_quant_model::without_numbers;

use super::{Item, Job};

/// Says so if a good part of a quantized language model's bytes is not quantized, and what they are.
pub(super) fn unquantized((items, specs): (&[Item], &[TensorSpec]), parameters: u64) -> Option<String> {
    const MOST: f64 = 0.2;
    const SHOWN: usize = 3;
    if !items.iter().any(|item| matches!(item.job, Job::Quantize { .. })) {
        return None;
    }
    let total: u64 = specs.iter().map(TensorSpec::bytes).sum();
    let mut kinds: HashMap<String, u64> = HashMap::new();
    for item in items.iter().filter(|item| matches!(item.job, Job::Copy { .. })) {
        let spec = &specs[item.first_output];
        // What the source has packed is copied, too.
        if FloatType::from_dtype(spec.dtype).is_some()
            && !item.name.ends_with(".scales")
            && !item.name.ends_with(".biases")
        {
            *kinds.entry(without_numbers(&item.name)).or_default() += spec.bytes();
        }
    }
    let plain: u64 = kinds.values().sum();
    if plain as f64 <= MOST * total as f64 {
        return None;
    }
    let mut kinds: Vec<(String, u64)> = kinds.into_iter().collect();
    kinds.sort_by(|left, right| right.1.cmp(&left.1).then_with(|| left.0.cmp(&right.0)));
    let named: Vec<String> = kinds
        .iter()
        .take(SHOWN)
        .map(|(name, bytes)| format!("{name}: {}", crate::numbers::bytes(*bytes)))
        .collect();
    let more = if kinds.len() > SHOWN { ", ..." } else { "" };
    Some(format!(
        "{:.0} % of the bytes stay unquantized, which makes {:.2} bits per weight ({}{more})",
        100.0 * plain as f64 / total as f64,
        crate::parameters::bits_per_weight(total, parameters),
        named.join(", ")
    ))
}
