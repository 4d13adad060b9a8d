//! Which method for which wish: the decision guide, with what each method would need on this machine.

use std::fmt::Write as _;

use mlx_format::Scheme;
use mlx_quant_model::WeightsError;
use serde::Serialize;

use super::{Forecast, Machine, Peer, forecast, mlx_lm, nominal_windows};
use crate::data::{Shares, VALIDATION_WINDOWS};
use crate::dwq::DwqSettings;
use crate::dynamic::{DynamicPlan, DynamicSettings, Target};
use crate::methods::Method;
use crate::plan::{Plan, Settings};
use crate::recipes::{Contestant, USUAL_RESIDENT, budget};
use crate::session::QuantizeSettings;
use crate::{Error, Model};

/// How much quality is to be paid for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Quality {
    /// Seconds to minutes.
    Fast,
    /// The closest to the original that time and memory allow, without training scales and biases.
    #[default]
    Balanced,
    /// The closest to the original that time and memory allow.
    Best,
}

/// What is asked.
#[derive(Clone, Debug)]
pub struct Wish {
    /// Memory that may be used, bytes.
    pub memory: u64,
    /// Time that may be used, seconds.
    pub time: Option<f64>,
    /// Size of the result; without one that of every layer at [`Self::bits`].
    pub target: Option<Target>,
    /// Bits of a code where no size is asked for.
    pub bits: u32,
    /// Weights that share a scale.
    pub group_size: usize,
    /// How much quality.
    pub quality: Quality,
    /// Calibration windows, and windows that dwq trains on; `None`: 128, and as many as dwq's steps take.
    pub windows: Option<usize>,
    /// Tokens of each.
    pub sequence_length: usize,
    /// Steps of dwq.
    pub iterations: usize,
    /// Threads, 0 for one per core.
    pub threads: usize,
}

/// A method, and what it would need.
#[derive(Clone, Debug, Serialize)]
pub struct Choice {
    /// As in mlx-lm's guide, or a recipe.
    pub method: String,
    /// When the guide takes it.
    pub when: &'static str,
    /// The recipe.
    #[serde(serialize_with = "as_text")]
    pub recipe: crate::Recipe,
    /// Bits of a code, where they are not allocated.
    pub bits: u32,
    /// Bits per weight that are allocated.
    pub target_bpw: Option<f64>,
    /// What it needs; `None` if it cannot reach the size.
    pub forecast: Option<Forecast>,
    /// Why it is out of the question.
    pub obstacle: Option<String>,
    /// mlx-lm's method of the same name.
    pub mlx_lm: Option<Peer>,
}

/// What is recommended.
#[derive(Clone, Debug, Serialize)]
pub struct Recommendation {
    /// All methods, in the guide's order.
    pub choices: Vec<Choice>,
    /// The one to take; `None` if nothing is possible.
    pub pick: Option<usize>,
    /// Why.
    pub why: String,
}

fn as_text<S: serde::Serializer>(recipe: &crate::Recipe, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(recipe)
}

/// Methods with their place in the guide, quickest first.
const GUIDE: [(&str, &str); 7] = [
    ("basic", "quick"),
    ("awq", "default"),
    ("dynamic", "layers differ, or a size is given"),
    ("gptq", "established"),
    ("dwq", "production quality, with time"),
    ("dynamic+awq+gptq", "best without training"),
    ("dynamic+awq+gptq+dwq", "best"),
];

/// By quality at equal size, best first, as measured on both models of docs/results.md at 4 bits and more. At 3 bits dwq and gptq lie
/// before dynamic on one of them, within two standard errors.
const BY_QUALITY: [&str; 7] =
    ["dynamic+awq+gptq+dwq", "dynamic+awq+gptq", "dynamic", "dwq", "gptq", "awq", "basic"];

/// Held-out windows on which a command measures what it made, for the model card.
const MEASURED_WINDOWS: usize = 4;

/// What was found out about a method, and where that is written down: to be looked at again when methods change.
struct Finding {
    method: &'static str,
    /// As the rest of a sentence about the method that is recommended.
    text: &'static str,
    /// Day of the measurement.
    date: &'static str,
    /// Where it is, in this repository.
    source: &'static str,
}

const FINDINGS: [Finding; 2] = [
    Finding {
        method: "dynamic+awq+gptq",
        text: "of what needs no training it was the closest to the original at every size measured (the guide's default is awq)",
        date: "2026-11-25",
        source: "benches/results/trained-2026-11-25.md",
    },
    Finding {
        method: "dynamic+awq+gptq+dwq",
        text: "all methods stacked were the closest to the original, or within two standard errors of it, wherever they were measured",
        date: "2026-11-25",
        source: "benches/results/trained-2026-11-25.md",
    },
];

/// Foresees every method of the guide on `model` and picks one.
///
/// # Errors
/// As [`Plan::new`] and [`forecast`]. What a method cannot do is its [`Choice::obstacle`], no error.
pub fn recommend(model: &Model, wish: &Wish, machine: &Machine) -> Result<Recommendation, Error> {
    let parameters = crate::inspect::inspect(model)?.parameters;
    let widest = widest(model, wish)?;
    let choices = GUIDE
        .iter()
        .map(|guided| choice(model, wish, machine, (parameters, widest), *guided))
        .collect::<Result<Vec<_>, _>>()?;
    let (pick, why) = pick(&choices, wish);
    Ok(Recommendation { choices, pick, why })
}

/// The most bits of a code whose layers all together stay within the target.
fn widest(model: &Model, wish: &Wish) -> Result<Option<Scheme>, Error> {
    let Some(target) = wish.target else {
        return Ok(Some(Scheme::affine(wish.bits, wish.group_size).map_err(crate::PlanError::from)?));
    };
    for bits in [8, 6, 5, 4, 3, 2] {
        let scheme = Scheme::affine(bits, wish.group_size).map_err(crate::PlanError::from)?;
        let settings = Settings { quantize: Some(scheme), ..Settings::default() };
        let plan = Plan::new(&model.checkpoint, &model.config, settings)?;
        let fits = match target {
            Target::BitsPerWeight(most) => plan.bits_per_weight() <= most,
            Target::Bytes(most) => plan.layout.tensor_bytes() <= most,
            Target::Divergence(_) => true,
        };
        if fits {
            return Ok(Some(scheme));
        }
    }
    Ok(None)
}

fn choice(
    model: &Model,
    wish: &Wish,
    machine: &Machine,
    (parameters, widest): (u64, Option<Scheme>),
    (name, when): (&str, &'static str),
) -> Result<Choice, Error> {
    let affine = |bits| Scheme::affine(bits, wish.group_size).map_err(crate::PlanError::from);
    let named = |scheme| {
        let wrong = |error: crate::methods::RecipeError| Error::Comparison {
            path: name.to_owned(),
            reason: error.to_string(),
        };
        Contestant::new(name, scheme).map_err(wrong)
    };
    // What has no sensitivity keeps the usual bits, however small the budget.
    let usual = affine(wish.bits)?;
    let scheme = match widest {
        _ if named(usual)?.recipe.allocates() => usual,
        Some(scheme) => scheme,
        None => affine(2)?,
    };
    let contestant = named(scheme)?;
    let recipe = contestant.recipe.clone();
    let method = recipe.methods()[0];
    let single = recipe.methods().len() == 1;
    let mut made = Choice {
        method: contestant.name.clone(),
        when,
        bits: scheme.bits(),
        target_bpw: None,
        forecast: None,
        obstacle: None,
        mlx_lm: if single { peer(method, model, parameters, scheme.bits())? } else { None },
        recipe: recipe.clone(),
    };
    let settings = Settings { quantize: Some(scheme), ..Settings::default() };
    let plan = Plan::new(&model.checkpoint, &model.config, settings)?;
    if recipe.allocates() {
        let target = match wish.target {
            None => Target::BitsPerWeight(budget(model, scheme)?),
            Some(target) => target,
        };
        match DynamicPlan::check(model, &plan.settings, &DynamicSettings::new(target)) {
            // Thousandths, as a command line says it, and never above what was asked.
            Ok(range) => {
                let bits = asked(target, parameters).min(range.1);
                made.target_bpw = Some((bits * 1000.0).floor() / 1000.0);
            }
            Err(Error::Plan(error)) => made.obstacle = Some(error.to_string()),
            Err(Error::Weights(error @ WeightsError::Undescribed { .. })) => {
                made.obstacle = Some(error.to_string());
            }
            Err(error) => return Err(error),
        }
    } else if widest.is_none() {
        made.obstacle =
            Some(format!("at 2 bits it has {:.3} bits per weight already", plan.bits_per_weight()));
    }
    if made.obstacle.is_some() {
        return Ok(made);
    }
    let dwq = DwqSettings { iterations: wish.iterations, ..DwqSettings::default() };
    let shares = shares(wish, recipe.trains().then_some(&dwq));
    // Of a text that holds what is asked for.
    let split = shares.split(shares.wanted())?;
    let nominal = |count: usize| nominal_windows(count, wish.sequence_length);
    let windows = nominal(split.calibration.len());
    let held_out = nominal(MEASURED_WINDOWS);
    let lessons = split.training.map(|(training, judged)| (nominal(training.len()), nominal(judged.len())));
    let mut how = QuantizeSettings {
        threads: wish.threads,
        lessons,
        dwq: dwq.clone(),
        // What a command measures for its model card.
        evaluate: recipe.needs_calibration().then_some(held_out),
        ..QuantizeSettings::new(recipe)
    };
    let first = forecast(model, &plan, &windows, &how, false, machine, USUAL_RESIDENT);
    let mut needs = match first {
        Err(Error::Weights(error @ WeightsError::Undescribed { .. })) => {
            made.obstacle = Some(error.to_string());
            return Ok(made);
        }
        other => other?,
    };
    if beyond(&needs, wish) && how.recipe.needs_calibration() {
        how.low_memory = true;
        needs = forecast(model, &plan, &windows, &how, false, machine, USUAL_RESIDENT)?;
    }
    if let Some(bits) = made.target_bpw {
        needs.bits_per_weight = bits;
        needs.bytes = (bits * parameters as f64 / 8.0) as u64;
    }
    made.obstacle = obstacle(&needs, wish);
    made.forecast = Some(needs);
    Ok(made)
}

/// Windows of a text as the commands share them out. A forecast cannot know how many a text holds, so that "all" is as many as are usual.
fn shares(wish: &Wish, dwq: Option<&DwqSettings>) -> Shares {
    let asked = wish.windows.filter(|asked| *asked > 0);
    let shares = Shares::new(asked);
    match dwq {
        Some(dwq) => shares.with_training(asked, wish.iterations, dwq.batch_size, VALIDATION_WINDOWS),
        None => shares,
    }
}

fn asked(target: Target, parameters: u64) -> f64 {
    match target {
        Target::BitsPerWeight(bits) => bits,
        Target::Bytes(bytes) => bytes as f64 * 8.0 / parameters.max(1) as f64,
        Target::Divergence(_) => f64::INFINITY,
    }
}

/// Forecasts of memory are up to that part too low (`benches/forecast.py`).
const MARGIN: f64 = 0.15;

fn beyond(needs: &Forecast, wish: &Wish) -> bool {
    needs.peak_memory as f64 * (1.0 + MARGIN) > wish.memory as f64
}

/// mlx-lm's method; nothing of model types that only convert.
fn peer(method: Method, model: &Model, parameters: u64, bits: u32) -> Result<Option<Peer>, Error> {
    match mlx_lm(method, model, parameters, bits) {
        Err(Error::Weights(WeightsError::Undescribed { .. })) => Ok(None),
        other => other,
    }
}

fn obstacle(needs: &Forecast, wish: &Wish) -> Option<String> {
    if beyond(needs, wish) {
        let (needs, has) = (crate::numbers::bytes(needs.peak_memory), crate::numbers::bytes(wish.memory));
        return Some(format!("needs about {needs} of memory, {has} may be used"));
    }
    let time = wish.time.filter(|time| needs.seconds > *time)?;
    let (needs, has) = (crate::numbers::duration(needs.seconds), crate::numbers::duration(time));
    Some(format!("needs {needs}, {has} may be used"))
}

/// The best that is possible, and why.
fn pick(choices: &[Choice], wish: &Wish) -> (Option<usize>, String) {
    let possible = |name: &str| choices.iter().position(|one| one.method == name && one.obstacle.is_none());
    let trained = |name: &str| name.contains("dwq");
    let wanted: Vec<&str> = match wish.quality {
        Quality::Fast => vec!["basic", "dynamic"],
        Quality::Balanced => BY_QUALITY.iter().copied().filter(|name| !trained(name)).collect(),
        Quality::Best => BY_QUALITY.to_vec(),
    };
    let Some((place, pick)) =
        wanted.iter().enumerate().find_map(|(place, name)| Some((place, possible(name)?)))
    else {
        let first = choices.iter().find_map(|one| one.obstacle.clone()).unwrap_or_default();
        return (None, format!("nothing is possible: {first}"));
    };
    let mut why = match (wish.quality, choices[pick].method.as_str()) {
        (Quality::Fast, "basic") => "it is the fastest, and equal to mlx_lm.convert".to_owned(),
        (Quality::Fast, _) => "only an allocation of bits reaches that size".to_owned(),
        (_, other) => match FINDINGS.iter().find(|finding| finding.method == other) {
            Some(Finding { text, date, source, .. }) => format!("{text} ({date}, {source})"),
            None => format!("{other} is the best that fits"),
        },
    };
    if let Some(better) = wanted[..place].first() {
        let obstacle =
            choices.iter().find(|one| one.method == *better).and_then(|one| one.obstacle.as_deref());
        if let Some(obstacle) = obstacle {
            let _ = write!(why, "; {better} is better but {obstacle}");
        }
    }
    (Some(pick), why)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choice(method: &str, obstacle: Option<&str>) -> Choice {
        Choice {
            method: method.to_owned(),
            when: "",
            recipe: crate::Recipe::of(Method::Rtn),
            bits: 4,
            target_bpw: None,
            forecast: None,
            obstacle: obstacle.map(str::to_owned),
            mlx_lm: None,
        }
    }

    fn wish(quality: Quality) -> Wish {
        Wish {
            memory: 1 << 30,
            time: None,
            target: None,
            bits: 4,
            group_size: 64,
            quality,
            windows: Some(8),
            sequence_length: 64,
            iterations: 10,
            threads: 1,
        }
    }

    /// A claim without its measurement is a rumour.
    #[test]
    fn findings_are_written_down_where_they_say() {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        for Finding { method, date, source, .. } in FINDINGS {
            let text = std::fs::read_to_string(root.join(source)).unwrap();
            assert!(text.contains(method) && source.contains(date), "{method}: {source}");
            assert!(BY_QUALITY.contains(&method) && GUIDE.iter().any(|(name, _)| *name == method));
        }
    }

    #[test]
    fn takes_the_best_that_is_possible() {
        let all: Vec<Choice> = GUIDE.iter().map(|(name, _)| choice(name, None)).collect();
        let method = |choices: &[Choice], quality| {
            let (pick, why) = pick(choices, &wish(quality));
            (pick.map(|at| choices[at].method.clone()).unwrap_or_default(), why)
        };
        assert_eq!(method(&all, Quality::Fast).0, "basic");
        assert_eq!(method(&all, Quality::Balanced).0, "dynamic+awq+gptq");
        assert_eq!(method(&all, Quality::Best).0, "dynamic+awq+gptq+dwq");
        let why = method(&all, Quality::Best).1;
        assert!(why.ends_with("(2026-11-25, benches/results/trained-2026-11-25.md)"), "{why}");
        let slow: Vec<Choice> = GUIDE
            .iter()
            .map(|(name, _)| choice(name, name.contains("dynamic").then_some("needs 2 h, 1 h may be used")))
            .collect();
        let (best, why) = method(&slow, Quality::Best);
        assert!(best == "dwq" && why.contains("is better but needs 2 h"), "{best}: {why}");
        assert_eq!(method(&slow, Quality::Balanced).0, "gptq");
        let none: Vec<Choice> = GUIDE.iter().map(|(name, _)| choice(name, Some("too large"))).collect();
        let (nothing, why) = method(&none, Quality::Balanced);
        assert!(nothing.is_empty() && why.contains("too large"), "{why}");
    }
}
