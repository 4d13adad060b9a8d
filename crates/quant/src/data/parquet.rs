//! Tables of documents, as most data sets on the hub are stored.
//!
//! Rows are read through parquet's record interface, without arrow: calibration needs some hundred thousand tokens, and
//! arrow would be the largest dependency of the program. Pages are read and unpacked as rows ask for them, so a file is
//! never in memory.

use std::fs::File;
use std::io::{BufReader, Read, Seek as _, SeekFrom};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use mlx_quant_model::contained;
use parquet::errors::ParquetError;
use parquet::file::metadata::RowGroupMetaData;
use parquet::file::reader::{ChunkReader, FileReader as _, Length, SerializedFileReader};
use parquet::record::reader::TreeBuilder;
use parquet::record::{Field, Row};
use parquet::schema::types::{SchemaDescriptor, Type};
use serde_json::{Map, Value};

use super::document::{has_form, is_column, named};
use super::footer::claims_too_much;
use super::pages::Checked;
use super::read::{Input, Tallied, Tally};
use super::rows::{Place, Sink, Source};
use super::sample::{GROUPS, Portion, spread};
use super::{DataError, Extent};

/// Rows that are decoded together. They may be long.
const BATCH_ROWS: usize = 64;

/// A file that is read at many places, and what is read of it tallied.
struct Chunks {
    file: Arc<Mutex<File>>,
    size: u64,
    tally: Tally,
}

/// A place in it.
struct Chunk {
    file: Arc<Mutex<File>>,
    at: u64,
}

impl Read for Chunk {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.seek(SeekFrom::Start(self.at))?;
        let read = file.read(buffer)?;
        // The parser of page headers would ask again and again for what a damaged one counts.
        if read == 0 && !buffer.is_empty() {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        self.at += read as u64;
        Ok(read)
    }
}

impl Length for Chunks {
    fn len(&self) -> u64 {
        self.size
    }
}

impl ChunkReader for Chunks {
    type T = BufReader<Tallied<Chunk>>;

    fn get_read(&self, start: u64) -> Result<Self::T, ParquetError> {
        let chunk = Chunk { file: Arc::clone(&self.file), at: start };
        Ok(BufReader::new(Tallied { inner: chunk, tally: self.tally.clone() }))
    }

    fn get_bytes(&self, start: u64, length: usize) -> Result<Bytes, ParquetError> {
        // A damaged file asks for more than there is; nothing is allocated for that.
        if start.checked_add(length as u64).is_none_or(|end| end > self.size) {
            return Err(ParquetError::EOF(format!(
                "{length} bytes at {start} lie beyond the end of the file"
            )));
        }
        let mut bytes = vec![0; length];
        self.get_read(start)?.read_exact(&mut bytes)?;
        Ok(bytes.into())
    }
}

fn open(input: &Input, tally: &Tally) -> Result<SerializedFileReader<Chunks>, DataError> {
    let file = Arc::new(Mutex::new(input.open()?));
    let chunks = Chunks { file, size: input.size, tally: tally.clone() };
    check_footer(input, &chunks)?;
    parsed(input, || SerializedFileReader::new(chunks))
}

/// Looks at the footer before room is reserved for what it claims: its length and a mark stand at the end of the file.
fn check_footer(input: &Input, chunks: &Chunks) -> Result<(), DataError> {
    let tail = chunks.size.checked_sub(8).and_then(|at| chunks.get_bytes(at, 8).ok());
    let Some(length) =
        tail.as_deref().and_then(<[u8]>::first_chunk::<4>).map(|length| u32::from_le_bytes(*length))
    else {
        return Ok(());
    };
    let start = (chunks.size - 8).checked_sub(u64::from(length));
    let footer = start.and_then(|start| chunks.get_bytes(start, length as usize).ok());
    if footer.is_some_and(|footer| claims_too_much(&footer)) {
        let reason = "its footer claims more than it holds".to_owned();
        return Err(DataError::Parquet { file: input.file.clone(), reason });
    }
    Ok(())
}

/// What the parser says, also where it panics.
fn parsed<T>(input: &Input, work: impl FnOnce() -> Result<T, ParquetError>) -> Result<T, DataError> {
    match contained(work) {
        Ok(done) => done.map_err(|error| damaged(input, &error)),
        Err(reason) => Err(DataError::Parquet { file: input.file.clone(), reason }),
    }
}

fn damaged(input: &Input, error: &ParquetError) -> DataError {
    DataError::Parquet { file: input.file.clone(), reason: error.to_string() }
}

/// Bytes of the columns that are read, unpacked, as the file says.
pub(super) fn text_size(input: &Input) -> Result<u64, DataError> {
    let reader = open(input, &Tally::default())?;
    let mut size = 0_u64;
    for group in reader.metadata().row_groups() {
        for column in group.columns() {
            let name = column.column_path().parts().first();
            if name.is_some_and(|name| is_column(name)) {
                size = size.saturating_add(u64::try_from(column.uncompressed_size()).unwrap_or(0));
            }
        }
    }
    Ok(size)
}

/// Hands out the documents of a .parquet file with their row numbers, counted from 1.
pub(super) fn documents(
    source: &Source,
    portion: Portion,
    tally: &Tally,
    sink: &mut Sink<'_>,
) -> Result<Extent, DataError> {
    let input = &source.input;
    let sampled = matches!(portion, Portion::Sample { .. });
    let of_rows = if sampled { tally.clone() } else { Tally::default() };
    let reader = open(input, &of_rows)?;
    let metadata = reader.metadata();
    let columns = known_columns(source, metadata.file_metadata().schema())?;
    let columns = Arc::new(SchemaDescriptor::new(Arc::new(columns)));
    let groups = metadata.num_row_groups();
    let (visited, share) = if sampled && groups > 0 {
        let count = 1 << groups.min(GROUPS).ilog2();
        let visited = spread(count).into_iter().map(|index| index * groups / count).collect();
        (visited, portion.limit().div_ceil(count as u64))
    } else {
        ((0..groups).collect::<Vec<_>>(), u64::MAX)
    };
    let mut bytes = 0_u64;
    for group in visited {
        let before = metadata.row_groups()[..group].iter().map(RowGroupMetaData::num_rows);
        let first = before.fold(1, |sum, rows| sum + usize::try_from(rows).unwrap_or(0));
        let rows = parsed(input, || reader.get_row_group(group))?;
        let checked = Checked(&*rows);
        let builder = TreeBuilder::new().with_batch_size(BATCH_ROWS);
        let mut rows = parsed(input, || builder.as_iter(Arc::clone(&columns), &checked))?;
        let mut taken = 0;
        for index in 0.. {
            if bytes + taken >= portion.limit() || taken >= share {
                break;
            }
            let place = Place::Number(first + index);
            let Some(row) = parsed(input, || rows.next().transpose())? else { break };
            // Dates that no calendar has make the crate panic where it shows them.
            let object = contained(|| object(row)).unwrap_or_else(Err);
            let object = object.map_err(|reason| DataError::Form {
                file: input.file.clone(),
                place: source.place(place),
                reason,
            })?;
            let document = source.document(object, place)?;
            taken += document.bytes();
            sink(place, document)?;
        }
        bytes += taken;
        if bytes >= portion.limit() {
            break;
        }
    }
    if sampled {
        return Ok(Extent::Spread);
    }
    let mut file = input.stream(tally)?;
    std::io::copy(&mut file, &mut std::io::sink()).map_err(|error| input.unread(&error))?;
    Ok(if bytes < portion.limit() { Extent::Whole } else { Extent::Beginning })
}

/// The part of a table that is read.
fn known_columns(source: &Source, schema: &Type) -> Result<Type, DataError> {
    let all = schema.get_fields();
    if !has_form(|name| all.iter().any(|field| field.name() == name)) {
        return Err(DataError::NoForm {
            file: source.input.file.clone(),
            place: "columns".to_owned(),
            found: named(all.iter().map(|field| field.name())),
        });
    }
    let fields = all.iter().filter(|field| is_column(field.name())).cloned().collect();
    let columns = Type::group_type_builder(schema.name()).with_fields(fields).build();
    columns.map_err(|error| damaged(&source.input, &error))
}

/// A row as JSON. A text that is not UTF-8 is refused; below that, bytes are pictures and the like.
fn object(row: Row) -> Result<Map<String, Value>, String> {
    let cell = |(name, field): (String, Field)| match &field {
        Field::Bytes(bytes) if std::str::from_utf8(bytes.data()).is_err() => {
            Err(format!("{name} is not UTF-8"))
        }
        _ => Ok((name, value(field))),
    };
    row.into_columns().into_iter().map(cell).collect()
}

/// A cell as JSON. Dates and decimals become text, bytes that are no text null.
fn value(field: Field) -> Value {
    match field {
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
        Field::Float16(it) => f32::from(it).into(),
        Field::Float(it) => it.into(),
        Field::Double(it) => it.into(),
        Field::Str(text) => text.into(),
        Field::Bytes(bytes) => std::str::from_utf8(bytes.data()).map_or(Value::Null, Value::from),
        Field::Group(row) => {
            row.into_columns().into_iter().map(|(name, field)| (name, value(field))).collect()
        }
        Field::ListInternal(list) => list.elements().iter().cloned().map(value).collect(),
        Field::MapInternal(map) => {
            let key = |key: &Field| match key {
                Field::Str(text) => text.clone(),
                other => other.to_string(),
            };
            map.entries().iter().map(|(name, field)| (key(name), value(field.clone()))).collect()
        }
        other => other.to_string().into(),
    }
}
