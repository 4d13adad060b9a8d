//! What an evaluation needs of the logits of one token.

/// The score of one row of logits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenScore {
    /// Minus the log probability of the target, in nats.
    pub nll: f64,
    /// The most likely token; the first of equals.
    pub best: u32,
    /// Logarithm of the sum of the exponentials of the row.
    pub log_sum_exp: f64,
}

/// Scores a row of logits, one for each token of the vocabulary, against the token that followed.
///
/// A target outside of the row has an infinite `nll`.
pub fn score(logits: &[f32], target: u32) -> TokenScore {
    let mut best = 0;
    for (i, value) in logits.iter().enumerate() {
        if *value > logits[best] {
            best = i;
        }
    }
    let largest = logits.get(best).copied().unwrap_or(f32::NEG_INFINITY);
    let sum: f64 = logits.iter().map(|value| f64::from((value - largest).exp())).sum();
    let log_sum_exp = f64::from(largest) + sum.ln();
    let nll = logits.get(target as usize).map_or(f64::INFINITY, |value| log_sum_exp - f64::from(*value));
    TokenScore { nll, best: best as u32, log_sum_exp }
}

/// `KL(reference || logits)` in nats of two rows, given the `log_sum_exp` of both.
pub fn kl_of_rows(reference: &[f32], reference_lse: f64, logits: &[f32], lse: f64) -> f64 {
    let term = |(p, q): (&f32, &f32)| {
        let log_p = f64::from(*p) - reference_lse;
        let probability = log_p.exp();
        if probability == 0.0 { 0.0 } else { probability * (log_p - (f64::from(*q) - lse)) }
    };
    reference.iter().zip(logits).map(term).sum()
}
