//! Caches on disks without links or locks, and caches that cannot be written.

use std::path::{Path, PathBuf};

use mlx_quant_hub_fixture::{Fault, Kind};

use crate::machine::{Call, read_only, without};
use crate::place::{ID, Place, assert_same, failed, files, finish, fixture};

const NO_LINKS: &str = "HF_HUB_DISABLE_SYMLINKS";
const EPERM: u32 = 1;
const ENOLCK: u32 = 37;
const ENOSYS: u32 = 38;
const EOPNOTSUPP: u32 = 95;
const SHARD: &str = "model-00001-of-00002.safetensors";

fn convert(name: &str) -> String {
    format!("convert -q --model {ID} --mlx-path {name}")
}

/// An output is that of the same model in a directory.
fn is_right(place: &Place, name: &str) {
    if !place.at("local").exists() {
        place.succeed(&format!("convert -q --model {} --mlx-path local", fixture("llama_tied").display()));
    }
    assert_same(&place.at(name), &place.at("local"));
}

/// Everything below a directory.
fn tree(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.is_dir() && !path.is_symlink() {
            found.extend(tree(&path));
        }
        found.push(path);
    }
    found.sort();
    found
}

/// The snapshot has the files themselves, each of them once on the disk, and nothing half made lies about.
fn holds_files(place: &Place) {
    let snapshot = place.snapshot(ID);
    for (name, bytes) in files(&fixture("llama_tied")) {
        let path = snapshot.join(&name);
        assert!(path.symlink_metadata().unwrap().is_file(), "{name} is a link");
        assert_eq!(std::fs::read(path).unwrap(), bytes, "{name}");
    }
    assert_eq!(tree(&place.cache("models", ID).join("blobs")), Vec::<PathBuf>::new());
    assert_eq!(tree(&snapshot).len(), files(&fixture("llama_tied")).len());
}

/// What is there is found again, online and offline.
fn is_found_again(place: &Place) {
    let before = place.downloads().len();
    assert!(before > 0);
    place.succeed(&convert("again"));
    let mut offline = place.command(&convert("offline"));
    assert!(finish(offline.env("HF_HUB_OFFLINE", "1")).status.success());
    assert!(finish(place.command(&convert("without")).env(NO_LINKS, "1")).status.success());
    for name in ["again", "offline", "without"] {
        is_right(place, name);
    }
    assert_eq!(place.downloads().len(), before, "it was fetched again");
}

#[test]
fn links_that_are_not_wanted() {
    for value in ["1", "true", "YES"] {
        let place = Place::with_model();
        assert!(finish(place.command(&convert("out")).env(NO_LINKS, value)).status.success());
        is_right(&place, "out");
        holds_files(&place);
        is_found_again(&place);
    }
    let place = Place::with_model();
    assert!(finish(place.command(&convert("out")).env(NO_LINKS, "0")).status.success());
    assert!(place.snapshot(ID).join(SHARD).is_symlink());
}

/// exFAT, SMB, and file systems in user space.
#[test]
fn links_that_cannot_be() {
    for errno in [EPERM, ENOSYS, EOPNOTSUPP] {
        let place = Place::with_model();
        let Some(output) = without(&[Call::Symlink], errno, &mut place.command(&convert("out"))) else {
            return;
        };
        assert!(output.status.success(), "{errno}: {}", String::from_utf8_lossy(&output.stderr));
        is_right(&place, "out");
        holds_files(&place);
        is_found_again(&place);
    }
}

/// What other snapshots may link to is copied, and stays.
#[test]
fn content_that_was_there_is_copied() {
    let place = Place::new();
    let first = place.hub.add(Kind::Model, ID, files(&fixture("llama_tied")));
    place.succeed(&convert("first"));
    let mut changed = files(&fixture("llama_tied"));
    changed.push(("LICENSE.txt".to_owned(), b"new".to_vec()));
    let second = place.hub.add(Kind::Model, ID, changed);
    assert_ne!(first, second);
    let before = place.weights().len();
    assert!(finish(place.command(&convert("second")).env(NO_LINKS, "1")).status.success());
    assert_eq!(place.weights().len(), before, "it was fetched again");
    let snapshots = place.cache("models", ID).join("snapshots");
    assert!(snapshots.join(&first).join(SHARD).is_symlink());
    assert!(snapshots.join(&second).join(SHARD).symlink_metadata().unwrap().is_file());
    let mut offline = place.command(&format!("convert -q --model {ID}@{first} --mlx-path offline"));
    assert!(finish(offline.env("HF_HUB_OFFLINE", "1")).status.success());
    is_right(&place, "offline");
    let odd: Vec<_> = tree(&place.hf_home())
        .into_iter()
        .filter(|path| path.file_name().unwrap().to_str().unwrap().ends_with(".new"))
        .collect();
    assert!(odd.is_empty(), "{odd:?}");
}

#[test]
fn datasets_and_streams_without_links() {
    let place = Place::with_model();
    let text = format!("{{\"text\": \"{}\"}}\n", "a b ".repeat(400)).into_bytes();
    place.hub.add(Kind::Dataset, "some-org/texts", vec![("deep/down/train.jsonl".to_owned(), text)]);
    let line = format!("eval --model {ID} --data some-org/texts --windows 2 --sequence-length 32");
    for _ in 0..2 {
        assert!(finish(place.command(&line).env(NO_LINKS, "1")).status.success());
    }
    let snapshots = place.cache("datasets", "some-org/texts").join("snapshots");
    let file = tree(&snapshots).into_iter().find(|path| path.ends_with("deep/down/train.jsonl")).unwrap();
    assert!(file.symlink_metadata().unwrap().is_file());
    // One shard is in the cache, the other is not.
    std::fs::remove_file(place.snapshot(ID).join("model-00002-of-00002.safetensors")).unwrap();
    for (name, errno) in [("eperm", EPERM), ("eopnotsupp", EOPNOTSUPP)] {
        let line = format!("convert -q --stream --model {ID} --mlx-path {name}");
        let Some(output) = without(&[Call::Symlink], errno, &mut place.command(&line)) else { return };
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        is_right(&place, name);
    }
    let line = format!("convert -q --stream --model {ID} --mlx-path asked");
    assert!(finish(place.command(&line).env(NO_LINKS, "1")).status.success());
    is_right(&place, "asked");
    assert!(place.snapshot(ID).join(SHARD).is_file());
}

#[test]
fn two_processes_share_a_download_without_links() {
    let place = Place::with_model();
    place.hub.fault("cdn GET", 2, Fault::Slow { bytes_per_second: 200_000 });
    let mut both = ["one", "two"].map(|name| place.start_with(&convert(name), &[(NO_LINKS, "1")]));
    for child in &mut both {
        assert!(child.wait().unwrap().success());
    }
    is_right(&place, "one");
    is_right(&place, "two");
    holds_files(&place);
    assert_eq!(place.weights().len(), 2, "each shard is fetched once");
}

/// A full download where nothing can be locked, with one word on it.
#[test]
fn disks_without_locks() {
    for errno in [ENOSYS, EOPNOTSUPP, ENOLCK] {
        let place = Place::with_model();
        let Some(output) = without(&[Call::Flock], errno, &mut place.command(&convert("out"))) else {
            return;
        };
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{errno}: {said}");
        assert_eq!(said.matches("knows no locks").count(), 1, "{said}");
        is_right(&place, "out");
        let blobs = tree(&place.cache("models", ID).join("blobs"));
        assert!(blobs.iter().all(|blob| blob.extension().is_none()), "{blobs:?}");
        is_found_again(&place);
        let line = format!("convert -q --stream --model {ID} --mlx-path streamed");
        std::fs::remove_dir_all(place.hf_home()).unwrap();
        let output = without(&[Call::Flock], errno, &mut place.command(&line)).unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.contains(".streamed.source"), "{errno}: {said}");
        is_right(&place, "streamed");
    }
    // Other errors are errors.
    let place = Place::with_model();
    let line = convert("out");
    let Some(output) = without(&[Call::Flock], 5, &mut place.command(&line)) else { return };
    failed(&line, &output, 1, &["Input/output error"]);
}

/// Two at once, who know nothing of each other, and one after the other.
#[test]
fn downloads_without_locks_stay_whole() {
    for calls in [&[Call::Flock][..], &[Call::Flock, Call::Symlink]] {
        let place = Place::with_model();
        place.hub.fault("cdn GET", 4, Fault::Slow { bytes_per_second: 50_000 });
        let outputs = std::thread::scope(|scope| {
            let run = |name: &'static str| {
                let place = &place;
                scope.spawn(move || without(calls, ENOSYS, &mut place.command(&convert(name))))
            };
            [run("one"), run("two")].map(|run| run.join().unwrap())
        });
        for output in outputs {
            let Some(output) = output else { return };
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }
        is_right(&place, "one");
        is_right(&place, "two");
        assert_eq!(place.weights().len(), 4, "they were to come at the same time");
        let parts = tree(&place.hf_home());
        assert!(
            !parts.iter().any(|path| path.extension().is_some_and(|end| end == "incomplete")),
            "{parts:?}"
        );
    }
    // What a failure leaves is gone on with.
    let place = Place::with_model();
    // Both shards break off, so that whichever is asked for again, and fails, has something to leave.
    place.hub.fault("cdn GET", 2, Fault::Drop { after: 30_000 });
    place.hub.fault("cdn GET", 100, Fault::Status { code: 404, retry_after: None, body: String::new() });
    let line = convert("out");
    let Some(output) = without(&[Call::Flock], ENOSYS, &mut place.command(&line)) else { return };
    assert!(!output.status.success());
    place.hub.calm();
    let output = without(&[Call::Flock], ENOSYS, &mut place.command(&line)).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let last: Vec<_> =
        place.weights().into_iter().rev().take(2).filter_map(|request| request.range).collect();
    assert!(last.iter().any(|range| !range.starts_with("bytes=0-")), "{last:?}");
    is_right(&place, "out");
}

/// A cache that somebody else fills is used as it is.
#[test]
fn a_read_only_cache_with_everything() {
    let place = Place::with_model();
    let text = format!("{{\"text\": \"{}\"}}\n", "a b ".repeat(400)).into_bytes();
    place.hub.add(Kind::Dataset, "some-org/texts", vec![("train.jsonl".to_owned(), text)]);
    let eval = format!("eval --model {ID} --data some-org/texts --windows 2 --sequence-length 32");
    place.succeed(&convert("first"));
    place.succeed(&eval);
    let cache = place.hf_home();
    let (before, downloads) = (tree(&cache), place.downloads().len());
    let commit = place.snapshot(ID).file_name().unwrap().to_str().unwrap().to_owned();
    let lines = [
        convert("online"),
        format!("convert -q --model {ID}@{commit} --mlx-path by-commit"),
        format!("convert -q --model {ID} --dry-run"),
        format!("inspect {ID} --verify"),
        eval,
        format!("convert -q --stream --model {ID} --mlx-path streamed"),
    ];
    for line in &lines {
        for environment in [&[][..], &[("HF_HUB_OFFLINE", "1")]] {
            if environment.len() == 1 && line.contains("--mlx-path") {
                std::fs::remove_dir_all(place.at(line.rsplit(' ').next().unwrap())).unwrap();
            }
            let Some(output) = read_only(&place, &cache, line, environment) else { return };
            assert!(output.status.success(), "{line}\n{}", String::from_utf8_lossy(&output.stderr));
        }
    }
    for name in ["online", "by-commit", "streamed"] {
        is_right(&place, name);
    }
    // Where a branch is cannot be noted, and need not be.
    std::fs::remove_file(place.cache("models", ID).join("refs/main")).unwrap();
    let output = read_only(&place, &cache, &convert("no-ref"), &[]).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(tree(&cache).len(), before.len() - 1);
    assert_eq!(place.downloads().len(), downloads, "something was fetched");
}

/// mlx_lm and transformers fetch no README.md.
#[test]
fn a_read_only_cache_without_a_card() {
    let place = Place::new();
    let mut all = files(&fixture("llama_tied"));
    all.push(("README.md".to_owned(), b"---\nlicense: mit\n---\n".to_vec()));
    place.hub.add(Kind::Model, ID, all);
    place.succeed(&convert("first"));
    std::fs::remove_file(place.snapshot(ID).join("README.md")).unwrap();
    let Some(output) = read_only(&place, &place.hf_home(), &convert("out"), &[]) else { return };
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("licence and language are not known"), "{said}");
    is_right(&place, "out");
    let output = read_only(&place, &place.hf_home(), &format!("inspect {ID}"), &[]).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// What is missing is refused before anything is fetched.
#[test]
fn a_read_only_cache_that_lacks_something() {
    let place = Place::with_model();
    std::fs::create_dir_all(place.hf_home().join("hub")).unwrap();
    let hub = place.hf_home().join("hub").display().to_string();
    let refused = |line: &str, words: &[&str]| {
        let (before, downloads) = (tree(&place.at("")), place.downloads().len());
        let Some(output) = read_only(&place, &place.hf_home(), line, &[]) else { return false };
        let all: Vec<&str> = [&hub, "cannot be written", "HF_HOME", "HF_HUB_CACHE"]
            .into_iter()
            .chain(words.iter().copied())
            .collect();
        failed(line, &output, 2, &all);
        assert_eq!(tree(&place.at("")), before);
        assert_eq!(place.downloads().len(), downloads, "something was fetched");
        true
    };
    // Nothing is there at all.
    if !refused(&convert("out"), &[ID, "lacks"]) {
        return;
    }
    refused(&format!("inspect {ID}"), &[ID]);
    place.succeed(&convert("first"));
    let shard = place.snapshot(ID).join(SHARD);
    let target = std::fs::read_link(&shard).unwrap();
    std::fs::remove_file(&shard).unwrap();
    refused(&convert("out"), &[SHARD, "1 file(s)"]);
    std::os::unix::fs::symlink(target, shard).unwrap();
    std::fs::remove_file(place.snapshot(ID).join("config.json")).unwrap();
    refused(&convert("out"), &["config.json"]);
    // A newer commit.
    place.hub.add(Kind::Model, ID, files(&fixture("qwen3_moe")));
    refused(&convert("out"), &["lacks"]);
    place.hub.add(Kind::Dataset, "some-org/texts", vec![("train.txt".to_owned(), b"text".to_vec())]);
    refused("gptq --data some-org/texts --mlx-path out", &["train.txt", "some-org/texts"]);
    // What is in the cache can be written again afterwards.
    place.succeed(&convert("out"));
}
