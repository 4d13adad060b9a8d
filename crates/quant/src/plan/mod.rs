//! The plan: every output tensor, its scheme and its place, known from headers alone.
//!
//! `--dry-run` prints a plan and stops; [`crate::convert()`] carries one out. Everything that can be wrong with a
//! source or with settings is found here, before any work.

mod check;
mod end_of_turn;
mod error;
mod ids;
mod mixed;
mod overrides;
mod planner;
mod report;

use std::collections::BTreeMap;

use mlx_format::checkpoint::{Checkpoint, Config, Layout};
use mlx_format::{FloatType, Scheme};

pub use self::end_of_turn::GenerationConfig;
pub use self::error::PlanError;
pub use self::ids::TensorId;
pub use self::mixed::MixedRecipe;
pub use self::overrides::{Overrides, OverridesError};
pub use self::report::{LayerReport, PlanReport};

use self::check::{check_by_names, check_experts, check_settings};
use self::end_of_turn::EndOfTurn;
use self::ids::Paths;
use self::planner::Planner;
use mlx_quant_model::{Architecture, Named, View};

/// What is to be done with a model.
#[derive(Clone, Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "independent choices")]
pub struct Settings {
    /// Quantize with this scheme.
    pub quantize: Option<Scheme>,
    /// With a mixed-bit recipe (affine; its bits replace those of the scheme).
    pub mixed: Option<MixedRecipe>,
    /// Per-layer settings.
    pub overrides: Option<Overrides>,
    /// Schemes of single modules by path, below those of `overrides`.
    pub schemes: BTreeMap<String, Scheme>,
    /// Search scales and biases instead of taking them from each group's extremes; same format, same size.
    pub search: bool,
    /// Decode an MLX-quantized model.
    pub dequantize: bool,
    /// dtype of what is not quantized, and of scales and biases; default: config.json's `torch_dtype`.
    pub dtype: Option<FloatType>,
    /// Every tensor in the dtype that it has, whatever config.json says.
    pub keep_dtypes: bool,
    /// Store NaN and infinity as MLX does instead of refusing them.
    pub allow_nonfinite: bool,
    /// Carry tensors along that no part of the model reads instead of refusing them.
    pub allow_unread: bool,
    /// Take end-of-turn tokens as mlx-lm does, from generation_config.json alone or else from config.json.
    pub keep_eos: bool,
}

/// What is done to one tensor or layer.
#[derive(Clone, Debug, PartialEq)]
pub enum Job {
    /// Written as it is, or in another dtype.
    Copy {
        /// The tensor.
        view: View,
        /// Its dtype in the output where it changes (or 1 is added).
        float: Option<FloatType>,
    },
    /// Cast to `float`, then quantized; weight, scales and (affine) biases are written.
    Quantize {
        /// The weight, `[.., out, in]`.
        view: View,
        /// dtype of scales and biases.
        float: FloatType,
        /// How.
        scheme: Scheme,
    },
    /// Decoded from packed form.
    Dequantize {
        /// uint32 codes.
        weight: View,
        /// Scales.
        scales: View,
        /// Biases, affine only.
        biases: Option<View>,
        /// dtype of the result (affine scales and biases are cast to it first, as mlx-lm does).
        float: FloatType,
        /// How it is packed.
        scheme: Scheme,
    },
}

/// One step of the plan.
#[derive(Clone, Debug, PartialEq)]
pub struct Item {
    /// Module path for layers, full name for other tensors.
    pub name: String,
    /// What is done.
    pub job: Job,
    /// Index of its first tensor in the layout; the others follow.
    pub first_output: usize,
}

/// A complete plan.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Description of the model type.
    pub architecture: Architecture,
    /// In output order.
    pub items: Vec<Item>,
    /// Files, headers, offsets.
    pub layout: Layout,
    /// config.json of the output.
    pub config: Config,
    /// generation_config.json of the output: mlx_lm takes the tokens that end a text from it.
    pub generation_config: GenerationConfig,
    /// Weights, as mlx-lm counts them: codes, not scales.
    pub parameters: u64,
    /// What a person should know.
    pub notes: Vec<String>,
    /// The settings it was made from.
    pub settings: Settings,
    paths: Paths,
}

impl Plan {
    /// Plans the conversion of an opened checkpoint. Reads headers and config.json only.
    ///
    /// # Errors
    /// [`PlanError`].
    pub fn new(checkpoint: &Checkpoint, config: &Config, settings: Settings) -> Result<Self, PlanError> {
        let named = Named::read(checkpoint, config)?;
        check_settings(&settings, &named.existing)?;
        named.check(checkpoint, settings.allow_unread)?;
        if !named.architecture.described {
            check_experts(&named)?;
        }
        if settings.quantize.is_some() && !named.architecture.described {
            check_by_names(&named, config)?;
        }
        let eos = EndOfTurn::of(checkpoint.directory(), config, settings.keep_eos);
        Planner::new(named, settings, config)?.finish(config, eos)
    }

    /// The item of a module path (of a layer) or a full name (of another tensor).
    pub fn by_path(&self, path: &str) -> Option<TensorId> {
        self.paths.find(path)
    }

    /// Items whose names begin with `prefix`, such as `model.layers.3.`, in output order.
    pub fn below(&self, prefix: &str) -> Vec<TensorId> {
        self.paths.below(prefix)
    }

    /// The item of a number that this plan gave out.
    ///
    /// # Panics
    /// If it is another plan's.
    pub fn item(&self, id: TensorId) -> &Item {
        &self.items[id.index()]
    }

    /// Stored bits per weight of the whole model, as mlx-lm counts them.
    pub fn bits_per_weight(&self) -> f64 {
        crate::parameters::bits_per_weight(self.layout.tensor_bytes(), self.parameters)
    }

    /// Bytes read from the source.
    pub fn input_bytes(&self) -> u64 {
        self.items
            .iter()
            .map(|item| item.views().map(|view| (view.rows() * view.row_bytes()) as u64).sum::<u64>())
            .sum()
    }
}

impl Item {
    /// All views it reads.
    pub fn views(&self) -> impl Iterator<Item = &View> {
        let (first, second, third) = match &self.job {
            Job::Copy { view, .. } | Job::Quantize { view, .. } => (view, None, None),
            Job::Dequantize { weight, scales, biases, .. } => (weight, Some(scales), biases.as_ref()),
        };
        std::iter::once(first).chain(second).chain(third)
    }
}
