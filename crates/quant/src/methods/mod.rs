//! Methods of quantization as passes, and recipes that stack them.
//!
//! [`Method::Dynamic`] rewrites the plan: it gives every layer its scheme. [`Method::Rtn`] and [`Method::Search`] need
//! nothing but the weights. [`Method::Awq`], [`Method::Gptq`] and [`Method::Refine`] look at one site of one block at a
//! time and at the [`Gram`] matrix of its inputs: AWQ chooses factors that are folded into what stands before the site,
//! then a rounding method chooses codes, scales and biases. [`Method::Learn`] lets each block learn its codes and ranges anew,
//! from those that were chosen. [`Method::Dwq`] trains scales and biases of the whole model.

pub(crate) mod awq;

use std::fmt;
use std::str::FromStr;

pub(crate) use mlx_quant_engine::rounding::ROWS;
pub use mlx_quant_engine::rounding::{How, Pending, Rounded, round};
pub use mlx_quant_engine::{Factor, Gram, GramSum};

use crate::spelling::did_you_mean;

/// One method.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Method {
    /// Bits where they matter: a scheme for every layer under a budget of bytes ([`crate::dynamic::DynamicPlan`]).
    Dynamic,
    /// Activation-aware scales (Lin et al. 2023, arXiv 2306.00978); rounds with [`Method::Search`] if nothing follows.
    Awq,
    /// Round to nearest on the grids of `mx.quantize`; alone equal to it, after folding with codes nearest to the
    /// stored scales.
    Rtn,
    /// Round to nearest with searched scales and biases.
    Search,
    /// Round to nearest on searched grids, then coordinate descent over scales, biases and codes on each block's own
    /// inputs; what [`Method::Dynamic`] and [`Method::Dwq`] round with if nothing else is said.
    Refine,
    /// Second-order rounding (Frantar et al. 2022, arXiv 2210.17323).
    Gptq,
    /// Learned rounding (Cheng et al. 2023, arXiv 2309.05516), block by block, from the codes that a rounding method chose
    /// ([`crate::learn`]).
    Learn,
    /// Scales and biases distilled from the full-precision model (`mlx_lm.dwq`).
    Dwq,
}

impl Method {
    /// All, in the order in which they may be stacked.
    pub const ALL: [Self; 8] =
        [Self::Dynamic, Self::Awq, Self::Rtn, Self::Search, Self::Refine, Self::Gptq, Self::Learn, Self::Dwq];

    /// As in recipes.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Dynamic => "dynamic",
            Self::Awq => "awq",
            Self::Rtn => "rtn",
            Self::Search => "search",
            Self::Refine => "refine",
            Self::Gptq => "gptq",
            Self::Learn => "learn",
            Self::Dwq => "dwq",
        }
    }

    /// Its place in a recipe; methods of one place exclude each other.
    const fn place(self) -> u8 {
        match self {
            Self::Dynamic => 0,
            Self::Awq => 1,
            Self::Rtn | Self::Search | Self::Refine | Self::Gptq => 2,
            Self::Learn => 3,
            Self::Dwq => 4,
        }
    }

    const fn rounds(self) -> bool {
        self.place() == 2
    }
}

/// A recipe that cannot be followed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecipeError {
    /// Not a method.
    #[error(
        "recipe {recipe:?}: there is no method {name:?}; hint: {meant}stack dynamic, awq, one of rtn, search, refine, gptq, then learn and dwq, as in dynamic+awq+gptq+learn+dwq"
    )]
    Unknown {
        /// As given.
        recipe: String,
        /// The part.
        name: String,
        /// The method that it may stand for, as a hint begins with it; or nothing.
        meant: String,
    },
    /// In an order that makes no sense.
    #[error(
        "recipe {recipe:?}: {name} cannot follow; hint: dynamic comes first, then awq, then one method that rounds, then learn, then dwq: dynamic+awq+gptq+learn+dwq"
    )]
    Order {
        /// As given.
        recipe: String,
        /// The part.
        name: &'static str,
    },
}

/// Methods in the order in which they run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recipe(Vec<Method>);

impl Recipe {
    /// One method alone.
    pub fn of(method: Method) -> Self {
        Self(vec![method])
    }

    /// Its methods.
    pub fn methods(&self) -> &[Method] {
        &self.0
    }

    /// Whether scales are folded.
    pub fn folds(&self) -> bool {
        self.0.contains(&Method::Awq)
    }

    /// Whether layers get schemes of their own.
    pub fn allocates(&self) -> bool {
        self.0.contains(&Method::Dynamic)
    }

    /// Whether blocks learn their rounding.
    pub fn learns(&self) -> bool {
        self.0.contains(&Method::Learn)
    }

    /// Whether scales and biases are trained.
    pub fn trains(&self) -> bool {
        self.0.contains(&Method::Dwq)
    }

    /// What chooses codes.
    pub fn rounding(&self) -> Method {
        let rounding = self.0.iter().copied().find(|method| method.rounds());
        rounding.unwrap_or(if self.folds() { Method::Search } else { Method::Refine })
    }

    /// Whether windows of calibration text pass the blocks while these are rounded.
    pub fn walks(&self) -> bool {
        self.folds() || self.learns() || matches!(self.rounding(), Method::Gptq | Method::Refine)
    }

    /// Whether it looks at calibration text.
    pub fn needs_calibration(&self) -> bool {
        self.walks() || self.allocates() || self.trains()
    }
}

impl FromStr for Recipe {
    type Err = RecipeError;

    fn from_str(recipe: &str) -> Result<Self, RecipeError> {
        let mut methods: Vec<Method> = Vec::new();
        for name in recipe.split('+').map(str::trim) {
            let method = Method::ALL.into_iter().find(|method| method.name() == name);
            let Some(method) = method else {
                let meant = did_you_mean(name, Method::ALL.map(Method::name));
                return Err(RecipeError::Unknown { recipe: recipe.to_owned(), name: name.to_owned(), meant });
            };
            if methods.last().is_some_and(|before| before.place() >= method.place()) {
                return Err(RecipeError::Order { recipe: recipe.to_owned(), name: method.name() });
            }
            methods.push(method);
        }
        Ok(Self(methods))
    }
}

impl fmt::Display for Recipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.0.iter().map(|method| method.name()).collect();
        f.write_str(&names.join("+"))
    }
}

/// Figures of the methods.
#[derive(Clone, Debug, PartialEq)]
pub struct MethodSettings {
    /// AWQ: exponents tried.
    pub n_grid: usize,
    /// GPTQ: columns between updates of all columns after them.
    pub block_size: usize,
    /// GPTQ: part of the Hessian's mean diagonal added to its diagonal.
    pub damping: f32,
    /// GPTQ: part of what the full-precision stream is beyond the quantized one that readers make up for, as far as inputs tell it; 0
    /// to 1.
    pub correction: f32,
    /// GPTQ: sweeps of coordinate descent after rounding.
    pub sweeps: usize,
    /// GPTQ: loud groups, and loud columns within them, first.
    pub act_order: bool,
}

impl Default for MethodSettings {
    fn default() -> Self {
        Self { n_grid: 20, block_size: 128, damping: 0.01, correction: 0.0, sweeps: 2, act_order: false }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recipes() {
        for text in [
            "rtn",
            "search",
            "awq",
            "gptq",
            "awq+gptq",
            "awq+search",
            "awq+rtn",
            "dynamic",
            "dwq",
            "rtn+dwq",
            "dynamic+awq+gptq+dwq",
            "learn",
            "gptq+learn",
            "search+learn+dwq",
            "dynamic+awq+gptq+learn+dwq",
        ] {
            assert_eq!(text.parse::<Recipe>().unwrap().to_string(), text);
        }
        let recipe: Recipe = "awq + gptq".parse().unwrap();
        assert!(recipe.folds() && recipe.rounding() == Method::Gptq && recipe.needs_calibration());
        assert_eq!(Recipe::of(Method::Awq).rounding(), Method::Search);
        assert!(!Recipe::of(Method::Search).needs_calibration());
        for text in ["", "awk", "awq+", "gptq,awq"] {
            assert!(matches!(text.parse::<Recipe>(), Err(RecipeError::Unknown { .. })), "{text}");
        }
        let said = |text: &str| text.parse::<Recipe>().unwrap_err().to_string();
        assert!(
            said("awq+gtpq").contains("\"gtpq\"; hint: did you mean gptq? stack"),
            "{}",
            said("awq+gtpq")
        );
        assert!(said("llama").contains("hint: stack"), "{}", said("llama"));
        let rounding = |text: &str| text.parse::<Recipe>().unwrap().rounding();
        assert_eq!(
            ["dynamic", "dwq", "dynamic+dwq", "learn", "rtn+dwq"].map(rounding),
            [Method::Refine, Method::Refine, Method::Refine, Method::Refine, Method::Rtn]
        );
        for text in [
            "gptq+awq",
            "awq+awq",
            "gptq+gptq",
            "search+gptq",
            "awq+rtn+gptq",
            "dwq+gptq",
            "awq+dynamic",
            "learn+gptq",
            "dwq+learn",
        ] {
            assert!(matches!(text.parse::<Recipe>(), Err(RecipeError::Order { .. })), "{text}");
        }
    }
}
