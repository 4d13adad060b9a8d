//! Who chooses the factors of a fold, and how tests look into a run.

use mlx_quant_engine::Result;
use mlx_quant_model::State;

use crate::methods::awq::{self, Reader, Ties};
use crate::methods::{Gram, Method, MethodSettings};
use crate::walks::calibrate::Saving;

/// A site whose features may get factors.
pub(super) struct Candidate<'c> {
    pub(super) gram: &'c Gram,
    /// Samples of the weights that read it.
    pub(super) readers: &'c [Reader<'c>],
    pub(super) ties: Ties<'c>,
    /// How readers are rounded afterwards.
    pub(super) rounding: Method,
    pub(super) settings: &'c MethodSettings,
}

/// Chooses factors. Recipes use [`Searched`]; tests have one that folds wherever it is possible.
pub(super) trait ChooseFactors: Sync {
    /// Whether every site is folded: also those whose readers are not quantized, and where it does not help.
    fn always(&self) -> bool {
        false
    }

    /// Powers of two, one a feature; `None` where the site stays as it is.
    fn choose(&self, candidate: &Candidate<'_>) -> Result<Option<Vec<f32>>>;
}

/// The factors of least loss on a grid, where they help.
pub(super) struct Searched;

impl ChooseFactors for Searched {
    fn choose(&self, candidate: &Candidate<'_>) -> Result<Option<Vec<f32>>> {
        let Candidate { gram, readers, ties, rounding, settings } = *candidate;
        let search = rounding != Method::Rtn;
        let Some(factors) = awq::choose(gram, readers, settings.n_grid, search, ties)? else {
            return Ok(None);
        };
        let helps = rounding != Method::Gptq || awq::helps_gptq(gram, readers, &factors, settings)?;
        Ok(helps.then_some(factors))
    }
}

/// Where tests take part in a run.
pub(super) struct Hooks<'h> {
    pub(super) choose: &'h dyn ChooseFactors,
    /// Called with the states behind the last block.
    pub(super) left: Option<&'h (dyn Fn(Vec<State>) + Sync)>,
    /// When states are saved, instead of what the settings say.
    pub(super) saving: Option<Saving>,
}

impl Hooks<'_> {
    /// What every run outside tests has.
    pub(super) const USUAL: Hooks<'static> = Hooks { choose: &Searched, left: None, saving: None };
}
