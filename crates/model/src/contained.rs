//! Panics of other people's parsers, as errors.
//!
//! Files from outside are read by libraries that mostly return errors and sometimes panic; fuzzing found both in the newest
//! versions of `tokenizers` and `parquet`. A damaged file must end in a word about that file.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};

thread_local! {
    static CONTAINED: Cell<bool> = const { Cell::new(false) };
}

/// Runs a parser; a panic becomes its message. The parser's own state must not be used again after one.
///
/// # Errors
/// The panic's message.
pub fn contained<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    let before = CONTAINED.replace(true);
    let done = catch_unwind(AssertUnwindSafe(work));
    CONTAINED.set(before);
    done.map_err(|payload| {
        let text = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
        let text = text.or_else(|| payload.downcast_ref::<String>().cloned());
        format!("its parser gave up ({})", text.as_deref().unwrap_or("without a word"))
    })
}

/// Whether this thread is in [`contained`], so that a panic here is none of the program's: for panic hooks.
pub fn is_contained() -> bool {
    CONTAINED.get()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panics_become_words() {
        assert_eq!(contained(|| 3), Ok(3));
        assert!(!is_contained());
        let text = contained(|| -> u8 {
            assert!(is_contained());
            panic!("at {}", 7)
        });
        assert_eq!(text, Err("its parser gave up (at 7)".to_owned()));
        assert!(!is_contained());
    }
}
