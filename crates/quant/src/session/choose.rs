//! Who chooses the factors of a fold, and who hears how a run went.

use mlx_quant_engine::Result;
use mlx_quant_model::State;

use crate::methods::awq::{self, Reader, Ties};
use crate::methods::{Gram, Method, MethodSettings};

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

/// Chooses factors. [`Searched`] is what recipes use; tests fold wherever it is possible.
pub(super) trait ChooseFactors: Sync {
    /// Whether sites are folded too whose readers are not quantized, and whatever that brings.
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

/// Where a run can be looked into.
pub(super) struct Hooks<'h> {
    pub(super) choose: &'h dyn ChooseFactors,
    /// Is given what left the last block.
    pub(super) left: Option<&'h (dyn Fn(Vec<State>) + Sync)>,
}

impl Hooks<'_> {
    /// What every run outside tests has.
    pub(super) const USUAL: Hooks<'static> = Hooks { choose: &Searched, left: None };
}
