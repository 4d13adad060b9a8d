//! What a distillation is told, and what it tells.

use std::path::PathBuf;

use serde::{Deserialize, Deserializer, Serialize};

/// How it is trained.
#[derive(Clone, Debug, PartialEq)]
pub struct DwqSettings {
    /// Steps.
    pub iterations: usize,
    /// Windows a step.
    pub batch_size: usize,
    /// Adam's rate for scales and centers, absolute; `None`: found from the layers' own steps and the distance to the teacher.
    pub learning_rate: Option<f64>,
    /// Of the distillation.
    pub temperature: f64,
    /// Steps between looks at the held-out windows, 0 for a tenth of all (fewer where looks would cost much).
    pub validate_every: usize,
    /// Seconds between states from which an interrupted run goes on: what a kill costs at most, and a step.
    pub save_seconds: u64,
    /// Directory in which the teacher's targets are kept, or from which they are taken.
    pub target_dir: Option<PathBuf>,
    /// Directory in which the teacher's final hidden states are kept for other runs with the same windows; `None`: they go with the run.
    pub teacher_states: Option<PathBuf>,
    /// Whether weights of norms are trained, too; `None`: where the trained layers of blocks have 3.5 bits at most, on
    /// average over their weights.
    pub norms: Option<bool>,
    /// Of the order of windows.
    pub seed: u64,
}

impl Default for DwqSettings {
    fn default() -> Self {
        Self {
            iterations: 100,
            batch_size: 4,
            learning_rate: None,
            temperature: 2.0,
            validate_every: 0,
            save_seconds: 90,
            target_dir: None,
            teacher_states: None,
            norms: None,
            seed: 123,
        }
    }
}

/// What training did.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Distilled {
    /// Steps taken, earlier runs included.
    pub steps: usize,
    /// Of them, in earlier runs.
    pub resumed_steps: usize,
    /// The rate that was used: part of a code a step, or absolute where one was given.
    pub rate: f64,
    /// KL on held-out windows before any step.
    #[serde(deserialize_with = "number_or_nan")]
    pub start_kl: f64,
    /// At the step that was kept.
    #[serde(deserialize_with = "number_or_nan")]
    pub best_kl: f64,
    /// Which that was; 0: the start.
    pub best_step: usize,
    /// Step and KL of every look.
    #[serde(deserialize_with = "looks_or_nan")]
    pub held_out: Vec<(usize, f64)>,
    /// Of every step, at the temperature of the distillation.
    #[serde(deserialize_with = "numbers_or_nan")]
    pub losses: Vec<f64>,
    /// Why it ended before its time.
    pub stopped: Option<String>,
    /// Scales and biases that were trained.
    pub trained: u64,
    /// Norms whose weights were trained beside them; 0 where bits are not few.
    pub norms: usize,
}

/// JSON has no NaN: what was none comes back as null.
fn number_or_nan<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(from)?.unwrap_or(f64::NAN))
}

fn numbers_or_nan<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<f64>, D::Error> {
    let numbers = Vec::<Option<f64>>::deserialize(from)?;
    Ok(numbers.into_iter().map(|number| number.unwrap_or(f64::NAN)).collect())
}

fn looks_or_nan<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<(usize, f64)>, D::Error> {
    let looks = Vec::<(usize, Option<f64>)>::deserialize(from)?;
    Ok(looks.into_iter().map(|(step, kl)| (step, kl.unwrap_or(f64::NAN))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_number_survives_json() {
        let made = Distilled {
            start_kl: f64::NAN,
            best_kl: 0.5,
            held_out: vec![(0, f64::NAN), (2, 0.5)],
            losses: vec![f64::INFINITY, 1.0],
            ..Distilled::default()
        };
        let text = serde_json::to_string(&made).unwrap();
        let back: Distilled = serde_json::from_str(&text).unwrap();
        assert!(
            back.start_kl.is_nan()
                && back.best_kl == 0.5
                && back.held_out[0].1.is_nan()
                && back.losses[1] == 1.0
        );
    }
}
