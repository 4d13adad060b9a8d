//! `mlx-quant compare`.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context as _, Result};
use mlx_quant::compare::{CompareSettings, Comparison, Contestant, Entry, compare};
use mlx_quant::compare::{Keep, budget, foresee, steps};
use mlx_quant::dwq::DwqSettings;
use mlx_quant::forecast::Forecast;
use mlx_quant::learn::LearnSettings;
use mlx_quant::methods::MethodSettings;
use mlx_quant::observer::Within;
use mlx_quant::recipes::{Room, Shares, Text, VALIDATION_WINDOWS, choose_low_memory};
use mlx_quant::{DataSource, Event, Model, Observer as _, Pick};
use mlx_quant_report as report;
use mlx_quant_report::Commands;
use serde_json::json;

use super::ending::{Ending, generate};
use super::line::{CommandLine, other, quoted};
use super::quantize::affine;
use super::windows;
use crate::args::{Compare, KeepArg};
use crate::commands::card::card_fits;
use crate::commands::source::{self, Asked, Need};
use crate::machine;
use crate::printer::{Printer, bytes};
use crate::refusal::Refusal;
use crate::screen::Screen;

/// Of the JSON. 2: ranks by width, `verdicts`, `made_on`, ratios of perplexities.
const SCHEMA: u32 = 2;

/// Runs the command.
pub(crate) fn run(args: &Compare, printer: Printer) -> Result<()> {
    let contestants = contestants(args)?;
    let device = source::device(&args.machine.device)?;
    let _left = source::Left(&device, printer);
    let asked = asked(args);
    source::check(&[asked], &[args.data.as_deref(), args.eval_data.as_deref()])?;
    let model = source::open(asked, Need::of(args.dry_run), printer)?;
    let model = model.allow_unread(args.allow_unread).on(&device);
    let settings = settings(args, &model, contestants, printer)?;
    let (settings, needs) = fitted(&model, settings, printer)?;
    let commands = commands(args, &model, &settings)?;
    if args.dry_run {
        return dry_run(&settings, &needs, &commands, printer);
    }
    let screen = Screen::comparing(printer);
    screen.event(Event::Job { steps: &steps(&settings, Some(&needs)) });
    let made = compare(&model, &settings, &args.output, &Within(&screen));
    screen.clear();
    let made = made?;
    let run = |entry: &Entry| entry.model.as_deref().map(|model| generate(Path::new(model)));
    let commands = Commands { run: made.entries.iter().map(run).collect(), make: commands };
    write(&made, &commands, &args.output)?;
    if printer.is_json() {
        printer.data(&document(&made)?);
    } else {
        printer.data(&report::comparison_table(&made, &commands, printer.width()));
    }
    for entry in &made.entries {
        match &entry.model {
            Some(model) => printer.say(&format!("kept     {model} ({})", entry.name)),
            None if settings.keep == Keep::All => printer.say(&format!(
                "{} was made by an earlier run that did not keep it; its command makes it again",
                entry.name
            )),
            None => {}
        }
    }
    let page = args.output.join("report.html");
    printer.say(&format!(
        "report   {} (and .md, .json, .svg), {}",
        page.display(),
        report::duration(made.seconds)
    ));
    ending(&made, asked, printer);
    Ok(())
}

/// The best of what was kept.
fn ending(made: &Comparison, original: Asked<'_>, printer: Printer) {
    let kept = made.entries.iter().filter_map(|entry| Some((entry, entry.model.as_deref()?)));
    let Some((best, path)) = kept.min_by(|one, other| one.0.kl().total_cmp(&other.0.kl())) else {
        return printer.say("output   none was kept; --keep best keeps one");
    };
    let what = format!("{}, {:.3} bits per weight, {}", best.name, best.bits_per_weight, bytes(best.bytes));
    let quality = best.evaluation.total.against.as_ref();
    Ending { path: Path::new(path), what, quality, original }.say(printer);
}

/// What each method needs; all of them save memory where one does not fit the usual way.
fn fitted(
    model: &Model,
    settings: CompareSettings,
    printer: Printer,
) -> Result<(CompareSettings, Vec<Forecast>)> {
    let (room, machine) = (Room::now(), machine::known(settings.threads, &model.device, printer)?);
    let asked = settings.low_memory;
    let foresee = |low_memory| {
        let settings = CompareSettings { low_memory, ..settings.clone() };
        foresee(model, &settings, &machine, room.resident)
    };
    let card = |needs: &Forecast| needs.card_obstacle(&model.device);
    let fits =
        |all: &Vec<Forecast>| all.iter().all(|needs| room.fits(needs.peak_memory) && card(needs).is_none());
    let (low_memory, needs) = choose_low_memory(asked, foresee, fits)?;
    if low_memory && !asked {
        printer.detail("--low-memory, because all windows' activations do not fit in free memory");
    }
    card_fits(needs.iter().find_map(card))?;
    Ok((CompareSettings { low_memory, ..settings }, needs))
}

/// What each method would need, and nothing done.
fn dry_run(
    settings: &CompareSettings,
    needs: &[Forecast],
    commands: &[String],
    printer: Printer,
) -> Result<()> {
    let all = settings.contestants.iter().zip(needs);
    if printer.is_json() {
        let methods = all.enumerate().map(|(at, (contestant, needs))| {
            let mut value = serde_json::to_value(needs)?;
            value["name"] = json!(contestant.name);
            value["recipe"] = json!(contestant.recipe.to_string());
            value["command"] = json!(commands.get(at));
            Ok(value)
        });
        let methods = methods.collect::<Result<Vec<_>>>()?;
        let (calibration, held_out) = (settings.calibration.report(), settings.held_out.report());
        let document = json!({"calibration": calibration, "held_out": held_out, "methods": methods});
        printer.data(&report::json(&document)?);
        return Ok(());
    }
    let named = all.map(|(contestant, needs)| (contestant.name.as_str(), needs));
    printer.data(&report::foreseen(named, printer.width()));
    Ok(())
}

/// The comparison as JSON, with the version of its form.
fn document(made: &Comparison) -> Result<String> {
    Ok(report::json(&report::versioned(made, SCHEMA)?)?)
}

/// What takes part, checked before anything is opened.
fn contestants(args: &Compare) -> Result<Vec<Contestant>, Refusal> {
    let refused = |error: &dyn std::fmt::Display| Refusal(format!("--methods: {error}"));
    let mut all: Vec<Contestant> = Vec::new();
    for &bits in &args.q_bits {
        let scheme = affine(bits, args.q_group_size)?;
        for name in args.methods.iter().filter(|name| !name.trim().is_empty()) {
            let one = Contestant::new(name, scheme).map_err(|error| refused(&error))?;
            all.push(if args.q_bits.len() > 1 { one.with_width() } else { one });
        }
    }
    if all.is_empty() {
        return Err(refused(&"no method is named; hint: basic,awq,gptq,dynamic,dwq"));
    }
    let mut seen = BTreeSet::new();
    match all.iter().find(|one| !seen.insert((one.recipe.to_string(), one.scheme.bits()))) {
        Some(twice) => Err(refused(&format!("{} is named twice; hint: name it once", twice.name))),
        None => Ok(all),
    }
}

fn settings(
    args: &Compare,
    model: &Model,
    contestants: Vec<Contestant>,
    printer: Printer,
) -> Result<CompareSettings> {
    // With a training whoever takes part, so that all see the same windows and others can join later.
    let (asked, batch) = (args.n_samples, args.batch_size as usize);
    let shares = Shares::new(asked).with_training(asked, args.iters, batch, VALIDATION_WINDOWS);
    let data = source::data(args.data.as_deref(), DataSource::BuiltinCalibration, printer)?;
    let text = Text::new(data, args.sequence_length).strict(args.strict);
    let shared = windows::shared(model, &text, args.machine.seed, &shares, printer)?;
    let calibration = shared.calibration;
    let lessons = shared.training.unwrap_or_else(|| (calibration.clone(), calibration.clone()));
    let data = source::data(args.eval_data.as_deref(), DataSource::BuiltinHeldOut, printer)?;
    let pick = Pick::EvenlySpaced { windows: args.windows };
    let text = Text::new(data, args.sequence_length).strict(args.strict);
    let held_out = text.windows(model, pick)?;
    windows::tell(&held_out.sources, printer);
    Ok(CompareSettings {
        contestants,
        calibration,
        lessons,
        held_out,
        method: MethodSettings::default(),
        dwq: DwqSettings {
            iterations: args.iters,
            batch_size: args.batch_size as usize,
            seed: args.machine.seed,
            ..DwqSettings::default()
        },
        learn: LearnSettings {
            steps: args.learn_steps as usize,
            seed: args.machine.seed,
            ..LearnSettings::default()
        },
        seed: args.machine.seed,
        threads: args.machine.threads.map_or(0, |threads| threads as usize),
        low_memory: args.machine.low_memory,
        shared_statistics: args.share_statistics,
        keep: match args.keep {
            KeepArg::Best => Keep::Best,
            KeepArg::All => Keep::All,
            KeepArg::None => Keep::None,
        },
        restart: args.restart,
    })
}

fn asked(args: &Compare) -> Asked<'_> {
    Asked::new(args.model.given(), args.revision.as_deref())
}

/// For each method the command line that makes the same model.
fn commands(args: &Compare, model: &Model, settings: &CompareSettings) -> Result<Vec<String>> {
    let command = |contestant: &Contestant| -> Result<String> {
        let (recipe, scheme) = (&contestant.recipe, contestant.scheme);
        let target = if recipe.allocates() { Some(budget(model, scheme)?) } else { None };
        let mut line = CommandLine::new(recipe, asked(args).word().as_deref(), scheme, target);
        if recipe.needs_calibration() {
            let usual = DwqSettings::default();
            line.flag("--data", args.data.as_deref().map(quoted));
            line.flag("--n-samples", args.n_samples.map(|count| count.to_string()));
            line.flag("--sequence-length", other(args.sequence_length, 512));
            line.flag("--seed", other(args.machine.seed, 123));
            line.device(&args.machine.device);
            if recipe.learns() {
                let usual = LearnSettings::default().steps;
                line.flag("--learn-steps", other(args.learn_steps as usize, usual));
            }
            if recipe.trains() {
                line.flag("--iters", other(args.iters, usual.iterations));
                line.flag("--batch-size", other(args.batch_size as usize, usual.batch_size));
            }
        }
        Ok(line.to_string())
    };
    // What takes Hessians from a directory of the comparison has no line of its own.
    let all = if args.share_statistics { &[] } else { settings.contestants.as_slice() };
    all.iter().map(command).collect()
}

/// The reports, each beside its name and then renamed.
fn write(made: &Comparison, commands: &Commands, output: &Path) -> Result<()> {
    let page = report::comparison_html(made, commands)?;
    let files = [
        ("report.html", page),
        ("report.md", report::comparison_markdown(made, commands)),
        ("report.json", document(made)? + "\n"),
        ("report.svg", report::comparison_svg(made)),
    ];
    for (name, text) in files {
        let (path, partial) = (output.join(name), output.join(format!(".{name}.partial")));
        fs_err::write(&partial, text)
            .and_then(|()| fs_err::rename(&partial, &path))
            .with_context(|| path.display().to_string())?;
    }
    Ok(())
}
