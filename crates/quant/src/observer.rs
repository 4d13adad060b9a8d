//! How progress leaves the library.
//!
//! A job (a command, a call of [`crate::quantize`]) consists of [`Step`]s, which are told before any work
//! ([`Event::Job`]); a step has parts, each of which is an [`Event::Phase`] when its time comes. Whoever draws it knows from
//! that how much is still to come.

/// A step of a job: a method, the evaluation, or one model of a comparison.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// As a person reads it: `awq+gptq`.
    pub name: String,
    /// What it consists of, in order.
    pub parts: Vec<StepPart>,
    /// Whether the job may end without it.
    pub optional: bool,
}

/// A part of a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepPart {
    /// Name of its [`Event::Phase`]; [`StepPart::WRITE`] for an [`Event::Started`].
    pub phase: &'static str,
    /// Expected wall time, seconds; `None` where nothing was forecast.
    pub seconds: Option<f64>,
}

impl StepPart {
    /// Weights are read and written, counted in bytes.
    pub const WRITE: &'static str = "write";
}

impl Step {
    /// A step of these phases, of unknown length.
    pub fn new(name: impl Into<String>, phases: impl IntoIterator<Item = &'static str>) -> Self {
        let parts = phases.into_iter().map(|phase| StepPart { phase, seconds: None }).collect();
        Self { name: name.into(), parts, optional: false }
    }
}

/// What the steps of a phase are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Unit {
    /// Blocks of a model and, as the last one, its head.
    Blocks,
    /// Layers.
    Layers,
    /// Windows of text.
    Windows,
    /// Steps of a training.
    Steps,
    /// Nothing that a person would count: only the part that is done says something.
    Parts,
}

/// Something that happened.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Event<'a> {
    /// A job begins, which will take these steps. What follows belongs to it.
    Job {
        /// In their order.
        steps: &'a [Step],
    },
    /// Reading and writing weights begins.
    Started {
        /// Bytes to be read.
        total: u64,
        /// Bytes that an earlier, interrupted run has done.
        resumed: u64,
    },
    /// A part of the work begins.
    Phase {
        /// What it is.
        name: &'static str,
        /// What is counted.
        unit: Unit,
        /// So many of these; [`Event::Progress`] counts them.
        total: u64,
        /// Tokens that pass the model (or train it) in all of its steps; 0 where none do.
        tokens: u64,
    },
    /// So much of the phase that has just begun was done by an earlier, interrupted run.
    Resumed {
        /// In the phase's unit.
        done: u64,
    },
    /// A comparison turns to a method.
    Contestant {
        /// Its name.
        name: &'a str,
        /// Its place, from 0.
        index: usize,
        /// Of so many.
        total: usize,
    },
    /// A comparison is done with a method: what it made is measured.
    ContestantDone {
        /// Its name.
        name: &'a str,
        /// Mean KL(original || made) on held-out text, nats a token.
        kl: f64,
        /// Standard error of that, over windows.
        kl_stderr: Option<f64>,
        /// Of what was made.
        bits_per_weight: f64,
        /// Of all its safetensors files.
        bytes: u64,
        /// Wall time of making it, what it shares with other methods included.
        seconds: f64,
        /// Largest resident memory while it was made, bytes.
        peak_memory: Option<u64>,
        /// Whether an earlier run had done it.
        known: bool,
    },
    /// This many bytes of input (or steps of a phase) are done, earlier runs included.
    Progress {
        /// Bytes.
        done: u64,
    },
    /// Work goes on with this layer or tensor.
    Working {
        /// MLX name.
        name: &'a str,
    },
    /// A figure on the way, for those who want to know more.
    Note {
        /// What a person reads.
        text: &'a str,
    },
    /// Something that everybody should know, although work goes on.
    Warning {
        /// What a person reads.
        text: &'a str,
    },
    /// Every layer has its bits; nothing is written yet.
    Allocated {
        /// Of the whole model.
        bits_per_weight: f64,
        /// Nats a token.
        predicted_kl: f64,
        /// No allocation of the same size is predicted to diverge less.
        bound_kl: f64,
        /// Bits per weight between which a target can lie.
        range: (f64, f64),
        /// Predicted divergence at both ends of the range.
        range_kl: (f64, f64),
    },
    /// A search for a divergence has made a model and measured it.
    Tried {
        /// Of the model.
        bits_per_weight: f64,
        /// Measured, nats a token.
        kl: f64,
        /// What is to be reached.
        wanted: f64,
    },
    /// Weights are written; the directory is being synced and renamed.
    Finishing,
}

/// Receives events and may ask to stop. Called from the thread that runs the conversion.
pub trait Observer: Sync {
    /// Something happened.
    fn event(&self, event: Event<'_>);

    /// Whether to stop at the next opportunity, resumably.
    fn cancelled(&self) -> bool {
        false
    }

    /// Whether somebody reads [`Event::Note`]s; what only they need is not computed otherwise.
    fn wants_notes(&self) -> bool {
        false
    }

    /// Largest resident memory of the process since this was last asked, bytes; `None` where nobody knows. The library itself
    /// never asks the system.
    fn peak_memory(&self) -> Option<u64> {
        None
    }
}

/// Hears nothing, never stops.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Observer for Silent {
    fn event(&self, _: Event<'_>) {}
}

/// Passes on everything but the beginning of jobs: for calls that are steps of a larger job, which has been told.
pub struct Within<'o>(pub &'o dyn Observer);

impl Observer for Within<'_> {
    fn event(&self, event: Event<'_>) {
        if !matches!(event, Event::Job { .. }) {
            self.0.event(event);
        }
    }

    fn cancelled(&self) -> bool {
        self.0.cancelled()
    }

    fn wants_notes(&self) -> bool {
        self.0.wants_notes()
    }

    fn peak_memory(&self) -> Option<u64> {
        self.0.peak_memory()
    }
}

/// Passes on the wish to stop and nothing else.
pub(crate) struct Quiet<'o>(pub(crate) &'o dyn Observer);

impl Observer for Quiet<'_> {
    fn event(&self, _: Event<'_>) {}

    fn cancelled(&self) -> bool {
        self.0.cancelled()
    }
}
