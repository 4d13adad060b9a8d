//! The model card, README.md of the output.

use std::fmt::Write as _;

use mlx_format::Mode;

use crate::data::Windows;
use crate::plan::{Job, Plan};
use crate::session::{QuantizeSettings, Quantized};

/// Front matter as mlx-lm writes it for a local source (`mlx_lm/utils.py`, `create_model_card`), and below it
/// what was done, so that a model can be told apart later. `source` names the source.
pub fn model_card(plan: &Plan, source: &str) -> String {
    let searched = plan.settings.search
        && plan
            .items
            .iter()
            .any(|item| matches!(item.job, Job::Quantize { scheme, .. } if scheme.mode() == Mode::Affine));
    let how = if searched { "round to nearest, searched scales and biases" } else { "round to nearest" };
    card(plan, source, how, "")
}

/// The card of a calibrated run: recipe, calibration data and seed, and the quality that was measured.
pub(crate) fn calibrated_card(
    plan: &Plan,
    source: &str,
    windows: &Windows,
    settings: &QuantizeSettings,
    made: &Quantized,
) -> String {
    let mut rows = format!("| recipe | {} |\n", settings.recipe);
    let error = |error: Option<f64>| error.map_or_else(String::new, |error| format!(" ± {error:.5}"));
    let mut row = |name: &str, value: String| {
        let _ = writeln!(rows, "| {name} | {value} |");
    };
    row("calibration", format!("{} windows of {} tokens", windows.picked.len(), windows.sequence_length));
    for source in &windows.sources {
        row("calibration file", format!("{}, sha256 `{}`", source.name, source.sha256));
    }
    row("calibration data hash", format!("`{}`", windows.data_hash));
    if let crate::Pick::Sampled { seed, .. } = windows.pick {
        row("seed", seed.to_string());
    }
    row("kernels", mlx_format::simd_name().to_owned());
    if let Some(evaluation) = &made.evaluation {
        let total = &evaluation.total;
        row(
            "perplexity on held-out text",
            format!("{:.4}{}", total.perplexity, error(total.perplexity_stderr)),
        );
        if let Some(against) = &total.against {
            row(
                "KL(source, this) in nats a token",
                format!(
                    "{:.5}{} ({} windows of {} tokens)",
                    against.kl_mean,
                    error(against.kl_stderr),
                    total.windows,
                    evaluation.sequence_length
                ),
            );
            row("top-1 agreement with the source", format!("{:.4}", against.top1));
        }
    }
    if let Some(distilled) = &made.distilled {
        row(
            "dwq",
            format!(
                "{} steps of {} windows, step {} kept, KL {:.5} before and {:.5} after on its held-out windows, rate {:.3e}, temperature {}, seed {}",
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

fn card(plan: &Plan, source: &str, how: &str, table: &str) -> String {
    let mut schemes = String::new();
    for (scheme, count) in plan.report().schemes {
        let _ = writeln!(schemes, "| {scheme} | {count} |");
    }
    format!(
        "---\nlanguage: en\nlibrary_name: mlx\npipeline_tag: text-generation\ntags:\n- mlx\n---\n\n\
         Converted from `{source}` with mlx-quant {version} ({how}), {bits:.3} bits per weight.\n\n\
         {table}| stored as | tensors |\n|---|---|\n{schemes}\n\
         ```\nmlx_lm.generate --model <this directory> --prompt \"Hello\"\n```\n",
        version = env!("CARGO_PKG_VERSION"),
        bits = plan.bits_per_weight(),
    )
}
