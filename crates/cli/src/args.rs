//! The command line: parsed, not yet acted upon.

mod calibrated;
mod choices;
mod compare;
mod convert;
mod devices;
mod hub;
mod model;
mod recommend;
mod shared;

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use clap::{Args, Parser, Subcommand};

pub(crate) use self::calibrated::{
    Awq, AwqFlags, Calibrated, Dwq, DwqFlags, DynamicFlags, DynamicQuant, Gptq, GptqFlags, LearnFlags,
    Quantize,
};
pub(crate) use self::choices::RecipeArg;
pub(crate) use self::compare::{Compare, KeepArg};
pub(crate) use self::convert::Convert;
pub(crate) use self::devices::Devices;
pub(crate) use self::hub::{HubFlags, Upload};
pub(crate) use self::model::ModelArg;
pub(crate) use self::recommend::Recommend;
pub(crate) use self::shared::DeviceFlags;
use self::shared::{Machine, Output, SchemeFlags, Target};
use crate::refusal::Refusal;

/// Version, what is built in, and the kernels that this machine gets.
static LONG_VERSION: LazyLock<String> = LazyLock::new(|| {
    let features = [
        ("demo", cfg!(feature = "demo")),
        ("hub", cfg!(feature = "hub")),
        ("parquet", cfg!(feature = "parquet")),
        ("gpu", cfg!(feature = "gpu")),
    ];
    let built: Vec<&str> = features.iter().filter(|feature| feature.1).map(|feature| feature.0).collect();
    format!(
        "{}\nfeatures: {}\nkernels: {}\nplatform: {}-{}",
        env!("CARGO_PKG_VERSION"),
        if built.is_empty() { "none".to_owned() } else { built.join(", ") },
        mlx_format::simd_name(),
        std::env::consts::ARCH,
        std::env::consts::OS
    )
});

const EXAMPLES_OF_ALL: &str = "\
Examples:
  mlx-quant compare
      all methods on the built-in demo model, ranked by what they lose; minutes
  mlx-quant recommend Qwen/Qwen3-8B
      what to do now, within an hour or overnight, and the command for each method
  mlx-quant convert -q --model Qwen/Qwen3-8B --mlx-path ./out-4bit
      the quickest: 4 bits, equal to mlx_lm.convert
  mlx-quant eval --model ./Qwen3-8B-4bit --reference Qwen/Qwen3-8B
      is the quantized model any good?";

/// Turns Hugging Face language models into MLX quantized models.
#[derive(Debug, Parser)]
#[command(name = "mlx-quant", version, long_version = LONG_VERSION.as_str(), arg_required_else_help = true)]
#[command(max_term_width = 100, after_help = EXAMPLES_OF_ALL)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Convert a model: quantize (-q), dequantize (-d), or only change its dtype
    ///
    /// Round to nearest, equal to mlx_lm.convert tensor for tensor. Weights are streamed: memory does not grow
    /// with the model, and an interrupted run resumes when it is repeated.
    Convert(Box<Convert>),

    /// Quantize with activation-aware scales (AWQ) on calibration text
    ///
    /// Important channels are found by the magnitudes of their activations and made easier to round by scales that are
    /// folded into the layer before; scales and biases of all groups are searched. Works for every model type that `eval` runs.
    Awq(Box<Awq>),

    /// Quantize with second-order rounding (GPTQ) on calibration text
    ///
    /// Weights are rounded column by column and later columns make up for the errors of earlier ones, block by block on the
    /// outputs of the blocks that are quantized already. Any bits, any group size.
    Gptq(Box<Gptq>),

    /// Quantize with bits where they matter: a width and group size for every layer, under a budget
    ///
    /// One backward pass over calibration text measures what a change of each layer costs in KL; a knapsack then spends the bytes.
    /// Scales and biases are searched. The measurement can be kept: any other size is then planned in seconds.
    #[command(alias = "dynamic_quant")]
    DynamicQuant(Box<DynamicQuant>),

    /// Distill scales and biases of a quantized model from the original (DWQ)
    ///
    /// Trains scales and biases of all layers below 8 bits (at 2 and 3 bits weights of norms, too) by KL to the original, block by block, and
    /// keeps the best step on held-out windows: never worse than it began. Begins with rounding that is refined on each block's own inputs, or with any MLX model.
    Dwq(Box<Dwq>),

    /// Quantize with a recipe of stacked methods, such as dynamic+awq+gptq
    Quantize(Box<Quantize>),

    /// Show what a model is: parameters, bits per weight, how each layer is stored; --verify checks everything
    ///
    /// Takes unconverted Hugging Face models and MLX models, quantized or not. Reads headers and config.json only,
    /// with --verify every tensor. Exit code 2 if --verify finds anything wrong.
    Inspect(Inspect),

    /// Measure a model's quality on held-out text: perplexity, and KL and top-1 agreement with a reference
    ///
    /// Takes Hugging Face models and MLX models, quantized or not, and measures the files as they are written, decoded
    /// in float32. Standard errors are over windows.
    Eval(Eval),

    /// Compare methods on your model: quantize with each at the same size, measure each on held-out text, rank them
    ///
    /// Writes a table, and report.html, report.md, report.json and report.svg into the output directory. Work that methods share is done
    /// once. An interrupted comparison goes on where it was when it is repeated; more methods can join later.
    Compare(Box<Compare>),

    /// Say what to do now, within an hour and overnight: expected quality, memory, time and command for each method on this machine
    ///
    /// Reads headers (or config.json alone) and is instant; the first call measures the machine for two seconds and keeps that.
    Recommend(Recommend),

    /// List what can compute here: the processor and graphics adapters, with memory, limits and measured rate
    ///
    /// Says which word --device takes for each, and which of them `auto` is. The first call measures each for two seconds and keeps that.
    Devices(Devices),

    /// Upload a model directory to the hub, in one commit
    ///
    /// Creates the repository if it is not there, sends the files that differ, and removes weights of an earlier model in the same commit.
    /// An interrupted upload goes on when it is repeated.
    Upload(Upload),

    /// Print a completion script for a shell
    #[command(after_help = COMPLETIONS_EXAMPLES)]
    Completions {
        /// The shell
        #[arg(value_enum)]
        shell: clap_complete::Shell,
    },

    /// Write man pages, one a command
    #[command(after_help = MAN_EXAMPLES)]
    Man {
        /// Directory for them
        #[arg(value_name = "DIR")]
        directory: PathBuf,
    },
}

const COMPLETIONS_EXAMPLES: &str = "\
Examples:
  mlx-quant completions bash > mlx-quant.bash
      source it, or put it into ~/.local/share/bash-completion/completions
  mlx-quant completions zsh > _mlx-quant";

const MAN_EXAMPLES: &str = "\
Examples:
  mlx-quant man ./man1
      man -l man1/mlx-quant-compare.1";

/// A model (a directory or what is on the hub; nothing for the built-in demo model), and its revision on the hub.
type Source<'a> = (Option<&'a Path>, Option<&'a str>);

impl Command {
    /// The model that it is about, with its revision on the hub; nothing of commands that are about none or name it otherwise.
    ///
    /// # Errors
    /// Two models where one is meant.
    pub(crate) fn source(&self) -> Result<Option<Source<'_>>, Refusal> {
        let (model, revision) = match self {
            Self::Convert(args) => (&args.target.model, &args.hub.revision),
            Self::Awq(args) => args.common.source(),
            Self::Gptq(args) => args.common.source(),
            Self::DynamicQuant(args) => args.common.source(),
            Self::Dwq(args) => args.common.source(),
            Self::Quantize(args) => args.common.source(),
            Self::Inspect(args) => (&args.model, &args.revision),
            Self::Eval(args) => (&args.model, &args.revision),
            Self::Compare(args) => (&args.model, &args.revision),
            Self::Recommend(args) => (&args.model, &args.revision),
            Self::Devices(_) | Self::Upload(_) | Self::Completions { .. } | Self::Man { .. } => {
                return Ok(None);
            }
        };
        model.check()?;
        let mut given = model.given();
        // With targets at hand, the quantized model is all that there is.
        if let (None, Self::Dwq(args)) = (given, self)
            && args.flags.target_dir.is_some()
        {
            given = args.quantized_model.as_deref();
        }
        Ok(Some((given, revision.as_deref())))
    }

    /// How it shows things; nothing of commands that only print.
    pub(crate) fn output(&self) -> Option<&Output> {
        Some(match self {
            Self::Convert(args) => &args.output,
            Self::Awq(args) => &args.common.output,
            Self::Gptq(args) => &args.common.output,
            Self::DynamicQuant(args) => &args.common.output,
            Self::Dwq(args) => &args.common.output,
            Self::Quantize(args) => &args.common.output,
            Self::Inspect(args) => &args.output,
            Self::Eval(args) => &args.output,
            Self::Compare(args) => &args.shown,
            Self::Recommend(args) => &args.output,
            Self::Devices(args) => &args.output,
            Self::Upload(args) => &args.output,
            Self::Completions { .. } | Self::Man { .. } => return None,
        })
    }
}

const INSPECT_EXAMPLES: &str = "\
Examples:
  mlx-quant inspect
      the built-in demo model
  mlx-quant inspect ./Qwen3-8B-4bit
  mlx-quant inspect ./Qwen3-8B-4bit --verify
      does mlx_lm load it, are all weights numbers, does the tokenizer fit?
  mlx-quant inspect ./Qwen3-8B-4bit --json | jq '.layers[] | select(.packing.bits == 6) | .path'";

/// Arguments of `inspect`.
#[derive(Debug, Args)]
#[command(after_help = INSPECT_EXAMPLES)]
pub(crate) struct Inspect {
    #[command(flatten)]
    pub(crate) model: ModelArg,

    /// Branch, tag or commit of a model on the hub [default: main]
    #[arg(long, value_name = "REVISION")]
    pub(crate) revision: Option<String>,

    /// Check every tensor, the index, config.json and the tokenizer, and say whether mlx_lm loads the model
    #[arg(long)]
    pub(crate) verify: bool,

    /// Threads of --verify [default: one per core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) threads: Option<u32>,

    #[command(flatten)]
    pub(crate) output: Output,
}

const EVAL_EXAMPLES: &str = "\
Examples:
  mlx-quant eval
      the built-in demo model on the built-in held-out text
  mlx-quant eval --model ./Qwen3-8B-4bit --reference Qwen/Qwen3-8B
      what quantization cost: KL(reference || model), top-1 agreement
  mlx-quant eval --model ./Qwen3-8B-4bit --reference Qwen/Qwen3-8B --data chats.jsonl --windows 64 --json
  mlx-quant eval --model ./Qwen3-8B-3bit --reference Qwen/Qwen3-8B --cache ~/.cache/mlx-quant
      the reference is computed once and kept
  mlx-quant eval --model ./Qwen3-8B-3bit --reference Qwen/Qwen3-8B --suite questions.jsonl
      task accuracy beside KL: lines such as
      {\"question\": \"Question: What is ice?\\nAnswer:\", \"choices\": [\"frozen water\", \"a metal\"], \"answer\": 0}
  mlx-quant eval --model Qwen/Qwen3-8B --low-memory --dry-run
      how much memory it would need

Data: .txt; rows with `text`, `prompt` and `completion`, `messages`, `conversations`, or `instruction` and `output` in .jsonl, .json, .csv,
.tsv or .parquet (chats are rendered with the model's chat template); a directory of these, each file reported apart. Of more than 64 MiB of text
only as much is read as the windows need.";

const EVALUATED: &str = "Model, Hugging Face, MLX dense or MLX quantized: a directory, or a hub id or URL such as mlx-community/Qwen3-8B-4bit [default: the built-in demo model]";

/// Arguments of `eval`.
#[derive(Debug, Args)]
#[command(after_help = EVAL_EXAMPLES)]
#[command(mut_arg("model", |arg| arg.help(EVALUATED)))]
#[expect(clippy::struct_excessive_bools, reason = "flags")]
pub(crate) struct Eval {
    #[command(flatten)]
    pub(crate) model: ModelArg,

    /// Branch, tag or commit of --model on the hub [default: main]
    #[arg(long, value_name = "REVISION")]
    pub(crate) revision: Option<String>,

    /// Model that was quantized, to compare with: a directory or a hub id (with another revision: ORG/NAME@REVISION)
    #[arg(long, value_name = "MODEL")]
    pub(crate) reference: Option<PathBuf>,

    /// Text to evaluate on: .txt, .jsonl, .json, .csv, .tsv, .parquet (all but .parquet also as .gz or .zst), a directory of these, or a hub dataset
    /// id [default: the built-in held-out text]
    #[arg(long, visible_alias = "data-path", value_name = "PATH")]
    pub(crate) data: Option<PathBuf>,

    /// Also answer the multiple-choice questions of this .jsonl file, scored by log-likelihood as lm-evaluation-harness scores them
    #[arg(long, value_name = "FILE")]
    pub(crate) suite: Option<PathBuf>,

    /// Stop at the first row of --data that the chat template refuses [default: leave such rows out, unless they are most]
    #[arg(long)]
    pub(crate) strict: bool,

    /// Windows, evenly spaced over each file; 0 for all
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub(crate) windows: usize,

    /// Tokens per window
    #[arg(long, visible_alias = "max-seq-length", value_name = "N", default_value_t = 512)]
    pub(crate) sequence_length: usize,

    /// Keep what the reference computes in this directory, for the next model [default: keep nothing]
    #[arg(long, value_name = "DIR", requires = "reference")]
    pub(crate) cache: Option<PathBuf>,

    /// Also write the result into this file, as Markdown or JSON by its ending
    #[arg(long, value_name = "FILE")]
    pub(crate) report: Option<PathBuf>,

    /// Print what would be evaluated and how much memory it would need, and stop
    #[arg(long)]
    pub(crate) dry_run: bool,

    /// Read blocks one at a time even where keeping them would be faster [default: where they do not fit in free memory]
    #[arg(long)]
    pub(crate) low_memory: bool,

    /// Let pass tensors that no part of the model reads instead of refusing them
    #[arg(long)]
    pub(crate) allow_unread: bool,

    /// Threads; the result does not depend on it [default: one per core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) threads: Option<u32>,

    #[command(flatten)]
    pub(crate) device: DeviceFlags,

    #[command(flatten)]
    pub(crate) output: Output,
}
