//! What a divergence is like, in words: one scale for the report, the command line and the documentation, so that no two
//! of them disagree. docs/guide.md and docs/quality.md quote it, and a test compares them.

/// A stretch of the scale.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Reading {
    /// Mean KL to the original, nats a token: the stretch ends below this.
    pub below: f64,
    /// What a model of such a divergence is like.
    pub words: &'static str,
    /// What to do about it.
    pub advice: Option<&'static str>,
}

/// From equal to useless.
pub const SCALE: [Reading; 5] = [
    Reading { below: 0.01, words: "hard to tell from the original", advice: None },
    Reading { below: 0.05, words: "very close to the original", advice: None },
    Reading { below: 0.2, words: "noticeable in hard tasks", advice: None },
    Reading {
        below: 0.5,
        words: "clearly worse than the original",
        advice: Some("use more bits or a better method"),
    },
    Reading {
        below: f64::INFINITY,
        words: "another model",
        advice: Some("use more bits or a better method"),
    },
];

/// The stretch in which a mean KL to the original, in nats a token, lies. What is no number is in the last one.
pub fn reading(kl: f64) -> Reading {
    SCALE.into_iter().find(|reading| kl < reading.below).unwrap_or(SCALE[SCALE.len() - 1])
}

impl Reading {
    /// `below 0.01`, `0.01 to 0.05`, `above 0.5`.
    pub fn range(&self) -> String {
        let from = SCALE.iter().rev().map(|other| other.below).find(|below| *below < self.below);
        match from {
            None => format!("below {}", self.below),
            Some(from) if self.below.is_finite() => format!("{from} to {}", self.below),
            Some(from) => format!("above {from}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_divergence_has_its_words() {
        assert!(SCALE.is_sorted_by(|a, b| a.below < b.below));
        let ranges: Vec<String> = SCALE.iter().map(Reading::range).collect();
        assert_eq!(ranges, ["below 0.01", "0.01 to 0.05", "0.05 to 0.2", "0.2 to 0.5", "above 0.5"]);
        for (kl, words) in [
            (0.0, "hard to tell from the original"),
            (0.01, "very close to the original"),
            (0.0939, "noticeable in hard tasks"),
            (0.4759, "clearly worse than the original"),
            (0.5, "another model"),
            (f64::INFINITY, "another model"),
            (f64::NAN, "another model"),
        ] {
            assert_eq!(reading(kl).words, words, "{kl}");
        }
    }

    /// Whoever reads the documentation reads the same scale.
    #[test]
    fn the_documentation_quotes_the_scale() {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let line = |reading: &Reading| format!("| {} | {} |", reading.range(), reading.words);
        let table = SCALE.iter().map(line).collect::<Vec<_>>().join("\n");
        for name in ["docs/guide.md", "docs/quality.md"] {
            let text = std::fs::read_to_string(root.join(name)).unwrap();
            assert!(text.contains(&table), "{name} does not have\n{table}");
        }
    }
}
