//! Everything that can end a command, and whether it ended before any work.

use std::path::Path;

use mlx_format::checkpoint::{CheckpointError, ConfigError, DirectoryError, WriteError};
use mlx_quant_model::{TokenizerError, WeightsError};

use crate::data::DataError;
use crate::plan::PlanError;
use crate::setting::SettingError;

/// A reference or a model has another vocabulary than the other.
#[derive(Debug, thiserror::Error)]
#[error(
    "the reference {reference} has a vocabulary of {reference_rows}, the model {model} of {rows}; hint: a reference is the model that was quantized, give that one"
)]
pub struct VocabularyMismatch {
    pub(crate) reference: String,
    pub(crate) reference_rows: usize,
    pub(crate) model: String,
    pub(crate) rows: usize,
}

/// Why a model was not converted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// What is done on one device alone.
    #[error("{0} computes on one device; hint: name one with --device")]
    OneDevice(&'static str),
    /// Another device of a run on several has stopped.
    #[error("another device of this run has stopped; hint: its own message says why")]
    Stopped,
    /// The source directory.
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    /// The source weights.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// config.json.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Source and settings together.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// Calibration or evaluation data.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The output.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// A weight that is not a number.
    #[error(
        "tensor {tensor} in {file}: element {element} is {value}; hint: the checkpoint is damaged, download it again; --allow-nonfinite stores it all the same"
    )]
    NonFinite {
        /// MLX name.
        tensor: String,
        /// Source file.
        file: String,
        /// Index in the tensor.
        element: usize,
        /// NaN or infinity.
        value: f32,
    },
    /// A finite weight beyond the range of the output dtype.
    #[error(
        "tensor {tensor} in {file}: element {element} is too large for {dtype}; hint: use --dtype bfloat16"
    )]
    Overflow {
        /// MLX name.
        tensor: String,
        /// Source file.
        file: String,
        /// Index in the tensor.
        element: usize,
        /// Output dtype.
        dtype: &'static str,
    },
    /// Weights and config as a decoder.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// A reference that is another model.
    #[error(transparent)]
    Vocabulary(VocabularyMismatch),
    /// Logits that are not numbers.
    #[error(
        "the model's logits for token {token} of window {window} of {source_name} are not finite; hint: the model is damaged or its activations overflow, check it with `mlx-quant inspect --verify`"
    )]
    NotANumber {
        /// File of the text.
        source_name: String,
        /// Window of it.
        window: usize,
        /// Token of the window.
        token: usize,
    },
    /// The cache directory.
    #[error("{path}: {reason}; hint: give another directory to --cache")]
    Cache {
        /// File or directory.
        path: String,
        /// What the system says.
        reason: String,
        /// Whether the reference was already computed.
        working: bool,
    },
    /// A file in which activations wait.
    #[error("{path}: {reason}; hint: is the disk full? the same command goes on where this one stopped")]
    State {
        /// The file.
        path: String,
        /// What the system says.
        reason: String,
    },
    /// Something on which another process is at work.
    #[error("{path} is in use by another process; hint: wait until it has ended, or choose another place")]
    Busy {
        /// The file or directory.
        path: String,
    },
    /// A file without which an unfinished run cannot go on.
    #[error(
        "{path}: {reason}; hint: delete the directory that it lies in and repeat the command, which then begins anew"
    )]
    Lost {
        /// The file.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A directory of statistics that cannot be used.
    #[error("{path}: {reason}; hint: give another directory to --statistics")]
    Statistics {
        /// The directory.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A file of sensitivities that cannot be used.
    #[error(
        "{path}: {reason}; hint: give another file to --sensitivities, or remove this one to measure anew"
    )]
    Sensitivities {
        /// The file.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A directory of targets that cannot be used.
    #[error("{path}: {reason}; hint: give another directory to --target-dir")]
    Targets {
        /// The directory.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A directory that a comparison cannot use.
    #[error("{path}: {reason}; hint: give another directory to --output")]
    Comparison {
        /// The directory.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A student that is no quantized form of the teacher.
    #[error("{0}; hint: --quantized-model is to be a quantized form of --model")]
    Student(String),
    /// A student in which nothing can be trained.
    #[error(
        "nothing in {0} can be trained: it has no affine layer below 8 bits; hint: quantize it to fewer bits first"
    )]
    NothingToTrain(String),
    /// A setting that no run could follow.
    #[error(transparent)]
    Setting(#[from] SettingError),
    /// No size at which a model diverges as little as was asked for.
    #[error(
        "no model with a measured KL below {wanted} was found in {tries} tries; hint: ask for a larger one, or use gptq in the recipe"
    )]
    Divergence {
        /// Nats a token.
        wanted: f64,
        /// Models that were made at most.
        tries: usize,
    },
    /// Threads could not be started.
    #[error("cannot start {threads} threads: {reason}; hint: use fewer --threads")]
    Threads {
        /// How many were asked for.
        threads: usize,
        /// Why not.
        reason: String,
    },
    /// A part of the source that could not be brought here.
    #[error("{0}")]
    Fetch(String),
    /// The observer asked to stop.
    #[error("interrupted; hint: repeat the command to go on where it stopped")]
    Interrupted,
}

impl Error {
    /// A file in which intermediate results wait cannot be read or written.
    pub(crate) fn state(path: &Path, reason: &dyn std::fmt::Display) -> Self {
        Self::State { path: path.display().to_string(), reason: reason.to_string() }
    }

    /// A file or directory of a cache that cannot be used.
    pub(crate) fn cache(path: &std::path::Path, error: &std::io::Error, working: bool) -> Self {
        Self::Cache { path: path.display().to_string(), reason: error.to_string(), working }
    }

    /// A file without which an unfinished run cannot go on.
    pub(crate) fn lost(path: &std::path::Path, reason: String) -> Self {
        Self::Lost { path: path.display().to_string(), reason }
    }

    /// Something on which another process is at work.
    pub fn busy(path: &std::path::Path) -> Self {
        Self::Busy { path: path.display().to_string() }
    }

    /// Whether input or settings are to blame (nothing was written then), rather than something that happened
    /// during the work.
    pub fn is_refusal(&self) -> bool {
        match self {
            Self::Directory(_)
            | Self::Checkpoint(_)
            | Self::Config(_)
            | Self::Plan(_)
            | Self::Tokenizer(_)
            | Self::Data(_)
            | Self::NotANumber { .. }
            | Self::Vocabulary(_)
            | Self::Weights(_)
            | Self::NonFinite { .. }
            | Self::Busy { .. }
            | Self::Statistics { .. }
            | Self::Targets { .. }
            | Self::Comparison { .. }
            | Self::Student(_)
            | Self::NothingToTrain(_)
            | Self::Sensitivities { .. }
            | Self::Setting(_)
            | Self::OneDevice(_)
            | Self::Overflow { .. } => true,
            Self::Write(error) => !matches!(error, WriteError::Io(_) | WriteError::DiskFull { .. }),
            Self::Cache { working, .. } => !working,
            Self::Threads { .. }
            | Self::Divergence { .. }
            | Self::State { .. }
            | Self::Lost { .. }
            | Self::Stopped
            | Self::Fetch(_)
            | Self::Interrupted => false,
        }
    }
}
