//! The end of a run: what was written is measured, described and named.

use std::time::Instant;

use mlx_format::checkpoint::Writer;

use super::card::calibrated_card;
use super::{QuantizeSettings, Quantized};
use crate::data::Windows;
use crate::evaluate::{EvaluationSettings, evaluate};
use crate::observer::{Event, Observer};
use crate::plan::Plan;
use crate::{Error, Model, threads_or_all};

/// Measures what was written, describes it and gives it its name.
pub(super) fn conclude(
    source: Option<&Model>,
    plan: &Plan,
    windows: &Windows,
    settings: &QuantizeSettings,
    (mut made, start): (Quantized, Instant),
    writer: Writer,
    observer: &dyn Observer,
) -> Result<Quantized, Error> {
    observer.event(Event::Finishing);
    made.peak_memory = observer.peak_memory();
    // Training has changed the table since.
    crate::convert::repeat(&writer, plan)?;
    if let (Some(held_out), Some(source)) = (&settings.evaluate, source) {
        let directory = mlx_format::checkpoint::Directory::open(writer.partial())?;
        let written = crate::open(&directory)?.on_all(&source.devices());
        let threads = threads_or_all(settings.threads);
        let (low_memory, cache) = (settings.low_memory, settings.reference_cache.clone());
        let quality = EvaluationSettings { threads, low_memory, cache };
        made.evaluation = Some(evaluate(&written, Some(source), held_out, &quality, observer)?);
        observer.event(Event::Finishing);
    }
    let card = calibrated_card(plan, source, windows, settings, &made);
    writer.write_file("README.md", card.as_bytes())?;
    writer.finish()?;
    made.seconds = start.elapsed().as_secs_f64();
    Ok(made)
}
