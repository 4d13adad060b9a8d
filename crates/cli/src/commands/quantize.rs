//! `mlx-quant quantize`, and `awq` and `gptq`, which are two of its recipes.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use mlx_format::Scheme;
use mlx_format::checkpoint::Writer;
use mlx_quant::{
    DataSource, DynamicPlan, Method, MethodSettings, Model, Pick, Plan, QuantizeMemory, QuantizeSettings, Quantized,
    Recipe, SensitivitySettings, Settings, Windows, quantize_memory,
};
use serde_json::json;

use super::convert::{merge, resident_peak};
use super::dynamic::{self, Allocator};
use super::eval::{USUAL_RESIDENT, free_memory, resident_now};
use crate::Refusal;
use crate::args::{Awq, AwqFlags, Calibrated, DynamicFlags, DynamicQuant, Gptq, GptqFlags, Quantize};
use crate::commands::source;
use crate::printer::{Printer, bytes};
use crate::screen::Screen;

/// One of the three commands.
pub(crate) struct Request<'a> {
    recipe: Recipe,
    common: &'a Calibrated,
    dynamic: Option<&'a DynamicFlags>,
    awq: Option<&'a AwqFlags>,
    gptq: Option<&'a GptqFlags>,
}

impl<'a> Request<'a> {
    fn of(method: Method, common: &'a Calibrated) -> Self {
        Self { recipe: Recipe::of(method), common, dynamic: None, awq: None, gptq: None }
    }
}

impl<'a> From<&'a Awq> for Request<'a> {
    fn from(args: &'a Awq) -> Self {
        Self { awq: Some(&args.awq), ..Self::of(Method::Awq, &args.common) }
    }
}

impl<'a> From<&'a Gptq> for Request<'a> {
    fn from(args: &'a Gptq) -> Self {
        Self { gptq: Some(&args.gptq), ..Self::of(Method::Gptq, &args.common) }
    }
}

impl<'a> From<&'a DynamicQuant> for Request<'a> {
    fn from(args: &'a DynamicQuant) -> Self {
        Self { dynamic: Some(&args.dynamic), ..Self::of(Method::Dynamic, &args.common) }
    }
}

impl<'a> From<&'a Quantize> for Request<'a> {
    fn from(args: &'a Quantize) -> Self {
        Self {
            recipe: args.recipe.clone(),
            common: &args.common,
            dynamic: Some(&args.dynamic),
            awq: Some(&args.awq),
            gptq: Some(&args.gptq),
        }
    }
}

impl Request<'_> {
    fn method(&self) -> MethodSettings {
        let mut settings = MethodSettings::default();
        if let Some(awq) = self.awq {
            settings.n_grid = awq.n_grid as usize;
        }
        if let Some(gptq) = self.gptq {
            settings.block_size = gptq.block_size as usize;
            settings.damping = gptq.damping;
            settings.sweeps = gptq.sweeps;
            settings.act_order = gptq.act_order;
        }
        settings
    }

    /// The scheme of embeddings and head, where it is not that of the rest.
    fn embedding(&self, base: Scheme) -> Result<Scheme, Refusal> {
        let gptq = self.gptq.filter(|_| self.recipe.rounding() == Method::Gptq);
        let (awq_bits, awq_group) =
            self.awq.map_or((None, None), |awq| (awq.embed_bits, awq.embed_group_size));
        let (gptq_bits, gptq_group) = gptq.map_or((None, None), |gptq| {
            (Some(gptq.fallback_bits.unwrap_or(6)), Some(gptq.fallback_group_size.unwrap_or(64)))
        });
        let bits = awq_bits.or(gptq_bits).unwrap_or(base.bits());
        let group_size = awq_group.or(gptq_group).unwrap_or(base.group_size());
        affine(bits, group_size)
    }
}

fn affine(bits: u32, group_size: usize) -> Result<Scheme, Refusal> {
    // MLX has one bit since 0.32.4; older versions do not load it.
    let refused = |error: mlx_format::SchemeError| Refusal(error.to_string());
    if bits == 1 {
        return Err(refused(mlx_format::SchemeError::Bits(1)));
    }
    Scheme::affine(bits, group_size).map_err(refused)
}

/// Runs the command.
pub(crate) fn run(request: &Request<'_>, printer: Printer) -> Result<()> {
    let args = request.common;
    let base = affine(args.q_bits, args.q_group_size)?;
    let embedding = request.embedding(base)?;
    source::refuse_upload(&args.hub, printer)?;
    if let Some(gptq) = request.gptq
        && !(gptq.damping > 0.0 && gptq.damping <= 1.0)
    {
        return Err(Refusal(format!(
            "--damping {}: hint: give a number above 0 and at most 1, such as 0.01",
            gptq.damping
        ))
        .into());
    }
    let dynamic = match request.dynamic.filter(|_| request.recipe.allocates()) {
        Some(flags) => Some(dynamic::settings(flags)?),
        None => None,
    };
    let overrides = source::overrides(args.target.recipe_file.as_deref(), base)?;
    if !args.target.dry_run {
        Writer::check_target(&args.target.mlx_path).map_err(mlx_quant::Error::from)?;
    }
    let model = source::open(args.target.model.as_deref(), printer)?;
    let calibrated = request.recipe.needs_calibration();
    let schemes = if embedding == base { BTreeMap::new() } else { tables(&model, embedding)? };
    let settings = Settings {
        quantize: Some(base),
        overrides,
        schemes,
        search: request.recipe.rounding() == Method::Search && !calibrated,
        dtype: args.target.dtype.map(Into::into),
        ..Settings::default()
    };
    let plan = Plan::new(&model.checkpoint, &model.config, settings).map_err(mlx_quant::Error::from)?;
    for note in &plan.notes {
        printer.warn(note);
    }
    let threads = args.machine.threads.map_or(0, |threads| threads as usize);
    if !calibrated {
        return super::convert::carry_out(
            &model,
            &plan,
            &args.target.mlx_path,
            args.target.dry_run,
            threads,
            printer,
        );
    }
    let data =
        args.data.as_ref().map_or(DataSource::BuiltinCalibration, |path| DataSource::Path(path.clone()));
    let windows = {
        let pick = Pick::Sampled { windows: args.n_samples, seed: args.machine.seed };
        read(&model, &data, args.sequence_length, pick)?
    };
    if windows.picked.len() < args.n_samples {
        let (found, asked) = (windows.picked.len(), args.n_samples);
        printer.warn(&format!(
            "the calibration text holds {found} windows only, not {asked}; all of them are used"
        ));
    }
    let evaluate = match args.eval_windows {
        0 => None,
        count => {
            let pick = Pick::EvenlySpaced { windows: count };
            match read(&model, &DataSource::BuiltinHeldOut, args.sequence_length, pick) {
                Ok(windows) => Some(windows),
                Err(error) => {
                    printer.warn(&format!("the result will not be measured: {error:#}"));
                    None
                }
            }
        }
    };
    let mut settings = QuantizeSettings {
        method: request.method(),
        threads,
        low_memory: args.machine.low_memory,
        statistics: args.statistics.clone(),
        evaluate,
        ..QuantizeSettings::new(request.recipe.clone())
    };
    let resident = resident_now().unwrap_or(USUAL_RESIDENT);
    let mut memory = quantize_memory(&model, &windows, &settings, resident)?;
    if !settings.low_memory && free_memory().is_some_and(|free| memory.peak > free + resident) {
        settings.low_memory = true;
        memory = quantize_memory(&model, &windows, &settings, resident)?;
        printer.detail("--low-memory, because all windows' activations do not fit in free memory");
    }
    let screen = Screen::new(printer);
    let mut plan = plan;
    if let Some(dynamic) = dynamic {
        let measure = SensitivitySettings {
            seed: args.machine.seed,
            threads,
            low_memory: settings.low_memory,
            dtype: args.target.dtype.map(Into::into),
        };
        let file = request.dynamic.and_then(|flags| flags.sensitivities.as_deref());
        let both = (plan.settings.clone(), dynamic);
        let allocator = Allocator::new(&model, both, &windows, &measure, file, &screen)?;
        settings.columns = allocator.columns();
        if let Some(wanted) = allocator.target_kl().filter(|_| !args.target.dry_run) {
            let make = |plan: &DynamicPlan, path: &Path| {
                let made = mlx_quant::quantize(&model, &plan.plan, &windows, path, &settings, &screen);
                screen.clear();
                let made = made?;
                let measured = made.evaluation.as_ref().and_then(|all| all.total.against.as_ref());
                let kl = measured.map(|against| against.kl_mean);
                Ok((made, kl.ok_or_else(|| anyhow::anyhow!("nothing was measured"))?))
            };
            let (plan, made) = allocator.settle(wanted, &args.target.mlx_path, printer, make)?;
            return show(request, &plan.plan, &windows, &made, memory, printer);
        }
        plan = allocator.plan(printer)?.plan;
    }
    if args.target.dry_run {
        let operations = mlx_quant::operations(&model, &windows, &settings)?;
        let seconds = mlx_quant::seconds(operations, threads)?;
        return dry_run(request, &plan, &windows, (memory, operations, seconds), printer);
    }
    let made = mlx_quant::quantize(&model, &plan, &windows, &args.target.mlx_path, &settings, &screen);
    screen.clear();
    show(request, &plan, &windows, &made?, memory, printer)
}

fn read(model: &Model, data: &DataSource, sequence_length: usize, pick: Pick) -> Result<Windows> {
    let windows = Windows::read(data, &model.tokenizer()?, model.vocabulary()?, sequence_length, pick);
    Ok(windows.map_err(mlx_quant::Error::from)?)
}

/// Embeddings and head at their own scheme.
fn tables(model: &Model, scheme: Scheme) -> Result<BTreeMap<String, Scheme>> {
    let walk = mlx_quant::Walk::open(model)?;
    Ok(walk.decoder.tables().into_iter().map(|path| (path.to_owned(), scheme)).collect())
}

/// The plan, and nothing written.
fn dry_run(
    request: &Request<'_>,
    plan: &Plan,
    windows: &Windows,
    (memory, operations, seconds): (QuantizeMemory, f64, f64),
    printer: Printer,
) -> Result<()> {
    if printer.is_json() {
        let mut document = json!({"recipe": request.recipe.to_string(), "calibration": windows.report(), "memory": memory, "operations": operations, "seconds_estimate": seconds});
        merge(&mut document, &plan.report());
        printer.data(&serde_json::to_string_pretty(&document)?);
        return Ok(());
    }
    super::convert::layers(&plan.report(), printer);
    let line = |name: &str, value: String| printer.data(&format!("{name:<16} {value}"));
    line("recipe", request.recipe.to_string());
    line("calibration", format!("{} windows of {} tokens", windows.picked.len(), windows.sequence_length));
    for source in &windows.sources {
        line("", format!("{}: {} of {} windows", source.name, source.windows_picked, source.windows_total));
    }
    line("process", bytes(memory.fixed));
    line("block", bytes(memory.block));
    line("activations", bytes(memory.activations));
    line("hessians", bytes(memory.hessians));
    line("weights", bytes(memory.weights));
    line("threads", bytes(memory.scratch));
    line("evaluation", bytes(memory.evaluation));
    line("peak memory", format!("about {}", bytes(memory.peak)));
    line("time", format!("about {seconds:.0} s ({:.1} TFLOP)", operations / 1e12));
    Ok(())
}

fn show(
    request: &Request<'_>,
    plan: &Plan,
    windows: &Windows,
    made: &Quantized,
    memory: QuantizeMemory,
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
            "mlx_path": request.common.target.mlx_path,
            "recipe": request.recipe.to_string(),
            "calibration": windows.report(),
            "peak_memory_bytes": peak,
            "predicted_memory_bytes": memory.peak,
            "kernels": mlx_format::simd_name(),
            "made": made,
        });
        merge(&mut document, &plan.report());
        printer.data(&serde_json::to_string_pretty(&document)?);
    }
    if made.foldable > 0 {
        printer.detail(&format!("awq: scales folded at {} of {} sites", made.folded, made.foldable));
    }
    let quality = made.evaluation.as_ref().and_then(|evaluation| evaluation.total.against.as_ref());
    printer.say(&format!(
        "{}: {}, {:.3} bits per weight, {} in {:.1} s{}{}",
        request.common.target.mlx_path.display(),
        request.recipe,
        plan.bits_per_weight(),
        bytes(plan.layout.file_bytes()),
        made.quantize_seconds,
        peak.map_or_else(String::new, |peak| format!(", peak memory {}", bytes(peak))),
        quality.map_or_else(String::new, |against| format!(
            ", KL {:.4}{} on held-out text",
            against.kl_mean,
            against.kl_stderr.map_or_else(String::new, |error| format!(" ± {error:.4}"))
        )),
    ));
    Ok(())
}
