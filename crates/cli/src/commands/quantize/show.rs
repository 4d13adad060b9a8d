//! What the quantizing commands show: a plan, or what was made.

use anyhow::Result;
use mlx_quant::dwq::Distilled;
use mlx_quant::forecast::Forecast;
use mlx_quant::recipes::Device;
use mlx_quant::session::{Computed, Quantized};
use mlx_quant::{Plan, Windows};
use mlx_quant_report as report;
use serde_json::json;

use super::request::Request;
use crate::commands::card::{card_lines, card_peak, card_used};
use crate::commands::carry::{bits, layers, merge};
use crate::commands::ending::Ending;
use crate::memory::resident_peak;
use crate::printer::{Printer, bytes};

/// Of the JSON of a run. 2: an evaluation has the ratio of the perplexities and the difference of their logarithms.
const SCHEMA: u32 = 2;

/// The plan, and nothing written.
pub(super) fn dry_run(
    request: &Request<'_>,
    plan: &Plan,
    windows: &Windows,
    (needs, device): (Forecast, &Device),
    printer: Printer,
) -> Result<()> {
    let (memory, operations) = (needs.memory, needs.operations);
    if printer.is_json() {
        let mut document = json!({
            "recipe": request.recipe.to_string(),
            "calibration": windows.report(),
            "memory": memory,
            "dwq_memory": needs.dwq_memory,
            "sensitivities_memory": needs.sensitivities_memory,
            "card_memory": needs.card_memory,
            "peak_memory_bytes": needs.peak_memory,
            "operations": operations,
            "seconds_estimate": needs.seconds,
            "parts": needs.parts,
        });
        merge(&mut document, &plan.report());
        printer.data(&serde_json::to_string_pretty(&document)?);
        return Ok(());
    }
    layers(&plan.report(), printer);
    let mut lines: Vec<(&str, String)> = Vec::new();
    let mut line = |name, value| lines.push((name, value));
    line("recipe", request.recipe.to_string());
    line("calibration", format!("{} windows of {} tokens", windows.picked.len(), windows.sequence_length));
    for source in &windows.sources {
        line("", format!("{}: {} of {} windows", source.name, source.windows_picked, source.windows_total));
        for note in [source.part_read(), source.left_out()].into_iter().flatten() {
            line("", note);
        }
    }
    line("process", bytes(memory.fixed));
    line("block", bytes(memory.block));
    line("activations", bytes(memory.activations));
    line("hessians", bytes(memory.hessians));
    line("weights", bytes(memory.weights));
    if memory.learning > 0 {
        line("learning", bytes(memory.learning));
    }
    line("threads", bytes(memory.scratch));
    line("evaluation", bytes(memory.evaluation));
    if let Some(memory) = needs.sensitivities_memory {
        line("sensitivities", bytes(memory.peak));
    }
    if let Some(dwq) = needs.dwq_memory {
        line("dwq: grids", bytes(dwq.grids));
        line("dwq: block", bytes(dwq.block));
        line("dwq: trail", bytes(dwq.trail));
        line("dwq: threads", bytes(dwq.graph));
    }
    line("peak memory", format!("about {}", bytes(needs.peak_memory)));
    lines.extend(card_lines(needs.card_memory, device));
    let time = format!("about {} ({:.1} TFLOP)", report::duration(needs.seconds), operations / 1e12);
    lines.push(("time", time));
    printer.data(&report::facts(&lines, printer.width()));
    Ok(())
}

pub(super) fn show(
    request: &Request<'_>,
    plan: &Plan,
    windows: &Windows,
    made: &Quantized,
    (needs, device): (Forecast, &Device),
    printer: Printer,
) -> Result<()> {
    let peak = resident_peak();
    for (path, experts) in &made.experts {
        printer.detail(&format!("{path}: tokens by expert {:?}", experts.tokens));
        if !experts.fell_back.is_empty() {
            printer.warn(&format!(
                "{path}: experts {:?} saw too few tokens for a Hessian, their scales are searched instead; more --n-samples help",
                experts.fell_back
            ));
        }
    }
    if printer.is_json() {
        let mut document = json!({
            "schema_version": SCHEMA,
            "mlx_path": request.common.target.mlx_path,
            "recipe": request.recipe.to_string(),
            "calibration": windows.report(),
            "peak_memory_bytes": peak,
            "predicted_memory_bytes": needs.peak_memory,
            "card_peak_memory_bytes": card_peak(device),
            "card_predicted_memory_bytes": needs.card_memory.map(|card| card.peak),
            "operations": needs.operations,
            "kernels": mlx_format::simd_name(),
            "made": made,
        });
        merge(&mut document, &plan.report());
        printer.data(&serde_json::to_string_pretty(&document)?);
    }
    if made.engines.len() > 1 {
        printer.say(&format!("engines  {}", Computed::list(&made.engines)));
    }
    if made.foldable > 0 {
        let what = if request.recipe.folds() { "awq: scales" } else { "nvfp4: ranges" };
        printer.detail(&format!("{what} folded at {} of {} sites", made.folded, made.foldable));
    }
    if let Some(distilled) = &made.distilled {
        distillation(distilled, printer);
    }
    let evaluation =
        made.evaluation.as_ref().filter(|_| request.dynamic.is_some_and(|flags| flags.report_ppl));
    if let Some(evaluation) = evaluation {
        let total = &evaluation.total;
        printer.say(&format!("perplexity on held-out text {:.4}", total.perplexity));
    }
    let quality = made.evaluation.as_ref().and_then(|evaluation| evaluation.total.against.as_ref());
    let what = format!(
        "{}, {}, {}; took {}{}",
        request.recipe,
        bits(plan),
        bytes(plan.layout.file_bytes()),
        report::duration(made.quantize_seconds),
        peak.map_or_else(String::new, |peak| format!(", {} of memory", bytes(peak))) + &card_used(device),
    );
    let path = &request.common.target.mlx_path;
    Ending { path, what, quality, original: request.asked() }.say(printer);
    Ok(())
}

/// How training went.
fn distillation(made: &Distilled, printer: Printer) {
    if let Some(why) = &made.stopped {
        printer.warn(&format!("dwq stopped early: {why}; the best step is kept"));
    }
    let kept = match made.best_step {
        0 => "no step was better than the start, which is kept".to_owned(),
        step => format!("step {step} is kept"),
    };
    let norms = if made.norms > 0 && made.best_step > 0 {
        format!("; {} norms were trained, too", made.norms)
    } else {
        String::new()
    };
    printer.say(&format!(
        "dwq: KL {:.5} -> {:.5} on held-out windows in {} steps, {kept}{norms}",
        made.start_kl, made.best_kl, made.steps
    ));
}
