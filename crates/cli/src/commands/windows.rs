//! Windows of text, shared out to what needs them.

use anyhow::Result;
use mlx_quant::{DataSource, Model, Pick, Windows};

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

/// Windows of calibration text, and where something is trained its training and held-out windows. Calibration and training
/// windows begin alike, held-out ones are none of them.
pub(crate) fn calibration(
    model: &Model,
    data: &DataSource,
    sequence_length: usize,
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
    let all = read(model, data, sequence_length, Pick::Sampled { windows: wanted, seed })?;
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
pub(crate) fn read(model: &Model, data: &DataSource, sequence_length: usize, pick: Pick) -> Result<Windows> {
    let windows = Windows::read(data, &model.tokenizer()?, model.vocabulary()?, sequence_length, pick);
    Ok(windows.map_err(mlx_quant::Error::from)?)
}
