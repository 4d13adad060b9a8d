//! Sizes and times as people write them.

use crate::refusal::Refusal;

/// The number in front, and the unit behind it.
fn split(text: &str) -> Option<(f64, String)> {
    let text = text.trim();
    let end = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let number: f64 = text[..end].parse().ok()?;
    Some((number, text[end..].trim().to_ascii_lowercase()))
}

/// Bytes, as in `4.2GB` or `500MiB`.
pub(crate) fn size(flag: &str, text: &str) -> Result<u64, Refusal> {
    let factor = |unit: &str| match unit {
        "" | "b" => Some(1.0),
        "kb" | "k" => Some(1e3),
        "mb" | "m" => Some(1e6),
        "gb" | "g" => Some(1e9),
        "tb" | "t" => Some(1e12),
        "kib" => Some(1024.0),
        "mib" => Some(1024f64.powi(2)),
        "gib" => Some(1024f64.powi(3)),
        "tib" => Some(1024f64.powi(4)),
        _ => None,
    };
    let found = split(text).and_then(|(number, unit)| Some((number * factor(&unit)?) as u64));
    found.ok_or_else(|| {
        Refusal(format!("{flag} {text}: hint: give bytes, or a number with KB, MB, GB, KiB, MiB, GiB"))
    })
}

/// Seconds, as in `90s`, `30min`, `2h` or `1d`.
pub(crate) fn time(flag: &str, text: &str) -> Result<f64, Refusal> {
    let factor = |unit: &str| match unit {
        "" | "s" | "sec" => Some(1.0),
        "m" | "min" => Some(60.0),
        "h" => Some(3600.0),
        "d" => Some(86400.0),
        _ => None,
    };
    let found = split(text).and_then(|(number, unit)| Some(number * factor(&unit)?));
    found
        .filter(|seconds| *seconds > 0.0)
        .ok_or_else(|| Refusal(format!("{flag} {text}: hint: give seconds, or a number with s, min, h or d")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        let size = |text| super::size("--size", text);
        for (text, bytes) in [("12", 12), ("4.2GB", 4_200_000_000), ("1.5 KiB", 1536), ("3mb", 3_000_000)] {
            assert_eq!(size(text).ok(), Some(bytes), "{text}");
        }
        for text in ["", "GB", "4 furlongs", "1e9x"] {
            assert!(size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn times_are_read() {
        for (text, seconds) in
            [("90", 90.0), ("90s", 90.0), ("1.5h", 5400.0), ("30 min", 1800.0), ("2d", 172_800.0)]
        {
            assert_eq!(time("--time", text).ok(), Some(seconds), "{text}");
        }
        for text in ["", "h", "0s", "5 years"] {
            assert!(time("--time", text).is_err(), "{text}");
        }
    }
}
