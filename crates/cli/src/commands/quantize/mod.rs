//! `mlx-quant quantize`, and `awq`, `gptq`, `dynamic-quant` and `dwq`, which are four of its recipes.

mod distill;
mod dynamic;
mod request;
mod show;

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use mlx_format::Scheme;
use mlx_format::checkpoint::Writer;
use mlx_quant::forecast::{Forecast, forecast};
use mlx_quant::{
    DataSource, DynamicPlan, DynamicSettings, Method, Model, Pick, Plan, QuantizeSettings,
    SensitivitySettings, Settings, Windows,
};

use self::dynamic::Allocator;
pub(crate) use self::request::Request;
pub(crate) use self::request::affine;
use self::show::{dry_run, show};
use super::upload::Target;
use super::windows::{self, Shares, Text};
use crate::Refusal;
use crate::commands::source::{self, Need};
use crate::machine;
use crate::memory::{USUAL_RESIDENT, free_memory, resident_now};
use crate::printer::Printer;
use crate::screen::Screen;

/// Runs the command.
pub(crate) fn run(request: &Request<'_>, printer: Printer) -> Result<()> {
    let args = request.common;
    let base = affine(args.q_bits, args.q_group_size)?;
    let embedding = request.embedding(base)?;
    request.check()?;
    let dynamic = match request.dynamic.filter(|_| request.recipe.allocates()) {
        Some(flags) => Some(dynamic::settings(flags)?),
        None => None,
    };
    let overrides = source::overrides(args.target.recipe_file.as_deref(), base)?;
    let targets_only = request.alone.is_some_and(|dwq| dwq.targets_only);
    if !args.target.dry_run && !targets_only {
        Writer::check_target(&args.target.mlx_path).map_err(mlx_quant::Error::from)?;
    }
    source::check(&[request.asked()], &[args.data.as_deref()])?;
    if let Some(student) = request.alone.and_then(|dwq| dwq.quantized_model.as_deref()) {
        return distill::run(request, student, printer);
    }
    let upload = Target::of(&args.hub, args.target.dry_run || targets_only, printer)?;
    let model = source::open(request.asked(), Need::of(args.target.dry_run), printer)?;
    let model = model.allow_unread(args.target.allow_unread);
    let calibrated = request.recipe.needs_calibration();
    let schemes = if embedding == base { BTreeMap::new() } else { tables(&model, embedding)? };
    let settings = Settings {
        quantize: Some(base),
        overrides,
        schemes,
        search: request.recipe.rounding() == Method::Search && !calibrated,
        dtype: args.target.dtype.map(Into::into),
        allow_unread: args.target.allow_unread,
        keep_eos: args.target.keep_eos,
        ..Settings::default()
    };
    let plan = Plan::new(&model.checkpoint, &model.config, settings).map_err(mlx_quant::Error::from)?;
    for note in &plan.notes {
        printer.warn(note);
    }
    let threads = args.machine.threads.map_or(0, |threads| threads as usize);
    let target = &args.target.mlx_path;
    if calibrated {
        carry_out(request, &model, plan, dynamic, printer)?;
    } else {
        super::convert::carry_out(&model, &plan, target, args.target.dry_run, threads, printer)?;
    }
    upload.map_or(Ok(()), |upload| upload.push(target, Some(&model), printer))
}

/// Carries out a recipe that looks at text.
fn carry_out(
    request: &Request<'_>,
    model: &Model,
    mut plan: Plan,
    dynamic: Option<DynamicSettings>,
    printer: Printer,
) -> Result<()> {
    let args = request.common;
    let target = &args.target.mlx_path;
    let targets_only = request.alone.is_some_and(|dwq| dwq.targets_only);
    let file = request.dynamic.and_then(|flags| flags.sensitivities.as_deref());
    if let Some(file) = file {
        dynamic::check_place(file, target)?;
    }
    let mut range = None;
    if let Some(dynamic) = &dynamic {
        range = Some(DynamicPlan::check(model, &plan.settings, dynamic)?);
    }
    let (windows, mut settings) = prepare(request, model, printer)?;
    if targets_only && !args.target.dry_run {
        return distill::targets(request, model, &settings, printer);
    }
    let measured = file.is_some_and(Path::exists);
    let mut needs = needs(model, &plan, &windows, &settings, measured)?;
    if !settings.low_memory && free_memory().is_some_and(|free| needs.peak_memory > free + needs.memory.fixed)
    {
        settings.low_memory = true;
        needs = self::needs(model, &plan, &windows, &settings, measured)?;
        printer.detail("--low-memory, because all windows' activations do not fit in free memory");
    }
    let screen = Screen::new(printer);
    let make = |plan: &Plan, path: &Path, settings: &QuantizeSettings| -> Result<_> {
        let made = mlx_quant::quantize(model, plan, &windows, path, settings, &screen);
        screen.clear();
        Ok(made?)
    };
    // A dry run reads what was measured, and measures nothing.
    if let (Some((low, high)), true, false) = (range, args.target.dry_run, measured) {
        printer.say(&format!(
            "dynamic: layers get their bits once they are measured; the plan shows all alike; reachable: {low:.3} to {high:.3} bits per weight"
        ));
        return dry_run(request, &plan, &windows, needs, printer);
    }
    if let Some(dynamic) = dynamic {
        let measure = SensitivitySettings {
            seed: args.machine.seed,
            threads: settings.threads,
            low_memory: settings.low_memory,
            dtype: args.target.dtype.map(Into::into),
        };
        let both = (plan.settings.clone(), dynamic);
        let allocator = Allocator::new(model, both, &windows, &measure, file, &screen)?;
        settings.columns = allocator.columns();
        if let Some(wanted) = allocator.target_kl().filter(|_| !args.target.dry_run) {
            if settings.evaluate.is_none() {
                let why = "--target-kl measures on held-out text, which cannot be read for this model";
                return Err(Refusal(format!("{why}; hint: give --target-bpw")).into());
            }
            let make = |plan: &DynamicPlan, path: &Path| {
                let made = make(&plan.plan, path, &settings)?;
                let measured = made.evaluation.as_ref().and_then(|all| all.total.against.as_ref());
                let kl = measured.map(|against| against.kl_mean);
                Ok((made, kl.ok_or_else(|| anyhow::anyhow!("nothing was measured"))?))
            };
            let (plan, made) = allocator.settle(wanted, target, printer, make)?;
            return show(request, &plan.plan, &windows, &made, needs, printer);
        }
        let noted = plan.notes.len();
        plan = allocator.plan(printer)?.plan;
        for note in plan.notes.iter().skip(noted) {
            printer.warn(note);
        }
    }
    if args.target.dry_run {
        return dry_run(request, &plan, &windows, needs, printer);
    }
    let made = make(&plan, target, &settings)?;
    show(request, &plan, &windows, &made, needs, printer)
}

/// Windows for calibration, and everything that a run is told.
fn prepare(request: &Request<'_>, model: &Model, printer: Printer) -> Result<(Windows, QuantizeSettings)> {
    let args = request.common;
    let data = source::data(args.data.as_deref(), DataSource::BuiltinCalibration, printer)?;
    let (calibration, training, held_out) = request.windows();
    let shares = Shares { calibration, training, held_out, trains: request.recipe.trains() };
    let text = Text::new(data, args.sequence_length, args.strict);
    let (windows, lessons) = windows::calibration(model, &text, args.machine.seed, &shares, printer)?;
    // The size of a model that is to reach a divergence is settled by measuring.
    let settled = request.dynamic.is_some_and(|flags| flags.target_kl.is_some());
    let evaluate = match if settled { args.eval_windows.max(8) } else { args.eval_windows } {
        0 => None,
        count => {
            let pick = Pick::EvenlySpaced { windows: count };
            match windows::read(model, &Text::builtin(DataSource::BuiltinHeldOut, args.sequence_length), pick)
            {
                Ok(windows) => Some(windows),
                Err(error) => {
                    printer.warn(&format!("the result will not be measured: {error:#}"));
                    None
                }
            }
        }
    };
    let settings = QuantizeSettings {
        method: request.method(),
        threads: args.machine.threads.map_or(0, |threads| threads as usize),
        low_memory: args.machine.low_memory,
        statistics: args.statistics.clone(),
        dwq: request.training(),
        lessons,
        evaluate,
        ..QuantizeSettings::new(request.recipe.clone())
    };
    Ok((windows, settings))
}

/// Memory, arithmetic and time of a run.
fn needs(
    model: &Model,
    plan: &Plan,
    windows: &Windows,
    settings: &QuantizeSettings,
    measured: bool,
) -> Result<Forecast> {
    let resident = resident_now().unwrap_or(USUAL_RESIDENT);
    let machine = machine::known(settings.threads)?;
    Ok(forecast(model, plan, windows, settings, measured, &machine, resident)?)
}

/// Embeddings and head at their own scheme.
fn tables(model: &Model, scheme: Scheme) -> Result<BTreeMap<String, Scheme>> {
    let walk = mlx_quant::Walk::open(model)?;
    Ok(walk.decoder.tables().into_iter().map(|path| (path.to_owned(), scheme)).collect())
}
