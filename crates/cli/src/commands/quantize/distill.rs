//! `dwq` from a model that is quantized already, and the teacher's targets alone.

use std::path::Path;

use anyhow::Result;
use mlx_quant::forecast::forecast;
use mlx_quant::observer::Within;
use mlx_quant::plan::DrafterPlan;
use mlx_quant::recipes::{Device, Room};
use mlx_quant::session::steps_of_distilling;
use mlx_quant::{Event, Model, Observer as _, Plan, QuantizeSettings, Settings};

use super::prepare::prepare;
use super::request::{Request, affine};
use super::show::{dry_run, show};
use crate::commands::card::card_fits;
use crate::commands::drafter;
use crate::commands::source::{self, Asked, Need};
use crate::commands::upload::Target;
use crate::machine;
use crate::printer::Printer;
use crate::refusal::Refusal;
use crate::screen::Screen;

/// Trains `student`, an MLX quantized model.
pub(super) fn run(request: &Request<'_>, student: &Path, device: &Device, printer: Printer) -> Result<()> {
    let args = request.common;
    let need = Need::of(args.target.dry_run);
    let upload = Target::of(&args.hub, args.target.dry_run, printer)?;
    let student = source::open(Asked::new(Some(student), None), need, printer)?;
    let student = student.allow_unread(args.target.allow_unread).on(device);
    // With targets at hand the original is needed only where it is named.
    let known = request.dwq.is_some_and(|dwq| dwq.target_dir.is_some());
    let teacher = match args.target.model.given() {
        None if known => None,
        _ => {
            let teacher = source::open(request.asked(), need, printer)?;
            Some(teacher.allow_unread(args.target.allow_unread).on(device))
        }
    };
    let as_it_is = Settings {
        keep_dtypes: true,
        allow_unread: args.target.allow_unread,
        text_only: args.target.text_only,
        keep_eos: args.target.keep_eos,
        ..Settings::default()
    };
    let plan = Plan::new(&student.checkpoint, &student.config, as_it_is);
    let mut plan = plan.map_err(mlx_quant::Error::from)?;
    if args.target.mtp {
        plan.drafter = Some(Box::new(heads(teacher.as_deref())?));
    }
    let (windows, settings) = prepare(request, &student, printer)?;
    let machine = machine::known(settings.threads, device, printer)?;
    let needs = forecast(&student, &plan, &windows, &settings, true, &machine, Room::now().resident)?;
    card_fits(needs.card_obstacle(device))?;
    if args.target.dry_run {
        return dry_run(request, &plan, &windows, (needs, device), printer);
    }
    let (destination, threads) = (args.destination(), settings.threads);
    let beside = match &teacher {
        Some(teacher) => drafter::write(teacher, plan.drafter.as_deref(), destination, threads, printer)?,
        None => None,
    };
    let screen = Screen::new(printer);
    let steps = needs.expect(steps_of_distilling(&settings));
    screen.event(Event::Job { steps: &steps });
    let target = &args.target.mlx_path;
    let made = mlx_quant::session::distill(
        teacher.as_deref(),
        &student,
        &plan,
        &windows,
        destination,
        &settings,
        &Within(&screen),
    );
    screen.clear();
    let made = made
        .map_err(anyhow::Error::from)
        .and_then(|made| show(request, &plan, &windows, &made, (needs, device), printer));
    drafter::conclude(beside.as_ref(), made, printer)?;
    upload.map_or(Ok(()), |upload| upload.push(target, teacher.as_deref(), printer))
}

/// The drafter of the original, at 8 bits as the student is quantized.
fn heads(teacher: Option<&Model>) -> Result<DrafterPlan> {
    let Some(teacher) = teacher else {
        let why = "--mtp takes the multi-token-prediction heads of the original, which is not named";
        return Err(Refusal(format!("{why}; hint: give --model, or leave out --mtp")).into());
    };
    let settings = Settings { quantize: Some(affine(4, 64)?), ..Settings::default() };
    let planned = DrafterPlan::new(&teacher.checkpoint, &teacher.config, &settings);
    Ok(planned.map_err(mlx_quant::Error::from)?)
}

/// `--targets-only`.
pub(super) fn targets(
    request: &Request<'_>,
    teacher: &Model,
    settings: &QuantizeSettings,
    printer: Printer,
) -> Result<()> {
    let screen = Screen::new(printer);
    let made = mlx_quant::session::targets(teacher, settings, &screen);
    screen.clear();
    made?;
    let directory = request.dwq.and_then(|dwq| dwq.target_dir.as_deref());
    printer.say(&format!("{}: targets are complete", directory.unwrap_or(Path::new("")).display()));
    Ok(())
}
