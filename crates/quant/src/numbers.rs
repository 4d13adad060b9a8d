//! Bytes and times as people read them, for errors and for whoever shows results.

/// `1.23 GB`, in powers of 1000.
pub fn bytes(count: u64) -> String {
    let mut value = count as f64;
    for unit in ["B", "kB", "MB", "GB"] {
        if value < 999.5 {
            let digits = if unit == "B" || value >= 99.95 { 0 } else { 2 };
            return format!("{value:.digits$} {unit}");
        }
        value /= 1000.0;
    }
    format!("{value:.2} TB")
}

/// `0.05 s`, `31.7 s`, `5 min`, `2.5 h`.
pub fn duration(seconds: f64) -> String {
    match seconds {
        _ if seconds < 9.995 => format!("{seconds:.2} s"),
        _ if seconds < 99.95 => format!("{seconds:.1} s"),
        _ if seconds < 600.0 => format!("{seconds:.0} s"),
        _ if seconds < 5970.0 => format!("{:.0} min", seconds / 60.0),
        _ => format!("{:.1} h", seconds / 3600.0),
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
            (5_368_709_120, "5.37 GB"),
            (700_000_000_000, "700 GB"),
            (7_000_000_000_000, "7.00 TB"),
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
            (600.0, "10 min"),
            (9000.0, "2.5 h"),
        ];
        for (seconds, text) in cases {
            assert_eq!(duration(seconds), text);
        }
    }
}
