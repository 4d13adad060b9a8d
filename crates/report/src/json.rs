//! JSON: the result as it is.

use serde::Serialize;
use serde_json::{Value, json};

/// The document, indented.
///
/// # Errors
/// If a value cannot be written, which plain data can always be.
pub fn json<T: Serialize>(result: &T) -> Result<String, serde_json::Error> {
    serde_json::to_string_pretty(result)
}

/// The same as a value whose first field is `schema_version`, the version of its form.
///
/// # Errors
/// As [`json()`].
pub fn versioned<T: Serialize>(result: &T, version: u32) -> Result<Value, serde_json::Error> {
    let mut document = json!({"schema_version": version});
    if let (Some(object), Value::Object(fields)) = (document.as_object_mut(), serde_json::to_value(result)?) {
        object.extend(fields);
    }
    Ok(document)
}
