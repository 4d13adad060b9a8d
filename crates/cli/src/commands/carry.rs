//! Plans and conversions, whichever command asks for them: shown, carried out, told.

use std::path::Path;
use std::time::Instant;

use anyhow::Result;
use mlx_format::checkpoint::Destination;
use mlx_format::{FloatType, PackedMut};
use mlx_quant::convert::Converted;
use mlx_quant::plan::{Job, PlanReport};
use mlx_quant::{Model, Plan, Settings};
use mlx_quant_report as report;
use serde_json::json;

use super::ending::Ending;
use super::source::Asked;
use crate::args::Convert;
use crate::memory::resident_peak;
use crate::printer::{Printer, bytes};
use crate::screen::Screen;

/// Plans, with a word on what a person should know.
pub(super) fn plan(model: &Model, settings: Settings, printer: Printer) -> Result<Plan> {
    let plan = Plan::new(&model.checkpoint, &model.config, settings).map_err(mlx_quant::Error::from)?;
    for note in &plan.notes {
        printer.warn(note);
    }
    Ok(plan)
}

pub(super) fn threads(args: &Convert) -> usize {
    args.machine.threads.map_or(0, |threads| threads as usize)
}

/// Converts, or shows what that would do.
pub(super) fn carry_out(
    (model, asked): (&Model, Asked<'_>),
    plan: &Plan,
    target: Destination<'_>,
    only_plan: bool,
    threads: usize,
    printer: Printer,
) -> Result<()> {
    if only_plan {
        return dry_run(plan, threads, printer);
    }
    printer.detail(&format!("kernels: {}", mlx_format::simd_name()));
    let screen = Screen::new(printer);
    let done = mlx_quant::convert(model, plan, target, threads, &screen);
    screen.clear();
    show(&done?, plan, (target.path, asked), printer)
}

/// What a conversion did.
pub(super) fn show(
    done: &Converted,
    plan: &Plan,
    (target, original): (&Path, Asked<'_>),
    printer: Printer,
) -> Result<()> {
    let peak = resident_peak();
    if printer.is_json() {
        let mut document = json!({
            "mlx_path": target,
            "seconds": done.seconds,
            "peak_memory_bytes": peak,
            "kernels": mlx_format::simd_name(),
        });
        merge(&mut document, &plan.report());
        printer.data(&serde_json::to_string_pretty(&document)?);
    }
    let what = format!(
        "{}, {} from {}; took {} ({}/s){}",
        bits(plan),
        bytes(done.output_bytes),
        bytes(plan.input_bytes()),
        report::duration(done.seconds),
        bytes((done.input_bytes as f64 / done.seconds.max(1e-9)) as u64),
        peak.map_or_else(String::new, |peak| format!(", {} of memory", bytes(peak))),
    );
    Ending { path: target, what, quality: None, original }.say(printer);
    Ok(())
}

/// Bits per weight, and what sees and hears beside them.
pub(super) fn bits(plan: &Plan) -> String {
    let beside = Some(plan.towers.bytes).filter(|size| *size > 0);
    let beside = beside.map_or_else(String::new, |size| {
        format!(" ({:.3} without {} of vision and audio)", plan.language_bits_per_weight(), bytes(size))
    });
    format!("{:.3} bits per weight{beside}", plan.bits_per_weight())
}

/// The plan, and nothing written.
pub(super) fn dry_run(plan: &Plan, threads: usize, printer: Printer) -> Result<()> {
    let planned = plan.report();
    let threads =
        if threads == 0 { std::thread::available_parallelism().map_or(1, Into::into) } else { threads };
    let memory = mlx_quant::convert::peak_memory(plan, threads);
    let rate = kernel_rate(plan) * threads as f64;
    let seconds = planned.input_bytes as f64 / rate;
    if printer.is_json() {
        let mut document = json!({"peak_memory_bytes": memory, "seconds_estimate": seconds});
        merge(&mut document, &planned);
        printer.data(&serde_json::to_string_pretty(&document)?);
        return Ok(());
    }
    layers(&planned, printer);
    let lines = [
        ("peak memory", format!("about {} on {threads} thread(s)", bytes(memory))),
        (
            "time",
            format!(
                "about {}, if the disk keeps up with {}/s",
                report::duration(seconds),
                bytes(rate as u64)
            ),
        ),
    ];
    printer.data(&report::facts(&lines, printer.width()));
    Ok(())
}

/// Layers, and sums.
pub(super) fn layers(plan: &PlanReport, printer: Printer) {
    printer.data(&report::plan(plan, printer.is_verbose(), printer.width()));
}

/// Adds the fields of a report to a JSON object.
pub(super) fn merge(document: &mut serde_json::Value, report: &PlanReport) {
    if let (Some(object), Ok(serde_json::Value::Object(fields))) =
        (document.as_object_mut(), serde_json::to_value(report))
    {
        object.extend(fields);
    }
}

/// Input bytes per second that one thread of this machine quantizes with the plan's first scheme, or copies
/// where nothing is quantized; measured now, in a few milliseconds.
fn kernel_rate(plan: &Plan) -> f64 {
    const ROWS: usize = 256;
    let quantized = plan.items.iter().find_map(|item| match &item.job {
        Job::Quantize { float, scheme, .. } => Some((*float, *scheme)),
        _ => None,
    });
    let (float, scheme) = quantized.unwrap_or((FloatType::Bf16, mlx_format::fp::NVFP4));
    let columns = 4096;
    let values: Vec<f32> = (0..ROWS * columns).map(|i| (i as f32 * 0.7).sin() * 0.02).collect();
    let mut input = vec![0u8; values.len() * float.size()];
    float.narrow(&values, &mut input);
    let mut weight = vec![0u8; ROWS * scheme.words(columns) * 4];
    let mut scales = vec![0u8; ROWS * scheme.scale_bytes(columns, float)];
    let mut biases = vec![0u8; if scheme.has_biases() { scales.len() } else { 0 }];
    let mut copy = vec![0u8; input.len()];
    let best = (0..5).map(|_| {
        let start = Instant::now();
        if quantized.is_some() {
            let out = PackedMut { weight: &mut weight, scales: &mut scales, biases: &mut biases };
            // The values are finite.
            let _ = mlx_format::quantize(scheme, float, columns, &input, out, true);
        } else {
            copy.copy_from_slice(std::hint::black_box(&input));
        }
        start.elapsed().as_secs_f64()
    });
    input.len() as f64 / best.fold(f64::INFINITY, f64::min).max(1e-9)
}
