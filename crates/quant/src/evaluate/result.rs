//! Results as plain data.

use serde::{Deserialize, Serialize};

use super::statistics::{mean, percentile, standard_error};
use crate::Error;
use crate::data::{Pick, SourceInfo, Windows};

/// What was measured of one predicted token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenMeasure {
    /// Minus the log probability of the token, nats.
    pub nll: f64,
    /// Against the reference.
    pub divergence: Option<Divergence>,
}

/// One predicted token of two models.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Divergence {
    /// KL(reference || model), nats.
    pub kl: f64,
    /// Whether both find the same token most likely.
    pub agrees: bool,
    /// The reference's minus log probability of the token, nats.
    pub reference_nll: f64,
}

/// Measures of windows as numbers that another member of a team reads ([`of_words`]).
pub(super) fn words(windows: &[Vec<TokenMeasure>]) -> Vec<u64> {
    let mut words = Vec::new();
    for window in windows {
        words.push(window.len() as u64);
        for TokenMeasure { nll, divergence } in window {
            words.extend([nll.to_bits(), u64::from(divergence.is_some())]);
            if let Some(Divergence { kl, agrees, reference_nll }) = divergence {
                words.extend([kl.to_bits(), u64::from(*agrees), reference_nll.to_bits()]);
            }
        }
    }
    words
}

/// What [`words`] stand for.
pub(super) fn of_words(words: &[u64]) -> Vec<Vec<TokenMeasure>> {
    let mut rest = words.iter().copied();
    let mut windows = Vec::new();
    while let Some(tokens) = rest.next() {
        let mut next = || rest.next().unwrap_or_default();
        let token = |_| {
            let (nll, beside) = (f64::from_bits(next()), next() > 0);
            let mut divergence = || Divergence {
                kl: f64::from_bits(next()),
                agrees: next() > 0,
                reference_nll: f64::from_bits(next()),
            };
            TokenMeasure { nll, divergence: beside.then(&mut divergence) }
        };
        windows.push((0..tokens).map(token).collect());
    }
    windows
}

/// What was evaluated, and how.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Subject {
    /// Directory.
    pub model: String,
    /// Directory of the reference.
    pub reference: Option<String>,
    /// From config.json.
    pub model_type: String,
    /// Stored bits per weight, as mlx-lm counts them.
    pub bits_per_weight: f64,
    /// Weights, as mlx-lm counts them.
    pub parameters: u64,
    /// Whether the reference came from the cache.
    pub reference_cached: bool,
    /// Instruction set that computed it.
    pub kernels: String,
    /// Wall time.
    pub seconds: f64,
}

/// Quality of a model on some windows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// What was evaluated.
    #[serde(flatten)]
    pub subject: Subject,
    /// All windows together.
    #[serde(flatten)]
    pub total: Measures,
    /// By file, where the data is several.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub by_source: Vec<SourceEvaluation>,
    /// Tokens a window.
    pub sequence_length: usize,
    /// SHA-256 over the tokens of all data.
    pub data_hash: String,
    /// How the windows were picked.
    pub pick: Pick,
    /// Files.
    pub sources: Vec<SourceInfo>,
}

/// Quality on the windows of one file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SourceEvaluation {
    /// File name.
    pub name: String,
    /// Its windows.
    #[serde(flatten)]
    pub measures: Measures,
}

/// Quality on some windows. Standard errors are over windows, and missing where there is one window only.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Measures {
    /// Windows.
    pub windows: usize,
    /// Predicted tokens.
    pub tokens: usize,
    /// `exp` of the mean minus log probability.
    pub perplexity: f64,
    /// Its standard error.
    pub perplexity_stderr: Option<f64>,
    /// Against the reference.
    #[serde(flatten)]
    pub against: Option<Against>,
}

/// A model against its reference.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Against {
    /// Of the reference.
    pub reference_perplexity: f64,
    /// Mean over tokens of `nll(model) - nll(reference)`, nats: the difference of the logarithms of both perplexities.
    pub log_perplexity_difference: f64,
    /// Its standard error, paired: with `d[w]` the mean of `nll(model) - nll(reference)` over the tokens of window `w`,
    /// `sqrt(sum (d[w] - mean d)^2 / (n - 1) / n)` over `n` windows. What makes a window hard for both models cancels,
    /// so that this is far less than what the errors of the two perplexities suggest.
    pub log_perplexity_difference_stderr: Option<f64>,
    /// `perplexity / reference_perplexity`, which is `exp(log_perplexity_difference)`.
    pub perplexity_ratio: f64,
    /// Its standard error by the delta method: `perplexity_ratio * log_perplexity_difference_stderr`.
    pub perplexity_ratio_stderr: Option<f64>,
    /// Mean KL(reference || model), nats a token.
    pub kl_mean: f64,
    /// Its standard error.
    pub kl_stderr: Option<f64>,
    /// Median over tokens.
    pub kl_p50: f64,
    /// 99th percentile.
    pub kl_p99: f64,
    /// 99.9th percentile.
    pub kl_p999: f64,
    /// Largest.
    pub kl_max: f64,
    /// Share of tokens for which both find the same token most likely.
    pub top1: f64,
    /// Its standard error.
    pub top1_stderr: Option<f64>,
    /// Mean KL of each window, so that models that saw the same windows can be compared window by window.
    pub kl_by_window: Vec<f64>,
}

impl Evaluation {
    /// From the measures of every window.
    ///
    /// # Errors
    /// If a measure is not a number.
    pub(super) fn of(
        subject: Subject,
        windows: &Windows,
        measures: &[Vec<TokenMeasure>],
    ) -> Result<Self, Error> {
        for (window, measures) in windows.picked.iter().zip(measures) {
            let finite = |measure: &TokenMeasure| {
                measure.nll.is_finite()
                    && measure.divergence.is_none_or(|divergence| divergence.kl.is_finite())
            };
            if let Some(token) = measures.iter().position(|measure| !finite(measure)) {
                return Err(Error::NotANumber {
                    source_name: windows.sources[window.source].name.clone(),
                    window: window.index,
                    token,
                });
            }
        }
        let of_source = |source: usize| {
            let own = windows.picked.iter().zip(measures).filter(|(window, _)| window.source == source);
            own.map(|(_, measures)| measures.as_slice()).collect::<Vec<_>>()
        };
        let by_source = windows.sources.iter().enumerate().map(|(index, source)| SourceEvaluation {
            name: source.name.clone(),
            measures: Measures::of(&of_source(index)),
        });
        Ok(Self {
            subject,
            total: Measures::of(&measures.iter().map(Vec::as_slice).collect::<Vec<_>>()),
            by_source: if windows.sources.len() > 1 { by_source.collect() } else { Vec::new() },
            sequence_length: windows.sequence_length,
            data_hash: windows.data_hash.clone(),
            pick: windows.pick,
            sources: windows.sources.clone(),
        })
    }
}

impl Measures {
    fn of(windows: &[&[TokenMeasure]]) -> Self {
        let all = || windows.iter().flat_map(|window| window.iter());
        let window_means = |of: &dyn Fn(&TokenMeasure) -> f64| -> Vec<f64> {
            windows.iter().map(|window| mean(window.iter().map(of))).collect()
        };
        let perplexity = mean(all().map(|measure| measure.nll)).exp();
        let nll_stderr = standard_error(&window_means(&|measure| measure.nll));
        let divergences: Vec<Divergence> = all().filter_map(|measure| measure.divergence).collect();
        let against = (!divergences.is_empty()).then(|| {
            let kl = |measure: &TokenMeasure| measure.divergence.map_or(0.0, |divergence| divergence.kl);
            let agrees = |measure: &TokenMeasure| {
                f64::from(u8::from(measure.divergence.is_some_and(|divergence| divergence.agrees)))
            };
            let gap = |measure: &TokenMeasure| {
                measure.divergence.map_or(0.0, |divergence| measure.nll - divergence.reference_nll)
            };
            let (difference, difference_stderr) = (mean(all().map(gap)), standard_error(&window_means(&gap)));
            let mut sorted: Vec<f64> = divergences.iter().map(|divergence| divergence.kl).collect();
            sorted.sort_by(f64::total_cmp);
            Against {
                reference_perplexity: mean(divergences.iter().map(|divergence| divergence.reference_nll))
                    .exp(),
                log_perplexity_difference: difference,
                log_perplexity_difference_stderr: difference_stderr,
                perplexity_ratio: difference.exp(),
                perplexity_ratio_stderr: difference_stderr.map(|error| error * difference.exp()),
                kl_mean: mean(all().map(kl)),
                kl_stderr: standard_error(&window_means(&kl)),
                kl_p50: percentile(&sorted, 50.0),
                kl_p99: percentile(&sorted, 99.0),
                kl_p999: percentile(&sorted, 99.9),
                kl_max: percentile(&sorted, 100.0),
                top1: mean(all().map(agrees)),
                top1_stderr: standard_error(&window_means(&agrees)),
                kl_by_window: window_means(&kl),
            }
        });
        Self {
            windows: windows.len(),
            tokens: all().count(),
            perplexity,
            // The delta method.
            perplexity_stderr: nll_stderr.map(|error| error * perplexity),
            against,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Windows that are unequally hard, and a model that loses the same everywhere but for a little.
    #[test]
    fn perplexities_are_compared_window_by_window() {
        let token = |reference_nll: f64, gap: f64| TokenMeasure {
            nll: reference_nll + gap,
            divergence: Some(Divergence { kl: 0.05, agrees: true, reference_nll }),
        };
        let windows = [
            vec![token(1.0, 0.1), token(2.0, 0.3)],
            vec![token(4.0, 0.3), token(5.0, 0.3)],
            vec![token(2.0, 0.2), token(9.0, 0.6)],
        ];
        let measures = Measures::of(&windows.each_ref().map(Vec::as_slice));
        let against = measures.against.unwrap();
        // Differences by window: 0.2, 0.3, 0.4.
        let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-12, "{a} {b}");
        near(against.log_perplexity_difference, 0.3);
        let error = 0.1 / 3f64.sqrt();
        near(against.log_perplexity_difference_stderr.unwrap(), error);
        near(against.perplexity_ratio, 0.3f64.exp());
        near(against.perplexity_ratio_stderr.unwrap(), 0.3f64.exp() * error);
        near(against.perplexity_ratio, measures.perplexity / against.reference_perplexity);
        // The errors of both perplexities, unpaired, say nothing of the difference.
        assert!(measures.perplexity_stderr.unwrap() / measures.perplexity > 10.0 * error);
        let one = Measures::of(&[&windows[0]]).against.unwrap();
        assert_eq!((one.log_perplexity_difference_stderr, one.perplexity_ratio_stderr), (None, None));
    }
}
