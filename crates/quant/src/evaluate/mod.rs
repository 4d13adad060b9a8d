//! Quality of a model on held-out text: perplexity, and against a reference KL divergence and top-1 agreement.
//!
//! Definitions are those of `mlx_lm/perplexity.py` and llama.cpp's `--kl-divergence`: per predicted token, in nats,
//! over windows that do not overlap. Standard errors are taken over windows, because tokens of one window are not
//! independent. Everything is measured on the files as written, decoded in float32.
//!
//! The heads of both models run side by side over tiles of the vocabulary (`head.rs`), so neither a row of logits nor a
//! head's matrix is ever whole in memory.

mod cache;
mod head;
mod memory;
mod result;
mod scale;
mod statistics;
pub mod suite;

use std::path::PathBuf;
use std::time::Instant;

use mlx_quant_engine::{Device, Tensor};

pub use self::head::{States, measure};
pub(crate) use self::memory::operations;
pub use self::memory::{Memory, memory};
pub use self::result::{Against, Divergence, Evaluation, Measures, SourceEvaluation, Subject, TokenMeasure};
pub use self::scale::{Reading, SCALE, reading};
pub(crate) use self::statistics::{mean, standard_error};
use crate::data::Windows;
pub use crate::error::VocabularyMismatch;
use crate::observer::{Event, Observer, Quiet, Step, Unit};
use crate::team::{Part, Team};
use crate::walks::Walk;
use crate::{Error, Model, threads_or_all};

/// How a model is evaluated; nothing here changes a result.
#[derive(Clone, Debug, Default)]
pub struct EvaluationSettings {
    /// Threads, 0 for one per core.
    pub threads: usize,
    /// Blocks are never kept in memory. (They are where more windows than one wave of activations would read them
    /// again.)
    pub low_memory: bool,
    /// Directory in which the reference's final hidden states are kept for later runs. Logits are these times the
    /// reference's head, so that nothing is lost and little is stored: `hidden / vocabulary` of what the logits would
    /// take.
    pub cache: Option<PathBuf>,
}

/// The step of a job that is an evaluation, with a reference or without one.
pub fn step(reference: bool) -> Step {
    let reference = reference.then_some("reference");
    Step::new("evaluation", reference.into_iter().chain(["model", "head"]))
}

/// Evaluates `model` on `windows`, against `reference` if there is one.
///
/// Reports [`Event::Job`], [`Event::Phase`] for each part of the work with its number of steps, then
/// [`Event::Progress`].
///
/// # Errors
/// What is wrong with either model, a reference with another vocabulary, NaN among the logits, an unusable cache
/// directory, or [`Error::Interrupted`].
pub fn evaluate(
    model: &Model,
    reference: Option<&Model>,
    windows: &Windows,
    settings: &EvaluationSettings,
    observer: &dyn Observer,
) -> Result<Evaluation, Error> {
    let start = Instant::now();
    observer.event(Event::Job { steps: &[step(reference.is_some())] });
    let threads = threads_or_all(settings.threads);
    let pool = crate::threads::pool(threads)?;
    let own = open(model, settings, windows)?;
    let other = reference.map(|reference| open(reference, settings, windows)).transpose()?;
    if let (Some(reference), Some(other)) = (reference, &other)
        && other.decoder.vocabulary != own.decoder.vocabulary
    {
        return Err(Error::Vocabulary(VocabularyMismatch {
            reference: reference.label(),
            reference_rows: other.decoder.vocabulary,
            model: model.label(),
            rows: own.decoder.vocabulary,
        }));
    }
    let cache = match (&settings.cache, reference) {
        (Some(directory), Some(reference)) => Some(cache::Cache::open(directory, reference, windows)?),
        _ => None,
    };
    let tokens: Vec<&[u32]> = windows.picked.iter().map(|window| window.tokens.as_slice()).collect();
    let (measures, reference_cached) = if model.helpers.is_empty() {
        measured((&own, other.as_ref()), &tokens, cache.as_ref(), &pool, observer)?
    } else if cache.is_some() {
        return Err(Error::OneDevice("an evaluation with --cache"));
    } else {
        (by_team(model, reference, (&tokens, windows), settings, observer)?, false)
    };

    let inspection = crate::inspect::inspect(model)?;
    let label = Model::label;
    let subject = Subject {
        model: label(model),
        reference: reference.map(label),
        model_type: model.config.model_type().unwrap_or_default().to_owned(),
        bits_per_weight: inspection.bits_per_weight,
        parameters: inspection.parameters,
        reference_cached,
        kernels: mlx_format::simd_name().to_owned(),
        seconds: start.elapsed().as_secs_f64(),
    };
    Evaluation::of(subject, windows, &measures)
}

fn open<'m>(model: &'m Model, settings: &EvaluationSettings, windows: &Windows) -> Result<Walk<'m>, Error> {
    let walk = Walk::open(model)?;
    let residency = walk.residency(settings.low_memory, windows);
    Ok(walk.with(residency))
}

/// What is measured of each token, by window, and whether the reference's states were known.
fn measured(
    (own, other): (&Walk<'_>, Option<&Walk<'_>>),
    tokens: &[&[u32]],
    cache: Option<&cache::Cache>,
    pool: &rayon::ThreadPool,
    observer: &dyn Observer,
) -> Result<(Vec<Vec<TokenMeasure>>, bool), Error> {
    let mut reference_cached = false;
    let theirs = match other {
        None => None,
        Some(walk) => {
            let known = cache.map(|cache| cache.load(walk.decoder.hidden_size)).transpose()?.flatten();
            reference_cached = known.is_some();
            let hidden = if let Some(hidden) = known {
                hidden
            } else {
                let hidden = states(walk, "reference", tokens, pool, observer)?;
                if let Some(cache) = cache {
                    cache.store(&hidden)?;
                }
                hidden
            };
            Some((walk, hidden))
        }
    };
    let hidden = states(own, "model", tokens, pool, observer)?;
    Ok((head::measure((own, hidden), theirs, tokens, pool, observer)?, reference_cached))
}

/// [`measured`] on all devices of a model, each with its windows.
fn by_team(
    model: &Model,
    reference: Option<&Model>,
    (tokens, windows): (&[&[u32]], &Windows),
    settings: &EvaluationSettings,
    observer: &dyn Observer,
) -> Result<Vec<Vec<TokenMeasure>>, Error> {
    let devices: Vec<&Device> = std::iter::once(&model.device).chain(&model.helpers).collect();
    let threads = (threads_or_all(settings.threads) / devices.len()).max(1);
    let part = |team: &Team, device: &Device, observer: &dyn Observer| {
        let own = open(model, settings, windows)?.on(device);
        let other = reference.map(|reference| open(reference, settings, windows)).transpose()?;
        let other = other.map(|walk| walk.on(device));
        let pool = crate::threads::pool(threads)?;
        let share = &tokens[team.share(tokens.len())];
        let measures = if share.is_empty() {
            Vec::new()
        } else {
            measured((&own, other.as_ref()), share, None, &pool, observer)?.0
        };
        let all = team.gather(Part { head: result::words(&measures), ..Part::default() })?;
        Ok::<_, Error>(all.iter().flat_map(|part| result::of_words(&part.head)).collect())
    };
    let quiet = Quiet(observer);
    let follow = |team: &Team, rank: usize| part(team, devices[rank], &quiet).map(drop);
    crate::team::together(devices.len(), |team| part(team, devices[0], observer), follow)
}

fn states(
    walk: &Walk<'_>,
    name: &'static str,
    tokens: &[&[u32]],
    pool: &rayon::ThreadPool,
    observer: &dyn Observer,
) -> Result<Vec<Tensor>, Error> {
    let total = (tokens.len() * walk.decoder.blocks.len()) as u64;
    let all = tokens.iter().map(|window| window.len() as u64).sum();
    observer.event(Event::Phase { name, unit: Unit::Parts, total, tokens: all });
    walk.hidden(tokens, pool, observer, &mut 0)
}
