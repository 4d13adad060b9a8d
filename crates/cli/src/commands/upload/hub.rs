//! A model directory to the hub, with a card that says how close the model is to its source.

use std::path::Path;

use anyhow::Result;
use mlx_format::checkpoint::Directory;
use mlx_quant::recipes::Text;
use mlx_quant::{Evaluation, EvaluationSettings, Model, Pick, evaluate};
use serde_json::json;

use crate::args::{HubFlags, Upload as Args};
use crate::commands::source::{self, Asked, Need};
use crate::hub::{Address, Hub, Upload};
use crate::printer::{Printer, bytes};
use crate::refusal::Refusal;
use crate::screen::Screen;

/// Windows of held-out text on which a model is measured for its card where nothing was measured before.
const WINDOWS: usize = 8;
const WINDOW_TOKENS: usize = 512;

/// Runs the command.
pub(crate) fn run(args: &Args, printer: Printer) -> Result<()> {
    source::check_here(&args.directory)?;
    let target = Target::parse(&args.upload_repo, args.private, printer)?;
    let directory = Directory::open(&args.directory).map_err(mlx_quant::Error::from)?;
    mlx_quant::open(&directory)?;
    let card = target.card(&args.directory, printer)?;
    let reference = Asked::new(args.reference.as_deref(), args.revision.as_deref());
    let reference = match args.reference {
        Some(_) => Some(source::open(reference, Need::Weights, printer)?),
        None => None,
    };
    let done = target.upload(&args.directory, card, reference.as_deref(), printer)?;
    if printer.is_json() {
        printer.data(&serde_json::to_string_pretty(&done)?);
    }
    Ok(())
}

/// The card of a model directory; empty if there is none.
#[derive(Default)]
struct Card {
    was: String,
    /// As it is to be uploaded.
    now: String,
}

/// A repository that may be written to, as far as is known here.
pub(crate) struct Target {
    address: Address,
    private: bool,
    hub: Hub,
}

impl Target {
    fn parse(text: &str, private: bool, printer: Printer) -> Result<Self> {
        let address = source::address(Path::new(text), false)?.filter(|address| address.revision.is_none());
        let address = address.ok_or_else(|| {
            Refusal(format!(
                "--upload-repo {text}: this is no hub id; hint: give ORG/NAME, as mlx-community/Qwen3-8B-4bit"
            ))
        })?;
        let hub = Hub::open(printer)?;
        hub.check_upload(&address, &Screen::new(printer))?;
        Ok(Self { address, private, hub })
    }

    /// Where the flags of a command that writes a model want it to go, checked before any work.
    /// A command that only shows a plan has nothing to upload.
    pub(crate) fn of(flags: &HubFlags, only_plan: bool, printer: Printer) -> Result<Option<Self>> {
        let wanted = flags.upload_repo.as_deref().filter(|_| !only_plan);
        wanted.map(|text| Self::parse(text, flags.private, printer)).transpose()
    }

    /// Uploads what a command has written.
    pub(crate) fn push(&self, directory: &Path, source: Option<&Model>, printer: Printer) -> Result<()> {
        let card = self.card(directory, printer);
        let done = card.and_then(|card| self.upload(directory, card, source, printer));
        // The work is done: what is refused now is no bad input any more.
        done.map(|_| ()).map_err(|error| match error.downcast::<Refusal>() {
            Ok(refusal) => {
                anyhow::anyhow!("{} was written, but not uploaded: {refusal}", directory.display())
            }
            Err(error) => error,
        })
    }

    /// The card of a model directory, as far as the hub takes it, which is asked before anything is measured or sent.
    fn card(&self, directory: &Path, printer: Printer) -> Result<Card> {
        let path = directory.join("README.md");
        if !path.is_file() {
            return Ok(Card::default());
        }
        let was = String::from_utf8(fs_err::read(&path)?).map_err(|_| {
            Refusal(format!("{} is no text in UTF-8; hint: mend it, or remove it", path.display()))
        })?;
        let screen = Screen::new(printer);
        let now = self.hub.accepted_card(&self.address, was.clone(), &screen);
        screen.clear();
        Ok(Card { now: now?, was })
    }

    /// Uploads a model directory; its card tells how close it is to `source`, measured now unless it was before.
    fn upload(
        &self,
        directory: &Path,
        card: Card,
        source: Option<&Model>,
        printer: Printer,
    ) -> Result<serde_json::Value> {
        let model = mlx_quant::open(&Directory::open(directory).map_err(mlx_quant::Error::from)?)?;
        let screen = Screen::new(printer);
        let Card { was, mut now } = card;
        if let Some(source) = source.filter(|_| mlx_quant::card::lacks_quality(&now)) {
            match measure(&model, source, &screen) {
                Ok(evaluation) => now = mlx_quant::card::with_quality(&now, &evaluation),
                Err(error) if error.is::<mlx_quant::Error>() && screen.was_interrupted() => {
                    return Err(error);
                }
                Err(error) => printer.warn(&format!("not measured for the card: {error:#}")),
            }
        }
        if now != was {
            write_card(directory, &now)?;
        }
        let upload = Upload {
            directory,
            address: &self.address,
            private: self.private,
            message: concat!("Upload with mlx-quant ", env!("CARGO_PKG_VERSION")),
        };
        let done = self.hub.upload(&upload, &screen);
        screen.clear();
        let done = done?;
        match &done.commit {
            Some(_) => printer.say(&format!(
                "{}: {} file(s), {}, in one commit",
                done.url,
                done.files,
                bytes(done.bytes)
            )),
            None => printer.say(&format!("{}: everything was there already", done.url)),
        }
        Ok(json!({
            "url": done.url,
            "commit": done.commit,
            "files": done.files,
            "bytes": done.bytes,
            "files_kept": done.kept,
        }))
    }
}

/// Puts a card in the place of the one that a model has.
fn write_card(directory: &Path, card: &str) -> std::io::Result<()> {
    let next = directory.join(".README.md.next");
    fs_err::write(&next, card)?;
    fs_err::rename(next, directory.join("README.md"))
}

fn measure(model: &Model, source: &Model, screen: &Screen) -> Result<Evaluation> {
    let pick = Pick::EvenlySpaced { windows: WINDOWS };
    let windows = Text::held_out(WINDOW_TOKENS).windows(source, pick)?;
    let settings = EvaluationSettings { threads: 0, low_memory: true, cache: None };
    Ok(evaluate(model, Some(source), &windows, &settings, screen)?)
}
