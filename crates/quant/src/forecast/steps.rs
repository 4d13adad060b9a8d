//! What is forecast, laid out over the steps of a job.

use super::Forecast;
use crate::observer::{Step, StepPart};

/// Parts of the forecast that a phase consists of, and the share that it has of them.
fn parts_of(step: &str, phase: &str) -> (&'static [&'static str], f64) {
    const ROUNDING: [&str; 8] =
        ["read", "write", "read and round", "forward", "search", "rounding", "folding", "learning"];
    match (step, phase) {
        ("copy", _) => (&ROUNDING[..2], 1.0),
        (_, StepPart::WRITE | "quantize") => (&ROUNDING, 1.0),
        (_, "sensitivities") => (&["sensitivities"], 1.0),
        (_, "candidates") => (&["candidates"], 1.0),
        (_, "teacher") => (&["teacher"], 1.0),
        (_, "dwq") => (&["dwq", "dwq: looks"], 1.0),
        // Both models pass their blocks, then their heads run side by side.
        (_, "reference" | "model") => (&["evaluation"], 0.4),
        (_, "head") => (&["evaluation"], 0.2),
        _ => (&[], 0.0),
    }
}

impl Forecast {
    /// The steps with the seconds that each part of them is expected to take.
    #[must_use]
    pub fn expect(&self, mut steps: Vec<Step>) -> Vec<Step> {
        for step in &mut steps {
            for part in &mut step.parts {
                let (names, share) = parts_of(&step.name, part.phase);
                let known = self.parts.iter().filter(|known| names.contains(&known.name));
                let seconds: Vec<f64> = known.map(|known| known.seconds * share).collect();
                part.seconds = (!seconds.is_empty()).then(|| seconds.iter().sum());
            }
        }
        steps
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::forecast::Part;

    #[test]
    fn steps_take_together_what_is_forecast() {
        let part = |name, seconds| Part { name, amount: 0.0, seconds };
        let forecast = Forecast {
            bits_per_weight: 4.5,
            bytes: 0,
            peak_memory: 0,
            seconds: 0.0,
            operations: 0.0,
            low_memory: false,
            parts: vec![
                part("read", 1.0),
                part("write", 2.0),
                part("sensitivities", 4.0),
                part("candidates", 8.0),
                part("forward", 16.0),
                part("rounding", 32.0),
                part("teacher", 64.0),
                part("dwq", 128.0),
                part("dwq: looks", 256.0),
                part("evaluation", 512.0),
            ],
            memory: crate::session::QuantizeMemory::default(),
            sensitivities_memory: None,
            dwq_memory: None,
            card_memory: None,
        };
        let steps = vec![
            crate::dynamic::step(),
            Step::new("gptq", ["quantize"]),
            crate::dwq::step(),
            crate::evaluate::step(true),
        ];
        let steps = forecast.expect(steps);
        let seconds = |step: &Step| -> f64 { step.parts.iter().filter_map(|part| part.seconds).sum() };
        let all: Vec<f64> = steps.iter().map(seconds).collect();
        assert!(all.iter().zip([12.0, 51.0, 448.0, 512.0]).all(|(a, b)| (a - b).abs() < 1e-9), "{all:?}");
        assert_eq!(forecast.expect(vec![Step::new("x", ["unheard of"])])[0].parts[0].seconds, None);
    }
}
