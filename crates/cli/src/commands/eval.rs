//! `mlx-quant eval`.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use mlx_quant::data::Suite;
use mlx_quant::evaluate::suite::{
    Asked as Questions, SuiteEvaluation, evaluate_suite, suite_memory, suite_step,
};
use mlx_quant::evaluate::{Memory, memory, reading, step};
use mlx_quant::forecast::{CardMemory, card_memory_of_evaluation};
use mlx_quant::observer::Within;
use mlx_quant::recipes::{Device, Room, Text, choose_low_memory};
use mlx_quant::{
    DataSource, Error, Evaluation, EvaluationSettings, Event, Model, Observer as _, Pick, Windows, evaluate,
};
use mlx_quant_report as report;
use serde_json::json;

use crate::args::Eval;
use crate::commands::card::{card_fits, card_lines, card_peak, card_used};
use crate::commands::source::{self, Asked, Need};
use crate::commands::windows;
use crate::memory::resident_peak;
use crate::printer::{Printer, bytes};
use crate::refusal::Refusal;
use crate::screen::Screen;

/// Of the JSON. 2: with a reference the ratio of the perplexities and the difference of their logarithms. 3: answers to a
/// suite.
const SCHEMA: u32 = 3;

/// Runs the command.
pub(crate) fn run(args: &Eval, printer: Printer) -> Result<()> {
    let suite = args.suite.as_deref().map(Suite::read).transpose().map_err(Error::from)?;
    let devices = source::devices(&args.device)?;
    let device = &devices[0];
    let _left = source::Left(device, printer);
    let report = args.report.as_deref().map(Report::create).transpose()?;
    let need = Need::of(args.dry_run);
    let asked = Asked::new(args.model.given(), args.revision.as_deref());
    let reference = args.reference.as_deref().map(|path| Asked::new(Some(path), None));
    source::check(&[asked, reference.unwrap_or(asked)], &[args.data.as_deref()])?;
    let open = |asked| -> Result<_> {
        Ok(source::open(asked, need, printer)?.allow_unread(args.allow_unread).on_all(&devices))
    };
    let model = open(asked)?;
    let reference = reference.map(open).transpose()?;
    let reference = reference.as_deref();
    let windows = windows_of(args, &model, reference, printer)?;
    let suite =
        suite.as_ref().map(|suite| Ok::<_, Error>((suite, Questions::new(suite, &model, reference)?)));
    let suite = suite.transpose()?;
    let with = |low_memory| EvaluationSettings {
        threads: args.threads.map_or(0, |threads| threads as usize),
        low_memory,
        cache: args.cache.clone(),
    };
    let room = Room::now();
    let foresee = |low_memory| -> Result<_> {
        let settings = with(low_memory);
        let card = card_memory_of_evaluation(&model, reference, &windows, &settings)?;
        let text = memory(&model, reference, &windows, &settings, room.resident)?;
        let questions = match &suite {
            Some((_, questions)) => suite_memory(questions, (&model, reference), &settings, text.fixed)?,
            None => text,
        };
        // One after the other.
        Ok((if questions.peak > text.peak { questions } else { text }, card))
    };
    let obstacle = |card: &Option<CardMemory>| card.and_then(|card| card.obstacle(device.capacity()?));
    let fits = |needs: &(Memory, Option<CardMemory>)| room.fits(needs.0.peak) && obstacle(&needs.1).is_none();
    let (low_memory, (memory, card)) = choose_low_memory(args.low_memory, foresee, fits)?;
    let settings = with(low_memory);
    if low_memory && !args.low_memory {
        printer.detail("--low-memory, because the model does not fit in free memory");
    }
    card_fits(obstacle(&card))?;
    if args.dry_run {
        return dry_run(&windows, suite.as_ref(), memory, (card, device), printer);
    }
    let screen = Screen::new(printer);
    let against = reference.is_some();
    let steps: Vec<_> =
        [step(against)].into_iter().chain(suite.as_ref().map(|_| suite_step(against))).collect();
    screen.event(Event::Job { steps: &steps });
    let within = Within(&screen);
    let evaluation = evaluate(&model, reference, &windows, &settings, &within);
    let answers = evaluation.and_then(|evaluation| {
        let answer = |(suite, questions): &(&Suite, Questions)| {
            evaluate_suite(suite, questions, (&model, reference), &settings, &within)
        };
        Ok((evaluation, suite.as_ref().map(answer).transpose()?))
    });
    screen.clear();
    let (evaluation, answers) = answers?;
    if let Some(report) = report {
        report.write(&evaluation, answers.as_ref())?;
    }
    let peak = resident_peak();
    if printer.is_json() {
        let mut document = versioned(&evaluation, answers.as_ref())?;
        document["peak_memory_bytes"] = json!(peak);
        document["predicted_memory_bytes"] = json!(memory.peak);
        document["card_peak_memory_bytes"] = json!(card_peak(device));
        document["card_predicted_memory_bytes"] = json!(card.map(|card| card.peak));
        printer.data(&report::json(&document)?);
        return Ok(());
    }
    printer.data(&report::table(&evaluation, printer.width()));
    if let Some(answers) = &answers {
        printer.data(&format!("\n{}", report::suite_table(answers, printer.width())));
    }
    if let Some(against) = &evaluation.total.against {
        let top1 = against.top1 * 100.0;
        let reading = reading(against.kl_mean);
        let advice = reading.advice.map_or_else(String::new, |advice| format!("; {advice}"));
        printer.say(&format!(
            "KL {:.4}, {top1:.0} % of next tokens the same: {}{advice}",
            against.kl_mean, reading.words
        ));
    }
    let (tokens, seconds) = (windows.picked.len() * windows.sequence_length, evaluation.subject.seconds);
    printer.say(&format!(
        "{}, {:.0} tokens/s{}{}",
        report::duration(seconds),
        tokens as f64 / seconds.max(1e-9),
        peak.map_or_else(String::new, |peak| format!(", peak memory {}", bytes(peak))) + &card_used(device),
        if evaluation.subject.reference_cached { ", reference from the cache" } else { "" },
    ));
    Ok(())
}

/// Tokenizes with the reference's tokenizer, as the text was made for it; without one with the model's.
fn windows_of(args: &Eval, model: &Model, reference: Option<&Model>, printer: Printer) -> Result<Windows> {
    let data = source::data(args.data.as_deref(), DataSource::BuiltinHeldOut, printer)?;
    let text = Text::new(data, args.sequence_length).strict(args.strict);
    let read = |model: &Model| text.windows(model, Pick::EvenlySpaced { windows: args.windows });
    let windows = read(reference.unwrap_or(model))?;
    windows::tell(&windows.sources, printer);
    if reference.is_none() {
        return Ok(windows);
    }
    match read(model) {
        Ok(own) if own.data_hash != windows.data_hash => {
            printer
                .warn("model and reference tokenize the text differently; the reference's tokens are used");
        }
        _ => {}
    }
    Ok(windows)
}

fn dry_run(
    windows: &Windows,
    suite: Option<&(&Suite, Questions)>,
    memory: Memory,
    (card, device): (Option<CardMemory>, &Device),
    printer: Printer,
) -> Result<()> {
    if printer.is_json() {
        let suite = suite.map(|(suite, questions)| {
            let (count, tokens) = (suite.questions.len(), questions.tokens());
            json!({"name": suite.name, "sha256": suite.sha256, "questions": count, "tokens": tokens})
        });
        let mut document = json!({"data": windows.report(), "memory": memory, "card_memory": card});
        if let Some(suite) = suite {
            document["suite"] = suite;
        }
        printer.data(&report::json(&document)?);
        return Ok(());
    }
    let mut lines: Vec<(&str, String)> = Vec::new();
    let mut line = |name, value| lines.push((name, value));
    for source in &windows.sources {
        let (picked, total) = (source.windows_picked, source.windows_total);
        line("data", format!("{}: {} tokens, {picked} of {total} windows", source.name, source.tokens));
        for note in [source.part_read(), source.left_out()].into_iter().flatten() {
            line("", note);
        }
    }
    if let Some((suite, questions)) = suite {
        let (count, tokens) = (suite.questions.len(), questions.tokens());
        line("suite", format!("{}: {count} questions, {tokens} tokens with their answers", suite.name));
    }
    line("process", bytes(memory.fixed));
    line("blocks", bytes(memory.blocks));
    line("activations", bytes(memory.states));
    line("in a block", bytes(memory.scratch));
    line("head", bytes(memory.head));
    line("peak memory", format!("about {}", bytes(memory.peak)));
    lines.extend(card_lines(card, device));
    printer.data(&report::facts(&lines, printer.width()));
    Ok(())
}

/// The result as JSON.
fn versioned(evaluation: &Evaluation, answers: Option<&SuiteEvaluation>) -> Result<serde_json::Value> {
    let mut document = report::versioned(evaluation, SCHEMA)?;
    if let Some(answers) = answers {
        document["suite"] = serde_json::to_value(answers)?;
    }
    Ok(document)
}

/// A result file, opened before the long work; if it ends without a result, a new file is removed again.
struct Report {
    path: PathBuf,
    file: File,
    markdown: bool,
    unwritten: bool,
}

impl Report {
    fn create(path: &Path) -> Result<Self> {
        let markdown = match path.extension().and_then(|ending| ending.to_str()) {
            Some("md") => true,
            Some("json") => false,
            _ => {
                let path = path.display();
                return Err(Refusal(format!(
                    "--report {path}: the ending says the form; hint: end the name in .md or .json"
                ))
                .into());
            }
        };
        let unwritten = !path.exists();
        let file = File::options().create(true).append(true).open(path);
        let file = file.map_err(|error| {
            Refusal(format!("{}: {error}; hint: choose another --report", path.display()))
        })?;
        Ok(Self { path: path.to_owned(), file, markdown, unwritten })
    }

    fn write(mut self, evaluation: &Evaluation, answers: Option<&SuiteEvaluation>) -> Result<()> {
        let text = if self.markdown {
            report::markdown(evaluation) + &answers.map_or_else(String::new, report::suite_markdown)
        } else {
            report::json(&versioned(evaluation, answers)?)? + "\n"
        };
        let write = |file: &mut File| file.set_len(0).and_then(|()| file.write_all(text.as_bytes()));
        write(&mut self.file).with_context(|| self.path.display().to_string())?;
        self.unwritten = false;
        Ok(())
    }
}

impl Drop for Report {
    fn drop(&mut self) {
        if self.unwritten {
            let _ = fs_err::remove_file(&self.path);
        }
    }
}
