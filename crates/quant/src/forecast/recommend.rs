//! What every method would need on a machine and is expected to lose, and which to take: now, within an hour, overnight.

use std::rc::Rc;

use mlx_format::Scheme;
use mlx_quant_model::WeightsError;
use serde::Serialize;

use super::choice::Choice;
use super::curves::expected;
use super::rows::{Row, rows};
use super::{Forecast, Machine, Peer, forecast, mlx_lm, nominal_windows};
use crate::data::{Shares, VALIDATION_WINDOWS};
use crate::dwq::DwqSettings;
use crate::dynamic::{DynamicPlan, DynamicSettings, Target};
use crate::methods::Method;
use crate::plan::{Plan, Settings};
use crate::recipes::{Contestant, USUAL_RESIDENT, budget_of};
use crate::session::QuantizeSettings;
use crate::{Error, Model};

/// For how long somebody will wait: which row of the answer is the advice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Quality {
    /// Not at all.
    Fast,
    /// An hour.
    #[default]
    Balanced,
    /// A night.
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

/// What is recommended.
#[derive(Clone, Debug, Serialize)]
pub struct Recommendation {
    /// All methods, quickest first.
    pub choices: Vec<Choice>,
    /// What to do in how much time, shortest first.
    pub rows: Vec<Row>,
    /// The row that is the advice; `None` if nothing is possible.
    pub pick: Option<usize>,
    /// Why.
    pub why: String,
}

/// Methods of mlx-lm's guide and how we stack them, quickest first.
const METHODS: [&str; 9] = [
    "basic",
    "awq",
    "dynamic",
    "gptq",
    "dwq",
    "dynamic+awq+gptq",
    "gptq+learn",
    "dynamic+awq+gptq+dwq",
    "dynamic+awq+gptq+learn+dwq",
];

/// Calibration windows with which a method that is too slow may be quick enough: as many as the curves of [`expected`] were measured
/// with.
const FEWER_WINDOWS: usize = 32;

/// Held-out windows on which a command measures what it made, for the model card.
const MEASURED_WINDOWS: usize = 4;

/// Foresees every method of the guide on `model`, and says which to take in how much time.
///
/// # Errors
/// As [`Plan::new`] and [`forecast`]. What a method cannot do is its [`Choice::obstacle`], no error.
pub fn recommend(model: &Model, wish: &Wish, machine: &Machine) -> Result<Recommendation, Error> {
    let inspection = crate::inspect::inspect(model)?;
    let parameters = inspection.parameters - inspection.towers.map_or(0, |towers| towers.weights);
    let size = (parameters, widest(model, wish)?);
    let mut plans = Plans { model, made: Vec::new() };
    let mut all = |wish: &Wish, names: &[&str]| {
        let choices = names.iter().map(|name| choice(&mut plans, wish, machine, size, name));
        choices.collect::<Result<Vec<_>, _>>()
    };
    let choices = all(wish, &METHODS)?;
    let mut candidates = choices.clone();
    if wish.windows.is_none() {
        let quicker = Wish { windows: Some(FEWER_WINDOWS), ..wish.clone() };
        // dwq trains on as many as its steps take: fewer would be another method.
        let calibrated = |one: &&Choice| one.recipe.needs_calibration() && !one.recipe.trains();
        let names: Vec<&str> = choices.iter().filter(calibrated).map(|one| one.method.as_str()).collect();
        candidates.extend(all(&quicker, &names)?);
    }
    let rows = rows(candidates, wish.time);
    let (pick, why) = pick(&rows, &choices, wish);
    Ok(Recommendation { choices, rows, pick, why })
}

/// Plans of a model with everything at one scheme, each made once: every method starts from one of them.
struct Plans<'m> {
    model: &'m Model,
    made: Vec<((Scheme, bool), Rc<Plan>)>,
}

impl Plans<'_> {
    /// `keep_unreached` as in [`Settings`].
    fn of(&mut self, scheme: Scheme, keep_unreached: bool) -> Result<Rc<Plan>, Error> {
        let key = (scheme, keep_unreached);
        if let Some((_, plan)) = self.made.iter().find(|(own, _)| *own == key) {
            return Ok(plan.clone());
        }
        let settings = Settings { quantize: Some(scheme), keep_unreached, ..Settings::default() };
        let plan = Rc::new(Plan::new(&self.model.checkpoint, &self.model.config, settings)?);
        self.made.push((key, plan.clone()));
        Ok(plan)
    }
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
            Target::BitsPerWeight(most) => plan.language_bits_per_weight() <= most,
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
    plans: &mut Plans<'_>,
    wish: &Wish,
    machine: &Machine,
    (parameters, widest): (u64, Option<Scheme>),
    name: &str,
) -> Result<Choice, Error> {
    let model = plans.model;
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
        expected_kl: None,
        bits: scheme.bits(),
        target_bpw: None,
        windows: wish.windows,
        forecast: None,
        memory_at_most: None,
        obstacle: None,
        mlx_lm: if single { peer(method, model, parameters, scheme.bits())? } else { None },
        recipe: recipe.clone(),
    };
    let plan = plans.of(scheme, recipe.needs_calibration())?;
    if recipe.allocates() {
        let target = match wish.target {
            None => Target::BitsPerWeight(budget_of(&plan)),
            Some(target) => target,
        };
        match DynamicPlan::check(model, &plan.settings, &DynamicSettings::new(target)) {
            // Thousandths, as a command line says it, and never above what was asked.
            Ok(range) => {
                let bits = asked(target, &plan).min(range.1);
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
            Some(format!("at 2 bits it has {:.3} bits per weight already", plan.language_bits_per_weight()));
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
    let no_room = |needs: &Forecast| needs.card_obstacle(&model.device);
    if (beyond(&needs, wish) || no_room(&needs).is_some()) && how.recipe.needs_calibration() {
        how.low_memory = true;
        needs = forecast(model, &plan, &windows, &how, false, machine, USUAL_RESIDENT)?;
    }
    if let Some(bits) = made.target_bpw {
        needs.bits_per_weight = bits;
        needs.bytes = (bits * parameters as f64 / 8.0) as u64 + plan.towers.bytes;
    }
    made.obstacle = no_room(&needs).or_else(|| obstacle(&needs, wish));
    made.expected_kl = expected(name, needs.bits_per_weight);
    made.memory_at_most = Some(at_most(&needs));
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

/// Bits per weight of the language model.
fn asked(target: Target, plan: &Plan) -> f64 {
    match target {
        Target::BitsPerWeight(bits) => bits,
        Target::Bytes(bytes) => {
            bytes.saturating_sub(plan.towers.bytes) as f64 * 8.0 / plan.language_parameters().max(1) as f64
        }
        Target::Divergence(_) => f64::INFINITY,
    }
}

/// Forecasts of memory are up to that part too low (`benches/forecast.py`).
const MARGIN: f64 = 0.15;

/// The memory that a run may need, bytes.
fn at_most(needs: &Forecast) -> u64 {
    (needs.peak_memory as f64 * (1.0 + MARGIN)) as u64
}

fn beyond(needs: &Forecast, wish: &Wish) -> bool {
    at_most(needs) > wish.memory
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
        let (most, has) = (crate::numbers::bytes(at_most(needs)), crate::numbers::bytes(wish.memory));
        let (about, margin) = (crate::numbers::bytes(needs.peak_memory), MARGIN * 100.0);
        return Some(format!(
            "needs up to {most} of memory, {has} may be used ({about} are foreseen, and forecasts are up to {margin:.0} % too low)"
        ));
    }
    let time = wish.time.filter(|time| needs.seconds > *time)?;
    let (needs, has) = (crate::numbers::duration(needs.seconds), crate::numbers::duration(time));
    Some(format!("needs {needs}, {has} may be used"))
}

/// The row that the wish means, or the next one that has anything; and why.
fn pick(rows: &[Row], choices: &[Choice], wish: &Wish) -> (Option<usize>, String) {
    let wanted = match wish.quality {
        Quality::Fast => 0,
        Quality::Balanced => 1,
        Quality::Best => rows.len(),
    };
    let wanted = wanted.min(rows.len().saturating_sub(1));
    let places = (0..=wanted).rev().chain(wanted + 1..rows.len());
    let Some(place) = places.into_iter().find(|place| rows[*place].choice.is_some()) else {
        let first = choices.iter().find_map(|one| one.obstacle.clone()).unwrap_or_default();
        return (None, format!("nothing is possible: {first}"));
    };
    (Some(place), rows[place].why.clone())
}
