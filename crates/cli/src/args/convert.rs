//! Arguments of `convert`.

use clap::Args;

use super::{HubFlags, Machine, Output, RecipeArg, SchemeFlags, Target};

const EXAMPLES: &str = "\
Examples:
  mlx-quant convert -q
      the built-in demo model at 4 bits, into ./mlx_model
  mlx-quant convert -q --model Qwen/Qwen3-8B --mlx-path ./Qwen3-8B-4bit
  mlx-quant convert -q --model Qwen/Qwen3-8B --quant-predicate mixed_4_6 --mlx-path ./Qwen3-8B-mixed
  mlx-quant convert -q --stream --model Qwen/Qwen3-30B-A3B --mlx-path ./Qwen3-30B-A3B-4bit
      a model larger than the disk: one shard at a time
  mlx-quant convert -q --model ./Qwen3-8B --mlx-path ./local-4bit
      a directory on this machine
  mlx-quant convert -q --model Qwen/Qwen3-8B --q-mode mxfp4 --dry-run
      what would be written, layer by layer, without writing it
  mlx-quant convert -d --model ./Qwen3-8B-4bit --mlx-path ./Qwen3-8B-decoded

A recipe file sets layers apart (later entries win; * matches any characters):
  [[layer]]
  path = \"*.mlp.down_proj\"
  bits = 6
  [[layer]]
  path = \"lm_head\"
  keep = true";

/// Arguments of `convert`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
#[command(mut_arg("low_memory", |arg| arg.help("Without effect: weights are streamed whatever is said")))]
#[command(mut_arg("seed", |arg| arg.help("Without effect: nothing is drawn at random")))]
#[expect(clippy::struct_excessive_bools, reason = "flags")]
pub(crate) struct Convert {
    #[command(flatten)]
    pub(crate) target: Target,

    /// Quantize
    #[arg(long, short = 'q')]
    pub(crate) quantize: bool,

    /// Decode a quantized MLX model
    #[arg(long, short = 'd', conflicts_with = "quantize")]
    pub(crate) dequantize: bool,

    #[command(flatten)]
    pub(crate) scheme: SchemeFlags,

    /// Search scales and biases instead of taking them from each group's extremes (affine, with -q): same format and size, better
    #[arg(long)]
    pub(crate) search: bool,

    /// A float32 for each of stacked experts, over which its scales are spread (with --q-mode nvfp4; loads in mlx_lm 0.32.2 and later)
    #[arg(long, requires = "quantize", conflicts_with = "search")]
    pub(crate) q_global_scale: bool,

    /// Mixed-bit recipe: more bits for some layers' value and down projections and for the head
    #[arg(long, value_enum, value_name = "RECIPE")]
    pub(crate) quant_predicate: Option<RecipeArg>,

    /// Fetch a model on the hub shard by shard, each gone once it is converted: needs room for the output and about two shards
    #[arg(long)]
    pub(crate) stream: bool,

    /// Store NaN and infinite weights as MLX does instead of refusing them
    #[arg(long)]
    pub(crate) allow_nonfinite: bool,

    #[command(flatten)]
    pub(crate) machine: Machine,

    #[command(flatten)]
    pub(crate) output: Output,

    #[command(flatten)]
    pub(crate) hub: HubFlags,
}
