//! One method at one size, and the size as a budget.

use mlx_format::Scheme;

use crate::methods::{Method, Recipe, RecipeError};
use crate::plan::{Plan, Settings};
use crate::spelling::did_you_mean;
use crate::{Error, Model};

/// A recipe with the scheme that says how large its result is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contestant {
    /// Shown, and unique among all.
    pub name: String,
    /// What is done.
    pub recipe: Recipe,
    /// Of every layer; where the recipe allocates bits, the sum of all layers at this scheme is its budget.
    pub scheme: Scheme,
}

impl Contestant {
    /// By the name of mlx-lm's guide (`basic`, `awq`, `gptq`, `dynamic`, `dwq`), or by a recipe.
    ///
    /// # Errors
    /// A name that is neither.
    pub fn new(name: &str, scheme: Scheme) -> Result<Self, RecipeError> {
        let recipe = match name.trim() {
            "basic" | "convert" => Recipe::of(Method::Rtn),
            "dynamic-quant" | "dynamic_quant" => Recipe::of(Method::Dynamic),
            other => other.parse().map_err(|error| meant_here(error, other))?,
        };
        let name = match recipe.methods() {
            [only] => only.common_name().to_owned(),
            _ => recipe.to_string(),
        };
        Ok(Self { name, recipe, scheme })
    }

    /// Says the width where several are compared.
    #[must_use]
    pub fn with_width(mut self) -> Self {
        self.name = format!("{}, {} bits", self.name, self.scheme.bits());
        self
    }

    /// Of the plan for `model`, before bits are allocated.
    pub(crate) fn settings(&self, model: &Model) -> Settings {
        let search = self.recipe.rounding() == Method::Search && !self.recipe.needs_calibration();
        Settings {
            quantize: Some(self.scheme),
            keep_unreached: self.recipe.needs_calibration(),
            search,
            allow_unread: model.allow_unread,
            ..Settings::default()
        }
    }
}

/// Names that stand for a recipe here, and are none.
const NAMES: [&str; 4] = ["basic", "convert", "dynamic-quant", "dynamic_quant"];

/// Nearest to a lone word may be a name that is no method.
fn meant_here(error: RecipeError, word: &str) -> RecipeError {
    match error {
        RecipeError::Unknown { recipe, name, .. } if name == word => {
            let known = Method::ALL.map(Method::name).into_iter().chain(NAMES);
            RecipeError::Unknown { meant: did_you_mean(word, known), recipe, name }
        }
        other => other,
    }
}

impl Method {
    /// As users of mlx-lm's guide call it.
    const fn common_name(self) -> &'static str {
        match self {
            Self::Rtn => "basic",
            other => other.name(),
        }
    }
}

/// As many bits per weight as everything at one scheme takes, in thousandths, so that a command line can say it.
pub fn budget(model: &Model, scheme: Scheme) -> Result<f64, Error> {
    let settings =
        Settings { quantize: Some(scheme), allow_unread: model.allow_unread, ..Settings::default() };
    Ok(budget_of(&Plan::new(&model.checkpoint, &model.config, settings)?))
}

/// The same of a plan that holds everything at one scheme.
pub(crate) fn budget_of(plan: &Plan) -> f64 {
    (plan.language_bits_per_weight() * 1000.0).floor() / 1000.0
}
