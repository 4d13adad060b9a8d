//! Bytes and times as people read them, for errors and for whoever shows results: three digits and a unit.

/// `1.23 GB`, `15.7 MB`, `972 kB`, in powers of 1000; below 1000 bytes the bytes themselves.
pub fn bytes(count: u64) -> String {
    let mut value = count as f64;
    if value < 999.5 {
        return format!("{value:.0} B");
    }
    for unit in ["kB", "MB", "GB"] {
        value /= 1000.0;
        // What would be rounded to 1000 is 1.00 of the next.
        if value < 999.5 {
            return format!("{} {unit}", three_digits(value));
        }
    }
    format!("{} TB", three_digits(value / 1000.0))
}

/// `1.23`, `12.3`, `123`.
fn three_digits(value: f64) -> String {
    let digits = match value {
        _ if value < 9.995 => 2,
        _ if value < 99.95 => 1,
        _ => 0,
    };
    format!("{value:.digits$}")
}

/// `0.05 s`, `31.7 s`, `231 s`, `12 min`, `2 h 30 min`, `4 d 12 h`.
pub fn duration(seconds: f64) -> String {
    const MINUTE: f64 = 60.0;
    let two = |large: u64, unit: &str, small: u64, part: &str| match small {
        0 => format!("{large} {unit}"),
        _ => format!("{large} {unit} {small} {part}"),
    };
    let minutes = (seconds / MINUTE).round() as u64;
    let hours = (seconds / (60.0 * MINUTE)).round() as u64;
    match seconds {
        _ if seconds < 599.5 => format!("{} s", three_digits(seconds)),
        _ if minutes < 60 => format!("{minutes} min"),
        _ if minutes < 24 * 60 => two(minutes / 60, "h", minutes % 60, "min"),
        _ => two(hours / 24, "d", hours % 24, "h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        let cases = [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "1.00 kB"),
            (123_456, "123 kB"),
            (999_499, "999 kB"),
            (999_500, "1.00 MB"),
            (15_749_120, "15.7 MB"),
            (58_160_000, "58.2 MB"),
            (5_368_709_120, "5.37 GB"),
            (700_000_000_000, "700 GB"),
            (7_000_000_000_000, "7.00 TB"),
            (7_000_000_000_000_000, "7000 TB"),
        ];
        for (count, text) in cases {
            assert_eq!(bytes(count), text);
        }
    }

    #[test]
    fn times() {
        let cases = [
            (0.051, "0.05 s"),
            (9.994, "9.99 s"),
            (31.68, "31.7 s"),
            (120.4, "120 s"),
            (231.2, "231 s"),
            (599.4, "599 s"),
            (599.9, "10 min"),
            (3569.0, "59 min"),
            (3599.0, "1 h"),
            (9000.0, "2 h 30 min"),
            (86_399.0, "1 d"),
            (388_800.0, "4 d 12 h"),
        ];
        for (seconds, text) in cases {
            assert_eq!(duration(seconds), text);
        }
    }
}
