//! JSON: the result as it is.

use serde::Serialize;

/// The document, indented.
///
/// # Errors
/// If a value cannot be written, which plain data can always be.
pub fn json<T: Serialize>(result: &T) -> Result<String, serde_json::Error> {
    serde_json::to_string_pretty(result)
}
