//! Uploads: one commit, or none.

use mlx_quant_hub_fixture::{Fault, Kind};

use crate::place::{ID, Place, contents, failed, finish};

const TO: &str = "my-org/Tiny-4bit";

fn converted() -> Place {
    let place = Place::with_model();
    place.hub.offer_xet(true);
    place.succeed(&format!("convert -q --model {ID} --mlx-path out"));
    place
}

#[test]
fn a_model_goes_up_in_one_commit() {
    let place = converted();
    let said = place.succeed(&format!("upload out --upload-repo {TO}"));
    assert!(said.contains("in one commit"), "{said}");
    let there = place.hub.files(TO, "main");
    for (name, bytes) in contents(&place.at("out")) {
        assert!(there.get(&name) == Some(&bytes), "{name}");
    }
    let commits = place.hub.commits(TO);
    let ours: Vec<_> = commits.iter().filter(|commit| commit.title.contains("mlx-quant")).collect();
    assert_eq!(ours.len(), 1, "{commits:?}");
    // Again: nothing to do, and no second commit.
    let said = place.succeed(&format!("upload out --upload-repo {TO}"));
    assert!(said.contains("everything was there already"), "{said}");
    assert_eq!(place.hub.commits(TO).len(), commits.len());
    // And back.
    place.succeed(&format!("inspect {TO} --verify"));
    let document = place.run(&format!("upload out --upload-repo {TO} --json")).stdout;
    let document: serde_json::Value = serde_json::from_slice(&document).unwrap();
    assert_eq!(document["files"], 0);
    let schema = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("schemas/upload.schema.json");
    let schema = serde_json::from_slice(&std::fs::read(schema).unwrap()).unwrap();
    let schema = jsonschema::validator_for(&schema).unwrap();
    assert!(schema.is_valid(&document), "{document}");
    let other = place.run("upload out --upload-repo my-org/other --json").stdout;
    assert!(schema.is_valid(&serde_json::from_slice(&other).unwrap()));
    assert!(!schema.is_valid(&serde_json::json!({"url": 5})));
    assert!(document["url"].as_str().unwrap().ends_with(TO));
}

#[test]
fn weights_of_an_earlier_model_go_with_the_same_commit() {
    let place = converted();
    let old = |name: &str| (name.to_owned(), vec![1u8; 64]);
    place.hub.add(
        Kind::Model,
        TO,
        vec![
            old("model-00001-of-00002.safetensors"),
            old("model-00002-of-00002.safetensors"),
            old("notes.md"),
        ],
    );
    let before = place.hub.commits(TO).len();
    place.succeed(&format!("upload out --upload-repo {TO}"));
    let there = place.hub.files(TO, "main");
    assert!(!there.contains_key("model-00001-of-00002.safetensors") && there.contains_key("notes.md"));
    assert!(there.contains_key("model.safetensors"));
    assert_eq!(place.hub.commits(TO).len(), before + 1);
}

#[test]
fn broken_uploads_leave_nothing_to_see_and_go_on() {
    let faults = [
        ("xet POST", Fault::Status { code: 500, retry_after: None, body: String::new() }),
        ("/commit/", Fault::Drop { after: 0 }),
        (
            "/preupload/",
            Fault::Status { code: 403, retry_after: None, body: r#"{"error": "read-only"}"#.to_owned() },
        ),
    ];
    for (path, fault) in faults {
        let place = converted();
        let lasting = path != "/commit/";
        place.hub.fault(path, if lasting { 10_000 } else { 1 }, fault);
        let line = format!("upload out --upload-repo {TO}");
        let output = finish(&mut place.command(&line));
        if lasting {
            let code = if path == "/preupload/" { 2 } else { 1 };
            failed(&line, &output, code, &[]);
            assert!(
                !place.hub.files(TO, "main").contains_key("config.json"),
                "{path}: half a model is to be seen"
            );
        } else {
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            // The commit was made and its answer lost: it is not made again.
            assert_eq!(place.hub.commits(TO).len(), 2);
        }
    }
}

/// How often contents were sent.
fn sent(place: &Place) -> usize {
    let requests = place.hub.requests().into_iter();
    requests.filter(|request| request.method == "PUT" && request.path.contains("/xorb-uploads/")).count()
}

/// What reached the hub before a failure is not sent again.
#[test]
fn a_second_try_sends_only_what_is_missing() {
    let place = converted();
    place.hub.fault("/commit/", 5, Fault::Status { code: 500, retry_after: None, body: String::new() });
    let line = format!("upload out --upload-repo {TO}");
    place.fail(&line, 1, &["answered 500", "goes on where it stopped"]);
    let first = sent(&place);
    assert!(first > 0);
    place.succeed(&line);
    assert_eq!(sent(&place), first, "contents were sent again");
    assert!(place.hub.files(TO, "main").contains_key("model.safetensors"));
}

/// Killed while contents are sent: nothing is to be seen, and the next run sends only what was not there.
#[test]
fn a_killed_upload_goes_on() {
    /// Parts are of at most 64 MiB.
    const BYTES: usize = 280 << 20;
    let place = Place::new();
    place.hub.offer_xet(true);
    std::fs::create_dir(place.at("out")).unwrap();
    std::fs::write(place.at("out/config.json"), r#"{"model_type": "llama"}"#).unwrap();
    let header = format!(r#"{{"a":{{"dtype":"U8","shape":[{BYTES}],"data_offsets":[0,{BYTES}]}}}}"#);
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    let mut state = 1u64;
    bytes.extend((0..BYTES / 8).flat_map(|_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state ^ (state >> 29)).to_le_bytes()
    }));
    std::fs::write(place.at("out/model.safetensors"), &bytes).unwrap();
    let line = format!("upload out --upload-repo {TO}");
    // The last part never arrives.
    place.hub.fault("/xorb-grants/", 2, Fault::Slow { bytes_per_second: 100_000 });
    place.hub.fault("/xorb-grants/", 1000, Fault::Stall { after: 0 });
    let mut child = place.start(&line);
    while sent(&place) < 2 {
        assert!(child.try_wait().unwrap().is_none(), "it ended after {} parts", sent(&place));
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    // What was sent is written down by and by.
    std::thread::sleep(std::time::Duration::from_secs(2));
    child.kill().unwrap();
    child.wait().unwrap();
    let first = sent(&place);
    assert_eq!(place.hub.commits(TO).len(), 1, "half a model is to be seen");
    place.hub.calm();
    place.succeed(&line);
    assert!(place.hub.files(TO, "main")["model.safetensors"] == bytes);
    let second = sent(&place) - first;
    assert!(first >= 2 && second >= 1 && first + second <= 5, "{first} parts before, {second} after");
}

#[test]
fn commands_upload_what_they_make_and_say_how_close_it_is() {
    let place = Place::with_model();
    place.hub.offer_xet(true);
    place.succeed(&format!("convert -q --model {ID} --mlx-path out --upload-repo {TO}"));
    let card = String::from_utf8(place.hub.files(TO, "main")["README.md"].clone()).unwrap();
    for word in
        [&format!("base_model: {ID}"), "KL(source, this)", "top-1 agreement", "perplexity on held-out text"]
    {
        assert!(card.contains(word), "{word}\n{card}");
    }
    let calibrate = "--n-samples 2 --sequence-length 32 --eval-windows 1";
    place.succeed(&format!(
        "gptq --model {ID} {calibrate} --mlx-path out-gptq --upload-repo my-org/gptq --private"
    ));
    let card = String::from_utf8(place.hub.files("my-org/gptq", "main")["README.md"].clone()).unwrap();
    for word in
        ["| recipe | gptq |", "calibration data hash", "KL(source, this)", &format!("base_model: {ID}")]
    {
        assert!(card.contains(word), "{word}\n{card}");
    }
    // The model here is the one there.
    let said = place.succeed(&format!("upload out --upload-repo {TO} --reference {ID}"));
    assert!(said.contains("everything was there already"), "{said}");
    // A card that is not ours stays as it is.
    std::fs::write(place.at("out/README.md"), "My own words\n").unwrap();
    place.succeed(&format!("upload out --upload-repo {TO} --reference {ID}"));
}

#[test]
fn what_cannot_be_uploaded_is_refused_before_any_work() {
    let place = converted();
    let line = format!("upload out --upload-repo {TO}");
    failed(
        &line,
        &finish(place.command(&line).env_remove("HF_TOKEN")),
        2,
        &["needs a token", "hf auth login"],
    );
    failed(&line, &finish(place.command(&line).env("HF_HUB_OFFLINE", "1")), 2, &["HF_HUB_OFFLINE"]);
    failed(
        &line,
        &finish(place.command(&line).env("HF_TOKEN", "hf_wrong")),
        2,
        &["does not accept the token"],
    );
    place.hub.offer_xet(false);
    place.fail(&line, 2, &["does not take large files by xet"]);
    place.hub.offer_xet(true);
    place.fail("upload out --upload-repo not-an-id", 2, &["no hub id"]);
    place.fail("upload out --upload-repo my-org/..", 2, &["not a hub id"]);
    place.fail("upload out --upload-repo a/b@main", 2, &["no hub id"]);
    place.fail(&format!("upload nowhere --upload-repo {TO}"), 2, &["nowhere"]);
    std::fs::create_dir(place.at("empty")).unwrap();
    place.fail(&format!("upload empty --upload-repo {TO}"), 2, &["config.json"]);
    let mut gptq = place.command(&format!("gptq --model {ID} --mlx-path new --upload-repo {TO}"));
    failed("gptq", &finish(gptq.env_remove("HF_TOKEN")), 2, &["needs a token"]);
    assert!(!place.at("new").exists());
    let alone = place.run(&format!("convert --model {ID} --private"));
    assert_eq!(alone.status.code(), Some(2));
}
