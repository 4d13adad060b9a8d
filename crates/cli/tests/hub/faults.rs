//! Connections that break, servers that answer wrongly, disks that are full.

use std::time::{Duration, Instant};

use mlx_quant_hub_fixture::{Fault, Kind};

use crate::place::{ID, Place, assert_same, failed, files, finish, fixture};

const SHARD: &str = "model-00001-of-00002.safetensors";

/// One fault, after which the download must come right all the same. Gives the place for a further look.
fn mended(path: &str, times: usize, fault: Fault) -> Place {
    let place = Place::with_model();
    place.hub.fault(path, times, fault);
    place.succeed(&format!("convert -q --model {ID} --mlx-path out"));
    place.succeed(&format!("convert -q --model {} --mlx-path local", fixture("llama_tied").display()));
    assert_same(&place.at("out"), &place.at("local"));
    place
}

/// A lasting fault: the command fails with those words, and no blob bears its final name without being whole.
fn lasting(path: &str, fault: Fault, words: &[&str]) -> Place {
    let place = Place::with_model();
    place.hub.fault(path, 1000, fault);
    place.fail(&format!("convert -q --model {ID} --mlx-path out"), 1, words);
    assert!(!place.at("out").exists());
    let (commit_files, blobs) = (files(&fixture("llama_tied")), place.cache("models", ID).join("blobs"));
    for blob in std::fs::read_dir(blobs).into_iter().flatten() {
        let path = blob.unwrap().path();
        if path.extension().is_none() {
            let bytes = std::fs::read(&path).unwrap();
            assert!(
                commit_files.iter().any(|(_, whole)| *whole == bytes),
                "{} is half a file",
                path.display()
            );
        }
    }
    place
}

fn status(code: u16, retry_after: Option<u64>) -> Fault {
    Fault::Status { code, retry_after, body: r#"{"error": "no"}"#.to_owned() }
}

/// Where the ranges that were asked for begin.
fn ranges(place: &Place) -> Vec<u64> {
    let start =
        |range: String| range.trim_start_matches("bytes=").split('-').next().unwrap().parse().unwrap();
    place.weights().into_iter().filter_map(|request| request.range).map(start).collect()
}

#[test]
fn a_dropped_connection_goes_on_where_it_broke() {
    let place = mended("cdn GET /", 2, Fault::Drop { after: 30_000 });
    let ranges = ranges(&place);
    assert!(!ranges.is_empty() && ranges.iter().all(|start| *start > 0), "{ranges:?}");
}

#[test]
fn dropped_listings_are_asked_for_again() {
    mended("/tree/", 2, Fault::Drop { after: 20 });
    mended("/revision/", 1, Fault::Drop { after: 0 });
}

#[test]
fn errors_of_the_server_pass() {
    mended("/api/models/", 2, status(500, None));
    mended("/resolve/", 3, status(503, None));
    mended("cdn GET", 2, status(502, None));
    mended("HEAD /", 3, status(500, None));
}

#[test]
fn retry_after_is_waited_for() {
    let start = Instant::now();
    mended("cdn GET", 1, status(429, Some(2)));
    assert!(start.elapsed() >= Duration::from_secs(2));
    mended("HEAD /", 1, status(429, Some(1)));
    mended("/tree/", 1, status(429, None));
    let start = Instant::now();
    lasting("/api/models/", status(429, Some(3600)), &["takes no more requests", "3600 s"]);
    assert!(start.elapsed() < Duration::from_secs(60));
}

#[test]
fn silence_is_not_waited_for_without_end() {
    let place = mended("cdn GET", 1, Fault::Stall { after: 20_000 });
    assert!(ranges(&place).iter().any(|start| *start > 0));
}

#[test]
fn servers_that_do_not_serve_ranges() {
    let place = Place::with_model();
    place.hub.fault("cdn GET", 2, Fault::Drop { after: 30_000 });
    place.hub.fault("cdn GET", 2, Fault::IgnoreRange);
    place.succeed(&format!("convert -q --model {ID} --mlx-path out"));
    let place = Place::with_model();
    place.hub.fault("cdn GET", 2, Fault::Drop { after: 30_000 });
    place.hub.fault("cdn GET", 2, Fault::NotSatisfiable);
    place.succeed(&format!("convert -q --model {ID} --mlx-path out"));
}

#[test]
fn wrong_bytes_are_fetched_once_more_and_then_refused() {
    mended("cdn GET", 1, Fault::Flip { at: 1234 });
    lasting("cdn GET", Fault::Flip { at: 1234 }, &["safetensors", "hash differs", "twice"]);
    // Small files have git's hash.
    mended("/config.json", 1, Fault::Flip { at: 10 });
    lasting("/config.json", Fault::Flip { at: 10 }, &["config.json", "hash differs"]);
}

#[test]
fn wrong_lengths() {
    mended("cdn GET", 1, Fault::Short { by: 500 });
    lasting("cdn GET", Fault::Short { by: 500 }, &["another number"]);
}

#[test]
fn lasting_errors_are_explained() {
    lasting("/api/models/", status(500, None), &["answered 500", "goes on where it stopped"]);
    lasting("cdn GET", status(503, None), &["answered 503"]);
    lasting("/api/models/", Fault::Html, &["did not answer as the hub does", "HF_ENDPOINT"]);
    lasting("/tree/", Fault::Html, &["did not answer as the hub does"]);
    lasting("/config.json", Fault::Html, &["config.json"]);
}

#[test]
fn a_killed_download_goes_on() {
    let place = Place::with_model();
    place.hub.fault("cdn GET", 2, Fault::Stall { after: 50_000 });
    let line = format!("convert -q --model {ID} --mlx-path out");
    let mut child = place.start(&line);
    let blobs = place.cache("models", ID).join("blobs");
    let grown = || {
        let blobs = std::fs::read_dir(&blobs).into_iter().flatten().map(|blob| blob.unwrap());
        blobs
            .filter(|blob| blob.path().extension().is_some() && blob.metadata().unwrap().len() >= 40_000)
            .count()
    };
    let start = Instant::now();
    while grown() < 2 {
        assert!(start.elapsed() < Duration::from_secs(60), "nothing grows");
        std::thread::sleep(Duration::from_millis(20));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    place.succeed(&line);
    let ranges = ranges(&place);
    assert!(ranges.len() >= 2 && ranges.iter().all(|start| *start >= 40_000), "{ranges:?}");
    place.succeed(&format!("convert -q --model {} --mlx-path local", fixture("llama_tied").display()));
    assert_same(&place.at("out"), &place.at("local"));
}

#[test]
fn an_interrupted_download_says_so() {
    let place = Place::with_model();
    place.hub.fault("cdn GET", 2, Fault::Slow { bytes_per_second: 20_000 });
    let mut child = place.start(&format!("convert -q --model {ID} --mlx-path out"));
    while place.weights().is_empty() {
        assert!(child.try_wait().unwrap().is_none(), "it ended");
        std::thread::sleep(Duration::from_millis(20));
    }
    let interrupt = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status();
    assert!(interrupt.unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
    place.succeed(&format!("convert -q --model {ID} --mlx-path out"));
}

/// `/dev/full` stands for a disk that fills while something comes.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk() {
    let place = Place::with_model();
    place.succeed(&format!("convert -q --model {ID} --mlx-path first"));
    let blob = std::fs::canonicalize(place.snapshot(ID).join(SHARD)).unwrap();
    let growing = blob.with_extension("incomplete");
    std::fs::remove_file(&blob).unwrap();
    std::os::unix::fs::symlink("/dev/full", &growing).unwrap();
    let line = format!("convert -q --model {ID} --mlx-path second");
    place.fail(&line, 1, &["No space left", "make room"]);
    assert!(!blob.exists() && !place.at("second").exists());
    std::fs::remove_file(growing).unwrap();
    place.succeed(&line);
}

/// A repository that says it is larger than any disk is refused before anything is fetched.
#[test]
fn what_cannot_fit_is_refused_first() {
    let place = Place::with_model();
    // The hub lists sizes as it likes.
    let line = format!("convert -q --model {ID} --mlx-path out");
    let tree = format!(
        r#"[{{"type":"file","oid":"{0}","size":{1},"path":"config.json"}},{{"type":"file","oid":"{0}","size":{1},"path":"model.safetensors"}}]"#,
        "a".repeat(40),
        u64::MAX / 4
    );
    place.hub.fault("/tree/", 1, Fault::Status { code: 200, retry_after: None, body: tree });
    place.fail(&line, 2, &["has room for", "--stream"]);
    assert!(place.downloads().is_empty());
}

/// Names and hashes in a listing decide paths on this machine.
#[test]
fn hostile_listings() {
    let good = "a".repeat(40);
    let cases = [
        ("../../../evil", good.as_str(), "no config.json"),
        ("/etc/evil", &good, "no config.json"),
        ("a\\\\b", &good, "no config.json"),
        ("config.json", "../../evil", "which cannot be"),
    ];
    for (path, hash, words) in cases {
        let place = Place::with_model();
        let body = format!(r#"[{{"type":"file","oid":"{hash}","size":3,"path":"{path}"}}]"#);
        place.hub.fault("/tree/", 1, Fault::Status { code: 200, retry_after: None, body });
        place.fail(&format!("convert -q --model {ID} --mlx-path out"), 2, &[words]);
        assert!(place.downloads().is_empty());
    }
    let place = Place::new();
    let mut all = files(&fixture("llama_tied"));
    all.retain(|(name, _)| name != SHARD);
    let mut lying = u64::MAX.to_le_bytes().to_vec();
    lying.extend([b'{'; 100]);
    all.push((SHARD.to_owned(), lying));
    place.hub.add(Kind::Model, ID, all);
    for line in ["inspect", "convert -q --dry-run --model", "convert -q --stream --mlx-path out --model"] {
        place.fail(&format!("{line} {ID}"), 2, &[SHARD]);
    }
}

#[test]
fn a_wrong_endpoint() {
    let place = Place::with_model();
    let line = format!("convert -q --model {ID} --mlx-path out");
    failed(&line, &finish(place.command(&line).env("HF_ENDPOINT", "not an address")), 2, &["HF_ENDPOINT"]);
}
