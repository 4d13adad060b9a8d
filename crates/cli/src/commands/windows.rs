//! Windows of text, shared out to what needs them.

use anyhow::Result;
use mlx_quant::{DataSource, Model, OnRefusal, Pick, Windows};

use crate::Refusal;
use crate::printer::Printer;

/// How many windows of the calibration text go where; 0: all.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shares {
    pub(crate) calibration: usize,
    pub(crate) training: usize,
    /// On which steps of the training are judged.
    pub(crate) held_out: usize,
    pub(crate) trains: bool,
}

/// Text that windows are taken from.
#[derive(Clone, Debug)]
pub(crate) struct Text {
    pub(crate) data: DataSource,
    pub(crate) sequence_length: usize,
    pub(crate) on_refusal: OnRefusal,
}

impl Text {
    /// `strict` stops at the first row that the chat template refuses.
    pub(crate) fn new(data: DataSource, sequence_length: usize, strict: bool) -> Self {
        let on_refusal = if strict { OnRefusal::Stop } else { OnRefusal::LeaveOut };
        Self { data, sequence_length, on_refusal }
    }

    /// A text of our own.
    pub(crate) fn builtin(data: DataSource, sequence_length: usize) -> Self {
        Self::new(data, sequence_length, true)
    }
}

/// Windows of calibration text, and where something is trained its training and held-out windows. Calibration and training
/// windows begin alike, held-out ones are none of them.
pub(crate) fn calibration(
    model: &Model,
    text: &Text,
    seed: u64,
    shares: &Shares,
    printer: Printer,
) -> Result<(Windows, Option<(Windows, Windows)>)> {
    let &Shares { calibration, training, held_out, trains } = shares;
    // A larger number with the same seed begins with the same windows; the held-out ones come last.
    let wanted = match (calibration, training) {
        (0, _) | (_, 0) if trains => 0,
        (0, _) => 0,
        _ => calibration.max(training) + held_out,
    };
    let all = read(model, text, Pick::Sampled { windows: wanted, seed })?;
    tell(&all, printer);
    let found = all.picked.len();
    if found < wanted {
        printer.warn(&format!(
            "the calibration text holds {found} windows only, not {wanted}; all of them are used"
        ));
    }
    let held_out = held_out.min((found / 4).max(1));
    let rest = if trains { found - held_out } else { found };
    if trains && rest == 0 {
        return Err(Refusal(
            "the text holds a single window: nothing is left to judge steps on; hint: give more text or a shorter --sequence-length"
                .to_owned(),
        )
        .into());
    }
    let share = |count: usize| all.part(0..if count == 0 { rest } else { count.min(rest) });
    let lessons = trains.then(|| (share(training), all.part(found - held_out..found)));
    Ok((share(calibration), lessons))
}

/// Tokenizes a text for a model.
pub(crate) fn read(model: &Model, text: &Text, pick: Pick) -> Result<Windows> {
    let (tokenizer, vocabulary) = (model.tokenizer()?, model.vocabulary()?);
    let windows =
        Windows::read_with(&text.data, &tokenizer, vocabulary, text.sequence_length, pick, text.on_refusal);
    Ok(windows.map_err(mlx_quant::Error::from)?)
}

/// Says what of the text was not read, and what was left out.
pub(crate) fn tell(windows: &Windows, printer: Printer) {
    for source in &windows.sources {
        if let Some(part) = source.part_read() {
            printer.say(&format!("data     {}: {part}", source.name));
        }
        if let Some(rows) = source.left_out() {
            printer.warn(&format!("{}: {rows}; --strict stops there", source.name));
        }
    }
}
