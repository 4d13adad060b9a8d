//! Flags that several commands take.

use std::path::PathBuf;

use clap::Args;
use mlx_format::Scheme;
use mlx_format::checkpoint::Destination;
use mlx_quant::recipes::{DeviceChoice, Precision};

use super::choices::{DtypeArg, ModeArg};
use super::model::ModelArg;
use crate::refusal::Refusal;
use crate::typed::typed;

/// How weights are stored.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct SchemeFlags {
    /// Bits per weight: 2, 3, 4, 5, 6 or 8 [default: 4; the fp modes have their own]
    #[arg(id = "q_bits", long = "q-bits", visible_alias = "bits", value_name = "BITS")]
    pub(crate) bits: Option<u32>,

    /// Weights that share a scale: 32, 64 or 128 [default: 64; the fp modes have their own]
    #[arg(id = "q_group_size", long = "q-group-size", visible_alias = "group-size", value_name = "N")]
    pub(crate) group_size: Option<usize>,

    /// Quantization mode; what trains, or gives layers bits of their own, is affine
    #[arg(id = "q_mode", long = "q-mode", value_enum, default_value = "affine")]
    pub(crate) mode: ModeArg,
}

impl SchemeFlags {
    /// The scheme that they name.
    pub(crate) fn scheme(self) -> Result<Scheme, Refusal> {
        let scheme = Scheme::new(self.mode.into(), self.bits, self.group_size);
        scheme.and_then(Scheme::widely_loaded).map_err(|error| Refusal(error.to_string()))
    }
}

/// What every command that writes a model takes.
#[derive(Debug, Args)]
#[expect(clippy::struct_excessive_bools, reason = "flags")]
pub(crate) struct Target {
    #[command(flatten)]
    pub(crate) model: ModelArg,

    /// Output directory; must not exist (but see --overwrite), directories above it are made
    #[arg(long, value_name = "DIR", default_value = "mlx_model")]
    pub(crate) mlx_path: PathBuf,

    /// Begin anew where an unfinished run into this output was left, instead of going on with it
    #[arg(long)]
    pub(crate) restart: bool,

    /// Replace an existing output as soon as the new model is finished; only a directory with a model that mlx-quant wrote, and nothing else in
    /// it
    #[arg(long)]
    pub(crate) overwrite: bool,

    /// TOML file with bits, group size, mode or keep for layers by path pattern
    #[arg(long, value_name = "FILE")]
    pub(crate) recipe_file: Option<PathBuf>,

    /// dtype of what is not quantized, and of scales and biases [default: config.json's torch_dtype]
    #[arg(long, value_enum)]
    pub(crate) dtype: Option<DtypeArg>,

    /// Print the plan (schemes, bits per weight, exact bytes, memory, time) and write nothing
    #[arg(long)]
    pub(crate) dry_run: bool,

    /// Carry tensors along that no part of the model reads instead of refusing them
    #[arg(long)]
    pub(crate) allow_unread: bool,

    /// Leave out what sees and hears (towers, projectors, their settings): the output is the language model alone [default: keep it in 16 bits,
    /// as mlx_vlm has it; mlx_lm takes both]
    #[arg(long)]
    pub(crate) text_only: bool,

    /// Also write the multi-token-prediction heads, at 8 bits if the model is quantized, as a drafter for mlx_vlm into the directory of the same
    /// name with -mtp behind it [default: leave them out]
    #[arg(long)]
    pub(crate) mtp: bool,

    /// Take the tokens that end a text from generation_config.json or config.json alone, as mlx_lm does [default: all that config.json,
    /// generation_config.json and the chat template name]
    #[arg(long)]
    pub(crate) keep_eos: bool,
}

impl Target {
    /// Where the model goes, and what of that may be in the way.
    pub(crate) fn destination(&self) -> Destination<'_> {
        Destination {
            path: &self.mlx_path,
            restart: self.restart,
            restart_block: false,
            replaces: self.overwrite.then_some(mlx_quant::replace::replaceable),
            command: Some(typed()),
        }
    }
}

/// What computes, and how exactly.
#[derive(Clone, Debug, Args)]
pub(crate) struct DeviceFlags {
    /// What computes: auto, cpu, gpu, gpu:N or gpu:NAME (`mlx-quant devices` lists them; convert needs none). Several cards of one kind share the windows of gptq, awq and eval, and so the memory: gpu:0,gpu:1 or gpu:all
    #[arg(long, default_value = "cpu")]
    pub(crate) device: DeviceChoice,

    /// Products on a card: float32, or fast: by matrix units, in two float16 for each number with sums in float32
    #[arg(long, default_value = "float32")]
    pub(crate) precision: Precision,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Machine")]
pub(crate) struct Machine {
    /// Threads; the result does not depend on it [default: one per core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) threads: Option<u32>,

    /// Smallest resident set: activations wait in files
    #[arg(long)]
    pub(crate) low_memory: bool,

    #[command(flatten)]
    pub(crate) device: DeviceFlags,

    /// Seed of the choice of calibration windows
    #[arg(long, default_value_t = 123)]
    pub(crate) seed: u64,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Output")]
pub(crate) struct Output {
    /// Print one JSON document on stdout
    #[arg(long)]
    pub(crate) json: bool,

    /// Say nothing but errors
    #[arg(long, conflicts_with = "verbose")]
    pub(crate) quiet: bool,

    /// Say more
    #[arg(long)]
    pub(crate) verbose: bool,
}
