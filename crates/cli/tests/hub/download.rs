//! What a download brings, and where.

use std::path::Path;

use mlx_quant_hub_fixture::{Fault, Kind, Server};

use crate::place::{ID, Place, TOKEN, assert_same, contents, failed, files, finish, fixture};

/// Converts the model at [`ID`] and the same model from a directory, and compares.
fn converts(place: &Place, line: &str, output: &str) {
    place.succeed(&format!("{line} --mlx-path {output}"));
    let local = place.at("local");
    if !local.exists() {
        let model = fixture("llama_tied");
        place.succeed(&format!("convert -q --model {} --mlx-path local", model.display()));
    }
    assert_same(&place.at(output), &local);
}

#[test]
fn a_model_is_fetched_once_and_converts_as_a_local_one() {
    let place = Place::with_model();
    converts(&place, &format!("convert -q --hf-path {ID}"), "out");
    let before = place.downloads().len();
    assert!(before > 0);
    converts(&place, &format!("convert -q --model {ID}"), "again");
    assert_eq!(place.downloads().len(), before, "it was fetched again");
    assert!(place.hub.requests().iter().any(|request| request.token && request.server == Server::Hub));
    let card = String::from_utf8(contents(&place.at("out"))["README.md"].clone()).unwrap();
    assert!(card.contains(&format!("base_model: {ID}")), "{card}");
    assert!(card.contains("base_model_relation: quantized"), "{card}");
}

#[test]
fn only_what_is_needed_is_fetched_and_python_files_stay_data() {
    let place = Place::new();
    let mut all = files(&fixture("llama_tied"));
    let unneeded = [
        "pytorch_model.bin",
        "onnx/model.onnx",
        "photo.png",
        "tf_model.h5",
        "original/params.json",
        "consolidated.safetensors",
    ];
    all.extend(unneeded.map(|name| (name.to_owned(), vec![7; 100])));
    all.push(("modeling_tiny.py".to_owned(), b"raise SystemExit('this must not run')\n".to_vec()));
    all.push((
        "README.md".to_owned(),
        b"---\nlicense: apache-2.0\nlanguage:\n- de\nwidget: x\n---\nDear reader\n".to_vec(),
    ));
    place.hub.add(Kind::Model, ID, all);
    place.succeed(&format!("convert -q --model {ID} --mlx-path out-plain"));
    let out = contents(&place.at("out-plain"));
    assert!(out["modeling_tiny.py"].starts_with(b"raise"));
    let card = String::from_utf8(out["README.md"].clone()).unwrap();
    assert!(card.contains("license: apache-2.0") && card.contains("language:\n- de\n"), "{card}");
    assert!(!card.contains("widget") && !card.contains("Dear"), "{card}");
    let fetched = |name: &&str| place.downloads().iter().any(|request| request.path.contains(*name));
    assert_eq!(unneeded.iter().copied().filter(fetched).collect::<Vec<_>>(), Vec::<&str>::new());
}

/// The layout of `huggingface_hub`: links to blobs that are named by their hashes.
#[test]
fn the_cache_has_pythons_layout() {
    let place = Place::new();
    let commit = place.hub.add(Kind::Model, ID, files(&fixture("llama_tied")));
    place.succeed(&format!("convert --model {ID} --mlx-path out"));
    let cache = place.cache("models", ID);
    assert_eq!(std::fs::read_to_string(cache.join("refs/main")).unwrap(), commit);
    let snapshot = place.snapshot(ID);
    assert_eq!(snapshot.file_name().unwrap().to_str().unwrap(), commit);
    for (name, bytes) in files(&fixture("llama_tied")) {
        let link = std::fs::read_link(snapshot.join(&name)).unwrap();
        assert!(link.starts_with("../../blobs"), "{}", link.display());
        let hash = link.file_name().unwrap().to_str().unwrap();
        let large = name.ends_with(".safetensors");
        assert_eq!(hash.len(), if large { 64 } else { 40 }, "{name}");
        assert_eq!(std::fs::read(snapshot.join(&name)).unwrap(), bytes, "{name}");
    }
    let incomplete = std::fs::read_dir(cache.join("blobs")).unwrap().filter(|blob| {
        blob.as_ref().unwrap().path().extension().is_some_and(|ending| ending == "incomplete")
    });
    assert_eq!(incomplete.count(), 0);
}

#[test]
fn branches_commits_and_both_ways_to_name_them() {
    let place = Place::new();
    let first = place.hub.add(Kind::Model, ID, files(&fixture("llama_tied")));
    place.hub.branch(ID, "refs/pr/7", &first);
    place.hub.add(Kind::Model, ID, files(&fixture("qwen3_moe")));
    converts(&place, &format!("convert -q --model {ID} --revision {first}"), "by-commit");
    converts(&place, &format!("convert -q --model {ID} --revision refs/pr/7"), "by-branch");
    converts(&place, &format!("convert -q --model {ID}@refs/pr/7"), "by-name");
    place.succeed(&format!("convert -q --model {ID} --mlx-path newest"));
    assert!(
        String::from_utf8(contents(&place.at("newest"))["config.json"].clone())
            .unwrap()
            .contains("qwen3_moe")
    );
    let line = format!("convert --model {ID}@{first} --revision main --dry-run");
    place.fail(&line, 2, &["two revisions"]);
}

#[test]
fn a_renamed_repository_is_followed() {
    let place = Place::with_model();
    place.hub.rename(ID, "new-org/New-Name");
    let said = place.succeed(&format!("convert -q --model {ID} --mlx-path out"));
    assert!(said.contains("is now called new-org/New-Name"), "{said}");
}

/// Offline, the commit that is whole in the cache counts, not the newest that was looked at.
#[test]
fn looking_does_not_move_a_branch() {
    let place = Place::with_model();
    place.succeed(&format!("convert -q --model {ID} --mlx-path first"));
    place.hub.add(Kind::Model, ID, files(&fixture("qwen3_moe")));
    place.succeed(&format!("inspect {ID}"));
    place.succeed(&format!("convert -q --model {ID} --dry-run"));
    let line = format!("convert -q --model {ID} --mlx-path second");
    assert!(finish(place.command(&line).env("HF_HUB_OFFLINE", "1")).status.success());
    assert_same(&place.at("first"), &place.at("second"));
}

#[test]
fn offline_takes_what_is_cached_and_asks_nobody() {
    let place = Place::with_model();
    place.succeed(&format!("convert -q --model {ID} --mlx-path first"));
    let before = place.hub.requests().len();
    for name in ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"] {
        let line = format!("convert -q --model {ID} --mlx-path {name}");
        let output = finish(place.command(&line).env(name, "1"));
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_same(&place.at("first"), &place.at(name));
    }
    let line = "convert -q --model some-org/other --mlx-path other";
    failed(
        line,
        &finish(place.command(line).env("HF_HUB_OFFLINE", "yes")),
        2,
        &["not in the cache", "HF_HUB_OFFLINE"],
    );
    std::fs::remove_file(place.snapshot(ID).join("model-00002-of-00002.safetensors")).unwrap();
    let line = format!("convert -q --model {ID} --mlx-path partly");
    failed(
        &line,
        &finish(place.command(&line).env("HF_HUB_OFFLINE", "1")),
        2,
        &["only partly", "model-00002"],
    );
    assert_eq!(place.hub.requests().len(), before, "somebody was asked");
}

/// As huggingface_hub does: what is cached is used where nobody answers.
#[test]
fn an_unreachable_hub_leaves_the_cache() {
    let place = Place::with_model();
    place.succeed(&format!("convert -q --model {ID} --mlx-path first"));
    let line = format!("convert -q --model {ID} --mlx-path second");
    let output = finish(place.command(&line).env("HF_ENDPOINT", "http://127.0.0.1:9"));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    // As good as unreachable.
    place.hub.fault("/api/models/", 100, Fault::Status { code: 503, retry_after: None, body: String::new() });
    place.succeed(&format!("convert -q --model {ID} --mlx-path meanwhile"));
    let line = "convert -q --model some-org/other --mlx-path third";
    let output = finish(place.command(line).env("HF_ENDPOINT", "http://127.0.0.1:9"));
    failed(line, &output, 1, &["cannot reach http://127.0.0.1:9"]);
}

#[test]
fn the_cache_may_lie_elsewhere() {
    let place = Place::with_model();
    let line = format!("convert -q --model {ID} --mlx-path out");
    let elsewhere = place.at("elsewhere");
    assert!(finish(place.command(&line).env("HF_HUB_CACHE", &elsewhere)).status.success());
    assert!(elsewhere.join("models--some-org--Tiny-0.1B/refs/main").is_file());
    assert!(!place.hf_home().join("hub").exists());
}

#[test]
fn private_models_need_a_token_from_the_environment_or_the_file() {
    let place = Place::with_model();
    place.hub.hide(ID);
    let line = |output: &str| format!("inspect {ID} --{output}");
    let without = |output: &str| {
        let mut command = place.command(&line(output));
        command.env_remove("HF_TOKEN");
        command
    };
    failed(
        "without",
        &finish(&mut without("quiet")),
        2,
        &["no repository some-org/Tiny-0.1B, or it is private", "HF_TOKEN"],
    );
    std::fs::create_dir_all(place.hf_home()).unwrap();
    std::fs::write(place.hf_home().join("token"), format!("{TOKEN}\n")).unwrap();
    assert!(finish(&mut without("quiet")).status.success());
    let mut implicit = without("json");
    implicit.env("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1");
    failed("implicit", &finish(&mut implicit), 2, &["private"]);
    assert!(finish(&mut place.command(&line("json"))).status.success());
}

/// Plans and headers need no weights.
#[test]
fn plans_fetch_headers_only() {
    let place = Place::new();
    let mut all = files(&fixture("llama_tied"));
    // Much larger than its header, and larger than what is fetched to find that.
    let model = crate::common::dense(&place.at(""), "dense");
    all.retain(|(name, _)| !name.starts_with("model") && name != "config.json");
    all.extend(files(&model).into_iter().filter(|(name, _)| name != "README.md"));
    let total: usize = all.iter().map(|(_, bytes)| bytes.len()).sum();
    place.hub.add(Kind::Model, ID, all);
    let local = place.run(&format!("inspect {} --json", model.display())).stdout;
    let remote = place.run(&format!("inspect {ID} --json")).stdout;
    let layers = |bytes: &[u8]| serde_json::from_slice::<serde_json::Value>(bytes).unwrap()["layers"].clone();
    assert_eq!(layers(&local), layers(&remote));
    place.succeed(&format!("convert -q --model {ID} --dry-run"));
    place.succeed(&format!("recommend --model {ID}"));
    let sent: u64 = place.weights().iter().map(|request| request.sent).sum();
    assert!(sent > 0 && sent < total as u64 / 4, "{sent} of {total} bytes");
    assert!(place.weights().iter().all(|request| request.range.is_some()));
    assert!(!place.snapshot(ID).join("model.safetensors").exists());
    let output =
        String::from_utf8(place.run(&format!("recommend --model {ID} --revision main")).stdout).unwrap();
    assert!(output.contains(&format!("--model {ID}@main")), "{output}");
}

#[test]
fn files_come_at_the_same_time() {
    let place = Place::new();
    let all = crate::place::sharded(&fixture("qwen3_moe"), 6);
    place.hub.add(Kind::Model, ID, all);
    place.hub.fault("cdn GET", 6, Fault::Slow { bytes_per_second: 45_000 });
    let start = std::time::Instant::now();
    place.succeed(&format!("convert -q --model {ID} --mlx-path out"));
    // 530 kB one after the other would take twelve seconds.
    assert!(start.elapsed().as_secs_f64() < 9.0, "{:?}", start.elapsed());
}

#[test]
fn two_processes_share_a_download() {
    let place = Place::with_model();
    place.hub.fault("cdn GET", 2, Fault::Slow { bytes_per_second: 200_000 });
    let mut both =
        ["one", "two"].map(|name| place.start(&format!("convert -q --model {ID} --mlx-path {name}")));
    for child in &mut both {
        assert!(child.wait().unwrap().success());
    }
    assert_same(&place.at("one"), &place.at("two"));
    assert_eq!(place.weights().len(), 2, "each shard is fetched once");
}

/// What is damaged in the cache is fetched again.
#[test]
fn a_file_of_the_wrong_size_is_not_used() {
    let place = Place::with_model();
    converts(&place, &format!("convert -q --model {ID}"), "first");
    let shard = std::fs::canonicalize(place.snapshot(ID).join("model-00001-of-00002.safetensors")).unwrap();
    std::fs::OpenOptions::new().write(true).open(shard).unwrap().set_len(1000).unwrap();
    converts(&place, &format!("convert -q --model {ID}"), "second");
}

/// Where the hub keeps files in chunks, they come from there.
#[test]
fn large_files_may_come_through_xet() {
    let place = Place::with_model();
    place.hub.offer_xet(true);
    converts(&place, &format!("convert -q --model {ID}"), "out");
    place.hub.add(Kind::Model, "some-org/other", crate::place::sharded(&fixture("qwen3_moe"), 3));
    place.succeed("convert -q --stream --model some-org/other --mlx-path streamed");
    place.succeed("convert -q --model some-org/other --mlx-path plain");
    assert_same(&place.at("streamed"), &place.at("plain"));
}

#[test]
fn references_and_students_may_be_on_the_hub() {
    let place = Place::with_model();
    place.succeed(&format!("convert -q --model {ID} --mlx-path four"));
    place.hub.add_directory(Kind::Model, "some-org/four", &place.at("four"));
    place.succeed(&format!(
        "eval --model some-org/four --reference {ID}@main --windows 2 --sequence-length 32"
    ));
    place.succeed(&format!(
        "dwq --model {ID} --quantized-model some-org/four --iters 1 --batch-size 1 --n-samples 3 --valid-samples 1 --sequence-length 32 --eval-windows 0 --mlx-path trained"
    ));
    assert!(Path::new(&place.at("trained")).is_dir());
}
