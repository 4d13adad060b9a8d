//! Means, standard errors over windows, percentiles.

/// The mean; 0 of nothing.
pub(crate) fn mean(values: impl IntoIterator<Item = f64>) -> f64 {
    let (sum, count) = values.into_iter().fold((0.0, 0usize), |(sum, count), value| (sum + value, count + 1));
    if count == 0 { 0.0 } else { sum / count as f64 }
}

/// Standard error of the mean of `groups`' means (ddof 1); `None` of fewer than two.
pub(crate) fn standard_error(groups: &[f64]) -> Option<f64> {
    if groups.len() < 2 {
        return None;
    }
    let center = mean(groups.iter().copied());
    let squares: f64 = groups.iter().map(|value| (value - center).powi(2)).sum();
    let count = groups.len() as f64;
    Some((squares / (count - 1.0) / count).sqrt())
}

/// Percentile of sorted values, between ranks interpolated linearly (numpy's default).
pub(super) fn percentile(sorted: &[f64], percent: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return 0.0 };
    let place = percent / 100.0 * last as f64;
    let below = place.floor() as usize;
    let (low, high) = (sorted[below], sorted[(below + 1).min(last)]);
    low + (high - low) * (place - below as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_numpy_computes_them() {
        let values = [0.5, 2.0, 3.25, 10.0];
        assert_eq!(mean(values), 3.9375);
        // numpy.std(values, ddof=1) / 2
        assert!((standard_error(&values).unwrap() - 2.097_555_621_0).abs() < 1e-9);
        assert_eq!(percentile(&values, 50.0), 2.625);
        assert!((percentile(&values, 99.0) - 9.7975).abs() < 1e-12);
        assert_eq!(percentile(&values, 100.0), 10.0);
        assert_eq!(standard_error(&[1.0]), None);
    }
}
