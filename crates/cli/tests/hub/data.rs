//! Calibration text from datasets on the hub.

use mlx_quant_hub_fixture::Kind;

use crate::place::{ID, Place, assert_same};

const CALIBRATE: &str = "--n-samples 4 --sequence-length 32 --eval-windows 0";

fn lines(seed: usize) -> Vec<u8> {
    let line = |at: usize| {
        let text = format!(
            "Document {at} of {seed}: the quick brown fox jumps over the lazy dog, again and again. "
        );
        serde_json::json!({"text": text.repeat(6)}).to_string()
    };
    (0..40).map(line).collect::<Vec<_>>().join("\n").into_bytes()
}

#[test]
fn a_dataset_serves_as_its_training_file_does() {
    let place = Place::with_model();
    place.hub.add(
        Kind::Dataset,
        "some-org/texts",
        vec![
            ("README.md".to_owned(), b"A dataset".to_vec()),
            ("data/test-00000.jsonl".to_owned(), lines(1)),
            ("data/train-00000.jsonl".to_owned(), lines(2)),
        ],
    );
    std::fs::write(place.at("train.jsonl"), lines(2)).unwrap();
    std::fs::write(place.at("test.jsonl"), lines(1)).unwrap();
    let gptq = |data: &str, out: &str| {
        place.succeed(&format!("gptq --model {ID} --data {data} {CALIBRATE} --mlx-path {out}"))
    };
    let said = gptq("some-org/texts", "hub");
    assert!(said.contains("some-org/texts (train-00000.jsonl)"), "{said}");
    gptq("train.jsonl", "local");
    assert_same(&place.at("hub"), &place.at("local"));
    gptq("some-org/texts/data/test-00000.jsonl", "hub-test");
    gptq("test.jsonl", "local-test");
    assert_same(&place.at("hub-test"), &place.at("local-test"));
    assert!(place.cache("datasets", "some-org/texts").join("refs/main").is_file());
    let before = place.downloads().len();
    gptq("some-org/texts@main", "again");
    assert_eq!(place.downloads().len(), before);
}

#[cfg(feature = "parquet")]
#[test]
fn tables_from_the_hub() {
    let place = Place::with_model();
    let table = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../quant/tests/fixtures/data");
    let table = std::fs::read_dir(table).unwrap().map(|entry| entry.unwrap().path());
    let table =
        table.filter(|path| path.extension().is_some_and(|ending| ending == "parquet")).min().unwrap();
    place.hub.add(
        Kind::Dataset,
        "some-org/table",
        vec![("train.parquet".to_owned(), std::fs::read(&table).unwrap())],
    );
    place.succeed(&format!("eval --model {ID} --data some-org/table --windows 1 --sequence-length 8"));
    place.succeed(&format!("eval --model {ID} --data {} --windows 1 --sequence-length 8", table.display()));
}

#[test]
fn datasets_without_text() {
    let place = Place::with_model();
    place.hub.add(Kind::Dataset, "some-org/images", vec![("train/1.png".to_owned(), vec![1, 2, 3])]);
    let line = |data: &str| format!("gptq --model {ID} --data {data} {CALIBRATE} --mlx-path out");
    place.fail(&line("some-org/images"), 2, &["has no .parquet, .jsonl, .json, .csv, .tsv or .txt file"]);
    place.fail(&line("some-org/images/other"), 2, &["under \"other\""]);
    place.fail(&line("some-org/missing"), 2, &["no repository some-org/missing"]);
    assert!(!place.at("out").exists());
}
