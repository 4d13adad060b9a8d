//! Sizes and times as people write them: a number and a unit. A number alone could mean anything, and is refused.

use crate::refusal::Refusal;

/// Units of a quantity, each with what one of it is.
struct Quantity {
    /// As in "is no size".
    name: &'static str,
    /// How a unit is written, with the spellings that are taken too.
    units: &'static [(&'static [&'static str], f64)],
    example: &'static str,
}

const SIZE: Quantity = Quantity {
    name: "size",
    units: &[
        (&["B"], 1.0),
        (&["KB", "K"], 1e3),
        (&["MB", "M"], 1e6),
        (&["GB", "G"], 1e9),
        (&["TB", "T"], 1e12),
        (&["KiB"], 1024.0),
        (&["MiB"], 1024.0 * 1024.0),
        (&["GiB"], 1024.0 * 1024.0 * 1024.0),
        (&["TiB"], 1024.0 * 1024.0 * 1024.0 * 1024.0),
    ],
    example: "16GB",
};

const TIME: Quantity = Quantity {
    name: "time",
    units: &[(&["s", "sec"], 1.0), (&["min", "m"], 60.0), (&["h"], 3600.0), (&["d"], 86400.0)],
    example: "30min",
};

impl Quantity {
    /// Reads the text of a flag.
    fn read(&self, flag: &str, text: &str) -> Result<f64, Refusal> {
        let Self { name, units, example } = self;
        let refused = |what: String| {
            let names: Vec<&str> = units.iter().map(|unit| unit.0[0]).collect();
            let names = names.join(", ");
            Refusal(format!(
                "{flag}: {what}; hint: give a number with one of {names}, as in {flag} {example}"
            ))
        };
        let text = text.trim();
        let end = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
        let (number, unit) = (&text[..end], text[end..].trim());
        let Ok(number) = number.parse::<f64>() else { return Err(refused(format!("{text:?} is no {name}"))) };
        if unit.is_empty() {
            return Err(refused(format!("{text} has no unit")));
        }
        let known = units.iter().find(|known| known.0.iter().any(|name| name.eq_ignore_ascii_case(unit)));
        match known {
            Some((_, factor)) => Ok(number * factor),
            None => Err(refused(format!("{text} has the unit {unit:?}, which there is not"))),
        }
    }
}

/// Bytes, as in `4.2GB` or `500MiB`.
pub(crate) fn size(flag: &str, text: &str) -> Result<u64, Refusal> {
    Ok(SIZE.read(flag, text)? as u64)
}

/// Seconds, as in `90s`, `30min`, `2h` or `1d`.
pub(crate) fn time(flag: &str, text: &str) -> Result<f64, Refusal> {
    let seconds = TIME.read(flag, text)?;
    if seconds > 0.0 {
        return Ok(seconds);
    }
    Err(Refusal(format!("{flag}: {text} is no time at all; hint: give more, as in {flag} 30min")))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test panics to fail")]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        let size = |text| super::size("--size", text);
        for (text, bytes) in [("12B", 12), ("4.2GB", 4_200_000_000), ("1.5 KiB", 1536), ("3mb", 3_000_000)] {
            assert_eq!(size(text).ok(), Some(bytes), "{text}");
        }
        for text in ["", "GB", "4 furlongs", "1e9x", "1.2.3GB"] {
            assert!(size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn times_are_read() {
        for (text, seconds) in
            [("90s", 90.0), ("90 SEC", 90.0), ("1.5h", 5400.0), ("30 min", 1800.0), ("2d", 172_800.0)]
        {
            assert_eq!(time("--time", text).ok(), Some(seconds), "{text}");
        }
        for text in ["", "h", "0s", "5 years"] {
            assert!(time("--time", text).is_err(), "{text}");
        }
    }

    /// What is wrong, and every unit that there is.
    #[test]
    fn a_number_alone_is_refused() {
        let said = |result: Result<f64, Refusal>| result.unwrap_err().0;
        let bytes = |text| said(size("--memory", text).map(|bytes| bytes as f64));
        for text in ["16", "16.", " 4.2 ", "0"] {
            let refused = bytes(text);
            let (what, hint) = refused.split_once("; hint: ").unwrap();
            assert!(what.ends_with("has no unit"), "{refused}");
            for unit in ["B", "KB", "MB", "GB", "TB", "KiB", "MiB", "GiB", "TiB"] {
                assert!(hint.contains(&format!(" {unit},")), "{unit}: {refused}");
            }
        }
        assert!(bytes("4.2XB").starts_with("--memory: 4.2XB has the unit \"XB\""));
        let refused = said(time("--time", "60"));
        assert!(
            refused.contains("60 has no unit; hint: give a number with one of s, min, h, d"),
            "{refused}"
        );
    }
}
