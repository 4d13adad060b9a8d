//! Spending bytes where they save most: a multiple-choice knapsack.
//!
//! Relaxed to fractions it is solved exactly by going along the convex hulls of all items in the order of their slopes (Sinha and
//! Zoltners 1979); that is also the Lagrangian's optimum, and no choice of whole candidates can be better. From its whole part, exchanges
//! of one and of two items spend what is left. The bound tells how far from the best the result can be at most.

/// One way to store an item.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// What it takes.
    pub bytes: u64,
    /// What it costs.
    pub cost: f64,
}

/// A choice for every item.
#[derive(Clone, Debug, PartialEq)]
pub struct Allocation {
    /// Which of its choices each item gets.
    pub chosen: Vec<usize>,
    /// Of all.
    pub bytes: u64,
    /// Of all.
    pub cost: f64,
    /// No allocation within the budget costs less.
    pub bound: f64,
}

/// Exchanges of two items that are tried at most.
const EXCHANGES: usize = 200;

/// A step along an item's hull.
struct Step {
    item: usize,
    to: usize,
    bytes: u64,
    saved: f64,
}

/// The choices on the lower convex hull, smallest first.
fn hull(choices: &[Choice]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..choices.len()).collect();
    order.sort_by(|a, b| {
        let (a, b) = (choices[*a], choices[*b]);
        a.bytes.cmp(&b.bytes).then(a.cost.total_cmp(&b.cost))
    });
    let mut hull: Vec<usize> = Vec::new();
    for next in order {
        let point = choices[next];
        if hull.last().is_some_and(|last| choices[*last].cost <= point.cost) {
            continue;
        }
        let slope = |from: usize, to: Choice| {
            (choices[from].cost - to.cost) / (to.bytes - choices[from].bytes).max(1) as f64
        };
        while let [.., before, last] = hull[..] {
            if slope(before, choices[last]) > slope(last, point) {
                break;
            }
            hull.pop();
        }
        // Of equally large ones the cheapest came first.
        hull.push(next);
    }
    hull
}

/// The least costly choice for each item within `budget` bytes; `None` if even the smallest do not fit.
pub fn allocate(items: &[Vec<Choice>], budget: u64) -> Option<Allocation> {
    let hulls: Vec<Vec<usize>> = items.iter().map(|choices| hull(choices)).collect();
    let mut chosen: Vec<usize> = hulls.iter().map(|hull| hull.first().copied()).collect::<Option<_>>()?;
    let mut left = budget.checked_sub(items.iter().zip(&chosen).map(|(item, at)| item[*at].bytes).sum())?;
    let mut steps: Vec<Step> = Vec::new();
    for (item, hull) in hulls.iter().enumerate() {
        for pair in hull.windows(2) {
            let (from, to) = (items[item][pair[0]], items[item][pair[1]]);
            steps.push(Step { item, to: pair[1], bytes: to.bytes - from.bytes, saved: from.cost - to.cost });
        }
    }
    // Within an item slopes fall, so that a stable sort keeps its steps in order.
    steps.sort_by(|a, b| (b.saved / b.bytes as f64).total_cmp(&(a.saved / a.bytes as f64)));
    let cost = |chosen: &[usize]| items.iter().zip(chosen).map(|(item, at)| item[*at].cost).sum::<f64>();
    let mut bound = cost(&chosen);
    let mut open = true;
    let mut stopped = vec![false; items.len()];
    for step in &steps {
        if open {
            // The first step that does not fit is taken in part: the relaxed optimum.
            let part = (left as f64 / step.bytes as f64).min(1.0);
            bound -= step.saved * part;
            open = step.bytes <= left;
        }
        if step.bytes <= left && !stopped[step.item] {
            left -= step.bytes;
            chosen[step.item] = step.to;
        } else {
            stopped[step.item] = true;
        }
    }
    improve(items, &mut chosen, &mut left);
    let total = cost(&chosen);
    Some(Allocation { bytes: budget - left, cost: total, bound: bound.min(total), chosen })
}

/// Exchanges of one item, then of two, as long as they lower the cost.
fn improve(items: &[Vec<Choice>], chosen: &mut [usize], left: &mut u64) {
    for _ in 0..EXCHANGES {
        while let Some((item, to)) = best_single(items, chosen, *left) {
            *left = *left + items[item][chosen[item]].bytes - items[item][to].bytes;
            chosen[item] = to;
        }
        let Some([first, second]) = best_pair(items, chosen, *left) else { return };
        for (item, to) in [first, second] {
            // The one that gives bytes comes first.
            *left = *left + items[item][chosen[item]].bytes - items[item][to].bytes;
            chosen[item] = to;
        }
    }
}

fn best_single(items: &[Vec<Choice>], chosen: &[usize], left: u64) -> Option<(usize, usize)> {
    let mut best = None;
    let mut most = 0.0;
    for (item, choices) in items.iter().enumerate() {
        let now = choices[chosen[item]];
        for (to, choice) in choices.iter().enumerate() {
            if choice.bytes <= now.bytes + left && now.cost - choice.cost > most {
                most = now.cost - choice.cost;
                best = Some((item, to));
            }
        }
    }
    best
}

/// Best and second best of another item: what is saved, and the exchange.
type Two = [Option<(f64, (usize, usize))>; 2];

/// An item that becomes smaller and one that becomes larger.
fn best_pair(items: &[Vec<Choice>], chosen: &[usize], left: u64) -> Option<[(usize, usize); 2]> {
    // Upgrades by what they take; for each size, the best of all that take no more.
    let mut upgrades: Vec<(u64, f64, (usize, usize))> = Vec::new();
    let mut downgrades: Vec<(u64, f64, (usize, usize))> = Vec::new();
    for (item, choices) in items.iter().enumerate() {
        let now = choices[chosen[item]];
        for (to, choice) in choices.iter().enumerate() {
            if choice.bytes > now.bytes && choice.cost < now.cost {
                upgrades.push((choice.bytes - now.bytes, now.cost - choice.cost, (item, to)));
            } else if choice.bytes < now.bytes {
                downgrades.push((now.bytes - choice.bytes, choice.cost - now.cost, (item, to)));
            }
        }
    }
    upgrades.sort_by_key(|upgrade| upgrade.0);
    let mut prefix: Vec<Two> = Vec::with_capacity(upgrades.len());
    let mut two: Two = [None, None];
    for (_, saved, place) in &upgrades {
        let better = |other: &Option<(f64, (usize, usize))>| other.is_none_or(|other| *saved > other.0);
        if better(&two[0]) {
            if two[0].is_some_and(|first| first.1.0 != place.0) {
                two[1] = two[0];
            }
            two[0] = Some((*saved, *place));
        } else if two[0].is_some_and(|first| first.1.0 != place.0) && better(&two[1]) {
            two[1] = Some((*saved, *place));
        }
        prefix.push(two);
    }
    let mut best = None;
    let mut most = 1e-15;
    for (freed, lost, place) in downgrades {
        let end = upgrades.partition_point(|upgrade| upgrade.0 <= freed + left);
        let Some(two) = end.checked_sub(1).map(|at| prefix[at]) else { continue };
        let other = two.into_iter().flatten().find(|other| other.1.0 != place.0);
        let Some((saved, other)) = other else { continue };
        if saved - lost > most {
            most = saved - lost;
            best = Some([place, other]);
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The best of all allocations, by trying them.
    fn exhaustive(items: &[Vec<Choice>], budget: u64) -> Option<f64> {
        let Some((first, rest)) = items.split_first() else { return Some(0.0) };
        let fits = first.iter().filter(|choice| choice.bytes <= budget);
        fits.filter_map(|choice| Some(choice.cost + exhaustive(rest, budget - choice.bytes)?))
            .min_by(f64::total_cmp)
    }

    fn items() -> impl Strategy<Value = Vec<Vec<Choice>>> {
        let choice = (1u64..60, 0u32..1000);
        let choice = choice.prop_map(|(bytes, cost)| Choice { bytes, cost: f64::from(cost) / 100.0 });
        proptest::collection::vec(proptest::collection::vec(choice, 1..5), 1..6)
    }

    proptest! {
        #[test]
        fn within_the_budget_and_above_the_bound(items in items(), budget in 0u64..250) {
            let best = exhaustive(&items, budget);
            match allocate(&items, budget) {
                None => prop_assert!(best.is_none()),
                Some(found) => {
                    let of = |f: fn(&Choice) -> f64| -> f64 {
                        items.iter().zip(&found.chosen).map(|(item, at)| f(&item[*at])).sum()
                    };
                    let best = best.unwrap();
                    prop_assert!(found.bytes <= budget);
                    prop_assert_eq!(of(|choice| choice.bytes as f64), found.bytes as f64);
                    prop_assert!((of(|choice| choice.cost) - found.cost).abs() < 1e-9);
                    prop_assert!(found.cost >= best - 1e-9, "{} below the best {}", found.cost, best);
                    prop_assert!(found.bound <= best + 1e-9, "bound {} above the best {}", found.bound, best);
                }
            }
        }
    }

    /// Many layers whose cost falls by four with each bit: what is left of the gap is a step of one layer.
    #[test]
    fn the_gap_is_small_for_many_items() {
        let items: Vec<Vec<Choice>> = (0..200u64)
            .map(|item| {
                let size = 1000 + (item * 7919) % 5000;
                let worth = 1.0 + ((item * 104_729) % 977) as f64;
                (2..9u32)
                    .map(|bits| Choice {
                        bytes: size * u64::from(bits) + 31,
                        cost: worth * 0.25f64.powi(bits.cast_signed()),
                    })
                    .collect()
            })
            .collect();
        for budget in [2_000_000u64, 2_500_000, 3_300_000] {
            let found = allocate(&items, budget).unwrap();
            assert!(found.cost < found.bound * 1.001, "{} {}", found.cost, found.bound);
            assert!(found.bytes > budget - 1000);
        }
    }
}
