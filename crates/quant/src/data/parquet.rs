//! Tables of documents, as most data sets on the hub are stored.
//!
//! Rows are read through parquet's record interface, without arrow: calibration needs some hundred thousand tokens,
//! and arrow would be the largest dependency of the program.

use bytes::Bytes;
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader as _, SerializedFileReader};
use parquet::record::{Field, Row};
use parquet::schema::types::Type;
use serde_json::{Map, Value};
use std::sync::Arc;

use super::DataError;
use super::document::{COLUMNS, Document};

/// The documents of a .parquet file with their row numbers, counted from 1.
pub(super) fn documents(file: &str, bytes: Vec<u8>) -> Result<Vec<(usize, Document)>, DataError> {
    let damaged =
        |error: ParquetError| DataError::Parquet { file: file.to_owned(), reason: error.to_string() };
    let reader = SerializedFileReader::new(Bytes::from(bytes)).map_err(damaged)?;
    let columns = known_columns(reader.metadata().file_metadata().schema()).map_err(damaged)?;
    let Some(columns) = columns else {
        return Err(DataError::Form {
            file: file.to_owned(),
            place: "columns".to_owned(),
            reason: "neither text, nor prompt and completion, nor messages".to_owned(),
        });
    };
    let mut documents = Vec::new();
    for (index, row) in reader.get_row_iter(Some(columns)).map_err(damaged)?.enumerate() {
        let number = index + 1;
        let document = object(row.map_err(damaged)?).and_then(Document::from_object);
        let document = document.map_err(|reason| DataError::Form {
            file: file.to_owned(),
            place: format!("row {number}"),
            reason,
        })?;
        documents.push((number, document));
    }
    Ok(documents)
}

/// The part of a table that is read; `None` if there is none.
fn known_columns(schema: &Type) -> Result<Option<Type>, ParquetError> {
    let fields: Vec<Arc<Type>> =
        schema.get_fields().iter().filter(|field| COLUMNS.contains(&field.name())).cloned().collect();
    if fields.is_empty() {
        return Ok(None);
    }
    Type::group_type_builder(schema.name()).with_fields(fields).build().map(Some)
}

fn object(row: Row) -> Result<Map<String, Value>, String> {
    row.into_columns().into_iter().map(|(name, field)| Ok((name, value(field)?))).collect()
}

/// A cell as JSON. Cells that no document holds (dates, decimals) are refused.
fn value(field: Field) -> Result<Value, String> {
    Ok(match field {
        Field::Null => Value::Null,
        Field::Bool(it) => it.into(),
        Field::Byte(it) => it.into(),
        Field::Short(it) => it.into(),
        Field::Int(it) => it.into(),
        Field::Long(it) => it.into(),
        Field::UByte(it) => it.into(),
        Field::UShort(it) => it.into(),
        Field::UInt(it) => it.into(),
        Field::ULong(it) => it.into(),
        Field::Float(it) => it.into(),
        Field::Double(it) => it.into(),
        Field::Str(text) => text.into(),
        Field::Bytes(bytes) => {
            std::str::from_utf8(bytes.data()).map_err(|_| "a string is not UTF-8".to_owned())?.into()
        }
        Field::Group(row) => Value::Object(object(row)?),
        Field::ListInternal(list) => list.elements().iter().cloned().map(value).collect::<Result<_, _>>()?,
        other => return Err(format!("a value ({other}) that no document has")),
    })
}
