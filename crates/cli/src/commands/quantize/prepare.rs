//! What a run needs before it begins: text, settings, and whether it fits.

use anyhow::Result;
use mlx_quant::forecast::{Forecast, forecast};
use mlx_quant::recipes::{Room, Text, choose_low_memory};
use mlx_quant::{DataSource, Model, Pick, Plan, QuantizeSettings, Windows};

use super::request::Request;
use crate::commands::card::card_fits;
use crate::commands::{source, windows};
use crate::machine;
use crate::printer::Printer;

/// Windows for calibration, and everything that a run is told.
pub(super) fn prepare(
    request: &Request<'_>,
    model: &Model,
    printer: Printer,
) -> Result<(Windows, QuantizeSettings)> {
    let args = request.common;
    let data = source::data(args.data.as_deref(), DataSource::BuiltinCalibration, printer)?;
    let text = Text::new(data, args.sequence_length).strict(args.strict);
    let shared = windows::shared(model, &text, args.machine.seed, &request.shares(), printer)?;
    let settings = QuantizeSettings {
        method: request.method(),
        threads: args.machine.threads.map_or(0, |threads| threads as usize),
        low_memory: args.machine.low_memory,
        statistics: args.statistics.clone(),
        learn: request.learning(),
        dwq: request.training(),
        lessons: shared.training,
        evaluate: held_out(request, model, printer),
        ..QuantizeSettings::new(request.recipe.clone())
    };
    Ok((shared.calibration, settings))
}

/// Windows on which the result is measured; none where they are not wanted or the text cannot be read for this model.
fn held_out(request: &Request<'_>, model: &Model, printer: Printer) -> Option<Windows> {
    let args = request.common;
    // The size of a model that is to reach a divergence is settled by measuring.
    let settled = request.dynamic.is_some_and(|flags| flags.target_kl.is_some());
    let windows = if settled { args.eval_windows.max(8) } else { args.eval_windows };
    if windows == 0 {
        return None;
    }
    match Text::held_out(args.sequence_length).windows(model, Pick::EvenlySpaced { windows }) {
        Ok(windows) => Some(windows),
        Err(error) => {
            printer.warn(&format!("the result will not be measured: {error:#}"));
            None
        }
    }
}

/// Memory, arithmetic and time of a run, which saves memory where the usual way does not fit.
pub(super) fn fitted(
    model: &Model,
    plan: &Plan,
    windows: &Windows,
    settings: QuantizeSettings,
    measured: bool,
    printer: Printer,
) -> Result<(QuantizeSettings, Forecast)> {
    let (room, machine) = (Room::now(), machine::known(settings.threads, &model.device, printer)?);
    let asked = settings.low_memory;
    let foresee = |low_memory| {
        let settings = QuantizeSettings { low_memory, ..settings.clone() };
        forecast(model, plan, windows, &settings, measured, &machine, room.resident)
    };
    let fits =
        |needs: &Forecast| room.fits(needs.peak_memory) && needs.card_obstacle(&model.device).is_none();
    let (low_memory, needs) = choose_low_memory(asked, foresee, fits)?;
    if low_memory && !asked {
        printer.detail("--low-memory, because all windows' activations do not fit in free memory");
    }
    card_fits(needs.card_obstacle(&model.device))?;
    Ok((QuantizeSettings { low_memory, ..settings }, needs))
}
