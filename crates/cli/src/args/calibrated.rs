//! Arguments of the commands that look at calibration text.

use std::path::PathBuf;

use clap::Args;
use mlx_format::checkpoint::Destination;

use super::{HubFlags, Machine, ModelArg, Output, SchemeFlags, Target};

const AWQ_EXAMPLES: &str = "\
Examples:
  mlx-quant awq
      the built-in demo model at 4 bits with the built-in calibration text
  mlx-quant awq --model Qwen/Qwen3-8B --bits 3 --mlx-path ./Qwen3-8B-awq-3bit
  mlx-quant awq --model Qwen/Qwen3-8B --data chats.jsonl --n-samples 64 --embed-bits 6
  mlx-quant awq --model Qwen/Qwen3-8B --data allenai/tulu-3-sft-mixture
      calibration text from a dataset on the hub
  mlx-quant awq --model Qwen/Qwen3-8B --dry-run
      layers, exact bytes and memory, without writing anything";

/// Arguments of `awq`.
#[derive(Debug, Args)]
#[command(after_help = AWQ_EXAMPLES)]
pub(crate) struct Awq {
    #[command(flatten)]
    pub(crate) common: Calibrated,

    #[command(flatten)]
    pub(crate) awq: AwqFlags,
}

const GPTQ_EXAMPLES: &str = "\
Examples:
  mlx-quant gptq
      the built-in demo model at 4 bits with the built-in calibration text
  mlx-quant gptq --model Qwen/Qwen3-8B --bits 3 --mlx-path ./Qwen3-8B-gptq-3bit
  mlx-quant gptq --model Qwen/Qwen3-8B --q-mode nvfp4 --mlx-path ./Qwen3-8B-gptq-nvfp4
      second-order rounding to one of the fp formats; embeddings and head too, unless --fallback-bits is given
  mlx-quant gptq --model Qwen/Qwen3-8B --fallback-bits 4
      embedding and head at 4 bits too: 4.5 bits per weight instead of about 4.9
  mlx-quant gptq --model Qwen/Qwen3-30B-A3B --low-memory --verbose
      activations wait on disk; says which experts saw too few tokens";

/// Arguments of `gptq`.
#[derive(Debug, Args)]
#[command(after_help = GPTQ_EXAMPLES)]
pub(crate) struct Gptq {
    #[command(flatten)]
    pub(crate) common: Calibrated,

    #[command(flatten)]
    pub(crate) gptq: GptqFlags,
}

const DYNAMIC_EXAMPLES: &str = "\
Examples:
  mlx-quant dynamic-quant --target-bpw 4.5
      the built-in demo model: more bits for sensitive layers, fewer for others, 4.5 on average
  mlx-quant dynamic-quant --model Qwen/Qwen3-8B --target-bpw 4 --sensitivities qwen3-8b.json
      keeps the measurement; any other size from the same file takes seconds
  mlx-quant dynamic-quant --model Qwen/Qwen3-8B --target-size 4.2GB --min-bits 3
  mlx-quant dynamic-quant --model Qwen/Qwen3-8B --target-kl 0.02
      the smallest model that stays that close to the original
  mlx-quant quantize --recipe dynamic+awq+gptq --model Qwen/Qwen3-8B --target-bpw 4
      the same allocation, with better rounding";

/// Arguments of `dynamic-quant`.
#[derive(Debug, Args)]
#[command(after_help = DYNAMIC_EXAMPLES)]
pub(crate) struct DynamicQuant {
    #[command(flatten)]
    pub(crate) common: Calibrated,

    #[command(flatten)]
    pub(crate) dynamic: DynamicFlags,
}

/// Flags of dynamic mixed precision.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Dynamic mixed precision")]
pub(crate) struct DynamicFlags {
    /// Bits per weight of the whole model, scales included; the result is never above it [default: 4.0]
    #[arg(long, value_name = "X", conflicts_with_all = ["target_size", "target_kl"])]
    pub(crate) target_bpw: Option<f64>,

    /// Size of all weights, with its unit, as in 4.2GB or 500MiB
    #[arg(long, value_name = "SIZE", conflicts_with = "target_kl")]
    pub(crate) target_size: Option<String>,

    /// The smallest model whose KL to the original, in nats per token, is at most this: predicted, then measured
    #[arg(long, value_name = "X")]
    pub(crate) target_kl: Option<f64>,

    /// Fewest bits of a layer
    #[arg(long, visible_alias = "low-bits", value_name = "BITS", default_value_t = 2)]
    pub(crate) min_bits: u32,

    /// Most bits of a layer
    #[arg(long, visible_alias = "high-bits", value_name = "BITS", default_value_t = 8)]
    pub(crate) max_bits: u32,

    /// Keep the measured sensitivities in this file (JSON), or take them from there
    #[arg(long, value_name = "FILE")]
    pub(crate) sensitivities: Option<PathBuf>,

    /// Also show the perplexity of the result
    #[arg(long)]
    pub(crate) report_ppl: bool,
}

const DWQ_EXAMPLES: &str = "\
Examples:
  mlx-quant dwq
      the built-in demo model at 4 bits, scales and biases distilled from the original
  mlx-quant dwq --model Qwen/Qwen3-8B --bits 3 --iters 400 --data chats.jsonl
  mlx-quant dwq --model Qwen/Qwen3-8B --quantized-model ./Qwen3-8B-gptq --mlx-path ./better
      starts from any MLX model, of mixed precision or by other tools
  mlx-quant dwq --model Qwen/Qwen3-8B --target-dir ./targets --targets-only
  mlx-quant dwq --quantized-model ./Qwen3-8B-4bit --target-dir ./targets
      the original is needed for the first command only
  mlx-quant quantize --recipe rtn+dwq --model Qwen/Qwen3-8B
      trains round-to-nearest codes as they are, as mlx_lm.dwq does";

/// Arguments of `dwq`.
#[derive(Debug, Args)]
#[command(after_help = DWQ_EXAMPLES)]
#[command(mut_arg("n_samples", |arg| arg.help("Windows that are trained on; 0 for all [default: as many as the steps take]")))]
#[command(mut_arg("batch_size", |arg| arg.help("Windows per step [default: 4]")))]
pub(crate) struct Dwq {
    #[command(flatten)]
    pub(crate) common: Calibrated,

    #[command(flatten)]
    pub(crate) flags: DwqFlags,

    /// Start from this MLX quantized model (a directory or a hub id), whose codes stay [default: quantize --model first]
    #[arg(long, value_name = "MODEL")]
    pub(crate) quantized_model: Option<PathBuf>,

    /// Compute the teacher's targets into --target-dir, and stop
    #[arg(long, requires = "target_dir")]
    pub(crate) targets_only: bool,
}

/// Flags of DWQ.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "DWQ")]
pub(crate) struct DwqFlags {
    /// Steps of training
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub(crate) iters: usize,

    /// Absolute rate of Adam for scales and for what the middle of the codes decodes to; mlx_lm.dwq has 1e-6 [default: found from the
    /// scales and the distance to the original]
    #[arg(long, value_name = "X")]
    pub(crate) learning_rate: Option<f64>,

    /// Temperature of the distillation
    #[arg(long, value_name = "X", default_value_t = 2.0)]
    pub(crate) temperature: f64,

    /// Held-out windows on which steps are judged; the best one is kept
    #[arg(long, visible_alias = "num-valid-samples", value_name = "N", default_value_t = 16)]
    pub(crate) valid_samples: usize,

    /// Keep the original's targets (likeliest 1024 tokens of each token) in this directory, or take them from there
    #[arg(long, value_name = "DIR")]
    pub(crate) target_dir: Option<PathBuf>,

    /// Accepted; gradients are always taken block by block
    #[arg(long, hide = true)]
    pub(crate) grad_checkpoint: bool,
}

const QUANTIZE_EXAMPLES: &str = "\
Examples:
  mlx-quant quantize --recipe awq+gptq
      the built-in demo model: fold scales, then second-order rounding
  mlx-quant quantize --recipe awq+gptq --model Qwen/Qwen3-8B --bits 3 --mlx-path ./Qwen3-8B-3bit
  mlx-quant quantize --recipe search --model Qwen/Qwen3-8B
      no calibration text: the same as `convert -q --search`
  mlx-quant quantize --recipe gptq+learn --bits 2 --learn-steps 50
      the demo model at 2 bits: second-order rounding, then each block learns its codes and ranges
  mlx-quant quantize --recipe dynamic+awq+gptq+learn+dwq --model Qwen/Qwen3-8B --target-bpw 4
      everything there is

Methods, in this order: dynamic (bits for each layer), awq (scales), one of rtn, search, refine, gptq (codes), learn (codes, block by block), dwq (distillation).";

/// Arguments of `quantize`.
#[derive(Debug, Args)]
#[command(after_help = QUANTIZE_EXAMPLES)]
#[command(mut_arg("n_samples", |arg| arg.help("Calibration windows, and with dwq the windows that are trained on; 0 for all [default: 128; dwq trains on as many as its steps take]")))]
#[command(mut_arg("batch_size", |arg| arg.help("Windows per step of dwq [default: 4]")))]
pub(crate) struct Quantize {
    /// Methods, in their order, joined by +
    #[arg(long, value_name = "RECIPE")]
    pub(crate) recipe: mlx_quant::Recipe,

    #[command(flatten)]
    pub(crate) common: Calibrated,

    #[command(flatten)]
    pub(crate) dynamic: DynamicFlags,

    #[command(flatten)]
    pub(crate) awq: AwqFlags,

    #[command(flatten)]
    pub(crate) gptq: GptqFlags,

    #[command(flatten)]
    pub(crate) learn: LearnFlags,

    #[command(flatten)]
    pub(crate) dwq: DwqFlags,
}

/// Flags of AWQ.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "AWQ")]
pub(crate) struct AwqFlags {
    /// Exponents tried for the scales
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) n_grid: u32,

    /// Bits of embeddings and head [default: as the rest]
    #[arg(long, value_name = "BITS")]
    pub(crate) embed_bits: Option<u32>,

    /// Group size of embeddings and head [default: as the rest]
    #[arg(long, value_name = "N")]
    pub(crate) embed_group_size: Option<usize>,
}

/// Flags of GPTQ.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "GPTQ")]
pub(crate) struct GptqFlags {
    /// Columns processed together
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) block_size: u32,

    /// Part of the Hessian's mean diagonal added to its diagonal
    #[arg(long, value_name = "X", default_value_t = 0.01)]
    pub(crate) damping: f32,

    /// Part of the difference between the full-precision and the quantized stream that weights make up for: 0 (each layer aims at what it
    /// makes of the inputs that it gets) to 1; 0.5 is what was measured
    #[arg(long, value_name = "X", default_value_t = 0.0)]
    pub(crate) correction: f32,

    /// Sweeps of coordinate descent over scales, biases and codes after rounding
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub(crate) sweeps: usize,

    /// Round loud groups, and loud columns within them, first
    #[arg(long)]
    pub(crate) act_order: bool,

    /// Bits of embeddings and head [default: 6, as mlx_lm.gptq has it, or as the rest in an fp mode; with --bits 4, --fallback-bits 4 makes 4.5 bits per weight of
    /// the whole model]
    #[arg(long, value_name = "BITS")]
    pub(crate) fallback_bits: Option<u32>,

    /// Group size of embeddings and head [default: 64]
    #[arg(long, value_name = "N")]
    pub(crate) fallback_group_size: Option<usize>,
}

/// Flags of learned rounding.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Learn")]
pub(crate) struct LearnFlags {
    /// Steps that each block learns [default: 200]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) learn_steps: Option<u32>,

    /// Windows of a step [default: 8]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) learn_batch: Option<u32>,
}

/// What all calibrated commands take.
#[derive(Debug, Args)]
pub(crate) struct Calibrated {
    #[command(flatten)]
    pub(crate) target: Target,

    #[command(flatten)]
    pub(crate) scheme: SchemeFlags,

    /// Calibration text: .txt, .jsonl, .json, .csv, .tsv, .parquet (all but .parquet also as .gz or .zst), a directory of these, or a hub dataset
    /// id [default: the built-in calibration text]
    #[arg(long, visible_alias = "data-path", value_name = "PATH")]
    pub(crate) data: Option<PathBuf>,

    /// Stop at the first row of --data that the chat template refuses [default: leave such rows out, unless they are most]
    #[arg(long)]
    pub(crate) strict: bool,

    /// Calibration windows; 0 for all [default: 128]
    #[arg(long, visible_alias = "num-samples", value_name = "N")]
    pub(crate) n_samples: Option<usize>,

    /// Tokens per window
    #[arg(long, visible_alias = "max-seq-length", value_name = "N", default_value_t = 512)]
    pub(crate) sequence_length: usize,

    /// Without effect: windows are independent of each other, however many are in memory
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) batch_size: Option<u32>,

    /// Keep what calibration measures in this directory, or take it from there: any bits and methods on the same model and windows
    /// then need no forward pass. Layers do not see what was quantized before them [default: measure anew, on quantized inputs]
    #[arg(long, value_name = "DIR")]
    pub(crate) statistics: Option<PathBuf>,

    /// Held-out windows on which the result is measured against the source, for the model card; 0 for none
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub(crate) eval_windows: usize,

    /// Go on with the finished blocks of an unfinished run that another engine (--device) began: both compute, and the model card says so
    #[arg(long, conflicts_with = "restart")]
    pub(crate) restart_block: bool,

    #[command(flatten)]
    pub(crate) machine: Machine,

    #[command(flatten)]
    pub(crate) output: Output,

    #[command(flatten)]
    pub(crate) hub: HubFlags,
}

impl Calibrated {
    /// Where the model goes, and what of that may be in the way.
    pub(crate) fn destination(&self) -> Destination<'_> {
        Destination { restart_block: self.restart_block, ..self.target.destination() }
    }

    /// The model that is quantized, and its revision on the hub.
    pub(super) fn source(&self) -> (&ModelArg, &Option<String>) {
        (&self.target.model, &self.hub.revision)
    }
}
