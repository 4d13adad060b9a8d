//! Which files hold the weights: the index decides, whatever they are called.

use crate::model::{CONVERT, HIDDEN, done, llama, random, read, refused, save};

#[test]
fn the_index_decides() {
    let at = tempfile::tempdir().unwrap();
    let (right, _) = done(CONVERT, &llama(2).write(&at.path().join("one")));
    let each: [&[&str]; 3] = [
        &["layers-0.safetensors", "outside.safetensors"],
        &["model.safetensors", "mtp.safetensors"],
        &["a.safetensors", "model-00001-of-00009.safetensors", "Z_0.safetensors"],
    ];
    for (index, names) in each.into_iter().enumerate() {
        let model = llama(2).write_shards(&at.path().join(index.to_string()), names, names);
        let (out, _) = done(CONVERT, &model);
        assert_eq!(read(&out), read(&right), "{names:?}");
        let (_, said) = done("inspect {model}", &model);
        let files = if names.len() == 1 { "file" } else { "files" };
        assert!(said.contains(&format!("in {} {files}\n", names.len())), "{said}");
        done("recommend --model {model} --memory 8GB --time 1h", &model);
        done("eval --model {model} --windows 1 --sequence-length 32", &model);
    }
    // mlx_lm itself reads no such names, and a verdict on the source says so.
    refused("inspect {model} --verify", &at.path().join("0"), &["model*.safetensors"]);
}

#[test]
fn an_index_of_another_build() {
    let at = tempfile::tempdir().unwrap();
    let (right, _) = done(CONVERT, &llama(2).write(&at.path().join("one")));
    let shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    let each: [(&[&str], &[&str]); 3] = [
        (&["model.safetensors"], &shards),
        (&["model.safetensors"], &["x.safetensors"]),
        (&shards, &["model.safetensors"]),
    ];
    for (index, (names, said)) in each.into_iter().enumerate() {
        let model = llama(2).write_shards(&at.path().join(index.to_string()), names, said);
        let (out, text) = done(CONVERT, &model);
        assert!(text.contains("it is left aside"), "{text}");
        assert_eq!(read(&out), read(&right));
    }
    // Part of the files that it names: nobody knows whether the rest is missing.
    let model = llama(2).write_shards(&at.path().join("partly"), &[shards[0], "model.safetensors"], &shards);
    refused(CONVERT, &model, &[shards[1], "missing"]);
    // Nothing that it names, and what is here is no whole model.
    let model = llama(2).without("model.norm.weight").write_shards(
        &at.path().join("half"),
        &["model.safetensors"],
        &shards,
    );
    refused(CONVERT, &model, &["model.norm.weight is missing"]);
    // A type of which nobody knows what it holds, and an index that speaks of more than there is.
    let made = llama(2).set("model_type", serde_json::json!("minimax"));
    let model = made.write_shards(&at.path().join("more"), &["model.safetensors"], &shards);
    done(CONVERT, &model);
    let mut fewer = made.tensors.clone();
    fewer.remove("model.norm.weight");
    save(&model.join("model.safetensors"), &fewer);
    refused(CONVERT, &model, &["model.norm.weight", "remove the index"]);
}

#[test]
fn what_is_no_part_of_the_model() {
    let at = tempfile::tempdir().unwrap();
    let (right, _) = done(CONVERT, &llama(2).write(&at.path().join("one")));
    for (index, beside) in [
        "consolidated.safetensors",
        "consolidated.00.safetensors",
        "adapter_model.safetensors",
        "optimizer.safetensors",
    ]
    .into_iter()
    .enumerate()
    {
        let model = llama(2).write(&at.path().join(index.to_string()));
        save(
            &model.join(beside),
            &[("x".to_owned(), random(1, &[HIDDEN])), ("lm_head.weight".to_owned(), random(1, &[8]))].into(),
        );
        let (out, _) = done(CONVERT, &model);
        assert_eq!(read(&out), read(&right), "{beside}");
        std::fs::remove_file(model.join("model.safetensors")).unwrap();
        refused(CONVERT, &model, &["has no safetensors files of a whole model"]);
    }
    // Without an index and under another name.
    let model = llama(2).write(&at.path().join("other"));
    std::fs::rename(model.join("model.safetensors"), model.join("weights.00.safetensors")).unwrap();
    let (out, _) = done(CONVERT, &model);
    assert_eq!(read(&out), read(&right));
}

#[test]
fn every_number_of_a_series_is_there() {
    let at = tempfile::tempdir().unwrap();
    let made = llama(2).set("model_type", serde_json::json!("minimax"));
    let each: [&[&str]; 3] = [
        &["model-00001-of-00002.safetensors", "model-extra.safetensors"],
        &["model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors", "model-x.safetensors"],
        &["model-00002-of-00002.safetensors"],
    ];
    for (index, names) in each.into_iter().enumerate() {
        let model = made.write_shards(&at.path().join(index.to_string()), names, names);
        std::fs::remove_file(model.join("model.safetensors.index.json")).unwrap();
        refused(CONVERT, &model, &["shards that their names speak of"]);
    }
}
