//! From sensitivities and a target to a scheme for every layer.

use std::collections::{BTreeMap, BTreeSet};

use mlx_format::{FloatType, Mode, Scheme};

use super::candidates::{self, BITS, GROUP_SIZES};
use super::{Choice, Cost, Layer, Sensitivities, allocate, observe};
use crate::plan::{Job, Plan, PlanError, Settings};
use crate::walks::Walk;
use crate::{Error, Model};

/// What is asked of the size.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Target {
    /// At most so many bits per weight of the language model, as mlx-lm counts them.
    BitsPerWeight(f64),
    /// At most so many bytes of weights, those of towers included.
    Bytes(u64),
    /// The smallest model that is predicted to diverge by at most so many nats a token.
    Divergence(f64),
}

/// How bits are allocated.
#[derive(Clone, Debug, PartialEq)]
pub struct DynamicSettings {
    /// What is asked.
    pub target: Target,
    /// No layer gets fewer.
    pub min_bits: u32,
    /// No layer gets more.
    pub max_bits: u32,
    /// Group sizes that may be chosen.
    pub group_sizes: Vec<usize>,
    /// By how much the model's divergence exceeds the sum over its layers. [`DynamicPlan::usual_factor`] before anything was measured.
    pub factor: f64,
    /// Blocks learn their rounding afterwards (a recipe with `learn`): what costs are left then decides.
    pub learned: bool,
}

impl DynamicSettings {
    /// All widths and group sizes.
    pub fn new(target: Target) -> Self {
        Self {
            target,
            min_bits: BITS[0],
            max_bits: BITS[BITS.len() - 1],
            group_sizes: GROUP_SIZES.to_vec(),
            factor: DynamicPlan::usual_factor(),
            learned: false,
        }
    }
}

/// A plan with a scheme for every layer, and what it promises.
#[derive(Clone, Debug)]
pub struct DynamicPlan {
    /// To be carried out.
    pub plan: Plan,
    /// Nats a token, [`DynamicSettings::factor`] included.
    pub predicted_kl: f64,
    /// No allocation of the same size is predicted to diverge less.
    pub bound_kl: f64,
    /// Bits per weight of the language model between which a target can lie.
    pub range: (f64, f64),
    /// Predicted divergence at both ends of the range.
    pub range_kl: (f64, f64),
}

/// What of the cost of so many bits is left to a layer of a block that learns afterwards. At 2, 3 and 4 bits measured on
/// the demo model (benches/results/allocation-2026-11-30.md), and continued for more. What does not learn keeps its
/// cost: tables get more bits then.
const fn left(bits: u32) -> f64 {
    match bits {
        0..=2 => 0.49,
        3 => 0.63,
        4 => 0.68,
        5 => 0.72,
        6 => 0.75,
        _ => 0.8,
    }
}

/// A layer that bits are chosen for.
struct Item {
    path: String,
    candidates: Vec<Cost>,
    choices: Vec<Choice>,
}

impl DynamicPlan {
    /// The sum over layers predicts about a fifth too little (measured on both demo models at 3.5 to 5 bits per weight).
    pub const fn usual_factor() -> f64 {
        1.2
    }

    /// Refuses, from headers alone, a size that cannot be reached; gives the range of bits per weight.
    ///
    /// # Errors
    /// As [`DynamicPlan::new`].
    pub fn check(model: &Model, settings: &Settings, dynamic: &DynamicSettings) -> Result<(f64, f64), Error> {
        let walk = Walk::open(model)?;
        let mut nominal = Sensitivities::default();
        for (path, shape) in observe::observed_paths(&walk) {
            let columns = shape.last().copied().unwrap_or(0);
            // In the order in which costs fall.
            let cost =
                |scheme: Scheme| 0.25f64.powi(scheme.bits().cast_signed()) * scheme.group_size() as f64;
            let costs = candidates::all(columns).map(|scheme| Cost {
                bits: scheme.bits(),
                group_size: scheme.group_size(),
                kl: cost(scheme),
            });
            let costs = costs.collect();
            nominal.layers.push(Layer { path, shape, seen: Vec::new(), table: None, costs });
        }
        let target = match dynamic.target {
            Target::Divergence(target) if target.is_finite() && target > 0.0 => Target::Divergence(f64::MAX),
            Target::Divergence(target) => {
                let range = "it is a positive number of nats a token".to_owned();
                return Err(PlanError::Target { asked: format!("a KL of {target}"), range }.into());
            }
            target => target,
        };
        let sized = DynamicSettings { target, ..dynamic.clone() };
        Ok(Self::new(model, settings, &nominal, &sized)?.range)
    }

    /// Allocates. Layers that a recipe file or the family's own protection decides keep that; `settings.quantize` is the scheme of
    /// quantizable tensors that have no sensitivity.
    ///
    /// # Errors
    /// As [`Plan::new`]; a target outside the range ([`PlanError::Target`]).
    pub fn new(
        model: &Model,
        settings: &Settings,
        sensitivities: &Sensitivities,
        dynamic: &DynamicSettings,
    ) -> Result<Self, Error> {
        let base = Plan::new(&model.checkpoint, &model.config, settings.clone())?;
        let decoder = if dynamic.learned { Some(Walk::open(model)?.decoder) } else { None };
        let learns = |path: &str| decoder.as_ref().is_some_and(|decoder| decoder.in_block(path));
        let (items, fixed) = items(&base, sensitivities, dynamic, learns)?;
        let choices: Vec<Vec<Choice>> = items.iter().map(|item| item.choices.clone()).collect();
        let end = |better: fn(&Choice, &Choice) -> bool| -> (u64, f64) {
            let ends = choices.iter().map(|choices| {
                choices.iter().copied().reduce(|best, next| if better(&next, &best) { next } else { best })
            });
            ends.flatten().fold((fixed, 0.0), |(bytes, cost), end| (bytes + end.bytes, cost + end.cost))
        };
        let smallest =
            end(|next, best| next.bytes < best.bytes || (next.bytes == best.bytes && next.cost < best.cost));
        let best =
            end(|next, best| next.cost < best.cost || (next.cost == best.cost && next.bytes < best.bytes));
        // Towers are no layer to choose for: bits are those of the language model, with or without them.
        let (weights, beside) = (base.language_parameters(), base.towers.bytes);
        let bits = |bytes: u64| crate::parameters::bits_per_weight(bytes - beside, weights);
        let range = (bits(smallest.0), bits(best.0));
        let range_kl = (smallest.1 * dynamic.factor, best.1 * dynamic.factor);
        let unreachable = |asked: String| PlanError::Target {
            asked,
            range: format!(
                "{:.3} to {:.3} bits per weight ({} to {} bytes){}",
                range.0,
                range.1,
                smallest.0,
                best.0,
                match dynamic.target {
                    Target::Divergence(_) => format!(", predicted KL {:.5} to {:.5}", range_kl.0, range_kl.1),
                    _ => String::new(),
                }
            ),
        };
        let found = match dynamic.target {
            Target::BitsPerWeight(target) => {
                // More than the best of all would change nothing: the target is not reached.
                let budget = (target * weights as f64 / 8.0).floor() + beside as f64;
                if !target.is_finite() || budget < smallest.0 as f64 || target > range.1 + SLACK {
                    return Err(unreachable(format!("{target} bits per weight")).into());
                }
                allocate(&choices, budget as u64 - fixed)
            }
            Target::Bytes(budget) => {
                if budget < smallest.0 {
                    return Err(unreachable(format!("{budget} bytes")).into());
                }
                allocate(&choices, budget - fixed)
            }
            Target::Divergence(target) => {
                if !(target.is_finite() && target >= range_kl.1) {
                    return Err(unreachable(format!("a KL of {target}")).into());
                }
                smallest_below(&choices, target / dynamic.factor, best.0 - fixed)
            }
        };
        let found = found.ok_or_else(|| unreachable(format!("{:?}", dynamic.target)))?;
        let scheme = |(item, at): (&Item, &usize)| {
            let Cost { bits, group_size, .. } = item.candidates[*at];
            Ok((item.path.clone(), Scheme::affine(bits, group_size).map_err(PlanError::from)?))
        };
        let schemes =
            items.iter().zip(&found.chosen).map(scheme).collect::<Result<BTreeMap<_, _>, Error>>()?;
        let mut settings = settings.clone();
        settings.schemes.extend(schemes);
        let mut plan = Plan::new(&model.checkpoint, &model.config, settings)?;
        plan.notes.extend(unmeasured(&plan, sensitivities));
        let repeats = plan.items.iter().any(|item| matches!(item.job, Job::Repeat { .. }));
        debug_assert!(repeats || plan.layout.tensor_bytes() == fixed + found.bytes, "bytes as planned");
        Ok(Self {
            plan,
            predicted_kl: found.cost * dynamic.factor,
            bound_kl: found.bound * dynamic.factor,
            range,
            range_kl,
        })
    }
}

/// What keeps the scheme of the command line because nothing was measured of it.
fn unmeasured(plan: &Plan, sensitivities: &Sensitivities) -> Option<String> {
    let known: BTreeSet<&str> = sensitivities.layers.iter().map(|layer| layer.path.as_str()).collect();
    let open = plan.items.iter().filter(|item| {
        matches!(&item.job, Job::Quantize { .. })
            && !known.contains(item.name.as_str())
            && plan.architecture.protection(&item.name).is_none()
    });
    let names: Vec<&str> = open.map(|item| item.name.as_str()).collect();
    let first = names.first()?;
    Some(format!(
        "{} layers are not measured and keep the bits of the command line ({first}, ...)",
        names.len()
    ))
}

/// Bits per weight by which a target may lie above everything at its best.
const SLACK: f64 = 0.02;

/// The smallest allocation that costs at most `target`, by halving the budget.
fn smallest_below(choices: &[Vec<Choice>], target: f64, most: u64) -> Option<super::Allocation> {
    let mut best = allocate(choices, most)?;
    let (mut low, mut high) = (0, most);
    while high - low > (most / 100_000).max(1) {
        let middle = low + (high - low) / 2;
        match allocate(choices, middle) {
            Some(found) if found.cost <= target => {
                (best, high) = (found, middle);
            }
            _ => low = middle,
        }
    }
    Some(best)
}

/// Layers to choose for, and the bytes of everything else.
fn items(
    base: &Plan,
    sensitivities: &Sensitivities,
    dynamic: &DynamicSettings,
    learns: impl Fn(&str) -> bool,
) -> Result<(Vec<Item>, u64), Error> {
    let known: BTreeMap<&str, &Layer> =
        sensitivities.layers.iter().map(|layer| (layer.path.as_str(), layer)).collect();
    let mut fixed = base.layout.tensor_bytes();
    let mut items = Vec::new();
    for item in &base.items {
        let Job::Quantize { view, float, scheme } = &item.job else { continue };
        let decided = base.architecture.protection(&item.name).is_some()
            || base.settings.schemes.contains_key(&item.name)
            || base.settings.overrides.as_ref().is_some_and(|all| all.get(&item.name).is_some());
        let Some(layer) = known.get(item.name.as_str()) else { continue };
        if decided || scheme.mode() != Mode::Affine {
            continue;
        }
        let allowed = |cost: &&Cost| {
            (dynamic.min_bits..=dynamic.max_bits).contains(&cost.bits)
                && dynamic.group_sizes.contains(&cost.group_size)
        };
        let candidates: Vec<Cost> = layer.costs.iter().filter(allowed).copied().collect();
        if candidates.is_empty() {
            continue;
        }
        // Bits are those of the language model, bytes of everything, and a table may be written twice.
        let twice = matches!(dynamic.target, Target::Bytes(_))
            && base
                .items
                .iter()
                .any(|other| matches!(other.job, Job::Repeat { of } if of == item.first_output));
        let copies = if twice { 2 } else { 1 };
        let bytes = |scheme: Scheme| stored_bytes(scheme, view.rows(), view.columns(), *float) * copies;
        let learned = learns(&item.name);
        let choice = |cost: &Cost| -> Result<Choice, Error> {
            let scheme = Scheme::affine(cost.bits, cost.group_size).map_err(PlanError::from)?;
            let left = if learned { left(cost.bits) } else { 1.0 };
            Ok(Choice { bytes: bytes(scheme), cost: cost.kl * left })
        };
        let choices = candidates.iter().map(choice).collect::<Result<_, _>>()?;
        fixed -= bytes(*scheme);
        items.push(Item { path: item.name.clone(), candidates, choices });
    }
    if items.is_empty() {
        return Err(PlanError::NothingToQuantize.into());
    }
    Ok((items, fixed))
}

/// Codes, scales and biases.
fn stored_bytes(scheme: Scheme, rows: usize, columns: usize, float: FloatType) -> u64 {
    (rows * (scheme.words(columns) * 4 + 2 * scheme.scale_bytes(columns, float))) as u64
}
