//! Who is better, and whether that is more than chance.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::Entry;
use crate::evaluate::{mean, standard_error};

/// Order of quality in mlx-lm's guide, best first.
const GUIDE: [&str; 5] = ["dwq", "awq", "gptq", "dynamic", "basic"];

/// Sizes that differ by less, in bits per weight, are equal: a budget is never spent to the last byte.
const SAME_SIZE: f64 = 0.01;

/// Differences of so many standard errors are told apart.
const APART: f64 = 2.0;

/// A place among the entries of one width.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ranked {
    /// Index into [`super::Comparison::entries`].
    pub entry: usize,
    /// The width that it is ranked in: bits of a code of the scheme that decides the size.
    pub bits: u32,
    /// From 1 within the width. Entries that are equal within error have the same rank, and the next rank counts them: 1,
    /// 2, 2, 4. Equal within error means that the KL above that of the rank's first entry, window by window, is at most
    /// two standard errors. Where one window gives no error, only equal KLs are equal.
    pub rank: usize,
    /// Index of the entry that it was compared with: the first of its own rank, or, of a rank's first entry, that of the
    /// rank before; `None` of the first of a width.
    pub against: Option<usize>,
    /// KL above that of `against`, mean over windows.
    pub behind: Option<f64>,
    /// Standard error of that difference, window by window.
    pub behind_stderr: Option<f64>,
    /// Whether `against` is better by more than two standard errors.
    pub apart: bool,
}

/// What to take at one width.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// Bits of a code of the scheme that decides the size.
    pub bits: u32,
    /// Index of the entry of lowest KL.
    pub take: usize,
    /// Part of the KL of round-to-nearest that it is below, 0 to 1; `None` without round-to-nearest at the same size, or
    /// if it is that itself.
    pub below_basic: Option<f64>,
    /// Index of the next by KL, if there is one.
    pub next: Option<usize>,
    /// Whether `next` is equal within error.
    pub next_is_equal: bool,
    /// Index of the fastest of those that are equal within error and faster, if that is not `next`.
    pub faster: Option<usize>,
}

/// Orders of a comparison's entries.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Rankings {
    /// What to take, one for each width, the narrowest first.
    pub verdicts: Vec<Verdict>,
    /// By width, the narrowest first, and within a width by KL, lowest first.
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
    /// The orders of `entries` by quality (mean KL) within their widths and by speed, what to take, and those that nothing
    /// beats in both size and quality.
    pub fn of(entries: &[Entry]) -> Self {
        let mut speed: Vec<usize> = (0..entries.len()).collect();
        speed.sort_by(|a, b| entries[*a].seconds.total_cmp(&entries[*b].seconds));
        let widths: BTreeSet<u32> = entries.iter().map(|entry| entry.bits).collect();
        let quality: Vec<Ranked> = widths.into_iter().flat_map(|bits| ranked(entries, bits)).collect();
        let verdicts =
            quality.chunk_by(|a, b| a.bits == b.bits).map(|width| verdict(entries, width)).collect();
        Self { verdicts, quality, speed, pareto: pareto(entries), guide: guide(entries) }
    }

    /// Place by quality within its width, from 1.
    pub fn quality_of(&self, entry: usize) -> usize {
        self.quality.iter().find(|ranked| ranked.entry == entry).map_or(0, |ranked| ranked.rank)
    }
}

/// The entries of one width, lowest KL first.
fn ranked(entries: &[Entry], bits: u32) -> Vec<Ranked> {
    let mut order: Vec<usize> = (0..entries.len()).filter(|at| entries[*at].bits == bits).collect();
    order.sort_by(|a, b| entries[*a].kl().total_cmp(&entries[*b].kl()));
    let mut made: Vec<Ranked> = Vec::with_capacity(order.len());
    // The first entry of the rank that is being filled.
    let mut first: Option<(usize, usize)> = None;
    for (place, entry) in order.into_iter().enumerate() {
        let gap = first.map(|(first, _)| difference(&entries[first], &entries[entry]));
        let equal = gap.is_some_and(|gap| gap.0 == 0.0 || (gap.1.is_some() && !apart(gap)));
        let against = first.map(|(first, _)| first);
        let rank = match first {
            Some((_, rank)) if equal => rank,
            _ => place + 1,
        };
        if !equal {
            first = Some((entry, rank));
        }
        made.push(Ranked {
            entry,
            bits,
            rank,
            against,
            behind: gap.map(|gap| gap.0),
            behind_stderr: gap.and_then(|gap| gap.1),
            apart: gap.is_some_and(apart),
        });
    }
    made
}

/// What to take among the ranked entries of one width.
fn verdict(entries: &[Entry], width: &[Ranked]) -> Verdict {
    let take = width[0].entry;
    let taken = &entries[take];
    let basic = width.iter().map(|ranked| &entries[ranked.entry]).find(|entry| {
        entry.recipe == "rtn" && (entry.bits_per_weight - taken.bits_per_weight).abs() < SAME_SIZE
    });
    let below_basic = basic.filter(|_| taken.recipe != "rtn").map(|basic| 1.0 - taken.kl() / basic.kl());
    // Each beside the one to take, not by rank: what is equal to that may rank behind another that is not.
    let equal = |at: usize| {
        let gap = difference(taken, &entries[at]);
        gap.0 == 0.0 || (gap.1.is_some() && !apart(gap))
    };
    let next = width.get(1).map(|next| next.entry);
    let faster = width[1..]
        .iter()
        .map(|ranked| ranked.entry)
        .filter(|at| equal(*at) && entries[*at].seconds < taken.seconds)
        .min_by(|a, b| entries[*a].seconds.total_cmp(&entries[*b].seconds));
    Verdict {
        bits: width[0].bits,
        take,
        below_basic: below_basic.filter(|share| share.is_finite()),
        next,
        next_is_equal: next.is_some_and(equal),
        faster: faster.filter(|faster| next != Some(*faster)),
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
        // 0.001 behind, with windows that disagree on who is better: equal, and the next rank counts both.
        let places: Vec<usize> = ranks.quality.iter().map(|ranked| ranked.rank).collect();
        assert_eq!(places, [1, 2, 2, 4]);
        assert!(!ranks.quality[2].apart && ranks.quality[3].apart && ranks.quality[0].behind.is_none());
        let behind = ranks.quality[2].behind.unwrap();
        assert!((behind - 0.001).abs() < 1e-9, "{behind}");
        // The last one is compared with the first of the rank before, not with the one that is equal to it.
        assert_eq!(ranks.quality[3].against, Some(1));
        assert!(ranks.guide.contains("does not hold"), "{}", ranks.guide);
        assert!(ranks.guide.contains("dynamic is better than gptq"), "{}", ranks.guide);
        assert!(ranks.guide.contains("within two standard errors: dwq and gptq"), "{}", ranks.guide);
    }

    /// Nobody asks whether 3 bits are worse than 4.
    #[test]
    fn widths_are_ranked_by_themselves() {
        let entries = [
            entry("gptq, 3 bits", "gptq", 3.5, 1.0, &[0.20, 0.21, 0.22]),
            entry("gptq, 4 bits", "gptq", 4.5, 1.0, &[0.05, 0.06, 0.07]),
            entry("basic, 3 bits", "rtn", 3.5, 1.0, &[0.40, 0.42, 0.44]),
            entry("basic, 4 bits", "rtn", 4.5, 1.0, &[0.10, 0.12, 0.14]),
        ];
        let ranks = Rankings::of(&entries);
        let places: Vec<_> =
            ranks.quality.iter().map(|ranked| (ranked.bits, ranked.entry, ranked.rank)).collect();
        assert_eq!(places, [(3, 0, 1), (3, 2, 2), (4, 1, 1), (4, 3, 2)]);
        assert!(ranks.quality[2].behind.is_none(), "the first of a width is behind nobody");
        let takes: Vec<_> = ranks.verdicts.iter().map(|verdict| (verdict.bits, verdict.take)).collect();
        assert_eq!(takes, [(3, 0), (4, 1)]);
        assert!((ranks.verdicts[1].below_basic.unwrap() - 0.5).abs() < 1e-9);
    }

    #[test]
    fn a_verdict_names_what_is_equal_and_faster() {
        let entries = [
            entry("all", "dynamic+awq+gptq+dwq", 4.5, 231.0, &[0.040, 0.043, 0.041]),
            entry("dynamic", "dynamic", 4.5, 89.0, &[0.041, 0.042, 0.042]),
            entry("gptq", "gptq", 4.5, 8.0, &[0.042, 0.042, 0.041]),
            entry("basic", "rtn", 4.5, 1.0, &[0.093, 0.094, 0.095]),
        ];
        let all = Rankings::of(&entries).verdicts.remove(0);
        assert_eq!((all.take, all.next, all.next_is_equal, all.faster), (0, Some(1), true, Some(2)));
        assert!((all.below_basic.unwrap() - 0.5603).abs() < 1e-3, "{all:?}");
        // Equal to the best, though behind one that is not.
        let noisy = [
            entry("all", "dynamic", 4.5, 30.0, &[0.040, 0.050, 0.060]),
            entry("dwq", "dwq", 4.5, 20.0, &[0.045, 0.055, 0.065]),
            entry("gptq", "gptq", 4.5, 8.0, &[0.055, 0.070, 0.042]),
        ];
        let made = Rankings::of(&noisy);
        let places: Vec<usize> = made.quality.iter().map(|ranked| ranked.rank).collect();
        assert_eq!((places, made.verdicts[0].faster), (vec![1, 2, 2], Some(2)));
        assert!(!made.verdicts[0].next_is_equal);
        // Without round-to-nearest, and with nobody else.
        let alone = Rankings::of(&entries[..1]).verdicts.remove(0);
        assert_eq!((alone.below_basic, alone.next, alone.faster), (None, None, None));
        let basic = Rankings::of(&entries[3..]).verdicts.remove(0);
        assert_eq!(basic.below_basic, None);
        // Another size is no comparison.
        let mut smaller = entries.clone();
        smaller[3].bits_per_weight = 4.4;
        assert_eq!(Rankings::of(&smaller).verdicts[0].below_basic, None);
    }

    #[test]
    fn a_hair_of_size_is_no_place_on_the_front_and_one_window_no_judgement() {
        let entries =
            [entry("gptq", "gptq", 4.506, 1.0, &[0.05]), entry("dynamic", "dynamic", 4.505, 1.0, &[0.06])];
        let ranks = Rankings::of(&entries);
        assert_eq!(ranks.pareto, [0]);
        assert!(ranks.guide.contains("cannot tell"), "{}", ranks.guide);
        let places: Vec<usize> = ranks.quality.iter().map(|ranked| ranked.rank).collect();
        assert_eq!(places, [1, 2], "without an error there is an order all the same");
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
