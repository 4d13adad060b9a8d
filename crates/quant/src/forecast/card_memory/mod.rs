//! How much of a card's memory a run will need, from headers alone.
//!
//! A card holds the weights of a block and of the next one in float32, what windows leave between and within blocks, and
//! what one batch of windows takes on its way; a calibrating walk also Gram matrices, factors and the readers that are rounded. Every walk
//! is summed up by itself, and the largest sum counts. Buffers are up to an eighth larger than what lies in them
//! (`engine/src/gpu/pool.rs`), which is part of each sum.

mod calibrating;
mod on_card;

pub use self::on_card::CardMemory;
use self::on_card::OnCard;
use crate::data::Windows;
use crate::dynamic::windows_together;
use crate::evaluate::EvaluationSettings;
use crate::plan::Plan;
use crate::reduce::CHUNK;
use crate::session::QuantizeSettings;
use crate::walks::{Residency, Walk};
use crate::{Error, Model, dwq, threads_or_all};

/// What an evaluation holds on the card that `model` computes on; nothing where that is the processor.
///
/// # Errors
/// As [`Walk::open`].
pub fn card_memory_of_evaluation(
    model: &Model,
    reference: Option<&Model>,
    windows: &Windows,
    settings: &EvaluationSettings,
) -> Result<Option<CardMemory>, Error> {
    if !model.device.is_card() {
        return Ok(None);
    }
    let (tokens, count) = (windows.sequence_length as u64, windows.picked.len() as u64);
    let (mut left, mut most, mut tiles) = (0, CardMemory::default(), 0);
    for model in reference.into_iter().chain([model]) {
        let walk = Walk::open(model)?;
        let stays = walk.residency(settings.low_memory, windows) == Residency::Resident;
        let own = OnCard { walk: &walk, tokens };
        most = most.max(own.forward(count, left, stays, "evaluation"));
        let blocks = if stays { walk.block_bytes().iter().sum() } else { 0 };
        left += own.finals(count) + blocks;
        let (tile, logits) = own.head(1, 4);
        tiles += tile;
        let heads = CardMemory {
            part: "evaluation",
            weights: tiles,
            activations: left,
            scratch: logits,
            ..CardMemory::default()
        };
        most = most.max(heads.summed());
    }
    Ok(Some(most))
}

/// What a run that writes `plan`'s output holds on the card that `model` computes on; nothing where that is the processor.
/// With `measured`, dynamic finds its sensitivities in a file.
///
/// # Errors
/// As [`Walk::open`].
pub(super) fn card_memory(
    model: &Model,
    plan: &Plan,
    windows: &Windows,
    settings: &QuantizeSettings,
    measured: bool,
) -> Result<Option<CardMemory>, Error> {
    if !model.device.is_card() {
        return Ok(None);
    }
    let threads = threads_or_all(settings.threads);
    let walk = Walk::open(model)?;
    let own = OnCard { walk: &walk, tokens: windows.sequence_length as u64 };
    let count = windows.picked.len() as u64;
    let mut most = CardMemory::default();
    if settings.recipe.walks() {
        // Of the largest share of windows, where several cards have them.
        let members = 1 + model.helpers.len() as u64;
        let share = count.div_ceil(CHUNK as u64).div_ceil(members) * CHUNK as u64;
        most = most.max(own.calibrating(share.min(count), settings));
    }
    if settings.recipe.learns() {
        most = most.max(own.learning(count, settings.learn.batch as u64));
        let measured = crate::learn::measured(windows.picked.len());
        let together = walk.trail(windows.sequence_length, threads, settings.low_memory).min(measured);
        let mut costs = own.backward(together as u64, 0, 1, "learning");
        costs.peak += 2 * own.states(count);
        most = most.max(costs);
    }
    if settings.recipe.allocates() && !measured {
        let together = windows_together(&walk, windows, threads, settings.low_memory) as u64;
        most = most.max(own.backward(together, 0, 1, "sensitivities"));
    }
    if let (true, Some((training, held_out))) = (settings.recipe.trains(), &settings.lessons) {
        let own = OnCard { walk: &walk, tokens: training.sequence_length as u64 };
        let wave = (settings.dwq.batch_size as u64).max(threads as u64);
        let step = (settings.dwq.batch_size as u64).min(training.picked.len() as u64);
        // What stays there from the first step to the last.
        // (The teacher's head has the student's shape.)
        let head = if walk.keeps_head() { walk.head_bytes() } else { 0 };
        let (codes, grids) = (own.held(model) + head, dwq::trained_bytes(&walk, plan));
        let mut steps = own.backward(step, own.trained(), 4, "dwq");
        steps.peak += codes + grids;
        most = most.max(steps);
        let all = (training.picked.len() + held_out.picked.len()) as u64;
        let mut looks = own.forward(wave.min(all), 0, false, "dwq");
        looks.peak += codes + grids;
        most = most.max(looks);
    }
    if let Some(held_out) = &settings.evaluate {
        let quality = EvaluationSettings { threads, low_memory: settings.low_memory, cache: None };
        let measuring = card_memory_of_evaluation(model, Some(model), held_out, &quality)?;
        most = most.max(measuring.unwrap_or_default());
    }
    Ok(Some(most).filter(|most| most.peak > 0))
}

#[cfg(test)]
mod tests;
