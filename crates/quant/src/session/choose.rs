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

/// What factors a site's features may get, and those they get in any case.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Room {
    /// Powers of two that nvfp4 needs, one a feature; ones otherwise.
    pub(super) base: Vec<f32>,
    /// The least and the largest factor of each feature.
    pub(super) limits: Vec<(f32, f32)>,
}

impl Room {
    /// Of `size` features without any limit.
    pub(super) fn new(size: usize) -> Self {
        Self { base: vec![1.0; size], limits: vec![(0.0, f32::INFINITY); size] }
    }

    /// Whether nothing has to be folded.
    pub(super) fn is_plain(&self) -> bool {
        self.base.iter().all(|factor| *factor == 1.0)
    }

    /// These factors on top of the base, as far as there is room for them.
    pub(super) fn over(&self, factors: Vec<f32>) -> Vec<f32> {
        self.within(factors.into_iter().zip(&self.base).map(|(factor, base)| factor * base))
    }

    /// Factors, as far as there is room for them.
    pub(super) fn within(&self, factors: impl IntoIterator<Item = f32>) -> Vec<f32> {
        let within = |(factor, (least, most)): (f32, &(f32, f32))| factor.min(*most).max(*least);
        factors.into_iter().zip(&self.limits).map(within).collect()
    }
}

/// Chooses factors. Recipes use [`Searched`]; tests have one that folds wherever it is possible.
pub(super) trait ChooseFactors: Sync {
    /// Whether every site is folded: also those whose readers are not quantized, and where it does not help.
    fn always(&self) -> bool {
        false
    }

    /// Powers of two, one a feature; `None` where the site stays as `room` has it.
    fn choose(&self, candidate: &Candidate<'_>, room: &Room) -> Result<Option<Vec<f32>>>;
}

/// The factors of least loss on a grid, where they help.
pub(super) struct Searched;

impl ChooseFactors for Searched {
    fn choose(&self, candidate: &Candidate<'_>, room: &Room) -> Result<Option<Vec<f32>>> {
        let Candidate { gram, readers, ties, rounding, settings } = *candidate;
        let search = rounding != Method::Rtn;
        let within = |factors: Vec<f32>| room.over(factors);
        let tried: (usize, awq::Within<'_>) = (settings.n_grid, &within);
        let Some(factors) = awq::choose(gram, readers, tried, &room.base, search, ties)? else {
            return Ok(None);
        };
        let helps =
            rounding != Method::Gptq || awq::helps_gptq(gram, readers, (&factors, &room.base), settings)?;
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
