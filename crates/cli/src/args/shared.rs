//! Flags and choices that several commands take.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use mlx_format::{FloatType, Mode};
use mlx_quant::plan::MixedRecipe;
use mlx_quant::recipes::{Device, DeviceChoice};

use crate::refusal::Refusal;

/// What every command that writes a model takes.
#[derive(Debug, Args)]
pub(crate) struct Target {
    /// Model: a directory, or a hub id such as Qwen/Qwen3-8B [default: the built-in demo model]
    #[arg(long, short = 'm', visible_alias = "hf-path", value_name = "MODEL")]
    pub(crate) model: Option<PathBuf>,

    /// Output directory; must not exist
    #[arg(long, value_name = "DIR", default_value = "mlx_model")]
    pub(crate) mlx_path: PathBuf,

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

    /// Take the tokens that end a text from generation_config.json or config.json alone, as mlx_lm does [default: all that config.json,
    /// generation_config.json and the chat template name]
    #[arg(long)]
    pub(crate) keep_eos: bool,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Machine")]
pub(crate) struct Machine {
    /// Threads; the result does not depend on it [default: one per core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) threads: Option<u32>,

    /// Smallest resident set: activations wait in files (convert always streams)
    #[arg(long)]
    pub(crate) low_memory: bool,

    /// Device
    #[arg(long, value_enum, default_value = "cpu")]
    pub(crate) device: DeviceArg,

    /// Seed of the choice of calibration windows (convert draws nothing at random)
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

/// A choice on the command line that stands for a value of the library.
macro_rules! choices {
    ($(#[$doc:meta])* $name:ident => $value:ty { $($variant:ident = $text:literal => $target:expr,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
        pub(crate) enum $name {
            $(#[value(name = $text)] $variant,)*
        }

        impl From<$name> for $value {
            fn from(choice: $name) -> Self {
                match choice {
                    $($name::$variant => $target,)*
                }
            }
        }
    };
}

choices!(
    /// `--q-mode`.
    ModeArg => Mode {
        Affine = "affine" => Mode::Affine,
        Mxfp4 = "mxfp4" => Mode::Mxfp4,
        Mxfp8 = "mxfp8" => Mode::Mxfp8,
        Nvfp4 = "nvfp4" => Mode::Nvfp4,
    }
);

choices!(
    /// `--quant-predicate`.
    RecipeArg => MixedRecipe {
        Mixed2_6 = "mixed_2_6" => MixedRecipe::Mixed2_6,
        Mixed3_4 = "mixed_3_4" => MixedRecipe::Mixed3_4,
        Mixed3_6 = "mixed_3_6" => MixedRecipe::Mixed3_6,
        Mixed4_6 = "mixed_4_6" => MixedRecipe::Mixed4_6,
    }
);

choices!(
    /// `--dtype`.
    DtypeArg => FloatType {
        Float16 = "float16" => FloatType::F16,
        Bfloat16 = "bfloat16" => FloatType::Bf16,
        Float32 = "float32" => FloatType::F32,
    }
);

/// `--device`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum DeviceArg {
    /// The best that there is
    Auto,
    /// The processor
    Cpu,
    /// A graphics card
    #[value(hide = true)]
    Gpu,
}

impl DeviceArg {
    /// What will compute.
    pub(crate) fn choose(self) -> Result<Device, Refusal> {
        let choice = match self {
            Self::Auto => DeviceChoice::Auto,
            Self::Cpu => DeviceChoice::Cpu,
            Self::Gpu => DeviceChoice::Gpu,
        };
        Ok(Device::choose(choice)?)
    }
}
