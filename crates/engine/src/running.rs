//! A token's score over the vocabulary, gathered tile by tile.
//!
//! A vocabulary may have 262,144 rows: with these, no row of logits is ever whole in memory, and the head's matrix is
//! read a tile at a time. Exponentials are float32, sums over tiles float64; the order of tiles decides the last bits,
//! so callers keep it fixed.

use crate::exp::{exp, largest, sum_of, sum_of_pairs, vectorised};

/// What one tile of logits is to a token's score, by itself.
#[cfg(feature = "gpu")]
#[derive(Clone, Copy, Debug)]
pub(crate) struct TileScore {
    pub(crate) largest: f32,
    /// Of the exponentials, relative to the tile's largest.
    pub(crate) sum: f64,
    /// The first token of the vocabulary that has the largest.
    pub(crate) best: u32,
    /// The logit of the token that followed, if it lies in this tile.
    pub(crate) target: Option<f32>,
}

/// Logits of one token against the token that followed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RunningScore {
    largest: f32,
    /// Of the exponentials, relative to the largest.
    sum: f64,
    best: u32,
    target: f32,
}

impl Default for RunningScore {
    fn default() -> Self {
        Self { largest: f32::NEG_INFINITY, sum: 0.0, best: 0, target: f32::NEG_INFINITY }
    }
}

impl RunningScore {
    /// Adds the logits of tokens `first..`; `target` is the token that followed.
    pub fn add(&mut self, logits: &[f32], first: u32, target: u32) {
        vectorised(
            #[inline(always)]
            || self.add_inline(logits, first, target),
        );
    }

    #[inline(always)]
    fn add_inline(&mut self, logits: &[f32], first: u32, target: u32) {
        let most = largest(logits);
        if most > self.largest {
            self.sum *= f64::from(self.largest - most).exp();
            self.largest = most;
            self.best = first + logits.iter().position(|value| *value == most).unwrap_or(0) as u32;
        }
        let largest = self.largest;
        self.sum += f64::from(sum_of(logits, |value| exp(value - largest)));
        if let Some(value) = target.checked_sub(first).and_then(|index| logits.get(index as usize)) {
            self.target = *value;
        }
    }

    /// Adds a tile whose sums somebody else has made. The factors of sums that are relative to the old largest, and to
    /// the tile's.
    #[cfg(feature = "gpu")]
    pub(crate) fn join(&mut self, tile: TileScore) -> (f64, f64) {
        let before = self.largest;
        if tile.largest > before {
            (self.largest, self.best) = (tile.largest, tile.best);
        }
        let now = self.largest;
        let factor = |from: f32| if from == now { 1.0 } else { (f64::from(from) - f64::from(now)).exp() };
        let factors = (factor(before), factor(tile.largest));
        self.sum = self.sum * factors.0 + tile.sum * factors.1;
        self.target = tile.target.unwrap_or(self.target);
        factors
    }

    /// Logarithm of the sum of the exponentials.
    pub fn log_sum_exp(&self) -> f64 {
        f64::from(self.largest) + self.sum.ln()
    }

    /// Minus the log probability of the token that followed, nats; infinite if it was in no tile.
    pub fn nll(&self) -> f64 {
        self.log_sum_exp() - f64::from(self.target)
    }

    /// The most likely token; the first of equals.
    pub fn best(&self) -> u32 {
        self.best
    }
}

/// Logits of one token by two models.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RunningDivergence {
    /// Of the reference.
    pub reference: RunningScore,
    /// Of the model that is compared with it.
    pub model: RunningScore,
    /// Sum of `exp(reference) * (reference - model)`, relative to the reference's largest.
    weighted: f64,
}

impl RunningDivergence {
    /// Adds a tile of both, as [`RunningScore::add`].
    pub fn add(&mut self, reference: &[f32], model: &[f32], first: u32, target: u32) {
        vectorised(
            #[inline(always)]
            || {
                let before = self.reference.largest;
                self.reference.add_inline(reference, first, target);
                self.model.add_inline(model, first, target);
                let largest = self.reference.largest;
                if largest > before {
                    // Nothing was summed before the first tile.
                    self.weighted *= if before.is_finite() { f64::from(before - largest).exp() } else { 0.0 };
                }
                let term = |p: f32, q: f32| {
                    let weight = exp(p - largest);
                    // What has no probability adds nothing, even where its logarithm is infinite.
                    if weight == 0.0 { 0.0 } else { weight * (p - q) }
                };
                self.weighted += f64::from(sum_of_pairs(reference, model, term));
            },
        );
    }

    /// Adds a tile of both, as [`RunningScore::join`]; `weighted` is relative to the largest of the reference's tile.
    #[cfg(feature = "gpu")]
    pub(crate) fn join(&mut self, reference: TileScore, model: TileScore, weighted: f64) {
        let (before, own) = self.reference.join(reference);
        self.model.join(model);
        self.weighted = self.weighted * before + weighted * own;
    }

    /// `KL(reference || model)` in nats.
    pub fn divergence(&self) -> f64 {
        self.weighted / self.reference.sum - self.reference.log_sum_exp() + self.model.log_sum_exp()
    }

    /// Whether both find the same token most likely.
    pub fn agrees(&self) -> bool {
        self.reference.best == self.model.best
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(seed: u64, length: usize) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 24) as f32
        };
        (0..length).map(|_| 30.0 * next() - 20.0).collect()
    }

    /// In float64, all at once.
    fn exact(reference: &[f32], model: &[f32], target: usize) -> (f64, f64) {
        let lse = |row: &[f32]| row.iter().map(|value| f64::from(*value).exp()).sum::<f64>().ln();
        let (p, q) = (lse(reference), lse(model));
        let term = |(a, b): (&f32, &f32)| {
            let log = f64::from(*a) - p;
            log.exp() * (log - (f64::from(*b) - q))
        };
        (reference.iter().zip(model).map(term).sum(), q - f64::from(model[target]))
    }

    #[test]
    fn tiles_give_what_the_whole_row_gives() {
        for (seed, length, tile) in
            [(1, 1000, 64), (2, 49_152, 2048), (3, 777, 100), (4, 5, 2), (5, 300, 300)]
        {
            let (reference, noise) = (rows(seed, length), rows(seed + 100, length));
            let model: Vec<f32> = reference.iter().zip(&noise).map(|(a, b)| a + 0.02 * b).collect();
            let target = length / 3;
            let mut running = RunningDivergence::default();
            for start in (0..length).step_by(tile) {
                let range = start..(start + tile).min(length);
                running.add(&reference[range.clone()], &model[range], start as u32, target as u32);
            }
            let (divergence, nll) = exact(&reference, &model, target);
            assert!((running.divergence() - divergence).abs() < 2e-6 * (1.0 + divergence), "{length}/{tile}");
            assert!((running.model.nll() - nll).abs() < 2e-6 * (1.0 + nll.abs()), "{length}/{tile}");
            let best = (0..length).fold(0, |best, i| if model[i] > model[best] { i } else { best });
            assert_eq!(running.model.best() as usize, best);
        }
    }

    /// Tiles that were summed elsewhere, the second of which has the larger logits, and a third nothing.
    #[cfg(feature = "gpu")]
    #[test]
    fn joined_tiles_are_added_tiles() {
        let of = |row: &[f32], first: u32, target: Option<f32>| {
            let most = largest(row);
            let shift = if most.is_finite() { most } else { 0.0 };
            let best = first + row.iter().position(|value| *value == most).unwrap_or(0) as u32;
            let sum = row.iter().map(|value| f64::from(value - shift).exp()).sum();
            TileScore { largest: most, sum, best, target }
        };
        let (reference, model) = ([-1.0, 2.0, 5.0, 3.0], [0.0, 1.0, 4.0, 4.0]);
        let (mut added, mut joined) = (RunningDivergence::default(), RunningDivergence::default());
        for (first, target) in [(0, None), (2, Some(1))] {
            let [p, q] = [&reference, &model].map(|row| &row[first..first + 2]);
            added.add(p, q, first as u32, 3);
            let most = largest(p);
            let terms = p.iter().zip(q).map(|(p, q)| f64::from(p - most).exp() * f64::from(p - q));
            let [own, theirs] = [q, p].map(|row| of(row, first as u32, target.map(|at: usize| row[at])));
            joined.join(theirs, own, terms.sum());
        }
        let nothing = of(&[f32::NEG_INFINITY; 2], 4, None);
        joined.join(nothing, nothing, 0.0);
        assert!((added.divergence() - joined.divergence()).abs() < 1e-6);
        for (added, joined) in [(added.model, joined.model), (added.reference, joined.reference)] {
            assert!((added.nll() - joined.nll()).abs() < 1e-6);
            assert_eq!((added.best(), joined.best()), (2, 2));
        }
    }

    #[test]
    fn first_of_equals_masked_tokens_and_nan() {
        let mut running = RunningScore::default();
        running.add(&[0.0, 1.0, 1.0], 0, 5);
        running.add(&[1.0, f32::NEG_INFINITY], 3, 5);
        assert_eq!(running.best(), 1);
        assert_eq!(running.nll(), f64::INFINITY);
        let mut both = RunningDivergence::default();
        both.add(&[1.0, f32::NEG_INFINITY], &[1.0, f32::NEG_INFINITY], 0, 0);
        assert_eq!(both.divergence(), 0.0);
        let mut broken = RunningScore::default();
        broken.add(&[f32::NAN, 2.0], 0, 1);
        assert!(broken.nll().is_nan());
    }

    #[test]
    fn a_model_does_not_diverge_from_itself() {
        let row = rows(7, 5000);
        let mut running = RunningDivergence::default();
        for (index, tile) in row.chunks(512).enumerate() {
            running.add(tile, tile, index as u32 * 512, 3);
        }
        assert_eq!(running.divergence(), 0.0);
        assert!(running.agrees());
    }
}
