//! Every kind of file, packed and not, whole and broken.

use std::io::Write as _;

use super::*;

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 1).unwrap()
}

const LINES: &str = "{\"text\": \"One two\"}\n\n{\"text\": \"three\"}\r\n";
const JOINED: &str = "One two<|end_of_text|>three";

#[test]
fn json_comes_in_many_shapes() {
    for content in [
        r#"[{"text": "One two"}, {"text": "three"}]"#,
        "\u{feff} [\n {\"text\": \"One two\"}\n,\n{\"text\": \"three\"}\n]\n\n",
        LINES,
        r#"{"text": "One two"}{"text": "three"}"#,
        r#"{"version": "1.0", "data": [{"text": "One two"}, {"text": "three"}], "license": "none"}"#,
        r#"{"meta": {"data": [{"text": "no"}]}, "empty": [], "rows": [{"text": "One two"}, {"text": "three"}]}"#,
        "{\n  \"text\": \"One two\"\n}\n{\n  \"text\": \"three\"\n}\n",
    ] {
        text_of("data.json", content.as_bytes(), &demo(), JOINED);
        text_of("DATA.JSON.GZ", &gzip(content.as_bytes()), &demo(), JOINED);
    }
    // A document may hold a list of objects itself.
    text_of("a.json", br#"{"images": [{"path": "x"}], "text": "One two"}"#, &demo(), "One two");
}

#[test]
fn broken_json_names_its_row() {
    for (content, expected) in [
        ("[{\"text\": \"a\"}, {\"text\": \"b\"", "row 2: the file ends inside it"),
        ("[{\"text\": \"a\"}, 3]", "row 2: not an object"),
        ("[{\"text\": \"a\"} {\"text\": \"b\"}]", "row 2: '{' where ','"),
        ("[{\"text\": \"a\"}] {\"text\": \"b\"}", "row 2: '{' behind the end of the list"),
        ("[{\"text\" \"a\"}]", "row 1: expected `:`"),
        ("[\"a\", \"b\"]", "row 1: not an object"),
        ("[]", "holds no text"),
        ("", "holds no text"),
        ("\"text\"", "row 1: not an object"),
        ("[{\"text\": 1}]", "row 1: text is a number"),
    ] {
        let error = read_file("a.json", content.as_bytes(), &demo()).unwrap_err().to_string();
        assert!(
            error.contains("a.json") && error.contains(expected) && error.contains("; hint: "),
            "{content}: {error}"
        );
    }
    let error = read_file("a.json", b"[{\"text\": \"\xff\"}]", &demo()).unwrap_err().to_string();
    assert!(error.contains("row 1: not UTF-8"), "{error}");
}

#[test]
fn lines_need_not_be_strict_json() {
    for (line, expected) in [
        (r#"{"text": "caf\udce9 and\ud83d more"}"#, "caf\u{fffd} and\u{fffd} more"),
        (r#"{"\udce9": 1, "text": "One two"}"#, "One two"),
        (r#"{"score": NaN, "text": "One two", "more": [Infinity, {"deep": -Infinity}]}"#, "One two"),
        (r#"{"text": "One two", "size": 1e999, "NaN": "NaN"}"#, "One two"),
        (r#"{"prompt": NaN, "completion": NaN, "text": "One NaN two"}"#, "One NaN two"),
    ] {
        text_of("a.jsonl", line.as_bytes(), &demo(), expected);
        text_of("a.json", format!("[{line}]").as_bytes(), &demo(), expected);
    }
}

#[test]
fn packed_files_are_unpacked() {
    let halves = |pack: fn(&[u8]) -> Vec<u8>| {
        let (first, second) = LINES.as_bytes().split_at(25);
        [pack(first), pack(second)].concat()
    };
    text_of("a.jsonl.gz", &gzip(LINES.as_bytes()), &demo(), JOINED);
    text_of("a.JSONL.Zst", &zstd(LINES.as_bytes()), &demo(), JOINED);
    // Several members make one file.
    text_of("a.jsonl.gz", &halves(gzip), &demo(), JOINED);
    text_of("a.jsonl.zst", &halves(zstd), &demo(), JOINED);
    text_of("a.txt.gz", &gzip("\u{feff}One\r\ntwo".as_bytes()), &demo(), "One\ntwo");
    text_of("a.csv.zst", &zstd(b"text\nOne two\nthree\n"), &demo(), JOINED);
    for (name, content) in [
        ("a.jsonl.gz", LINES.as_bytes().to_vec()),
        ("a.jsonl.zst", LINES.as_bytes().to_vec()),
        ("a.jsonl.gz", gzip(LINES.as_bytes())[..30].to_vec()),
        ("a.txt.zst", zstd(LINES.as_bytes())[..20].to_vec()),
    ] {
        let error = read_file(name, &content, &demo()).unwrap_err().to_string();
        assert!(
            error.contains(name) && error.contains("cannot be unpacked") && error.contains("; hint: "),
            "{error}"
        );
    }
    // The hash is of the file as it lies there, whatever follows the list.
    for (name, content) in [
        ("a.jsonl.gz", gzip(LINES.as_bytes())),
        ("b.json", br#"{"data": [{"text": "One two"}], "more": 1}"#.to_vec()),
    ] {
        let windows = read_file(name, &content, &demo())
            .unwrap()
            .windows(2, Pick::EvenlySpaced { windows: 1 })
            .unwrap();
        let source = &windows.sources[0];
        assert_eq!(source.sha256, hexadecimal(&Sha256::digest(&content)));
        assert_eq!(
            (source.bytes_read, source.bytes_total, source.extent),
            (content.len() as u64, content.len() as u64, Extent::Whole)
        );
        assert_eq!(source.part_read(), None);
    }
}

#[test]
fn separated_tables_have_columns() {
    for (name, content, expected) in [
        ("a.csv", "text\nOne two\nthree\n", JOINED),
        ("a.csv", "\u{feff}id,text\r\n1,\"One two\"\r\n2,three\r\n", JOINED),
        ("A.TSV", "id\ttext\n1\tOne two\n2\tthree", JOINED),
        ("a.csv", "text,other\n\"One\ntwo, \"\"three\"\"\",x\n", "One\ntwo, \"three\""),
        ("a.csv", "prompt,completion,text\n,,One two\n,,three\n", JOINED),
    ] {
        text_of(name, content.as_bytes(), &demo(), expected);
    }
    let messages = "id,messages\n1,\"[{\"\"role\"\": \"\"user\"\", \"\"content\"\": \"\"Hello\"\", \"\"name\"\": null}]\"\n";
    text_of(
        "a.csv",
        messages.as_bytes(),
        &with_templates("{{ messages[0] | tojson }}", None),
        "{\"role\": \"user\", \"content\": \"Hello\"}",
    );
    let alpaca = "instruction,input,output\nx,,y\n";
    text_of(
        "a.csv",
        alpaca.as_bytes(),
        &with_templates("{{ messages[0].content }} {{ messages[1].content }}", None),
        "x y",
    );
    for (content, expected) in [
        (&b"text,id\na,1\nb\n"[..], "row 2: 1 cells, where the first row has 2 names"),
        (b"text\na\n\xff\n", "row 2: text is not UTF-8"),
        (b"text\n", "holds no text"),
        (b"", "columns: neither text"),
        (b"messages\nhello\n", "row 1: messages is a string, not a list"),
    ] {
        let error = read_file("a.csv", content, &demo()).unwrap_err().to_string();
        assert!(error.contains("a.csv") && error.contains(expected) && error.contains("; hint: "), "{error}");
    }
}

#[test]
fn rows_without_an_end_are_refused() {
    let zeros = |start: &str| [start.as_bytes(), &vec![b'x'; (64 << 20) + (1 << 17)]].concat();
    for (name, content, place) in [
        ("a.jsonl.gz", gzip(&zeros("{\"text\": \"fine\"}\n{\"text\": \"")), "line 2"),
        ("a.json.zst", zstd(&zeros("[{\"text\": \"fine\"}, {\"text\": \"")), "row 2"),
        ("a.csv.gz", gzip(&zeros("text\nfine\n\"")), "row 2"),
    ] {
        assert!(content.len() < 1 << 20);
        let error = read_file(name, &content, &plain()).unwrap_err().to_string();
        assert!(
            error.contains(&format!("{name}, {place}: more than 64 MiB")) && error.contains("; hint: "),
            "{error}"
        );
    }
}

#[test]
fn directories_hold_data_and_settings() {
    let names = |files: &[&str]| -> Vec<String> {
        let directory = tempfile::tempdir().unwrap();
        for name in files {
            let content: &[u8] = if name.to_lowercase().contains("csv") {
                b"text\nOne two three\n"
            } else {
                b"{\"text\": \"One two three\"}\n"
            };
            std::fs::write(
                directory.path().join(name),
                if name.ends_with(".gz") { gzip(content) } else { content.to_vec() },
            )
            .unwrap();
        }
        let windows =
            read(directory.path(), &demo()).unwrap().windows(2, Pick::EvenlySpaced { windows: 1 }).unwrap();
        windows.sources.into_iter().map(|source| source.name).collect()
    };
    assert_eq!(names(&["b.jsonl", "dataset_infos.json", "a.json", "c.pdf"]), ["b.jsonl"]);
    assert_eq!(names(&["state.json", "train.json", "test.json.gz"]), ["test.json.gz", "train.json"]);
    assert_eq!(names(&["b.CSV", "a.jsonl.gz", "c.txt", ".d.jsonl"]), ["a.jsonl.gz", "b.CSV", "c.txt"]);
    assert_eq!(names(&["config.json"]), ["config.json"]);
}
