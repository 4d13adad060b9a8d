//! How layers are stored where nothing is said of single ones.

use std::collections::BTreeMap;

use mlx_format::{Mode, Scheme, SchemeError};

use crate::methods::{Method, Recipe};
use crate::{Error, Model};

/// Bits and group size of embeddings and head under gptq, as mlx-lm's gptq has them.
const TABLES_OF_GPTQ: (u32, usize) = (6, 64);

/// An affine scheme that every MLX loads: one bit came with 0.32.4, and older versions do not know it.
///
/// # Errors
/// As [`Scheme::affine`].
pub fn affine(bits: u32, group_size: usize) -> Result<Scheme, SchemeError> {
    Scheme::affine(bits, group_size).and_then(Scheme::widely_loaded)
}

/// The scheme of embeddings and head: what is asked for, or what the recipe usually gives them. Beside an fp mode they are as
/// the rest, unless bits or a group size are asked for, which are affine.
///
/// # Errors
/// As [`affine`].
pub fn table_scheme(
    recipe: &Recipe,
    base: Scheme,
    bits: Option<u32>,
    group_size: Option<usize>,
) -> Result<Scheme, SchemeError> {
    let fp = base.mode() != Mode::Affine;
    if fp && bits.is_none() && group_size.is_none() {
        return Ok(base);
    }
    // Dynamic decides of them too.
    let own = recipe.rounding() == Method::Gptq && !recipe.allocates();
    let usual = if own || fp { TABLES_OF_GPTQ } else { (base.bits(), base.group_size()) };
    affine(bits.unwrap_or(usual.0), group_size.unwrap_or(usual.1))
}

/// Embeddings and head of a model at a scheme of their own, by path: for [`crate::Settings::schemes`].
///
/// # Errors
/// As [`crate::walks::Walk::open`]: a model type without a decoder description.
pub fn table_schemes(model: &Model, scheme: Scheme) -> Result<BTreeMap<String, Scheme>, Error> {
    let walk = crate::Walk::open(model)?;
    Ok(walk.decoder.tables().into_iter().map(|path| (path.to_owned(), scheme)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gptq_keeps_embeddings_wider_unless_dynamic_decides() {
        let base = affine(3, 32).unwrap();
        let of = |recipe: &str, bits, group_size| {
            let scheme = table_scheme(&recipe.parse().unwrap(), base, bits, group_size).unwrap();
            (scheme.bits(), scheme.group_size())
        };
        assert_eq!(of("gptq", None, None), (6, 64));
        assert_eq!(of("awq+gptq", Some(4), None), (4, 64));
        assert_eq!(of("gptq+dwq", None, Some(128)), (6, 128));
        assert_eq!(of("dynamic+awq+gptq", None, None), (3, 32));
        assert_eq!(of("awq", None, None), (3, 32));
        assert_eq!(of("awq", Some(6), Some(64)), (6, 64));
    }

    #[test]
    fn tables_beside_an_fp_mode_are_as_the_rest_unless_asked_for() {
        let base = Scheme::new(Mode::Nvfp4, None, None).unwrap();
        let of = |recipe: &str, bits, group_size| {
            table_scheme(&recipe.parse().unwrap(), base, bits, group_size).unwrap()
        };
        assert_eq!([of("gptq", None, None), of("awq", None, None)], [base, base]);
        assert_eq!(of("gptq", Some(4), None), affine(4, 64).unwrap());
        assert_eq!(of("awq", None, Some(32)), affine(6, 32).unwrap());
    }

    #[test]
    fn one_bit_is_refused() {
        assert!(matches!(affine(1, 64), Err(SchemeError::Bits(1))));
        let gptq = Recipe::of(Method::Gptq);
        assert!(table_scheme(&gptq, affine(4, 64).unwrap(), Some(1), None).is_err());
    }
}
