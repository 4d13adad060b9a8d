//! Where a language model stands among a checkpoint's names.

/// What stands before the names of a language model, which families write as if it stood alone: `model.` before its table,
/// layers and last norm, nothing before its head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Before all of them.
    pub outer: &'static str,
    /// Instead of `model.`.
    pub model: &'static str,
}

impl Place {
    /// On its own.
    pub const ALONE: Self = Self::below("");

    /// Below a name that ends in a dot.
    pub const fn below(outer: &'static str) -> Self {
        Self { outer, model: "model." }
    }

    /// A name of the language model alone, as it is here.
    pub fn name(self, alone: &str) -> String {
        let Self { outer, model } = self;
        match alone.strip_prefix("model.") {
            Some(rest) => format!("{outer}{model}{rest}"),
            None => format!("{outer}{alone}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_head_stands_beside_the_model() {
        let bare = Place { outer: "language_model.", model: "" };
        for (place, norm, head) in [
            (Place::ALONE, "model.norm", "lm_head"),
            (Place::below("language_model."), "language_model.model.norm", "language_model.lm_head"),
            (bare, "language_model.norm", "language_model.lm_head"),
        ] {
            assert_eq!((place.name("model.norm").as_str(), place.name("lm_head").as_str()), (norm, head));
        }
    }
}
