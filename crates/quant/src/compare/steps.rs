//! The steps of a comparison: one a method, with the work that methods share in the first that needs it.

use std::collections::BTreeSet;

use super::CompareSettings;
use crate::forecast::Forecast;
use crate::observer::Step;
use crate::session::rounding_phase;

/// A step for each method. With what is forecast for each (as [`super::foresee`] gives it) they know how long they take.
pub fn steps(settings: &CompareSettings, forecasts: Option<&[Forecast]>) -> Vec<Step> {
    let mut shared = BTreeSet::new();
    let mut first = |phases: &[&'static str]| -> Vec<&'static str> {
        phases.iter().copied().filter(|phase| shared.insert(*phase)).collect()
    };
    let mut steps = Vec::new();
    for (at, contestant) in settings.contestants.iter().enumerate() {
        let recipe = &contestant.recipe;
        let mut phases = Vec::new();
        if recipe.allocates() {
            phases.extend(first(&["sensitivities", "candidates"]));
        }
        if recipe.trains() {
            phases.extend(first(&["teacher"]));
        }
        phases.push(rounding_phase(recipe));
        phases.extend(recipe.trains().then_some("dwq"));
        phases.extend(first(&["reference"]));
        phases.extend(["model", "head"]);
        let step = Step::new(&contestant.name, phases);
        match forecasts.and_then(|forecasts| forecasts.get(at)) {
            Some(forecast) => steps.extend(forecast.expect(vec![step])),
            None => steps.push(step),
        }
    }
    steps
}
