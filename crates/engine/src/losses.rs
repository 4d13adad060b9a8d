//! What losses over a vocabulary keep for each token while tiles of it pass.

use crate::running::RunningScore;

/// A label for each token of a window, drawn from the model's own distribution: the first token of the vocabulary at
/// which the sum of probabilities exceeds a random number.
#[derive(Clone, Debug)]
pub struct Labels {
    /// Random numbers in `[0, 1)`.
    pub(crate) draws: Vec<f64>,
    /// Probability of all tokens of the vocabulary before this tile.
    pub(crate) passed: Vec<f64>,
    pub(crate) chosen: Vec<bool>,
}

impl Labels {
    /// None is drawn yet; `draws` are random numbers in `[0, 1)`, one a token.
    pub fn new(draws: Vec<f64>) -> Self {
        Self { passed: vec![0.0; draws.len()], chosen: vec![false; draws.len()], draws }
    }
}

/// Those of a teacher's likeliest tokens, of one token of a window, that lie in a tile of the vocabulary.
#[derive(Clone, Copy, Debug)]
pub struct Likeliest<'t> {
    /// Ascending; `0` is the first of the vocabulary, not of the tile.
    pub ids: &'t [u32],
    /// The teacher's log probabilities of these.
    pub log_probabilities: &'t [f32],
}

/// The likeliest tokens of one token of a window, in the making.
#[derive(Clone, Debug, Default)]
pub struct Candidates {
    /// Of all tokens of the vocabulary so far.
    pub score: RunningScore,
    /// Logits and ids, in no order.
    pub found: Vec<(f32, u32)>,
}

impl Candidates {
    /// Keeps the `kept` likeliest, of equals the first; where there are as many, the least likely of them comes last.
    pub(crate) fn prune(&mut self, kept: usize) {
        if self.found.len() >= kept.max(1) {
            self.found
                .select_nth_unstable_by(kept.max(1) - 1, |a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
            self.found.truncate(kept);
        }
    }
}
