//! What a method will need on a machine, from headers alone: memory, time, and the size of what it writes.
//!
//! Memory is summed up by what holds it ([`QuantizeMemory`], [`SensitivityMemory`], [`DwqMemory`]). Time is operations
//! of each part of the work over the machine's rate of matrix products, by a factor for each part that was measured
//! once (SmolLM2-135M and the demo model, two cores with AVX-512): parts differ in how much of them is products. Where a
//! card computes, the rates are its own, also that of searching grids and that of rounding.

mod card;
mod card_memory;
mod choice;
mod curves;
mod machine;
mod peers;
mod recommend;
mod rows;
mod steps;

use serde::Serialize;

pub use self::card::CardRates;
pub use self::card_memory::{CardMemory, card_memory_of_evaluation};
pub use self::choice::Choice;
pub use self::curves::{Expected, expected};
pub use self::machine::Machine;
pub use self::peers::{Peer, mlx_lm};
pub use self::recommend::{Quality, Recommendation, Wish, recommend};
pub use self::rows::Row;
use crate::convert::peak_memory;
use crate::data::{Pick, Window, Windows};
use crate::device::Device;
use crate::dwq::{DwqMemory, dwq_memory, dwq_operations};
use crate::dynamic::{SensitivityMemory, sensitivity_needs, windows_together};
use crate::evaluate::{EvaluationSettings, memory};
use crate::plan::Plan;
use crate::session::{QuantizeMemory, QuantizeSettings, operations, quantize_memory};
use crate::walks::Walk;
use crate::{Error, Model, threads_or_all};

/// Seconds that any command takes before and after its work.
const OVERHEAD: f64 = 0.02;

/// A part of the work.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Part {
    /// What it is.
    pub name: &'static str,
    /// Floating-point operations, or bytes where it reads or writes.
    pub amount: f64,
    /// Wall time.
    pub seconds: f64,
}

/// What a run will need.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Forecast {
    /// Stored bits per weight of the language model.
    pub bits_per_weight: f64,
    /// Of all safetensors files.
    pub bytes: u64,
    /// Largest resident memory, bytes.
    pub peak_memory: u64,
    /// Wall time.
    pub seconds: f64,
    /// Floating-point operations.
    pub operations: f64,
    /// Whether activations wait in files.
    pub low_memory: bool,
    /// In the order in which they run.
    pub parts: Vec<Part>,
    /// Of rounding block by block; of a conversion its peak alone.
    pub memory: QuantizeMemory,
    /// Of dynamic's measurement.
    pub sensitivities_memory: Option<SensitivityMemory>,
    /// Of dwq.
    pub dwq_memory: Option<DwqMemory>,
    /// Of the card, where one computes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub card_memory: Option<CardMemory>,
}

impl Forecast {
    /// What is in the way of the run on a card; nothing if it fits, as far as the driver tells, or computes elsewhere.
    pub fn card_obstacle(&self, device: &Device) -> Option<String> {
        self.card_memory?.obstacle(device.capacity()?)
    }
}

/// Seconds in which all blocks go to the card, where one computes.
fn brought(model: &Model, machine: &Machine) -> Result<f64, Error> {
    let Some(card) = machine.card else { return Ok(0.0) };
    let bytes: u64 = Walk::open(model)?.block_bytes().iter().sum();
    Ok(bytes as f64 / card.upload)
}

/// Windows that stand for so many of that length, where no text is at hand: nothing but their number and length is
/// looked at here.
pub fn nominal_windows(windows: usize, sequence_length: usize) -> Windows {
    let window = |index| Window { source: 0, index, tokens: Vec::new() };
    Windows {
        sequence_length,
        pick: Pick::Sampled { windows, seed: 0 },
        picked: (0..windows).map(window).collect(),
        sources: Vec::new(),
        data_hash: String::new(),
    }
}

/// Foresees a run of `settings` on `model` in a process that holds `resident` bytes. With `measured`, dynamic finds its
/// sensitivities in a file.
///
/// # Errors
/// As [`crate::walks::Walk::open`], if the recipe looks at text.
pub fn forecast(
    model: &Model,
    plan: &Plan,
    windows: &Windows,
    settings: &QuantizeSettings,
    measured: bool,
    machine: &Machine,
    resident: u64,
) -> Result<Forecast, Error> {
    let (input, output) = (plan.input_bytes() as f64, plan.layout.file_bytes());
    let threads = threads_or_all(settings.threads);
    let mut made = Forecast {
        bits_per_weight: plan.language_bits_per_weight(),
        bytes: output,
        peak_memory: 0,
        seconds: 0.0,
        operations: 0.0,
        low_memory: settings.low_memory,
        parts: Vec::new(),
        memory: QuantizeMemory::default(),
        sensitivities_memory: None,
        dwq_memory: None,
        card_memory: card_memory::card_memory(model, plan, windows, settings, measured)?,
    };
    let part =
        |name: &'static str, amount: f64, rate: f64| Part { name, amount, seconds: amount / rate.max(1.0) };
    // Reading and computing overlap where nothing else is to be done.
    if !settings.recipe.needs_calibration() {
        made.peak_memory = peak_memory(plan, threads);
        made.memory.peak = made.peak_memory;
        made.parts = vec![
            part("read and round", input, machine.read.min(machine.rounding)),
            part("write", output as f64, machine.write),
        ];
        if let Some(held_out) = &settings.evaluate {
            let operations = crate::evaluate::operations(model, held_out)?;
            made.operations = operations;
            made.parts.push(part("evaluation", operations, machine.rate("evaluation")));
            let quality = EvaluationSettings { threads, low_memory: settings.low_memory, cache: None };
            made.memory.evaluation = memory(model, Some(model), held_out, &quality, resident)?.peak;
            made.peak_memory = made.peak_memory.max(made.memory.evaluation);
        }
        made.seconds = OVERHEAD + made.parts.iter().map(|part| part.seconds).sum::<f64>();
        return Ok(made);
    }
    let mut parts = vec![part("read", input, machine.read), part("write", output as f64, machine.write)];
    let brought = brought(model, machine)?;
    // With how often all blocks go to a card.
    let mut compute = |name: &'static str, operations: f64, passes: f64| {
        made.operations += operations;
        let own = part(name, operations, machine.rate(name));
        parts.push(Part { seconds: own.seconds + passes * brought, ..own });
    };
    if settings.recipe.allocates() && !measured {
        let (memory, measure, judge) =
            sensitivity_needs(model, windows, settings.threads, settings.low_memory, resident)?;
        made.sensitivities_memory = Some(memory);
        let walk = Walk::open(model)?;
        let together = windows_together(&walk, windows, threads, settings.low_memory).max(1);
        compute("sensitivities", measure, 2.0 * windows.picked.len().div_ceil(together) as f64);
        compute("candidates", judge, 0.0);
    }
    for (name, operations) in operations(model, windows, settings)? {
        compute(name, operations, if name == "forward" { 1.0 } else { 0.0 });
    }
    if let (true, Some((training, held_out))) = (settings.recipe.trains(), &settings.lessons) {
        let memory = dwq_memory(model, plan, training, &settings.dwq, settings.threads, resident)?;
        made.dwq_memory = Some(memory);
        let (teacher, train, look) = dwq_operations(model, training, held_out, &settings.dwq)?;
        compute("teacher", teacher, 1.0);
        compute("dwq", train, 2.0 * settings.dwq.iterations as f64);
        compute("dwq: looks", look, 2.0);
    }
    if let Some(held_out) = &settings.evaluate {
        compute("evaluation", crate::evaluate::operations(model, held_out)?, 2.0);
    }
    made.memory = quantize_memory(model, windows, settings, resident)?;
    made.peak_memory = made
        .memory
        .peak
        .max(made.sensitivities_memory.map_or(0, |memory| memory.peak))
        .max(made.dwq_memory.map_or(0, |memory| memory.peak));
    made.parts = parts;
    made.seconds = OVERHEAD + made.parts.iter().map(|part| part.seconds).sum::<f64>();
    Ok(made)
}
