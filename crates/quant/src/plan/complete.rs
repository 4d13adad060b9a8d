//! A complete plan, and what can be asked of it.

use mlx_format::checkpoint::{Config, Layout};
use mlx_quant_model::{Architecture, View};
use serde::Serialize;

use super::ids::Paths;
use super::{GenerationConfig, Item, Job, Settings, TensorId};

/// Parts that see and hear, which are carried along beside the language model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Towers {
    /// Items of the plan, its last ones.
    #[serde(skip)]
    pub items: usize,
    /// Tensors.
    pub tensors: usize,
    /// Weights, as mlx-lm counts them.
    pub weights: u64,
    /// Bytes.
    pub bytes: u64,
}

/// A planned drafter.
#[derive(Clone, Debug)]
pub struct DrafterPlan {
    /// Its tensors and config.json.
    pub plan: Plan,
    /// Files of the tokenizer that lie beside it, where the source has them.
    pub files: &'static [&'static str],
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
    /// The parts that see and hear, which are in all other figures too.
    pub towers: Towers,
    /// Tensors of multi-token-prediction heads, which are left out, or go into the drafter.
    pub prediction_heads: usize,
    /// The model of these heads, written beside the output, where that is asked for.
    pub drafter: Option<Box<DrafterPlan>>,
    /// What a person should know.
    pub notes: Vec<String>,
    /// The settings it was made from.
    pub settings: Settings,
    pub(super) paths: Paths,
}

impl Plan {
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

    /// Whether an item is a layer of stacked experts that gets a `global_scale`, its last tensor.
    pub(crate) fn is_spread(&self, item: &Item) -> bool {
        let last = self.layout.specs().get(item.first_output + 2);
        matches!(item.job, Job::Quantize { .. })
            && last.is_some_and(|spec| spec.name.strip_suffix(".global_scale") == Some(item.name.as_str()))
    }

    /// Stored bits per weight of the whole model, as mlx-lm counts them.
    pub fn bits_per_weight(&self) -> f64 {
        crate::parameters::bits_per_weight(self.layout.tensor_bytes(), self.parameters)
    }

    /// Stored bits per weight of the language model alone, which is what methods have a say in.
    pub fn language_bits_per_weight(&self) -> f64 {
        crate::parameters::bits_per_weight(self.language_bytes(), self.language_parameters())
    }

    /// Bytes of the language model's tensors.
    pub fn language_bytes(&self) -> u64 {
        self.layout.tensor_bytes() - self.towers.bytes
    }

    /// Weights of the language model.
    pub fn language_parameters(&self) -> u64 {
        self.parameters - self.towers.weights
    }

    /// Bytes read from the source.
    pub fn input_bytes(&self) -> u64 {
        self.items.iter().map(|item| item.views().map(View::stored_bytes).sum::<u64>()).sum()
    }
}
