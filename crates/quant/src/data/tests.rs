//! Expected windows come from `windows_of` of the measuring script (NumPy 2, transformers 5.24), expected samples from
//! an implementation of the description of [`super::pick::sampled`] in Python.

use std::fmt::Write as _;
use std::path::Path;

use mlx_quant_model::Tokenizer;
use serde_json::json;
use sha2::{Digest as _, Sha256};

mod files;
mod forms;
mod large;

use super::pick::{evenly_spaced, sampled};
use super::*;
use mlx_format::checkpoint::Directory;

const DEMO: Directory = Directory::Embedded { name: "demo", files: mlx_quant_demo::FILES };

fn demo() -> Tokenizer {
    Tokenizer::load(&DEMO).unwrap()
}

/// The demo model's tokenizer without chat template, BOS and EOS.
fn plain() -> Tokenizer {
    let directory = tempfile::tempdir().unwrap();
    let (name, bytes) = mlx_quant_demo::FILES.iter().find(|(name, _)| *name == "tokenizer.json").unwrap();
    std::fs::write(directory.path().join(name), bytes).unwrap();
    Tokenizer::load(&Directory::open(directory.path()).unwrap()).unwrap()
}

/// The demo model's tokenizer with a chat template, and with one for tools.
fn with_templates(default: &str, tool_use: Option<&str>) -> Tokenizer {
    let directory = tempfile::tempdir().unwrap();
    let (name, bytes) = mlx_quant_demo::FILES.iter().find(|(name, _)| *name == "tokenizer.json").unwrap();
    std::fs::write(directory.path().join(name), bytes).unwrap();
    std::fs::write(directory.path().join("chat_template.jinja"), default).unwrap();
    if let Some(template) = tool_use {
        let additional = directory.path().join("additional_chat_templates");
        std::fs::create_dir(&additional).unwrap();
        std::fs::write(additional.join("tool_use.jinja"), template).unwrap();
    }
    Tokenizer::load(&Directory::open(directory.path()).unwrap()).unwrap()
}

fn read(path: &Path, tokenizer: &Tokenizer) -> Result<Corpus, DataError> {
    Corpus::read(&DataSource::Path(path.to_owned()), tokenizer, 6144)
}

fn read_file(name: &str, content: &[u8], tokenizer: &Tokenizer) -> Result<Corpus, DataError> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(name);
    std::fs::write(&path, content).unwrap();
    read(&path, tokenizer)
}

/// What a file of that name and content is read as, documents one after the other.
fn text_of(name: &str, content: &[u8], tokenizer: &Tokenizer, expected: &str) {
    let corpus = read_file(name, content, tokenizer).unwrap_or_else(|error| panic!("{name}: {error}"));
    let mut ids = tokenizer.encode(expected).unwrap();
    let stride = 2 - tokenizer.prefix().len();
    ids.truncate(ids.len() / stride * stride);
    let shown = String::from_utf8_lossy(content);
    assert_eq!(tokens(&corpus), ids, "{name}: {}", shown.chars().take(300).collect::<String>());
}

/// The tokens of a corpus of one source, apart from what does not fill a window of one token.
fn tokens(corpus: &Corpus) -> Vec<u32> {
    let prefix = corpus.prefix().len();
    let windows = corpus.windows(2, Pick::EvenlySpaced { windows: 0 }).unwrap();
    windows.picked.iter().flat_map(|window| window.tokens[prefix..].to_vec()).collect()
}

fn hash<'a>(ids: impl IntoIterator<Item = &'a u32>) -> String {
    let bytes: Vec<u8> = ids.into_iter().flat_map(|id| id.to_le_bytes()).collect();
    Sha256::digest(&bytes).iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

#[test]
fn evenly_spaced_is_numpy() {
    assert_eq!(evenly_spaced(119, 16), [0, 8, 16, 24, 31, 39, 47, 55, 63, 71, 79, 87, 94, 102, 110, 118]);
    // A tie goes to the even index: 2.5 is 2.
    assert_eq!(evenly_spaced(6, 3), [0, 2, 5]);
    assert_eq!(evenly_spaced(10, 4), [0, 3, 6, 9]);
    assert_eq!(evenly_spaced(2, 2), [0, 1]);
    assert_eq!(evenly_spaced(7, 1), [0]);
    assert_eq!(evenly_spaced(3, 0), [0, 1, 2]);
    assert_eq!(evenly_spaced(3, 9), [0, 1, 2]);
    let all = (1..300).flat_map(|total| (1..=total).map(move |count| (total, count)));
    let picked: Vec<u32> =
        all.flat_map(|(total, count)| evenly_spaced(total, count)).map(|index| index as u32).collect();
    assert_eq!(hash(&picked), "57d96088be456651c6c72f87efdbd1d0d3464150f1f42b646856883b13cf188f");
}

#[test]
fn windows_equal_the_measuring_script() {
    let corpus = Corpus::read(&DataSource::BuiltinHeldOut, &demo(), 6144).unwrap();
    for (windows, length, total, expected) in [
        (16, 512, 119, "a3103337522f12e1cd1185e088995bd0c2283847905c7755f35c50fb97d07048"),
        (30, 128, 480, "5295f07f9a5474b052d20e596284b573674a9731c66b9e9769f42f94b6ec02a8"),
        (1, 512, 119, "63e56fd8cf46835ec48511ca4f026fa540fc3225d096527b4623096cf3b1026b"),
        (0, 512, 119, "a0b094f92cb1127cbfb3177c0209c0a2c49b598e6a45fd831241b4f1ebf85af1"),
    ] {
        let windows = corpus.windows(length, Pick::EvenlySpaced { windows }).unwrap();
        assert_eq!(windows.sources[0].windows_total, total);
        assert!(windows.picked.iter().all(|window| window.tokens.len() == length && window.tokens[0] == 0));
        assert_eq!(hash(windows.picked.iter().flat_map(|window| &window.tokens)), expected);
    }
}

#[test]
fn samples_are_pinned() {
    assert_eq!(sampled(119, 16, 123), [48, 77, 108, 87, 67, 27, 113, 91, 76, 81, 26, 72, 5, 32, 17, 51]);
    assert_eq!(sampled(119, 16, 0), [98, 47, 46, 55, 76, 22, 15, 26, 102, 33, 85, 17, 62, 34, 11, 19]);
    assert_eq!(sampled(1_000_000, 5, u64::MAX), [34_751, 584_644, 304_345, 542_788, 800_035]);
    assert_eq!(sampled(10, 10, 123), [1, 6, 8, 0, 7, 9, 3, 5, 4, 2]);
}

#[test]
fn samples_are_drawn_over_all_sources() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("b.txt"), "one two three ".repeat(300)).unwrap();
    std::fs::write(directory.path().join("a.TXT"), "four five ".repeat(150)).unwrap();
    std::fs::write(directory.path().join("README.md"), "ignored").unwrap();
    std::fs::write(directory.path().join(".hidden.txt"), "ignored").unwrap();
    std::fs::create_dir(directory.path().join("c.txt")).unwrap();
    let corpus = read(directory.path(), &demo()).unwrap();
    let windows = corpus.windows(8, Pick::Sampled { windows: 60, seed: 1 }).unwrap();
    assert_eq!(windows.picked.len(), 60);
    let names: Vec<_> = windows.sources.iter().map(|source| source.name.as_str()).collect();
    assert_eq!(names, ["a.TXT", "b.txt"]);
    let [a, b] = &windows.sources[..] else { panic!() };
    assert_eq!(a.windows_picked + b.windows_picked, 60);
    assert!(a.windows_picked > 3 && b.windows_picked > 3 * a.windows_picked / 2);
    let fewer = corpus.windows(8, Pick::Sampled { windows: 20, seed: 1 }).unwrap();
    assert_eq!(fewer.picked, windows.picked[..20]);
    assert_eq!(fewer.data_hash, windows.data_hash);
    // Evaluation takes its number from each.
    let even = corpus.windows(8, Pick::EvenlySpaced { windows: 5 }).unwrap();
    assert_eq!(even.picked.iter().filter(|window| window.source == 1).count(), 5);
    assert_eq!(even.picked.len(), 10);
}

#[test]
fn reports_name_what_was_used() {
    let pick = Pick::Sampled { windows: 3, seed: 123 };
    let windows = Windows::read(&DataSource::BuiltinCalibration, &demo(), 6144, 512, pick).unwrap();
    let report = serde_json::to_value(windows.report()).unwrap();
    assert_eq!(report["windows"], 3);
    assert_eq!(report["pick"], json!({"kind": "sampled", "windows": 3, "seed": 123}));
    assert_eq!(report["sources"][0]["name"], "calibration.txt");
    assert_eq!(report["sources"][0]["windows_picked"], 3);
    assert_eq!(report["sources"][0]["sha256"].as_str().unwrap().len(), 64);
    assert_eq!(report["data_hash"].as_str().unwrap(), windows.data_hash);
}

#[test]
fn lines_have_three_forms() {
    let lines = "\u{feff}{\"text\": \"One.\", \"id\": 7}\r\n\n  \n{\"prompt\": \"Who?\", \"completion\": \" Me.\"}\n{\"text\": null, \"prompt\": null, \"messages\": [{\"role\": \"user\", \"content\": \"Hello\"}]}";
    let tokenizer = demo();
    let corpus = read_file("data.jsonl", lines.as_bytes(), &tokenizer).unwrap();
    let expected = "One.<|end_of_text|><|begin_of_text|><|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n Me.<|im_end|>\n<|end_of_text|><|begin_of_text|><|im_start|>user\nHello<|im_end|>\n";
    assert_eq!(tokens(&corpus), tokenizer.encode(expected).unwrap());
    // Without a chat template the two are joined, without an end-of-text token nothing separates.
    let tokenizer = plain();
    let lines = "{\"text\": \"One. Two\"}\n{\"prompt\": \"Who?\", \"completion\": \" Me.\"}\n";
    let expected = [tokenizer.encode("One. Two").unwrap(), tokenizer.encode("Who? Me.").unwrap()].concat();
    let corpus = read_file("data.jsonl", lines.as_bytes(), &tokenizer).unwrap();
    assert_eq!(tokens(&corpus), expected[..expected.len() / 2 * 2]);
}

#[test]
fn text_is_read_as_python_reads_it() {
    let tokenizer = demo();
    let corpus = read_file("a.txt", "\u{feff}one\r\ntwo\rthree\n".as_bytes(), &tokenizer).unwrap();
    assert_eq!(tokens(&corpus), tokenizer.encode("one\ntwo\nthree\n").unwrap());
}

#[test]
fn broken_lines_are_named() {
    for (line, expected) in [
        (&b"{\"text\": "[..], "line 3: EOF while parsing"),
        (b"[1]", "line 3: not an object"),
        (b"{}", "line 3: neither text"),
        (b"{\"prompt\": \"only\"}", "line 3: neither text"),
        (b"{\"text\": 5}", "line 3: text is a number, not a string"),
        (b"{\"prompt\": [], \"completion\": \"\"}", "line 3: prompt is a list"),
        (b"{\"messages\": \"Hello\"}", "line 3: messages is a string, not a list"),
        (b"{\"messages\": []}", "line 3: messages is empty"),
        (b"{\"messages\": [\"Hello\"]}", "line 3: message 0 is a string"),
        (b"{\"messages\": [{\"content\": \"x\"}]}", "line 3: message 0 has no role"),
        (b"{\"messages\": [{\"role\": \"user\"}]}", "line 3: message 0 has no content"),
        (
            b"{\"messages\": [{\"role\": \"user\", \"content\": 3}]}",
            "line 3: content of message 0 is a number",
        ),
        (b"{\"text\": \"\xff\"}", "line 3: not UTF-8"),
        (
            b"{\"messages\": [{\"role\": \"user\", \"content\": [1]}]}",
            "line 3: part 0 of content of message 0 is a number",
        ),
    ] {
        let content = [b"{\"text\": \"fine\"}\n\n", line, b"\n"].concat();
        let error = read_file("data.jsonl", &content, &demo()).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains("data.jsonl"), "{error}");
        assert!(error.contains("; hint: "), "{error}");
    }
    let messages = b"{\"messages\": [{\"role\": \"user\", \"content\": \"x\"}]}";
    let error = read_file("data.jsonl", messages, &plain()).unwrap_err().to_string();
    assert!(error.contains("line 1") && error.contains("has no chat template"), "{error}");
}

#[test]
fn unfit_data_is_refused() {
    let empty = tempfile::tempdir().unwrap();
    for (result, expected) in [
        (read(Path::new("/nowhere/at/all.txt"), &demo()), "/nowhere/at/all.txt"),
        (read(empty.path(), &demo()), "holds no .txt, .jsonl, .json, .csv, .tsv or .parquet files"),
        (read(Path::new("/dev/null"), &demo()), "no kind of data"),
        (read_file("data.pdf", b"x", &demo()), "no kind of data"),
        (read_file("data.jsonl", b"\n\n", &demo()), "holds no text"),
        (read_file("data.txt", b"one\ntwo\n\xff", &demo()), "data.txt, line 3: not UTF-8"),
        (read_file("data.parquet", b"PAR1", &demo()), "data.parquet: "),
        (
            Corpus::read(&DataSource::BuiltinHeldOut, &demo(), 6000),
            "is beyond the model's vocabulary of 6000",
        ),
    ] {
        let error = result.unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains("; hint: "), "{error}");
    }
    let short = read_file("short.txt", b"Hello", &demo()).unwrap();
    for (length, expected) in [
        (512, "tokens, one window needs 511; hint: use a shorter --sequence-length"),
        (1, "windows of 1 tokens leave nothing to predict; hint:"),
        (0, "windows of 0 tokens leave nothing to predict; hint:"),
    ] {
        let error = short.windows(length, Pick::EvenlySpaced { windows: 4 }).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    assert!(crate::Error::from(DataError::SequenceLength(1)).is_refusal());
}

#[cfg(feature = "parquet")]
#[test]
fn tables_have_three_forms() {
    let fixture = |name: &str| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/data").join(name);
    let tokenizer = demo();
    let expect = |name: &str, text: &str| {
        let corpus = read(&fixture(name), &tokenizer).unwrap();
        assert_eq!(tokens(&corpus), tokenizer.encode(text).unwrap(), "{name}");
    };
    for codec in ["none", "snappy", "zstd", "gzip", "lz4", "brotli"] {
        let text = "First text, naïve.<|end_of_text|>Second text.<|end_of_text|>Third.";
        expect(&format!("text_{codec}.parquet"), text);
    }
    expect(
        "completion.parquet",
        "<|begin_of_text|><|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nMe.<|im_end|>\n<|end_of_text|><|begin_of_text|><|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\nHere.<|im_end|>\n",
    );
    expect(
        "messages.parquet",
        "<|begin_of_text|><|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi there<|im_end|>\n<|end_of_text|><|begin_of_text|><|im_start|>user\nBye<|im_end|>\n",
    );
    for (name, expected) in
        [("null.parquet", "row 2: neither text"), ("no_column.parquet", "columns: neither text")]
    {
        let error = read(&fixture(name), &tokenizer).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains("; hint: "), "{error}");
    }
}

#[cfg(not(feature = "parquet"))]
#[test]
fn tables_need_the_feature() {
    let error = read_file("data.parquet", b"PAR1", &demo()).unwrap_err().to_string();
    assert!(error.contains("does not read .parquet; hint: build with"), "{error}");
}
