//! Multiple-choice questions: which answer a model finds likeliest, as lm-evaluation-harness scores them.
//!
//! An answer's score is the sum of the log-probabilities of its tokens behind its question. The harness's figures
//! (`api/task.py`, `process_results` of `multiple_choice`, August 2026), each the share of questions whose best answer is
//! the right one, the first of equals being the best:
//!
//! * `acc`: the largest score;
//! * `acc_norm`: the largest score divided by the answer's length in characters;
//! * `acc_bytes`: the largest score divided by its length in bytes (UTF-8). For ASCII the same as `acc_norm`.
//!
//! Standard errors are over questions. Answers of about one length go through the model together, filled up behind their
//! end (what comes later does not change what stands before); of what leaves the last block only the tokens that predict
//! an answer's are kept, and the head takes them a tile of the vocabulary at a time.

use std::time::Instant;

use mlx_quant_engine::Tensor;
use mlx_quant_model::WeightsError;
use serde::Serialize;

use super::statistics::{mean, standard_error};
use super::{EvaluationSettings, Memory, head};
use crate::data::{Choice, Suite};
use crate::observer::{Event, Observer, Step, Unit};
use crate::walks::{Residency, Walk, tile_rows};
use crate::{Error, Model, threads_or_all};

/// Hidden states in front of the head that wait for it, bytes.
const KEPT: usize = 256 << 20;

/// How well a model answers.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Accuracy {
    /// By score.
    pub acc: f64,
    /// Its standard error.
    pub acc_stderr: Option<f64>,
    /// By score divided by characters.
    pub acc_norm: f64,
    /// Its standard error.
    pub acc_norm_stderr: Option<f64>,
    /// By score divided by bytes.
    pub acc_bytes: f64,
    /// Its standard error.
    pub acc_bytes_stderr: Option<f64>,
}

/// A model's answers beside its reference's, question by question.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Beside {
    /// Of the reference.
    pub reference: Accuracy,
    /// Share of questions on which both choose the same answer by score.
    pub agreement: f64,
    /// Its standard error.
    pub agreement_stderr: Option<f64>,
    /// Share of questions on which both choose the same answer by score divided by characters.
    pub agreement_norm: f64,
    /// Its standard error.
    pub agreement_norm_stderr: Option<f64>,
    /// `acc` minus the reference's.
    pub acc_difference: f64,
    /// Its standard error, paired: what both get right or wrong cancels.
    pub acc_difference_stderr: Option<f64>,
    /// `acc_norm` minus the reference's.
    pub acc_norm_difference: f64,
    /// Its standard error, paired.
    pub acc_norm_difference_stderr: Option<f64>,
}

/// Answers to the questions of a file.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct SuiteEvaluation {
    /// File name.
    pub name: String,
    /// SHA-256 of the file.
    pub sha256: String,
    /// Questions.
    pub questions: usize,
    /// Answers to choose from, of all questions.
    pub choices: usize,
    /// Of the model.
    #[serde(flatten)]
    pub model: Accuracy,
    /// Against the reference.
    pub beside: Option<Beside>,
    /// Wall time.
    pub seconds: f64,
}

/// What a model answers to one question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Picked {
    whole: usize,
    per_character: usize,
    per_byte: usize,
}

/// The step of a job that is a suite.
pub fn suite_step(reference: bool) -> Step {
    let reference = reference.then_some(["reference answers", "head"]);
    Step::new("suite", reference.into_iter().flatten().chain(["answers", "head"]))
}

/// A suite in the tokens of a model and of its reference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    model: Vec<Choice>,
    reference: Option<Vec<Choice>>,
}

impl Asked {
    /// Each model with its own tokenizer.
    ///
    /// # Errors
    /// A model without tokenizer; as [`Suite::tokens`].
    pub fn new(suite: &Suite, model: &Model, reference: Option<&Model>) -> Result<Self, Error> {
        let tokens = |model: &Model| -> Result<Vec<Choice>, Error> {
            let longest = longest(model)?;
            Ok(suite.tokens(&model.tokenizer()?, model.vocabulary()?, longest)?)
        };
        Ok(Self { model: tokens(model)?, reference: reference.map(tokens).transpose()? })
    }

    /// Questions with an answer that pass the model, tokens of all.
    pub fn tokens(&self) -> usize {
        self.model.iter().map(|choice| choice.tokens.len()).sum()
    }
}

/// Tokens that a model has positions for.
fn longest(model: &Model) -> Result<Option<usize>, Error> {
    let walk = Walk::open(model)?;
    let table = walk.decoder.embedding.positions.as_ref();
    let rows = table.and_then(|path| walk.weights.shape(&format!("{path}.weight")).map(|shape| shape[0]));
    let said = ["max_position_embeddings", "n_positions"].into_iter().find_map(|key| {
        let text = model.config.0.get("text_config").and_then(|text| text.get(key));
        text.or_else(|| model.config.0.get(key)).and_then(serde_json::Value::as_u64)
    });
    Ok(rows.or(said.map(|tokens| tokens as usize)))
}

/// The length to which an answer of `tokens` is filled up: two lengths an octave.
fn filled(tokens: usize) -> usize {
    let power = tokens.max(16).next_power_of_two();
    if tokens <= power / 4 * 3 { power / 4 * 3 } else { power }
}

/// Answers the questions with `model`, and with `reference` if there is one.
///
/// Reports [`Event::Phase`] for each part of the work, then [`Event::Progress`].
///
/// # Errors
/// What is wrong with either model, logits that are not numbers, or [`Error::Interrupted`].
pub fn evaluate_suite(
    suite: &Suite,
    asked: &Asked,
    (model, reference): (&Model, Option<&Model>),
    settings: &EvaluationSettings,
    observer: &dyn Observer,
) -> Result<SuiteEvaluation, Error> {
    let start = Instant::now();
    observer.event(Event::Job { steps: &[suite_step(reference.is_some())] });
    let theirs = match (reference, &asked.reference) {
        (Some(reference), Some(choices)) => {
            let scores = scores(reference, choices, suite, "reference answers", settings, observer)?;
            Some(picked(suite, choices, &scores))
        }
        _ => None,
    };
    let scores = scores(model, &asked.model, suite, "answers", settings, observer)?;
    let own = picked(suite, &asked.model, &scores);
    Ok(SuiteEvaluation {
        name: suite.name.clone(),
        sha256: suite.sha256.clone(),
        questions: suite.questions.len(),
        choices: asked.model.len(),
        model: Accuracy::of(suite, &own),
        beside: theirs.map(|theirs| Beside::of(suite, &own, &theirs)),
        seconds: start.elapsed().as_secs_f64(),
    })
}

/// The log-probability of every answer behind its question: nats, summed over the answer's tokens, in the order of
/// `choices`.
///
/// # Errors
/// As [`evaluate_suite`].
pub fn scores(
    model: &Model,
    choices: &[Choice],
    suite: &Suite,
    name: &'static str,
    settings: &EvaluationSettings,
    observer: &dyn Observer,
) -> Result<Vec<f64>, Error> {
    let pool = crate::threads::pool(threads_or_all(settings.threads))?;
    let walk = Walk::open(model)?;
    let waves = waves(&walk, choices);
    let walk = walk.with(Residency::of(settings.low_memory, waves.len()));
    let blocks = walk.decoder.blocks.len();
    let total = (choices.len() * blocks) as u64;
    let tokens = choices.iter().map(|choice| choice.tokens.len() as u64).sum();
    observer.event(Event::Phase { name, unit: Unit::Parts, total, tokens });
    let mut scores = vec![f64::NAN; choices.len()];
    let (mut waiting, mut bytes, mut done) = (Vec::new(), 0, 0);
    for (length, wave) in &waves {
        let fill = |index: &usize| {
            let mut tokens = choices[*index].tokens.clone();
            tokens.resize(*length, tokens[tokens.len() - 1]);
            tokens
        };
        let filled: Vec<Vec<u32>> = wave.iter().map(fill).collect();
        let windows: Vec<&[u32]> = filled.iter().map(Vec::as_slice).collect();
        let hidden = walk.hidden(&windows, &pool, observer, &mut done)?;
        for (index, hidden) in wave.iter().zip(hidden) {
            let Choice { tokens, given, .. } = &choices[*index];
            // The last token predicts nothing that is asked; the head leaves it out.
            let kept = hidden.narrow(0, given - 1, tokens.len() + 1 - given).map_err(WeightsError::from)?;
            bytes += kept.elem_count() * 4;
            waiting.push((*index, kept));
        }
        if bytes > KEPT {
            bytes = 0;
            judge(&walk, choices, std::mem::take(&mut waiting), &pool, &mut scores)?;
        }
        if observer.cancelled() {
            return Err(Error::Interrupted);
        }
    }
    observer.event(Event::Phase { name: "head", unit: Unit::Parts, total: 1, tokens: 0 });
    judge(&walk, choices, waiting, &pool, &mut scores)?;
    observer.event(Event::Progress { done: 1 });
    if let Some(at) = scores.iter().position(|score| !score.is_finite()) {
        let line = suite.questions[choices[at].question].line;
        return Err(Error::NotANumber {
            source_name: format!("{}, line {line}", suite.name),
            window: at,
            token: 0,
        });
    }
    Ok(scores)
}

/// Scores of those that wait for the head.
fn judge(
    walk: &Walk<'_>,
    choices: &[Choice],
    waiting: Vec<(usize, Tensor)>,
    pool: &rayon::ThreadPool,
    scores: &mut [f64],
) -> Result<(), Error> {
    let (indices, hidden): (Vec<usize>, Vec<Tensor>) = waiting.into_iter().unzip();
    let answer = |index: &usize| {
        let Choice { tokens, given, .. } = &choices[*index];
        &tokens[given - 1..]
    };
    let answers: Vec<&[u32]> = indices.iter().map(answer).collect();
    let measures = head::measure((walk, hidden), None, &answers, pool, &crate::observer::Silent)?;
    for (index, measures) in indices.into_iter().zip(measures) {
        scores[index] = -measures.iter().map(|measure| measure.nll).sum::<f64>();
    }
    Ok(())
}

/// Answers that go through the model together, with their common length, the shortest first.
fn waves(walk: &Walk<'_>, choices: &[Choice]) -> Vec<(usize, Vec<usize>)> {
    let mut order: Vec<usize> = (0..choices.len()).collect();
    order.sort_by_key(|index| (filled(choices[*index].tokens.len()), *index));
    let mut waves = Vec::new();
    for same in order.chunk_by(|a, b| filled(choices[*a].tokens.len()) == filled(choices[*b].tokens.len())) {
        // No longer than the longest of them, so that a table of positions is long enough.
        let length = same.iter().map(|index| choices[*index].tokens.len()).max().unwrap_or(0);
        waves.extend(same.chunks(walk.wave(length)).map(|wave| (length, wave.to_vec())));
    }
    waves
}

/// Predicts the peak resident memory of [`evaluate_suite`], as [`super::memory`] does for text.
///
/// # Errors
/// As [`Walk::open`].
pub fn suite_memory(
    asked: &Asked,
    (model, reference): (&Model, Option<&Model>),
    settings: &EvaluationSettings,
    resident: u64,
) -> Result<Memory, Error> {
    let threads = threads_or_all(settings.threads) as u64;
    let mut largest = Memory { blocks: 0, states: 0, scratch: 0, head: 0, fixed: resident, peak: 0 };
    let theirs = reference.zip(asked.reference.as_ref());
    for (model, choices) in theirs.into_iter().chain([(model, &asked.model)]) {
        let walk = Walk::open(model)?;
        let (waves, blocks) = (waves(&walk, choices), walk.block_bytes());
        let held = match Residency::of(settings.low_memory, waves.len()) {
            Residency::Resident => blocks.iter().sum(),
            Residency::Streaming => blocks.iter().copied().max().unwrap_or(0),
        };
        let hidden = walk.decoder.hidden_size as u64;
        let tokens = |wave: &(usize, Vec<usize>)| (wave.0 * wave.1.len()) as u64;
        let most = waves.iter().map(tokens).max().unwrap_or(0);
        let answers: usize = choices.iter().map(|choice| choice.tokens.len() + 1 - choice.given).sum();
        let kept = (answers as u64 * hidden * 4).min(2 * KEPT as u64);
        let length = waves.iter().map(|wave| wave.0).max().unwrap_or(0);
        let rows = tile_rows(&walk.device) as u64;
        let own = Memory {
            blocks: held,
            states: most * (walk.state_elements() as u64).max(hidden) * 4 + kept,
            scratch: walk.scratch_bytes(length) * threads,
            head: 2 * rows * hidden * 4 + threads * 2 * length as u64 * rows * 4,
            fixed: resident,
            peak: 0,
        };
        let peak = resident + own.blocks + own.states + own.scratch.max(own.head);
        if peak > largest.peak {
            largest = Memory { peak, ..own };
        }
    }
    Ok(largest)
}

/// The first of the largest.
fn best(values: impl Iterator<Item = f64>) -> usize {
    let mut best = (0, f64::NEG_INFINITY);
    for (at, value) in values.enumerate() {
        if value > best.1 {
            best = (at, value);
        }
    }
    best.0
}

fn picked(suite: &Suite, choices: &[Choice], scores: &[f64]) -> Vec<Picked> {
    let mut all = Vec::with_capacity(suite.questions.len());
    let mut first = 0;
    for own in choices.chunk_by(|a, b| a.question == b.question) {
        let question = &suite.questions[own[0].question];
        let scores = &scores[first..first + own.len()];
        let by = |length: &dyn Fn(&str) -> usize| {
            best(scores.iter().zip(&question.choices).map(|(score, choice)| score / length(choice) as f64))
        };
        all.push(Picked {
            whole: best(scores.iter().copied()),
            per_character: by(&|choice| choice.chars().count()),
            per_byte: by(&str::len),
        });
        first += own.len();
    }
    all
}

/// A share of questions and its standard error.
fn share(values: &[f64]) -> (f64, Option<f64>) {
    (mean(values.iter().copied()), standard_error(values))
}

fn right(suite: &Suite, picked: &[Picked], of: impl Fn(&Picked) -> usize) -> Vec<f64> {
    let right = suite.questions.iter().zip(picked).map(|(question, picked)| question.answer == of(picked));
    right.map(|right| f64::from(u8::from(right))).collect()
}

impl Accuracy {
    fn of(suite: &Suite, own: &[Picked]) -> Self {
        let (acc, acc_stderr) = share(&right(suite, own, |picked| picked.whole));
        let (acc_norm, acc_norm_stderr) = share(&right(suite, own, |picked| picked.per_character));
        let (acc_bytes, acc_bytes_stderr) = share(&right(suite, own, |picked| picked.per_byte));
        Self { acc, acc_stderr, acc_norm, acc_norm_stderr, acc_bytes, acc_bytes_stderr }
    }
}

impl Beside {
    fn of(suite: &Suite, own: &[Picked], theirs: &[Picked]) -> Self {
        let same = |of: fn(&Picked) -> usize| {
            let same = own.iter().zip(theirs).map(|(own, theirs)| f64::from(u8::from(of(own) == of(theirs))));
            share(&same.collect::<Vec<_>>())
        };
        let gap = |of: fn(&Picked) -> usize| {
            let (own, theirs) = (right(suite, own, of), right(suite, theirs, of));
            share(&own.iter().zip(&theirs).map(|(own, theirs)| own - theirs).collect::<Vec<_>>())
        };
        let (agreement, agreement_stderr) = same(|picked| picked.whole);
        let (agreement_norm, agreement_norm_stderr) = same(|picked| picked.per_character);
        let (acc_difference, acc_difference_stderr) = gap(|picked| picked.whole);
        let (acc_norm_difference, acc_norm_difference_stderr) = gap(|picked| picked.per_character);
        Self {
            reference: Accuracy::of(suite, theirs),
            agreement,
            agreement_stderr,
            agreement_norm,
            agreement_norm_stderr,
            acc_difference,
            acc_difference_stderr,
            acc_norm_difference,
            acc_norm_difference_stderr,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Question;

    fn question(choices: &[&str], answer: usize) -> Question {
        let choices = choices.iter().map(|&choice| choice.to_owned()).collect();
        Question { question: "Q".to_owned(), choices, answer, line: 1 }
    }

    /// Figures by hand: scores, characters and bytes each choose another answer; of equals the first.
    #[test]
    fn answers_are_picked_as_the_harness_picks_them() {
        let suite = Suite {
            name: "suite.jsonl".to_owned(),
            sha256: String::new(),
            questions: vec![question(&["a", "bbbb", "\u{e9}\u{e9}\u{e9}"], 1), question(&["x", "y"], 0)],
        };
        let choice = |question| Choice { question, tokens: vec![1, 2], given: 1 };
        let choices: Vec<Choice> = [0, 0, 0, 1, 1].map(choice).to_vec();
        let scores = [-2.0, -4.4, -3.0, -1.5, -1.5];
        let own = picked(&suite, &choices, &scores);
        // Characters: -2, -1.1, -1; bytes: -2, -1.1, -0.5.
        assert_eq!(own[0], Picked { whole: 0, per_character: 2, per_byte: 2 });
        assert_eq!(own[1], Picked { whole: 0, per_character: 0, per_byte: 0 });
        let theirs = picked(&suite, &choices, &[-5.0, -4.4, -6.0, -1.5, -1.6]);
        // Characters: -5, -1.1, -2; bytes: -5, -1.1, -1.
        assert_eq!(theirs[0], Picked { whole: 1, per_character: 1, per_byte: 2 });
        let accuracy = Accuracy::of(&suite, &own);
        assert_eq!((accuracy.acc, accuracy.acc_norm, accuracy.acc_bytes), (0.5, 0.5, 0.5));
        assert_eq!(accuracy.acc_stderr, Some(0.5));
        let beside = Beside::of(&suite, &own, &theirs);
        assert_eq!((beside.reference.acc, beside.reference.acc_bytes), (1.0, 0.5));
        assert_eq!((beside.agreement, beside.agreement_norm, beside.acc_difference), (0.5, 0.5, -0.5));
    }

    #[test]
    fn lengths_are_filled_up_by_half_at_most() {
        for tokens in 12..5000 {
            let filled = filled(tokens);
            assert!(filled >= tokens && 2 * filled <= 3 * tokens, "{tokens} {filled}");
        }
    }
}
