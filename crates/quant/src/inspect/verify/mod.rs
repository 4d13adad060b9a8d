//! Whether mlx_lm (or mlx_vlm, of types that it alone has) loads a model: every file, name, shape and value is looked at, and everything that is wrong is told.
//!
//! What mlx_lm does is that of version 0.32.2 (`mlx_lm/utils.py`, `load_model`): it reads every `model*.safetensors`, never
//! the index; takes a layer's packing from its entry in config.json, else from the shapes; and then wants
//! exactly the tensors of its model, each of its shape. What it does not look at (values, the index, token ids) makes a
//! warning.

mod config;
mod files;
mod findings;
mod finite;
mod layers;
mod tokenizer;

use std::fmt;
use std::time::Instant;

use mlx_quant_model::{SourceError, arch};
use serde::Serialize;

pub use self::findings::Problem;
use self::findings::{Findings, what};
use crate::plan::PlanError;
use crate::{Error, Model, Observer};

/// Whether mlx_lm loads a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// It will, and nothing is wrong.
    Loads,
    /// It will, but something is wrong.
    LoadsBut,
    /// Nothing was found that mlx_lm stops at, but the decoder is not described here, so that not all of it was looked at.
    Unknown,
    /// It will not.
    Fails,
}

/// What [`verify`] found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Verification {
    /// Whether it is loaded.
    pub verdict: Verdict,
    /// What loads it: mlx_lm, or mlx_vlm where that alone has a model of its type.
    pub loader: &'static str,
    /// Everything that is wrong; what mlx_lm stops at comes first.
    pub problems: Vec<Problem>,
    /// What a person should know, though nothing is wrong.
    pub notes: Vec<String>,
    /// Tensors whose values were read.
    pub tensors: usize,
    /// Bytes that were read.
    pub bytes: u64,
    /// Wall time.
    pub seconds: f64,
}

/// Reads the whole model on `threads` threads (0: one per core) and tells everything that is wrong with it. Open it with
/// [`crate::source::open_files`]: [`crate::open`] refuses part of what is told here. Memory does not grow with the model.
///
/// # Errors
/// [`Error::Interrupted`]; [`Error::Directory`] if a file cannot be read; [`Error::Plan`] if the model is quantized by a
/// method that is not known here, so that nothing can be said about it.
pub fn verify(model: &Model, observer: &dyn Observer, threads: usize) -> Result<Verification, Error> {
    let start = Instant::now();
    let mut findings = Findings::default();
    files::check(model, &mut findings)?;
    let named = match super::read(model) {
        Ok(named) => Some(named),
        Err(Error::Plan(PlanError::Source(error @ SourceError::Foreign { .. }))) => {
            return Err(PlanError::from(error).into());
        }
        Err(error) => {
            findings.fatal("model", what(&error));
            None
        }
    };
    config::check(model, &mut findings);
    let (mut tensors, mut bytes, mut vocabulary) = (0, 0, None);
    if let Some(named) = &named {
        vocabulary = layers::check(model, named, &mut findings);
        (tensors, bytes) = finite::check(model, named, observer, threads, &mut findings)?;
    }
    tokenizer::check(model, vocabulary, &mut findings)?;
    let Findings { mut problems, notes } = findings;
    problems.sort_by_key(|problem| !problem.fatal);
    let described = named.as_ref().is_some_and(|named| named.decoder.is_some());
    let verdict = match problems.first() {
        Some(problem) if problem.fatal => Verdict::Fails,
        _ if !described => Verdict::Unknown,
        None => Verdict::Loads,
        Some(_) => Verdict::LoadsBut,
    };
    let loader = arch::loader(&model.config).name();
    Ok(Verification {
        verdict,
        loader,
        problems,
        notes,
        tensors,
        bytes,
        seconds: start.elapsed().as_secs_f64(),
    })
}

/// The verdict in one line, with the first reasons.
impl fmt::Display for Verification {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 3;
        let loader = self.loader;
        match self.verdict {
            Verdict::Loads => write!(f, "{loader} will load it"),
            Verdict::LoadsBut => write!(f, "{loader} loads it, but: "),
            Verdict::Unknown if self.problems.is_empty() => {
                write!(
                    f,
                    "not known whether {loader} loads it: the decoder of its model type is not described here"
                )
            }
            Verdict::Unknown => write!(f, "not known whether {loader} loads it; wrong is: "),
            Verdict::Fails => write!(f, "{loader} will not load it: "),
        }?;
        let fatal = self.verdict == Verdict::Fails;
        let reasons: Vec<String> =
            self.problems.iter().filter(|problem| problem.fatal == fatal).map(Problem::to_string).collect();
        f.write_str(&reasons[..reasons.len().min(SHOWN)].join("; "))?;
        match reasons.len().checked_sub(SHOWN) {
            Some(more @ 1..) => write!(f, "; and {more} more"),
            _ => Ok(()),
        }
    }
}
