//! `mlx-quant quantize`, and `awq`, `gptq`, `dynamic-quant` and `dwq`, which are four of its recipes.

mod distill;
mod mode;
mod prepare;
mod request;
mod show;

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use mlx_format::Scheme;
use mlx_format::checkpoint::{Destination, Writer};
use mlx_quant::dynamic::{DynamicPlan, DynamicSettings, SensitivitySettings};
use mlx_quant::forecast::Forecast;
use mlx_quant::methods::Method;
use mlx_quant::observer::{Step, Within};
use mlx_quant::recipes::{Allocator, Search, check_place, table_schemes, tries};
use mlx_quant::session::{Quantized, steps};
use mlx_quant::{Error, Event, Model, Observer as _, Plan, QuantizeSettings, Settings, Windows};

use self::mode::Mode;
use self::prepare::{fitted, prepare};
pub(crate) use self::request::{Request, affine};
use self::show::{dry_run, show};
use super::drafter;
use super::parents::Parents;
use super::upload::Target;
use crate::commands::source::{self, Need};
use crate::printer::Printer;
use crate::refusal::Refusal;
use crate::screen::Screen;

/// Runs the command.
pub(crate) fn run(request: &Request<'_>, printer: Printer) -> Result<()> {
    let args = request.common;
    let base = request.scheme()?;
    let tables = request.tables(base)?;
    let devices = source::devices(&args.machine.device)?;
    let device = devices[0].clone();
    let _left = source::Left(&device, printer);
    request.check()?;
    let dynamic = request.allocation()?;
    let overrides = source::overrides(args.target.recipe_file.as_deref(), base)?;
    let targets_only = request.targets_only();
    let _parents = Parents::of(&args.target.mlx_path, args.target.dry_run || targets_only)?;
    if !args.target.dry_run && !targets_only {
        Writer::check_target(args.destination()).map_err(Error::from)?;
        if args.target.mtp {
            drafter::check(args.destination())?;
        }
    }
    source::check(&[request.asked()], &[args.data.as_deref()])?;
    if let Some(student) = request.alone.and_then(|dwq| dwq.quantized_model.as_deref()) {
        return distill::run(request, student, &device, printer);
    }
    let upload = Target::of(&args.hub, args.target.dry_run || targets_only, printer)?;
    let model = source::open(request.asked(), Need::of(args.target.dry_run), printer)?;
    let model = model.allow_unread(args.target.allow_unread).on_all(&devices);
    let calibrated = request.recipe.needs_calibration();
    let schemes = if tables == base { BTreeMap::new() } else { table_schemes(&model, tables)? };
    let settings = Settings {
        quantize: Some(base),
        overrides,
        schemes,
        keep_unreached: calibrated,
        search: request.recipe.rounding() == Method::Search && !calibrated,
        dtype: args.target.dtype.map(Into::into),
        allow_unread: args.target.allow_unread,
        text_only: args.target.text_only,
        mtp: args.target.mtp,
        keep_eos: args.target.keep_eos,
        ..Settings::default()
    };
    let plan = super::carry::plan(&model, settings, printer)?;
    if tables != base && request.tables_are_usual() {
        tell_tables(&model, &plan, base, tables, printer)?;
    }
    let threads = args.machine.threads.map_or(0, |threads| threads as usize);
    let target = &args.target.mlx_path;
    let only_plan = args.target.dry_run;
    let drafter = plan.drafter.as_deref().filter(|_| !only_plan && !targets_only);
    let beside = drafter::write(&model, drafter, args.destination(), threads, printer)?;
    let made = if calibrated {
        carry_out(request, &model, plan, dynamic, printer)
    } else {
        let destination = args.destination();
        super::carry::carry_out((&model, request.asked()), &plan, destination, only_plan, threads, printer)
    };
    drafter::conclude(beside.as_ref(), made, printer)?;
    upload.map_or(Ok(()), |upload| upload.push(target, Some(&model), printer))
}

/// Says what embeddings and head at a scheme of their own, which nobody asked for, make of the size, and how they are as the rest.
fn tell_tables(model: &Model, plan: &Plan, base: Scheme, tables: Scheme, printer: Printer) -> Result<()> {
    let alike = Settings { schemes: BTreeMap::new(), ..plan.settings.clone() };
    let alike = Plan::new(&model.checkpoint, &model.config, alike).map_err(Error::from)?;
    let group_size = match base.group_size() {
        size if size == tables.group_size() => String::new(),
        size => format!(" --fallback-group-size {size}"),
    };
    printer.say(&format!(
        "gptq keeps embeddings and head at {} bits: {:.3} bits per weight; with --fallback-bits {}{group_size} it is {:.3}",
        tables.bits(),
        plan.bits_per_weight(),
        base.bits(),
        alike.bits_per_weight()
    ));
    Ok(())
}

/// Carries out a recipe that looks at text.
fn carry_out(
    request: &Request<'_>,
    model: &Model,
    plan: Plan,
    dynamic: Option<DynamicSettings>,
    printer: Printer,
) -> Result<()> {
    let target = &request.common.target.mlx_path;
    let file = request.sensitivities();
    file.map_or(Ok(()), |file| check_place(file, target))?;
    let range = dynamic.as_ref().map(|dynamic| DynamicPlan::check(model, &plan.settings, dynamic));
    let range = range.transpose()?;
    let measured = file.is_some_and(Path::exists);
    let mode = Mode::of(request, dynamic, measured);
    let (windows, settings) = prepare(request, model, printer)?;
    if let Mode::Targets = mode {
        return distill::targets(request, model, &settings, printer);
    }
    let (settings, needs) = fitted(model, &plan, &windows, settings, measured, printer)?;
    let screen = Screen::new(printer);
    let mut run = Run { request, model, plan, windows, settings, needs, screen, printer };
    run.announce(&mode, measured);
    match mode {
        Mode::Targets => Ok(()),
        Mode::Foresee => run.foresee(range),
        Mode::ForeseeAllocated(dynamic) => {
            run.allocate(dynamic)?;
            run.foresee(None)
        }
        Mode::Make => run.make(None),
        Mode::Allocate(dynamic) => {
            let allocator = run.allocate(dynamic)?;
            run.make(Some(allocator))
        }
        Mode::Settle(dynamic, wanted) => run.settle(dynamic, wanted),
    }
}

/// A recipe on a text, with everything that it was told.
struct Run<'r> {
    request: &'r Request<'r>,
    model: &'r Model,
    plan: Plan,
    windows: Windows,
    settings: QuantizeSettings,
    needs: Forecast,
    screen: Screen,
    printer: Printer,
}

impl<'r> Run<'r> {
    /// Says what will be done.
    fn announce(&self, mode: &Mode, measured: bool) {
        let measure = (!measured).then(mlx_quant::dynamic::step);
        let steps: Vec<Step> = match mode {
            Mode::Targets | Mode::Foresee => return,
            Mode::Make => steps(&self.settings),
            Mode::ForeseeAllocated(_) => measure.into_iter().collect(),
            Mode::Allocate(_) => measure.into_iter().chain(steps(&self.settings)).collect(),
            Mode::Settle(..) => measure.into_iter().chain(tries(&self.settings)).collect(),
        };
        self.screen.event(Event::Job { steps: &self.needs.expect(steps) });
    }

    /// Shows the plan, with `range` where its layers are still all alike.
    fn foresee(self, range: Option<(f64, f64)>) -> Result<()> {
        if let Some((low, high)) = range {
            self.printer.say(&format!(
                "dynamic: layers get their bits once they are measured; the plan shows all alike; reachable: {low:.3} to {high:.3} bits per weight"
            ));
        }
        let needs = (self.needs, &self.model.device);
        dry_run(self.request, &self.plan, &self.windows, needs, self.printer)
    }

    /// What every layer costs, measured or read.
    fn measure(&self, dynamic: DynamicSettings) -> Result<Allocator<'r>> {
        let args = self.request.common;
        let measure = SensitivitySettings {
            seed: args.machine.seed,
            threads: self.settings.threads,
            low_memory: self.settings.low_memory,
            dtype: args.target.dtype.map(Into::into),
            ..SensitivitySettings::default()
        };
        let settings = self.plan.settings.clone();
        let place = (self.request.sensitivities(), self.request.common.destination());
        let observer = Within(&self.screen);
        let allocator =
            Allocator::measure(self.model, settings, dynamic, &self.windows, &measure, place, &observer);
        self.screen.clear();
        Ok(allocator?)
    }

    /// Gives every layer its bits.
    fn allocate(&mut self, dynamic: DynamicSettings) -> Result<Allocator<'r>> {
        let noted = self.plan.notes.len();
        let allocator = self.measure(dynamic)?;
        let plan = allocator.plan(&self.screen)?.plan;
        self.settings.columns = allocator.columns();
        for note in plan.notes.iter().skip(noted) {
            self.printer.warn(note);
        }
        self.plan = plan;
        Ok(allocator)
    }

    /// Carries the plan out.
    fn make(self, allocator: Option<Allocator<'r>>) -> Result<()> {
        let made = self.quantize(&self.plan, &self.request.common.target.mlx_path)?;
        if let Some(allocator) = allocator {
            allocator.conclude();
        }
        let needs = (self.needs, &self.model.device);
        show(self.request, &self.plan, &self.windows, &made, needs, self.printer)
    }

    /// Makes the smallest model that diverges by at most `wanted`.
    fn settle(mut self, dynamic: DynamicSettings, wanted: f64) -> Result<()> {
        if self.settings.evaluate.is_none() {
            let why = "--target-kl measures on held-out text, which cannot be read for this model";
            return Err(Refusal(format!("{why}; hint: give --target-bpw")).into());
        }
        let search = Search::begin(self.request.common.destination(), &self.screen)?;
        let allocator = self.measure(dynamic)?;
        self.settings.columns = allocator.columns();
        let make = |plan: &DynamicPlan, path: &Path| {
            let made = self.quantize(&plan.plan, path)?;
            let measured = made.evaluation.as_ref().and_then(|all| all.total.against.as_ref());
            let kl = measured.map_or(f64::INFINITY, |against| against.kl_mean);
            Ok((made, kl))
        };
        let (plan, made) = allocator.settle(wanted, search, &self.screen, make)?;
        let needs = (self.needs, &self.model.device);
        show(self.request, &plan.plan, &self.windows, &made, needs, self.printer)
    }

    fn quantize(&self, plan: &Plan, path: &Path) -> Result<Quantized, Error> {
        let target = self.request.common.destination();
        // A try is nobody's model yet, and replaces nothing.
        let own = target.path == path;
        let target = Destination { path, replaces: target.replaces.filter(|_| own), ..target };
        let observer = Within(&self.screen);
        let made = mlx_quant::quantize(self.model, plan, &self.windows, target, &self.settings, &observer);
        self.screen.clear();
        made
    }
}
