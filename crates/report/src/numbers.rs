//! Figures as tables show them; bytes and times are [`mlx_quant::numbers`], which errors need too.

/// A value and its standard error.
pub(crate) fn with_error(value: f64, error: Option<f64>, digits: usize) -> String {
    match error {
        Some(error) => format!("{value:.digits$} ± {error:.digits$}"),
        None => format!("{value:.digits$}"),
    }
}

/// `512 weights`, `7.9 million weights`, `8.03 billion weights`.
pub fn weights(count: u64) -> String {
    let millions = count as f64 / 1e6;
    if count < 10_000 {
        format!("{count} weights")
    } else if millions < 0.95 {
        format!("{:.0} thousand weights", count as f64 / 1e3)
    } else if millions < 999.95 {
        format!("{millions:.1} million weights")
    } else {
        format!("{:.2} billion weights", millions / 1e3)
    }
}

/// `412 GFLOP/s`, `36.2 TFLOP/s`.
pub fn rate(operations: f64) -> String {
    match operations / 1e9 {
        slow if slow < 9.95 => format!("{slow:.1} GFLOP/s"),
        slow if slow < 999.5 => format!("{slow:.0} GFLOP/s"),
        quick => format!("{:.1} TFLOP/s", quick / 1e3),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_change_their_unit() {
        assert_eq!(rate(9.6e9), "9.6 GFLOP/s");
        assert_eq!(rate(4.12e11), "412 GFLOP/s");
        assert_eq!(rate(9.997e11), "1.0 TFLOP/s");
        assert_eq!(rate(3.618e13), "36.2 TFLOP/s");
    }

    #[test]
    fn errors_are_rounded_as_values_are() {
        assert_eq!(with_error(0.123_456, Some(0.001_26), 4), "0.1235 ± 0.0013");
        assert_eq!(with_error(0.123_456, None, 2), "0.12");
    }

    #[test]
    fn weights_change_their_unit() {
        assert_eq!(weights(4_864), "4864 weights");
        assert_eq!(weights(94_000), "94 thousand weights");
        assert_eq!(weights(7_940_000), "7.9 million weights");
        assert_eq!(weights(999_900_000), "999.9 million weights");
        assert_eq!(weights(999_990_000), "1.00 billion weights");
        assert_eq!(weights(8_030_000_000), "8.03 billion weights");
    }
}
