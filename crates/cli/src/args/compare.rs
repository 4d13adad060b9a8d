//! Arguments of `compare`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::{Machine, ModelArg, Output};

const COMPARE_EXAMPLES: &str = "\
Examples:
  mlx-quant compare
      the built-in demo model: the five methods and all of them stacked, at 4 bits; minutes
  mlx-quant compare --model Qwen/Qwen3-8B --methods basic,gptq,dynamic --n-samples 32
  mlx-quant compare --model Qwen/Qwen3-8B --bits 3,4 --methods basic,gptq,dynamic+awq+gptq
      two sizes; the plot shows KL against size
  mlx-quant compare --model Qwen/Qwen3-8B --dry-run
      what each method would need, without doing it

Methods: basic, search, awq, gptq, dynamic, dwq, learn, or recipes such as awq+gptq, gptq+learn and dynamic+awq+gptq+learn+dwq. All get the same bits per weight:
embeddings and head as the rest, and dynamic the sum as its budget.";

/// Which models stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum KeepArg {
    /// Of each width the one with the lowest KL
    Best,
    /// All
    All,
    /// None
    None,
}

/// Arguments of `compare`.
#[derive(Debug, Args)]
#[command(after_help = COMPARE_EXAMPLES)]
#[expect(clippy::struct_excessive_bools, reason = "flags")]
pub(crate) struct Compare {
    #[command(flatten)]
    pub(crate) model: ModelArg,

    /// Branch, tag or commit of a model on the hub [default: main]
    #[arg(long, value_name = "REVISION")]
    pub(crate) revision: Option<String>,

    /// Let pass tensors that no part of the model reads instead of refusing them
    #[arg(long)]
    pub(crate) allow_unread: bool,

    /// Methods and recipes, separated by commas
    #[arg(
        long,
        value_name = "LIST",
        value_delimiter = ',',
        default_value = "basic,awq,gptq,dynamic,dwq,dynamic+awq+gptq+dwq"
    )]
    pub(crate) methods: Vec<String>,

    /// Bits per weight of the codes, one or several: 2, 3, 4, 5, 6 or 8
    #[arg(long, visible_alias = "bits", value_name = "LIST", value_delimiter = ',', default_value = "4")]
    pub(crate) q_bits: Vec<u32>,

    /// Weights that share a scale: 32, 64 or 128
    #[arg(long, visible_alias = "group-size", value_name = "N", default_value_t = 64)]
    pub(crate) q_group_size: usize,

    /// Directory of the reports and of models that are kept; an unfinished comparison in it is resumed
    #[arg(long, visible_alias = "mlx-path", value_name = "DIR", default_value = "mlx_compare")]
    pub(crate) output: PathBuf,

    /// Begin anew where the output directory holds a comparison, instead of going on with it; models that it kept go
    #[arg(long)]
    pub(crate) restart: bool,

    /// Which models stay in the output directory
    #[arg(long, value_enum, default_value = "best")]
    pub(crate) keep: KeepArg,

    /// Print what each method would need and write nothing
    #[arg(long)]
    pub(crate) dry_run: bool,

    /// Calibration text: .txt, .jsonl, .json, .csv, .tsv, .parquet (all but .parquet also as .gz or .zst), a directory of these, or a hub dataset
    /// id [default: the built-in calibration text]
    #[arg(long, visible_alias = "data-path", value_name = "PATH")]
    pub(crate) data: Option<PathBuf>,

    /// Text on which everything is measured, also from the hub; no method sees it [default: the built-in held-out text]
    #[arg(long, value_name = "PATH")]
    pub(crate) eval_data: Option<PathBuf>,

    /// Stop at the first row of --data or --eval-data that the chat template refuses [default: leave such rows out, unless they are most]
    #[arg(long)]
    pub(crate) strict: bool,

    /// Windows on which everything is measured, evenly spaced over each file; 0 for all
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub(crate) windows: usize,

    /// Calibration windows, and windows that dwq trains on; 0 for all [default: 128; dwq as many as its steps take]
    #[arg(long, visible_alias = "num-samples", value_name = "N")]
    pub(crate) n_samples: Option<usize>,

    /// Tokens per window
    #[arg(long, visible_alias = "max-seq-length", value_name = "N", default_value_t = 512)]
    pub(crate) sequence_length: usize,

    /// Windows per step of dwq
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) batch_size: u32,

    /// Steps of dwq, fewer than dwq itself takes
    #[arg(long, value_name = "N", default_value_t = 50)]
    pub(crate) iters: usize,

    /// Steps that each block learns, fewer than learn itself takes
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) learn_steps: u32,

    /// All methods take one set of Hessians, of the full-precision model: faster, and a little worse than the single commands
    #[arg(long)]
    pub(crate) share_statistics: bool,

    #[command(flatten)]
    pub(crate) machine: Machine,

    #[command(flatten)]
    pub(crate) shown: Output,
}
