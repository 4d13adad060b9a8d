//! What plans say of a card's memory.

use mlx_quant::forecast::CardMemory;
use mlx_quant::recipes::Device;

use crate::printer::bytes;
use crate::refusal::Refusal;

/// Refuses what a card has no room for.
pub(crate) fn card_fits(obstacle: Option<String>) -> Result<(), Refusal> {
    match obstacle {
        None => Ok(()),
        Some(why) => Err(Refusal(format!(
            "{why}; hint: fewer --n-samples or --windows, a shorter --sequence-length, --low-memory, or --device cpu"
        ))),
    }
}

/// A plan's lines about it.
pub(crate) fn card_lines(needs: Option<CardMemory>, device: &Device) -> Vec<(&'static str, String)> {
    let (Some(needs), Some(capacity)) = (needs, device.capacity()) else { return Vec::new() };
    let has = match capacity.memory {
        Some(memory) => format!("of {}", bytes(memory)),
        None => format!("how much it has is not told; its largest tensor has {}", bytes(capacity.largest)),
    };
    vec![
        ("card: weights", bytes(needs.weights)),
        ("card: activations", bytes(needs.activations)),
        ("card: hessians", bytes(needs.hessians)),
        ("card: scratch", bytes(needs.scratch)),
        ("card: peak memory", format!("up to {}, {has} ({})", bytes(needs.peak), needs.part)),
    ]
}

/// The most that a card held so far, bytes.
pub(crate) fn card_peak(device: &Device) -> Option<u64> {
    Some(device.memory()?.peak)
}

/// The same as the end of a sentence.
pub(crate) fn card_used(device: &Device) -> String {
    card_peak(device).map_or_else(String::new, |peak| format!(", {} on the card", bytes(peak)))
}
