//! Flags whose values are a few words.

use clap::ValueEnum;
use mlx_format::{FloatType, Mode};
use mlx_quant::plan::MixedRecipe;

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
