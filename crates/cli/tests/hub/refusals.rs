//! What cannot be had: a clear word, exit code 2, nothing written.

use mlx_quant_hub_fixture::Kind;

use crate::place::{ID, Place, failed, files, finish, fixture};

type Files = Vec<(String, Vec<u8>)>;

#[test]
fn ids_that_are_none() {
    let place = Place::with_model();
    for id in ["some-org/..", "some-org/a..b", "some-org/-x", "some-org/a%2fb", "some-org/x@../y"] {
        place.fail(&format!("convert -q --model {id} --mlx-path out"), 2, &["not a hub id", "ORG/NAME"]);
    }
    let mut spaced = place.command("convert -q --mlx-path out --model");
    failed("spaces", &finish(spaced.arg("some org/tiny model")), 2, &["not a hub id", "' '"]);
    for path in ["nowhere", "./some-org/tiny", "/some-org/tiny", "a/b/c"] {
        place.fail(&format!("convert -q --model {path} --mlx-path out"), 2, &["there is no such directory"]);
    }
    for line in ["gptq", "dwq", "compare --dry-run", "eval", "recommend"] {
        place.fail(&format!("{line} --model some-org/.."), 2, &["not a hub id"]);
    }
    place.fail("inspect some-org/..", 2, &["not a hub id"]);
    place.fail(&format!("eval --model {ID} --reference some-org/.."), 2, &["not a hub id"]);
    place.fail("gptq --data some-org/../x", 2, &["not a hub id"]);
    assert!(!place.at("out").exists() && place.weights().is_empty());
}

#[test]
fn what_is_not_there() {
    let place = Place::with_model();
    let line = |rest: &str| format!("convert -q --mlx-path out --model {rest}");
    place.fail(&line("some-org/missing"), 2, &["no repository some-org/missing", "spelling"]);
    place.fail(&line(&format!("{ID} --revision nowhere")), 2, &["no revision \"nowhere\""]);
    place.fail(&line(&format!("{ID} --revision {}", "0".repeat(40))), 2, &["no revision"]);
    place.fail(&line(&format!("{ID} --revision ../..")), 2, &["no branch, tag or commit"]);
    let anonymous = line("some-org/missing");
    let output = finish(place.command(&anonymous).env_remove("HF_TOKEN"));
    failed(&anonymous, &output, 2, &["no repository some-org/missing, or it is private", "hf auth login"]);
    assert!(!place.at("out").exists());
}

#[test]
fn gated_models_say_how_to_get_in() {
    let place = Place::with_model();
    place.hub.gate(ID);
    let line = format!("convert -q --model {ID} --mlx-path out");
    let page = format!("{}/{ID}", place.hub.endpoint());
    place.fail(&line, 2, &["is gated", &page, "access is granted"]);
    let output = finish(place.command(&line).env_remove("HF_TOKEN"));
    failed(&line, &output, 2, &["is gated", &page, "hf auth login"]);
    let wrong = finish(place.command(&line).env("HF_TOKEN", "hf_wrong"));
    failed(&line, &wrong, 2, &["does not accept the token"]);
    assert!(!String::from_utf8_lossy(&wrong.stderr).contains("hf_wrong"));
}

#[test]
fn repositories_that_are_no_models() {
    let place = Place::new();
    let config = || ("config.json".to_owned(), b"{\"model_type\": \"llama\"}".to_vec());
    let cases: [(&str, Files, &[&str]); 4] = [
        ("a/empty", vec![("x.txt".to_owned(), vec![1])], &["no config.json"]),
        (
            "a/pickled",
            vec![config(), ("pytorch_model.bin".to_owned(), vec![1; 9])],
            &["no safetensors", "pytorch_model.bin", "run code"],
        ),
        ("a/gguf", vec![config(), ("m.gguf".to_owned(), vec![1; 9])], &["no safetensors", "m.gguf"]),
        (
            "a/partial",
            {
                let mut files = files(&fixture("llama_tied"));
                files.retain(|(name, _)| name != "model-00002-of-00002.safetensors");
                files
            },
            &["model-00002-of-00002.safetensors", "incomplete"],
        ),
    ];
    for (id, files, words) in cases {
        place.hub.add(Kind::Model, id, files);
        place.fail(&format!("convert -q --model {id} --mlx-path out"), 2, words);
        place.fail(&format!("convert -q --stream --model {id} --mlx-path out"), 2, words);
        place.fail(&format!("gptq --model {id} --dry-run"), 2, words);
    }
    assert!(
        place
            .downloads()
            .iter()
            .all(|request| !request.path.contains(".bin") && !request.path.contains(".gguf"))
    );
    assert_eq!(std::fs::read_dir(place.at("")).unwrap().count(), 0, "something was left behind");
}
