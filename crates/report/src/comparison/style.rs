//! How methods look: each recipe has one colour and one marker, whatever it is compared with, so that a reader who has
//! seen one figure can read the next.

use kuva::plot::scatter::MarkerShape;

/// Seven colours that people with any colour vision tell apart (after Okabe and Ito), dark enough for a light ground and
/// light enough for a dark one: at least 3:1 on both.
const COLORS: [&str; 7] = ["#0072b2", "#d55e00", "#009e73", "#b0589c", "#a67c00", "#7f7f7f", "#7b68d9"];

/// Six shapes. No star: that is the Pareto front.
const MARKERS: [MarkerShape; 6] = [
    MarkerShape::Circle,
    MarkerShape::Square,
    MarkerShape::Triangle,
    MarkerShape::Diamond,
    MarkerShape::TriangleDown,
    MarkerShape::Pentagon,
];

/// Recipes that are compared most; no two of the first seven share a colour.
const USUAL: [&str; 9] = [
    "dynamic+awq+gptq+dwq",
    "dynamic",
    "dwq",
    "gptq",
    "awq",
    "rtn",
    "dynamic+awq+gptq",
    "search",
    "awq+gptq",
];

/// Colour and marker of a recipe.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Style {
    pub(super) color: &'static str,
    pub(super) marker: MarkerShape,
}

impl Style {
    /// Of a recipe as the command line takes it. Seven and six have no common factor, so that no two recipes share both.
    pub(super) fn of(recipe: &str) -> Self {
        let index =
            USUAL.iter().position(|usual| *usual == recipe).unwrap_or_else(|| USUAL.len() + number(recipe));
        Self { color: COLORS[index % COLORS.len()], marker: MARKERS[index % MARKERS.len()] }
    }

    /// The marker as a path around 0, six units to each side, for legends.
    pub(super) fn path(self) -> &'static str {
        match self.marker {
            MarkerShape::Square => "M-4.5-4.5H4.5V4.5H-4.5Z",
            MarkerShape::Triangle => "M0-5.5L5.2 4H-5.2Z",
            MarkerShape::TriangleDown => "M0 5.5L5.2-4H-5.2Z",
            MarkerShape::Diamond => "M0-5.8L5.8 0L0 5.8L-5.8 0Z",
            MarkerShape::Pentagon => "M0-5.6L5.3-1.7L3.3 4.5H-3.3L-5.3-1.7Z",
            _ => "M-5 0A5 5 0 1 0 5 0A5 5 0 1 0-5 0Z",
        }
    }
}

/// Which of the 32 stacks of methods a recipe is.
fn number(recipe: &str) -> usize {
    let has = |name: &str| recipe.split('+').any(|method| method == name);
    let rounding = ["rtn", "search", "refine", "gptq"].iter().position(|name| has(name)).unwrap_or(2);
    usize::from(has("dynamic")) + 2 * usize::from(has("awq")) + 4 * usize::from(has("dwq")) + 8 * rounding
}

/// As users of mlx-lm's guide call a recipe.
pub(super) fn method(recipe: &str) -> &str {
    if recipe == "rtn" { "basic" } else { recipe }
}

#[cfg(test)]
mod tests {
    use super::super::canvas::{DARK, LIGHT};
    use super::*;

    /// Relative luminance (WCAG 2.2).
    fn luminance(color: &str) -> f64 {
        let part = |at: usize| {
            let value = f64::from(u8::from_str_radix(&color[at..at + 2], 16).unwrap()) / 255.0;
            if value <= 0.04045 { value / 12.92 } else { ((value + 0.055) / 1.055).powf(2.4) }
        };
        0.2126 * part(1) + 0.7152 * part(3) + 0.0722 * part(5)
    }

    fn contrast(a: &str, b: &str) -> f64 {
        let (a, b) = (luminance(a), luminance(b));
        (a.max(b) + 0.05) / (a.min(b) + 0.05)
    }

    #[test]
    fn colours_are_seen_on_both_grounds() {
        assert!((contrast("#ffffff", "#000000") - 21.0).abs() < 1e-9);
        for color in COLORS {
            for ground in [LIGHT.back, DARK.back] {
                let contrast = contrast(color, ground);
                assert!(contrast >= 3.0, "{color} on {ground}: {contrast:.2}");
            }
        }
        for theme in [LIGHT, DARK] {
            assert!(contrast(theme.text, theme.back) >= 7.0 && contrast(theme.soft, theme.back) >= 4.5);
        }
    }

    #[test]
    fn no_two_recipes_look_alike() {
        let mut recipes: Vec<String> = USUAL.iter().map(|usual| (*usual).to_owned()).collect();
        for rounding in ["", "rtn", "search", "refine", "gptq"] {
            for bits in 0..8 {
                let parts =
                    [("dynamic", 1), ("awq", 2)].map(|(name, bit)| if bits & bit > 0 { name } else { "" });
                let last = if bits & 4 > 0 { "dwq" } else { "" };
                let all = parts.into_iter().chain([rounding, last]).filter(|part| !part.is_empty());
                let recipe = all.collect::<Vec<_>>().join("+");
                // Refine is what rounds where nothing is said (after awq: search); nobody compares both names of one.
                let twice = rounding == "refine";
                if !recipe.is_empty() && !twice && !recipes.contains(&recipe) {
                    recipes.push(recipe);
                }
            }
        }
        let styles: Vec<Style> = recipes.iter().map(|recipe| Style::of(recipe)).collect();
        for (at, style) in styles.iter().enumerate() {
            let same = styles[..at].iter().position(|other| other == style);
            assert_eq!(same.map(|same| &recipes[same]), None, "{} looks like", recipes[at]);
        }
    }
}
