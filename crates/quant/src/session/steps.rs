//! What a calibrated recipe consists of, before any work.

use super::QuantizeSettings;
use crate::methods::{Method, Recipe};
use crate::observer::{Step, StepPart};

/// The phase in which layers are rounded.
pub(super) const ROUNDING: &str = "quantize";

/// The phase in which a recipe rounds: block by block, or tensor by tensor where nothing has to pass the blocks.
pub fn rounding_phase(recipe: &Recipe) -> &'static str {
    if recipe.walks() { ROUNDING } else { StepPart::WRITE }
}

/// The steps of [`crate::quantize`]: folding and rounding as one, training, evaluation. (What dynamic measures comes
/// before them: [`crate::dynamic::step`].)
pub fn steps(settings: &QuantizeSettings) -> Vec<Step> {
    let recipe = &settings.recipe;
    let apart = |method: &&Method| !matches!(method, Method::Dynamic | Method::Dwq);
    let names: Vec<&str> = recipe.methods().iter().filter(apart).map(|method| method.name()).collect();
    let name = if names.is_empty() { recipe.rounding().name().to_owned() } else { names.join("+") };
    let rounding = Step::new(name, [rounding_phase(recipe)]);
    let training = recipe.trains().then(crate::dwq::step);
    let evaluation = settings.evaluate.is_some().then(|| crate::evaluate::step(true));
    [Some(rounding), training, evaluation].into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Pick, Windows};

    fn windows() -> Windows {
        let pick = Pick::Sampled { windows: 0, seed: 0 };
        Windows {
            sequence_length: 8,
            pick,
            picked: Vec::new(),
            sources: Vec::new(),
            data_hash: String::new(),
        }
    }

    #[test]
    fn steps_are_the_methods_of_a_recipe() {
        let names = |recipe: &str, evaluates: bool| -> Vec<String> {
            let mut settings = QuantizeSettings::new(recipe.parse().unwrap());
            settings.evaluate = evaluates.then(windows);
            steps(&settings).into_iter().map(|step| step.name).collect()
        };
        assert_eq!(names("gptq", true), ["gptq", "evaluation"]);
        assert_eq!(names("dynamic+awq+gptq+dwq", true), ["awq+gptq", "dwq", "evaluation"]);
        assert_eq!(names("dynamic", false), ["refine"]);
        assert_eq!(names("dwq", false), ["refine", "dwq"]);
        assert_eq!(rounding_phase(&"dynamic+search".parse().unwrap()), StepPart::WRITE);
    }
}
