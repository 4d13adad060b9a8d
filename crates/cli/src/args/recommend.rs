//! Arguments of `recommend`.

use clap::builder::TypedValueParser;
use clap::{Args, ValueEnum};
use mlx_quant::forecast::Quality;

use super::{DeviceFlags, ModelArg, Output};

const RECOMMEND_EXAMPLES: &str = "\
Examples:
  mlx-quant recommend Qwen/Qwen3-8B
      what to do now, within an hour or overnight on this machine, what each method needs, and its command
  mlx-quant recommend --model Qwen/Qwen3-8B --size 4GB --quality best
  mlx-quant recommend --model Qwen/Qwen3-8B --memory 16GB --time 1h
  mlx-quant recommend --model Qwen/Qwen3-8B --target-bpw 3.5 --json

A directory with config.json alone will do: shapes are taken from it, so that a model can be planned for before it is downloaded.";

const MODEL: &str = "Model: a directory (config.json alone will do), or a hub id or URL, of which only headers are fetched [default: the built-in demo model]";

/// Arguments of `recommend`.
#[derive(Debug, Args)]
#[command(after_help = RECOMMEND_EXAMPLES)]
#[command(mut_arg("model", |arg| arg.help(MODEL)))]
pub(crate) struct Recommend {
    #[command(flatten)]
    pub(crate) model: ModelArg,

    /// Branch, tag or commit of a model on the hub [default: main]
    #[arg(long, value_name = "REVISION")]
    pub(crate) revision: Option<String>,

    /// Memory that may be used, with its unit, as in 16GB [default: what is free]
    #[arg(long, value_name = "SIZE")]
    pub(crate) memory: Option<String>,

    /// Time that may be used, with its unit, as in 90s, 30min or 2h [default: a night]
    #[arg(long, value_name = "TIME")]
    pub(crate) time: Option<String>,

    /// Bits per weight of the result, scales included
    #[arg(long, value_name = "X", conflicts_with = "size")]
    pub(crate) target_bpw: Option<f64>,

    /// Size of the result's weights, with its unit, as in 3GB
    #[arg(long, visible_alias = "target-size", value_name = "SIZE")]
    pub(crate) size: Option<String>,

    /// Which row of the answer is the advice
    #[arg(long, value_enum, default_value = "balanced")]
    pub(crate) quality: QualityArg,

    /// Bits of a code where no size is asked for: 2, 3, 4, 5, 6 or 8
    #[arg(long, visible_alias = "bits", value_name = "BITS", default_value_t = 4)]
    pub(crate) q_bits: u32,

    /// Weights that share a scale: 32, 64 or 128
    #[arg(long, visible_alias = "group-size", value_name = "N", default_value_t = 64)]
    pub(crate) q_group_size: usize,

    /// Calibration windows, and windows that dwq trains on [default: 128; dwq as many as its steps take]
    #[arg(long, visible_alias = "num-samples", value_name = "N", value_parser = counted(1, 1_000_000))]
    pub(crate) n_samples: Option<usize>,

    /// Tokens per window
    #[arg(long, visible_alias = "max-seq-length", value_name = "N", default_value_t = 512, value_parser = counted(2, 10_000_000))]
    pub(crate) sequence_length: usize,

    /// Steps of dwq
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = counted(1, 100_000))]
    pub(crate) iters: usize,

    /// Measure this machine again instead of using what was measured before
    #[arg(long)]
    pub(crate) measure: bool,

    /// Threads [default: one per core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) threads: Option<u32>,

    #[command(flatten)]
    pub(crate) device: DeviceFlags,

    #[command(flatten)]
    pub(crate) output: Output,
}

/// A number between two.
fn counted(least: u64, most: u64) -> impl TypedValueParser<Value = usize> {
    clap::value_parser!(u64).range(least..=most).map(|count| usize::try_from(count).unwrap_or(usize::MAX))
}

/// `--quality`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum QualityArg {
    /// Now: the quickest
    Fast,
    /// Within an hour: the closest to the original that is ready by then
    Balanced,
    /// Overnight: the closest to the original that is ready by then
    Best,
}

impl From<QualityArg> for Quality {
    fn from(choice: QualityArg) -> Self {
        match choice {
            QualityArg::Fast => Self::Fast,
            QualityArg::Balanced => Self::Balanced,
            QualityArg::Best => Self::Best,
        }
    }
}
