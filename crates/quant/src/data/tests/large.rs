//! Data of which only a part is read.

use std::fmt::Write as _;

use super::super::kind::Kind;
use super::super::read::Input;
use super::super::rows::Source;
use super::super::sample::Portion;
use super::super::tokenized::Tokenized;
use super::*;

fn source(path: &Path) -> Source {
    let kind = Kind::of(path.to_str().unwrap()).unwrap();
    Source { input: Input::new(path, kind.packing).unwrap(), form: kind.form }
}

fn sample(path: &Path, bytes: u64, tokenizer: &Tokenizer) -> Result<Tokenized, DataError> {
    source(path).read(Portion::Sample { bytes }, tokenizer, OnRefusal::LeaveOut)
}

/// Numbered lines, each a document of about 100 bytes.
fn numbered(count: usize) -> String {
    (0..count).fold(String::new(), |mut lines, number| {
        writeln!(lines, "{{\"text\": \"Line {number:07} of a file that is too long to be read as a whole, and goes on and on.\"}}").unwrap();
        lines
    })
}

/// The numbers of the lines that were read, in their order.
fn numbers(made: &Tokenized, tokenizer: &Tokenizer, count: usize) -> Vec<usize> {
    let wanted: Vec<Vec<u32>> =
        (0..count).map(|number| tokenizer.encode(&format!("Line {number:07} of a file")).unwrap()).collect();
    let rest = tokenizer.encode(" that is too long to be read as a whole, and goes on and on.").unwrap();
    let end = tokenizer.end_of_text().unwrap();
    let documents: Vec<&[u32]> = made.ids.split(|id| *id == end).collect();
    let find = |document: &&[u32]| {
        let (head, tail) = document.split_at(document.len() - rest.len());
        assert_eq!(tail, rest, "a line is read whole");
        wanted.iter().position(|wanted| wanted == head).unwrap()
    };
    documents.iter().map(find).collect()
}

#[test]
fn lines_are_read_at_places_spread_over_the_file() {
    let (directory, tokenizer, count) = (tempfile::tempdir().unwrap(), demo(), 20_000);
    let path = directory.path().join("a.jsonl");
    std::fs::write(&path, numbered(count)).unwrap();
    let made = sample(&path, 64 << 10, &tokenizer).unwrap();
    assert_eq!((made.extent, made.left_out), (Extent::Spread, 0));
    assert!((64 << 10..90 << 10).contains(&made.bytes_read), "{}", made.bytes_read);
    let mut found = numbers(&made, &tokenizer, count);
    assert_eq!(found.len(), made.documents);
    found.sort_unstable();
    assert!(found.windows(2).all(|pair| pair[0] < pair[1]), "no line twice");
    // Eight places, and a run of lines at each.
    for place in 0..8 {
        let near = (place * count / 8..).take(60);
        assert!(near.filter(|line| found.contains(line)).count() > 50, "{place}: {found:?}");
    }
    let again = sample(&path, 64 << 10, &tokenizer).unwrap();
    assert_eq!((made.ids, made.sha256), (again.ids, again.sha256));
    // As much as there is: every line once, and the whole file's hash.
    let all = sample(&path, 1 << 30, &tokenizer).unwrap();
    let mut found = numbers(&all, &tokenizer, count);
    found.sort_unstable();
    assert_eq!(found, (0..count).collect::<Vec<_>>());
    assert_eq!((all.extent, all.bytes_read), (Extent::Whole, numbered(count).len() as u64));
}

#[test]
fn lines_on_the_border_of_places_are_read_once() {
    let (directory, tokenizer) = (tempfile::tempdir().unwrap(), demo());
    let path = directory.path().join("a.jsonl");
    // Lines of all lengths, with blank ones and ones that are longer than a place.
    for seed in 0..12 {
        let mut lines = String::new();
        for index in 0..40 {
            let length = (index * 7 + seed * 13) % 90 + if index == 20 { 3000 } else { 0 };
            writeln!(lines, "{{\"text\": \"{}\"}}{}", "x".repeat(length), "\n".repeat(index % 3)).unwrap();
        }
        std::fs::write(&path, &lines[..lines.len() - seed % 2]).unwrap();
        let made = sample(&path, 1 << 30, &tokenizer).unwrap();
        assert_eq!((made.documents, made.extent), (40, Extent::Whole), "{seed}");
    }
}

#[test]
fn a_row_in_the_middle_is_named_by_its_line() {
    let (directory, tokenizer) = (tempfile::tempdir().unwrap(), demo());
    let path = directory.path().join("a.jsonl");
    let mut lines: Vec<String> = numbered(4000).lines().map(str::to_owned).collect();
    // The first line of the fifth of eight places.
    let size = numbered(4000).len();
    let line = size / 2 / (size / 4000);
    for (broken, expected) in [
        ("{\"text\": 5}", format!("line {}: text is a number", line + 1)),
        ("{\"text\":", format!("line {}: EOF", line + 1)),
        ("{}", format!("line {}: neither text", line + 1)),
    ] {
        let width = lines[line].len();
        lines[line] = format!("{broken:<width$}");
        std::fs::write(&path, lines.join("\n") + "\n").unwrap();
        let error = sample(&path, 64 << 10, &tokenizer).unwrap_err().to_string();
        assert!(error.contains(&expected), "{error}");
    }
    let mut bytes = lines.join("\n").into_bytes();
    let start = bytes.split_inclusive(|byte| *byte == b'\n').take(line).map(<[u8]>::len).sum::<usize>();
    bytes[start + 3] = 0xff;
    std::fs::write(&path, bytes).unwrap();
    let error = sample(&path, 64 << 10, &tokenizer).unwrap_err().to_string();
    assert!(error.contains(&format!("line {}: not UTF-8", line + 1)), "{error}");
}

#[test]
fn long_text_is_read_in_pieces() {
    let (directory, tokenizer) = (tempfile::tempdir().unwrap(), demo());
    let path = directory.path().join("a.txt");
    for (unit, breaks) in [
        ("Some naïve words in a line 漢字.\r\n", Some('\n')),
        ("words without any line naïve 漢字 ", Some(' ')),
        ("漢字é", None),
    ] {
        // No place is where a unit begins.
        let text = format!("xyz{}", unit.repeat(2_000_000 / unit.len()));
        std::fs::write(&path, &text).unwrap();
        let made = sample(&path, 64 << 10, &tokenizer).unwrap();
        assert_eq!((made.extent, made.documents), (Extent::Spread, 8), "{unit}");
        assert!((60 << 10..=64 << 10).contains(&made.bytes_read), "{unit}: {}", made.bytes_read);
        let end = tokenizer.end_of_text().unwrap();
        let line = tokenizer.encode(&unit.replace("\r\n", "\n")).unwrap();
        let known = tokenizer.encode(&unit.repeat(9).replace("\r\n", "\n")).unwrap();
        for piece in made.ids.split(|id| *id == end).skip(1) {
            match breaks {
                // Whole lines.
                Some('\n') => assert_eq!(piece, line.repeat(piece.len() / line.len())),
                // Whole words: no token that such text does not have, but for the first, which lacks its space.
                Some(_) => assert!(piece[1..].iter().all(|id| known.contains(id)), "{unit}"),
                None => assert!(piece.len() > 1000),
            }
        }
    }
    let mut text = "line\n".repeat(100_000).into_bytes();
    text[250_012] = 0xff;
    std::fs::write(&path, text).unwrap();
    let error = sample(&path, 64 << 10, &tokenizer).unwrap_err().to_string();
    assert!(error.contains("a.txt, line 50003: not UTF-8"), "{error}");
}

#[test]
fn streams_are_read_from_their_beginning() {
    let (directory, tokenizer, count) = (tempfile::tempdir().unwrap(), demo(), 3000);
    let list: Vec<String> = numbered(count).lines().map(str::to_owned).collect();
    let table = list.iter().fold("text\n".to_owned(), |table, line| {
        let value: serde_json::Value = serde_json::from_str(line).unwrap();
        format!("{table}\"{}\"\n", value["text"].as_str().unwrap())
    });
    for (name, content) in [
        ("a.json", format!("[{}]", list.join(",")).into_bytes()),
        ("a.csv", table.into_bytes()),
        ("a.jsonl.zst", zstd::encode_all(numbered(count).as_bytes(), 1).unwrap()),
    ] {
        let path = directory.path().join(name);
        std::fs::write(&path, &content).unwrap();
        let made = sample(&path, 20_000, &tokenizer).unwrap();
        assert_eq!(made.extent, Extent::Beginning, "{name}");
        let found = numbers(&made, &tokenizer, 400);
        assert_eq!(found, (0..found.len()).collect::<Vec<_>>(), "{name}");
        assert!((200..260).contains(&found.len()), "{name}: {}", found.len());
        if !name.ends_with("zst") {
            assert!(made.bytes_read < 128 << 10, "{name}: {}", made.bytes_read);
            assert_eq!(made.sha256, hexadecimal(&Sha256::digest(&content[..made.bytes_read as usize])));
        }
        let whole = sample(&path, 1 << 30, &tokenizer).unwrap();
        assert_eq!((whole.extent, whole.documents), (Extent::Whole, count), "{name}");
    }
}

#[test]
fn data_sets_beyond_the_limit_are_sampled() {
    let (directory, tokenizer) = (tempfile::tempdir().unwrap(), plain());
    let line = format!("{{\"text\": \"{}\"}}\n", "Words of a long line. ".repeat(1500));
    let count = (70 << 20) / line.len();
    std::fs::write(directory.path().join("a.jsonl"), line.repeat(count)).unwrap();
    std::fs::write(directory.path().join("b.txt"), "A small text beside it. ".repeat(400)).unwrap();
    let windows = |pick: Pick, length: usize| {
        let data = DataSource::Path(directory.path().to_owned());
        Windows::read(&data, &tokenizer, 6144, length, pick).unwrap()
    };
    let sixteen = windows(Pick::Sampled { windows: 16, seed: 3 }, 64);
    let [large, small] = &sixteen.sources[..] else { panic!() };
    assert_eq!((large.extent, small.extent), (Extent::Spread, Extent::Whole));
    assert!((8 << 20..9 << 20).contains(&large.bytes_read), "{}", large.bytes_read);
    assert_eq!(
        large.part_read().unwrap(),
        format!(
            "read {} of {}, evenly spaced",
            crate::numbers::bytes(large.bytes_read),
            crate::numbers::bytes(large.bytes_total)
        )
    );
    // A larger number with the same seed begins with the same windows, as they are of the same sample.
    let more = windows(Pick::Sampled { windows: 32, seed: 3 }, 64);
    assert_eq!((&more.picked[..16], &more.data_hash), (&sixteen.picked[..], &sixteen.data_hash));
    let each = windows(Pick::EvenlySpaced { windows: 5 }, 64);
    assert_eq!(each.picked.iter().filter(|window| window.source == 1).count(), 5);
}

#[test]
fn more_is_read_where_text_is_scarce() {
    let (directory, tokenizer) = (tempfile::tempdir().unwrap(), demo());
    let path = directory.path().join("a.jsonl");
    // Most of what looks like text is dropped by the template.
    let template = with_templates("{{ messages[1].content }}", None);
    let line = json!({"prompt": "long ".repeat(8000), "completion": "one two three"}).to_string() + "\n";
    std::fs::write(&path, line.repeat(1800)).unwrap();
    assert!(std::fs::metadata(&path).unwrap().len() > 68 << 20);
    let read = |windows: usize| {
        let pick = Pick::Sampled { windows, seed: 1 };
        Windows::read(&DataSource::Path(path.clone()), &template, 6144, 32, pick).unwrap()
    };
    let few = read(10);
    assert_eq!((few.picked.len(), few.sources[0].extent), (10, Extent::Spread));
    assert!(few.sources[0].bytes_read < 10 << 20);
    let many = read(100);
    assert_eq!(many.picked.len(), 100);
    assert!(many.sources[0].bytes_read > 20 << 20, "{}", many.sources[0].bytes_read);
    let _ = tokenizer;
}

#[cfg(feature = "parquet")]
mod tables {
    use std::sync::Arc;

    use ::parquet::basic::Compression;
    use ::parquet::data_type::{ByteArray, ByteArrayType};
    use ::parquet::file::properties::WriterProperties;
    use ::parquet::file::writer::SerializedFileWriter;
    use ::parquet::schema::parser::parse_message_type;

    use super::*;

    /// A column: values, and what levels say about what is missing and repeated.
    type Column = (Vec<String>, Vec<i16>, Vec<i16>);

    fn write(path: &Path, schema: &str, groups: impl Iterator<Item = Vec<Column>>) {
        let schema = Arc::new(parse_message_type(schema).unwrap());
        let properties = WriterProperties::builder()
            .set_compression(Compression::SNAPPY)
            .set_dictionary_enabled(false)
            .set_data_page_row_count_limit(50)
            .set_write_batch_size(50);
        let file = std::fs::File::create(path).unwrap();
        let mut writer = SerializedFileWriter::new(file, schema, Arc::new(properties.build())).unwrap();
        for columns in groups {
            let mut group = writer.next_row_group().unwrap();
            for (values, definitions, repetitions) in columns {
                let values: Vec<ByteArray> = values.iter().map(|value| value.as_str().into()).collect();
                let mut column = group.next_column().unwrap().unwrap();
                column
                    .typed::<ByteArrayType>()
                    .write_batch(&values, Some(&definitions), Some(&repetitions))
                    .unwrap();
                column.close().unwrap();
            }
            group.close().unwrap();
        }
        writer.close().unwrap();
    }

    #[test]
    fn row_groups_are_entered_evenly() {
        let (directory, tokenizer, count) = (tempfile::tempdir().unwrap(), demo(), 20_000);
        let path = directory.path().join("a.parquet");
        let texts: Vec<String> = numbered(count)
            .lines()
            .map(|line| {
                serde_json::from_str::<serde_json::Value>(line).unwrap()["text"].as_str().unwrap().to_owned()
            })
            .collect();
        let group = |texts: &[String]| vec![(texts.to_vec(), vec![1; texts.len()], vec![0; texts.len()])];
        write(&path, "message m { optional binary text (STRING); }", texts.chunks(500).map(group));
        let made = sample(&path, 32 << 10, &tokenizer).unwrap();
        assert_eq!(made.extent, Extent::Spread);
        let found = numbers(&made, &tokenizer, count);
        let entered: std::collections::BTreeSet<usize> = found.iter().map(|line| line / 500).collect();
        // Fewer than 32 by the rows that were more than a share.
        assert!((30..=32).contains(&entered.len()) && entered.contains(&0), "{entered:?}");
        assert!(found.iter().all(|line| line % 500 < 20) && found.len() < 450, "{found:?}");
        assert!(made.bytes_read < 1_200_000, "{}", made.bytes_read);
        let whole =
            source(&path).read(Portion::All { at_most: u64::MAX }, &tokenizer, OnRefusal::LeaveOut).unwrap();
        assert_eq!(numbers(&whole, &tokenizer, count), (0..count).collect::<Vec<_>>());
        assert_eq!(whole.sha256, hexadecimal(&Sha256::digest(std::fs::read(&path).unwrap())));
        assert!(source(&path).size(0).unwrap() > 1_500_000);
    }

    #[test]
    fn structs_are_padded_and_tools_are_text() {
        let (directory, path) = (tempfile::tempdir().unwrap(), "a.parquet");
        let path = directory.path().join(path);
        let schema = "message m {
            optional group messages (LIST) { repeated group list { optional group element {
                optional binary role (STRING); optional binary content (STRING); optional binary name (STRING);
                optional group tool_calls (LIST) { repeated group list { optional group element { optional group function {
                    optional binary name (STRING); optional binary arguments (STRING); } } } } } } }
            optional binary tools (STRING); optional binary image; }";
        let text = |values: &[&str]| values.iter().map(|value| (*value).to_owned()).collect::<Vec<_>>();
        // A user's message and one that calls; the fields of each are padding in the other.
        let columns = vec![
            (text(&["user", "assistant"]), vec![4, 4], vec![0, 1]),
            (text(&["Hello"]), vec![4, 3], vec![0, 1]),
            (vec![], vec![3, 3], vec![0, 1]),
            (text(&["f"]), vec![3, 8], vec![0, 1]),
            (text(&["{\"a\": 3}"]), vec![3, 8], vec![0, 1]),
            (text(&["[{\"function\": {\"name\": \"g\"}}]"]), vec![1], vec![0]),
            (vec![], vec![0], vec![0]),
        ];
        write(&path, schema, [columns].into_iter());
        let template = "{{ messages | tojson }} {{ tools | tojson }}";
        let expected = "[{\"role\": \"user\", \"content\": \"Hello\"}, {\"role\": \"assistant\", \"content\": null, \"tool_calls\": [{\"function\": {\"name\": \"f\", \"arguments\": {\"a\": 3}}}]}] [{\"function\": {\"name\": \"g\"}}]";
        text_of("a.parquet", &std::fs::read(&path).unwrap(), &with_templates(template, None), expected);
    }

    #[test]
    fn columns_of_tables_are_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.parquet");
        let column = || (vec!["x".to_owned()], vec![1], vec![0]);
        write(
            &path,
            "message m { optional binary id (STRING); optional binary body (STRING); }",
            [vec![column(), column()]].into_iter(),
        );
        let error = read(&path, &demo()).unwrap_err().to_string();
        assert!(error.contains("columns: neither text") && error.contains("found are id, body;"), "{error}");
    }
}
