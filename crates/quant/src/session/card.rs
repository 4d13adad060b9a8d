//! The model card of a calibrated run.

use std::fmt::Write as _;

use super::{Computed, QuantizeSettings, Quantized};
use crate::Model;
use crate::card::{card, quality};
use crate::data::{Pick, Windows};
use crate::plan::Plan;

/// The card of a calibrated run: recipe, calibration data and seed, and the quality that was measured.
pub(super) fn calibrated_card(
    plan: &Plan,
    source: Option<&Model>,
    windows: &Windows,
    settings: &QuantizeSettings,
    made: &Quantized,
) -> String {
    let mut rows = format!("| recipe | {} |\n", settings.recipe);
    let mut row = |name: &str, value: String| {
        let _ = writeln!(rows, "| {name} | {value} |");
    };
    row("calibration", format!("{} windows of {} tokens", windows.picked.len(), windows.sequence_length));
    for source in &windows.sources {
        let part = source.part_read().map_or_else(String::new, |part| format!(" ({part})"));
        row("calibration file", format!("{}, sha256 `{}`{part}", source.name, source.sha256));
        if let Some(rows) = source.left_out() {
            row("calibration rows", rows.replace('|', "\\|"));
        }
    }
    row("calibration data hash", format!("`{}`", windows.data_hash));
    if let Pick::Sampled { seed, .. } = windows.pick {
        row("seed", seed.to_string());
    }
    row("kernels", mlx_format::simd_name().to_owned());
    if made.engines.len() > 1 || source.is_some_and(|source| source.device.is_card()) {
        row("engine", Computed::list(&made.engines).replace('|', "\\|"));
    }
    for (name, value) in made.evaluation.iter().flat_map(quality) {
        row(name, value);
    }
    if let Some(distilled) = &made.distilled {
        let norms = match distilled.norms {
            norms if norms == 0 || distilled.best_step == 0 => String::new(),
            norms => format!(", weights of {norms} norms trained, too"),
        };
        row(
            "dwq",
            format!(
                "{} steps of {} windows, step {} kept, KL {:.5} before and {:.5} after on its held-out windows, rate {:.3e}, temperature {}, seed {}{norms}",
                distilled.steps,
                settings.dwq.batch_size,
                distilled.best_step,
                distilled.start_kl,
                distilled.best_kl,
                distilled.rate,
                settings.dwq.temperature,
                settings.dwq.seed
            ),
        );
    }
    if settings.recipe.learns() {
        let learn = &settings.learn;
        row(
            "learn",
            format!("{} steps of {} windows a block, seed {}", learn.steps, learn.batch, learn.seed),
        );
    }
    let settings = &settings.method;
    row(
        "settings",
        format!(
            "n_grid {}, block size {}, damping {}, sweeps {}, act order {}",
            settings.n_grid, settings.block_size, settings.damping, settings.sweeps, settings.act_order
        ),
    );
    card(plan, source, "calibrated", &format!("| | |\n|---|---|\n{rows}\n"))
}
