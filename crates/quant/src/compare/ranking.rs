//! Who is better, and whether that is more than chance.

use serde::{Deserialize, Serialize};

use super::Entry;
use crate::evaluate::{mean, standard_error};

/// Order of quality in mlx-lm's guide, best first.
const GUIDE: [&str; 5] = ["dwq", "awq", "gptq", "dynamic", "basic"];

/// Sizes that differ by less, in bits per weight, are equal: a budget is never spent to the last byte.
const SAME_SIZE: f64 = 0.01;

/// Differences of so many standard errors are told apart.
const APART: f64 = 2.0;

/// A place in an order.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ranked {
    /// Index into [`super::Comparison::entries`].
    pub entry: usize,
    /// From 1.
    pub rank: usize,
    /// KL above that of the one before, mean over windows; `None` of the first.
    pub behind: Option<f64>,
    /// Standard error of that difference, window by window.
    pub behind_stderr: Option<f64>,
    /// Whether the one before is better by more than two standard errors.
    pub apart: bool,
}

/// Orders of a comparison's entries.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Rankings {
    /// By KL, lowest first.
    pub quality: Vec<Ranked>,
    /// Indices by time, fastest first.
    pub speed: Vec<usize>,
    /// Indices of those that no other beats in both size and KL, smallest first.
    pub pareto: Vec<usize>,
    /// How the order of mlx-lm's guide fares here.
    pub guide: String,
}

/// Mean and standard error of the KL of `b` above that of `a`, over the windows that both saw.
fn difference(a: &Entry, b: &Entry) -> (f64, Option<f64>) {
    let (a, b) = (a.against().kl_by_window, b.against().kl_by_window);
    let differences: Vec<f64> = b.iter().zip(&a).map(|(b, a)| b - a).collect();
    (mean(differences.iter().copied()), standard_error(&differences))
}

/// Whether a difference is more than chance.
fn apart((difference, error): (f64, Option<f64>)) -> bool {
    error.is_some_and(|error| difference.abs() > APART * error)
}

impl Rankings {
    /// The orders of `entries` by quality (mean KL) and by speed, and those of them that nothing beats in both size and quality.
    pub fn of(entries: &[Entry]) -> Self {
        let order = |key: &dyn Fn(&Entry) -> f64| {
            let mut order: Vec<usize> = (0..entries.len()).collect();
            order.sort_by(|a, b| key(&entries[*a]).total_cmp(&key(&entries[*b])));
            order
        };
        let by_kl = order(&Entry::kl);
        let ranked = |(rank, &entry): (usize, &usize)| {
            let before =
                rank.checked_sub(1).map(|before| difference(&entries[by_kl[before]], &entries[entry]));
            Ranked {
                entry,
                rank: rank + 1,
                behind: before.map(|before| before.0),
                behind_stderr: before.and_then(|before| before.1),
                apart: before.is_some_and(apart),
            }
        };
        Self {
            quality: by_kl.iter().enumerate().map(ranked).collect(),
            speed: order(&|entry| entry.seconds),
            pareto: pareto(entries),
            guide: guide(entries),
        }
    }

    /// Place by quality, from 1.
    pub fn quality_of(&self, entry: usize) -> usize {
        self.quality.iter().find(|ranked| ranked.entry == entry).map_or(0, |ranked| ranked.rank)
    }

    /// Place by speed, from 1.
    pub fn speed_of(&self, entry: usize) -> usize {
        self.speed.iter().position(|other| *other == entry).map_or(0, |place| place + 1)
    }
}

fn pareto(entries: &[Entry]) -> Vec<usize> {
    let beaten = |entry: &Entry| {
        entries.iter().any(|other| {
            let smaller = other.bits_per_weight < entry.bits_per_weight - SAME_SIZE;
            let as_small = other.bits_per_weight <= entry.bits_per_weight + SAME_SIZE;
            as_small && (other.kl() < entry.kl() || (smaller && other.kl() <= entry.kl()))
        })
    };
    let mut front: Vec<usize> = (0..entries.len()).filter(|index| !beaten(&entries[*index])).collect();
    front.sort_by(|a, b| entries[*a].bits_per_weight.total_cmp(&entries[*b].bits_per_weight));
    front
}

/// One sentence for each width on the guide's order among the methods that took part.
fn guide(entries: &[Entry]) -> String {
    let mut widths: Vec<u32> = entries.iter().map(|entry| entry.bits).collect();
    widths.sort_unstable();
    widths.dedup();
    let sentences = widths.iter().filter_map(|&bits| {
        let named = |recipe: &str| {
            let recipe = if recipe == "basic" { "rtn" } else { recipe };
            entries.iter().find(|entry| entry.bits == bits && entry.recipe == recipe)
        };
        let present: Vec<(&str, &Entry)> =
            GUIDE.iter().filter_map(|name| Some((*name, named(name)?))).collect();
        if present.len() < 2 {
            return None;
        }
        if present.iter().any(|(_, entry)| entry.evaluation.total.windows < 2) {
            return Some(format!(
                "At {bits} bits: one window cannot tell whether the order of mlx-lm's guide holds."
            ));
        }
        let order = present.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
        let (mut reversed, mut even) = (Vec::new(), Vec::new());
        for (at, (better, first)) in present.iter().enumerate() {
            for (worse, second) in &present[at + 1..] {
                // Positive where the guide is right.
                let gap = difference(first, second);
                match (apart(gap), gap.0 < 0.0) {
                    (true, true) => reversed.push(format!("{worse} is better than {better}")),
                    (false, _) => even.push(format!("{better} and {worse}")),
                    (true, false) => {}
                }
            }
        }
        let holds = if reversed.is_empty() && even.is_empty() {
            "holds".to_owned()
        } else if reversed.is_empty() {
            "is not contradicted".to_owned()
        } else {
            format!("does not hold: {}", reversed.join(", "))
        };
        let even = if even.is_empty() {
            String::new()
        } else {
            format!("; within two standard errors: {}", even.join(", "))
        };
        Some(format!("At {bits} bits the order of mlx-lm's guide ({order}) {holds}{even}."))
    });
    sentences.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::super::entry::tests::entry;
    use super::*;

    #[test]
    fn orders() {
        let entries = [
            entry("basic", "rtn", 4.5, 1.0, &[0.10, 0.12, 0.11]),
            entry("gptq", "gptq", 4.5, 9.0, &[0.05, 0.07, 0.06]),
            entry("dwq", "dwq", 4.5, 20.0, &[0.055, 0.065, 0.063]),
            entry("dynamic", "dynamic", 4.4, 5.0, &[0.02, 0.04, 0.03]),
        ];
        let ranks = Rankings::of(&entries);
        let order: Vec<usize> = ranks.quality.iter().map(|ranked| ranked.entry).collect();
        assert_eq!(order, [3, 1, 2, 0]);
        assert_eq!(ranks.speed, [0, 3, 1, 2]);
        // Smaller and closer than all others.
        assert_eq!(ranks.pareto, [3]);
        // 0.001 behind, with windows that disagree on who is better.
        assert!(!ranks.quality[2].apart && ranks.quality[3].apart && ranks.quality[0].behind.is_none());
        let behind = ranks.quality[2].behind.unwrap();
        assert!((behind - 0.001).abs() < 1e-9, "{behind}");
        assert!(ranks.guide.contains("does not hold"), "{}", ranks.guide);
        assert!(ranks.guide.contains("dynamic is better than gptq"), "{}", ranks.guide);
        assert!(ranks.guide.contains("within two standard errors: dwq and gptq"), "{}", ranks.guide);
    }

    #[test]
    fn a_hair_of_size_is_no_place_on_the_front_and_one_window_no_judgement() {
        let entries =
            [entry("gptq", "gptq", 4.506, 1.0, &[0.05]), entry("dynamic", "dynamic", 4.505, 1.0, &[0.06])];
        let ranks = Rankings::of(&entries);
        assert_eq!(ranks.pareto, [0]);
        assert!(ranks.guide.contains("cannot tell"), "{}", ranks.guide);
    }

    #[test]
    fn a_front_of_several_sizes() {
        let entries = [
            entry("a", "rtn", 3.5, 1.0, &[0.4, 0.5]),
            entry("b", "gptq", 3.5, 1.0, &[0.2, 0.3]),
            entry("c", "rtn", 4.5, 1.0, &[0.25, 0.3]),
            entry("d", "gptq", 4.5, 1.0, &[0.05, 0.06]),
        ];
        assert_eq!(Rankings::of(&entries).pareto, [1, 3]);
    }
}
