//! Writes the seeds that are made, not copied: `cargo run -p mlx-quant-fuzz-bodies --example make_seeds` in the repository's root.
#![allow(clippy::unwrap_used, reason = "a helper for people who can read a panic")]

use std::path::Path;
use std::sync::Arc;

use parquet::basic::{Compression, Encoding, ZstdLevel};
use parquet::data_type::{ByteArray, ByteArrayType, Int32Type, Int96, Int96Type};
use parquet::file::properties::{WriterProperties, WriterVersion};
use parquet::file::writer::{SerializedFileWriter, SerializedRowGroupWriter};
use parquet::schema::parser::parse_message_type;

fn main() {
    for (target, name, bytes) in mlx_quant_fuzz_bodies::kept_seeds() {
        write(target, &name, &bytes);
    }
    for (name, bytes) in tables() {
        write("parquet", name, &bytes);
    }
}

fn write(target: &str, name: &str, bytes: &[u8]) {
    let directory = Path::new("fuzz/seeds").join(target);
    std::fs::create_dir_all(&directory).unwrap();
    std::fs::write(directory.join(name), bytes).unwrap();
}

/// Writes the columns of one row group.
type Fill<'f> = &'f mut dyn FnMut(&mut SerializedRowGroupWriter<'_, Vec<u8>>);

fn table(schema: &str, properties: WriterProperties, mut groups: Vec<Fill<'_>>) -> Vec<u8> {
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let mut writer = SerializedFileWriter::new(Vec::new(), schema, Arc::new(properties)).unwrap();
    for group in &mut groups {
        let mut columns = writer.next_row_group().unwrap();
        group(&mut columns);
        columns.close().unwrap();
    }
    writer.into_inner().unwrap()
}

fn texts(
    group: &mut SerializedRowGroupWriter<'_, Vec<u8>>,
    values: &[&str],
    definitions: Option<&[i16]>,
    repetitions: Option<&[i16]>,
) {
    let mut column = group.next_column().unwrap().unwrap();
    let values: Vec<ByteArray> = values.iter().map(|text| ByteArray::from(*text)).collect();
    column.typed::<ByteArrayType>().write_batch(&values, definitions, repetitions).unwrap();
    column.close().unwrap();
}

/// What the fixtures of our tests do not have: two row groups, encodings of version 2, lists and nulls in them, columns that no document
/// has.
fn tables() -> Vec<(&'static str, Vec<u8>)> {
    let optional = "message schema { optional binary text (UTF8); }";
    let plain = WriterProperties::builder().set_dictionary_enabled(false);
    let mut first = |group: &mut SerializedRowGroupWriter<'_, _>| {
        texts(group, &["Call me Ishmael.", "Some years ago"], Some(&[1, 0, 1]), None);
    };
    let mut second = |group: &mut SerializedRowGroupWriter<'_, _>| {
        texts(group, &["never mind how long precisely"], Some(&[1]), None);
    };
    let groups = table(optional, plain.build(), vec![&mut first, &mut second]);

    let encodings = WriterProperties::builder()
        .set_writer_version(WriterVersion::PARQUET_2_0)
        .set_dictionary_enabled(false)
        .set_encoding(Encoding::DELTA_BYTE_ARRAY)
        .set_compression(Compression::ZSTD(ZstdLevel::default()));
    let required = "message schema { required binary text (UTF8); }";
    let mut delta = |group: &mut SerializedRowGroupWriter<'_, _>| {
        texts(group, &["prefix", "prefixes", "prefixed"], None, None);
    };
    let delta = table(required, encodings.build(), vec![&mut delta]);

    let messages =
        "message schema { optional group messages (LIST) { repeated group list { optional group element {
        required binary role (UTF8); optional binary content (UTF8); } } } required binary text; }";
    let mut rows = |group: &mut SerializedRowGroupWriter<'_, _>| {
        texts(group, &["user", "assistant", "user"], Some(&[3, 3, 3, 0]), Some(&[0, 1, 0, 0]));
        texts(group, &["Hi.", "Hello."], Some(&[4, 4, 3, 0]), Some(&[0, 1, 0, 0]));
        texts(group, &["a", "b", "c"], None, None);
    };
    let messages = table(messages, WriterProperties::builder().build(), vec![&mut rows]);

    let others = "message schema { required int32 text; required int96 prompt; }";
    let mut numbers = |group: &mut SerializedRowGroupWriter<'_, Vec<u8>>| {
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<Int32Type>().write_batch(&[1, 2], None, None).unwrap();
        column.close().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        let time = Int96::from(vec![1, 2, 3]);
        column.typed::<Int96Type>().write_batch(&[time, time], None, None).unwrap();
        column.close().unwrap();
    };
    let others = table(others, WriterProperties::builder().build(), vec![&mut numbers]);
    vec![
        ("two_groups.parquet", groups),
        ("delta_zstd.parquet", delta),
        ("messages_nulls.parquet", messages),
        ("numbers.parquet", others),
    ]
}
