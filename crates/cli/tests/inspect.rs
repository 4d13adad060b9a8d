//! `mlx-quant inspect` as people run it: what it shows, and that --verify finds each kind of damage.
#![allow(clippy::unwrap_used, reason = "a test panics to fail")]

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use assert_cmd::assert::Assert;
use predicates::prelude::*;
use predicates::str::contains;
use serde_json::{Value, json};

use crate::common::mlx_quant;

const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const LAYER: &str = "model.layers.1.mlp.down_proj";

/// A tensor of a file: dtype, shape, bytes.
type Tensor = (String, Vec<usize>, Vec<u8>);

/// A converted model that a test can damage.
struct Fixture {
    directory: tempfile::TempDir,
}

impl Fixture {
    fn new(extra: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../quant/tests/fixtures/zoo/llama_tied");
        let out = directory.path().join("model");
        mlx_quant()
            .args(["convert", "--quiet", "--model"])
            .arg(source)
            .arg("--mlx-path")
            .arg(&out)
            .args(extra)
            .assert()
            .success();
        Self { directory }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join("model").join(name)
    }

    fn inspect(&self, extra: &[&str]) -> Assert {
        mlx_quant().arg("inspect").arg(self.directory.path().join("model")).args(extra).assert()
    }

    fn edit_json(&self, name: &str, change: impl FnOnce(&mut Value)) {
        let mut value: Value = serde_json::from_slice(&std::fs::read(self.file(name)).unwrap()).unwrap();
        change(&mut value);
        std::fs::write(self.file(name), value.to_string()).unwrap();
    }

    /// Changes both copies of the quantization in config.json.
    fn edit_quantization(&self, change: impl Fn(&mut Value)) {
        self.edit_json("config.json", |config| {
            change(&mut config["quantization"]);
            change(&mut config["quantization_config"]);
        });
    }

    /// Changes the tensors and writes a file that is well formed, without the index.
    fn edit_tensors(&self, change: impl FnOnce(&mut BTreeMap<String, Tensor>)) {
        let bytes = std::fs::read(self.file(WEIGHTS)).unwrap();
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
        let data = &bytes[8 + length..];
        let infos = header.as_object().unwrap().iter().filter(|(name, _)| *name != "__metadata__");
        let tensor = |(name, info): (&String, &Value)| {
            let range: Vec<usize> = serde_json::from_value(info["data_offsets"].clone()).unwrap();
            let shape = serde_json::from_value(info["shape"].clone()).unwrap();
            let dtype = info["dtype"].as_str().unwrap().to_owned();
            (name.clone(), (dtype, shape, data[range[0]..range[1]].to_vec()))
        };
        let mut tensors: BTreeMap<String, Tensor> = infos.map(tensor).collect();
        change(&mut tensors);
        let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
        for (name, (dtype, shape, bytes)) in tensors {
            let range = [data.len(), data.len() + bytes.len()];
            header.insert(name, json!({"dtype": dtype, "shape": shape, "data_offsets": range}));
            data.extend(bytes);
        }
        let header = Value::Object(header).to_string();
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.as_bytes());
        file.extend(data);
        std::fs::write(self.file(WEIGHTS), file).unwrap();
        std::fs::remove_file(self.file(INDEX)).unwrap();
    }

    /// --verify ends with exit code 2 and still prints what the model is, all problems and the verdict.
    fn damaged(&self, verdict: &str, problems: &[&str]) {
        let mut assert = self
            .inspect(&["--verify"])
            .code(2)
            .stdout(contains("model type       llama").and(contains(verdict)))
            .stderr(contains("error: ").and(contains("hint: ")));
        for problem in problems {
            assert = assert.stdout(contains(*problem));
        }
        let output = self.inspect(&["--verify", "--json", "--quiet"]).code(2).get_output().stdout.clone();
        let document: Value = serde_json::from_slice(&output).unwrap();
        let found = document["verification"]["problems"].as_array().unwrap().len();
        assert_eq!(found, problems.len(), "{}", document["verification"]);
    }
}

const FAILS: &str = "mlx_lm will not load it: ";
const LOADS_BUT: &str = "mlx_lm loads it, but: ";

#[test]
#[cfg(feature = "demo")]
fn the_demo_model() {
    mlx_quant()
        .arg("inspect")
        .assert()
        .success()
        .stdout(
            contains("parameters       7.9 million weights")
                .and(contains("model.layers.{0-7}.mlp.down_proj"))
                .and(contains("not quantized"))
                .and(contains("mlx_lm").not()),
        )
        .stderr("model    the built-in demo model (--model takes your own)\n");
    mlx_quant().args(["inspect", "--verify"]).assert().success().stdout(contains("mlx_lm will load it\n"));
    mlx_quant()
        .args(["inspect", "--verbose"])
        .assert()
        .success()
        .stdout(contains("model.layers.3.mlp.down_proj"));
}

/// What it says of a conversion is what the conversion said itself.
#[test]
#[cfg(feature = "demo")]
fn conversions_of_the_demo_model() {
    let cases: [(&[&str], &str, usize); 3] = [
        (&[], "4 bits, group size 64", 57),
        (&["--quant-predicate", "mixed_4_6"], "6 bits, group size 64", 8),
        (&["--q-mode", "mxfp4"], "mxfp4", 57),
    ];
    for (extra, scheme, layers) in cases {
        let directory = tempfile::tempdir().unwrap();
        let out = directory.path().join("out");
        let convert = mlx_quant()
            .args(["convert", "-q", "--json", "--mlx-path"])
            .arg(&out)
            .args(extra)
            .assert()
            .success();
        let plan: Value = serde_json::from_slice(&convert.get_output().stdout).unwrap();
        let inspect =
            mlx_quant().arg("inspect").arg(&out).args(["--verify", "--json", "--threads", "2"]).assert();
        let document: Value = serde_json::from_slice(&inspect.success().get_output().stdout).unwrap();
        for (ours, theirs) in [
            ("parameters", "parameters"),
            ("bits_per_weight", "bits_per_weight"),
            ("model_type", "model_type"),
            ("file_bytes", "output_bytes"),
        ] {
            assert_eq!(document[ours], plan[theirs], "{extra:?} {ours}");
        }
        assert_eq!(document["form"], "quantized");
        assert_eq!(document["schemes"][scheme]["layers"], layers, "{extra:?}");
        assert_eq!(document["dimensions"], json!({"layers": 8, "hidden_size": 256, "vocabulary": 6144}));
        assert_eq!(document["verification"]["verdict"], "loads", "{extra:?}");
        let layer = &document["layers"][0];
        assert_eq!((&layer["path"], &layer["shape"]), (&json!("model.embed_tokens"), &json!([6144, 256])));
        assert_eq!(layer["packing"]["bits"], 4);
    }
}

#[test]
fn mixed_layers_are_listed_by_range() {
    let fixture = Fixture::new(&["-q", "--quant-predicate", "mixed_4_6"]);
    fixture
        .inspect(&[])
        .success()
        .stdout(contains(format!("{LAYER} ")).and(contains("model.layers.{0-1}.mlp.up_proj")));
    fixture.inspect(&["--verify"]).success().stdout(contains("mlx_lm will load it\n"));
}

#[test]
fn scales_with_too_few_columns_or_rows() {
    let fixture = Fixture::new(&["-q"]);
    fixture.edit_tensors(|tensors| {
        let (_, shape, bytes) = tensors.get_mut(&format!("{LAYER}.scales")).unwrap();
        shape[1] -= 1;
        bytes.truncate(shape[0] * shape[1] * 2);
    });
    fixture.damaged(FAILS, &["scales [64, 1] and biases [64, 2] do not belong together"]);

    let fixture = Fixture::new(&["-q"]);
    fixture.edit_tensors(|tensors| {
        for leaf in ["scales", "biases"] {
            let (_, shape, bytes) = tensors.get_mut(&format!("{LAYER}.{leaf}")).unwrap();
            shape[0] -= 1;
            bytes.truncate(shape[0] * shape[1] * 2);
        }
    });
    fixture.damaged(FAILS, &["weight [64, 16] and scales [63, 2] do not belong together"]);
}

#[test]
fn values_that_are_no_numbers() {
    let fixture = Fixture::new(&["-q"]);
    fixture.edit_tensors(|tensors| {
        let scales = &mut tensors.get_mut(&format!("{LAYER}.scales")).unwrap().2;
        scales[6..8].copy_from_slice(&half::bf16::NAN.to_le_bytes());
        let norm = &mut tensors.get_mut("model.norm.weight").unwrap().2;
        norm[..2].copy_from_slice(&half::bf16::INFINITY.to_le_bytes());
    });
    let scales = format!("{LAYER}.scales: in ");
    fixture
        .damaged(LOADS_BUT, &[&format!("{scales}{}", fixture.file(WEIGHTS).display()), "element 0 is inf"]);
    fixture.inspect(&["--verify"]).stdout(contains("element 3 is NaN"));

    let fixture = Fixture::new(&["-q", "--q-mode", "mxfp4"]);
    fixture.edit_tensors(|tensors| tensors.get_mut(&format!("{LAYER}.scales")).unwrap().2[5] = 0xFF);
    fixture.damaged(LOADS_BUT, &["element 5 is NaN"]);
}

#[test]
fn config_with_other_bits() {
    let fixture = Fixture::new(&["-q", "--quant-predicate", "mixed_4_6"]);
    fixture.edit_quantization(|quantization| quantization[LAYER]["bits"] = 3.into());
    fixture.damaged(FAILS, &["config.json says 3 bits, group size 64"]);
    fixture.edit_quantization(|quantization| quantization[LAYER] = false.into());
    fixture.damaged(FAILS, &["config.json says that it is not"]);
    fixture.edit_quantization(|quantization| quantization[LAYER] = json!({}));
    fixture.damaged(FAILS, &["config.json says that it is not"]);
    // 8 bits in groups of 32 have the words and groups of 4 bits in groups of 64, for half as many inputs.
    fixture.edit_quantization(|quantization| {
        quantization[LAYER] = json!({"bits": 6, "group_size": 64});
        quantization["model.layers.0.mlp.up_proj"] = json!({"bits": 8, "group_size": 32});
    });
    fixture.damaged(FAILS, &["config.json says 8 bits, group size 32"]);
}

/// mlx_lm goes by the shapes where a layer has no entry.
#[test]
fn shared_bits_that_no_layer_has() {
    let fixture = Fixture::new(&["-q"]);
    fixture.edit_quantization(|quantization| quantization["bits"] = 8.into());
    fixture.damaged(LOADS_BUT, &["says 8 bits, group size 64, but 15 layer(s)"]);
    fixture.edit_quantization(|quantization| quantization["group_size"] = 32.into());
    fixture.damaged(LOADS_BUT, &["says 8 bits, group size 32, but 15 layer(s)"]);
    fixture.edit_quantization(|quantization| {
        quantization.as_object_mut().unwrap().remove("bits");
        quantization["group_size"] = 64.into();
    });
    fixture.damaged(FAILS, &["has no number bits"]);
}

#[test]
fn entries_for_layers_that_are_not_packed() {
    let fixture = Fixture::new(&["-q"]);
    fixture
        .edit_quantization(|quantization| quantization["model.norm"] = json!({"bits": 4, "group_size": 64}));
    fixture.damaged(FAILS, &["model.norm: config.json says that it is packed"]);
    fixture.edit_quantization(|quantization| {
        quantization["model.norm"] = false.into();
        quantization["model.nothing"] = json!({"bits": 4, "group_size": 64});
    });
    fixture.damaged(LOADS_BUT, &["model.nothing: is in config.json's quantization"]);
}

#[test]
fn quantization_that_is_missing_or_twofold() {
    let fixture = Fixture::new(&["-q"]);
    let remove = |key: &'static str| {
        fixture.edit_json("config.json", |config| drop(config.as_object_mut().unwrap().remove(key)));
    };
    fixture.edit_json("config.json", |config| config["quantization_config"]["bits"] = 3.into());
    fixture.damaged(LOADS_BUT, &["differs from quantization"]);
    fixture.edit_json("config.json", |config| config["quantization_config"]["bits"] = 4.into());
    remove("quantization");
    fixture.damaged(FAILS, &["quantization_config (4 bits) alone is not read"]);
    remove("quantization_config");
    fixture.damaged(FAILS, &["mlx_lm does not know its scales"]);
}

#[test]
fn index_that_does_not_fit() {
    let fixture = Fixture::new(&["-q"]);
    fixture.edit_json(INDEX, |index| {
        index["weight_map"].as_object_mut().unwrap().remove("model.norm.weight");
        index["weight_map"]["model.nothing"] = WEIGHTS.into();
        index["weight_map"][format!("{LAYER}.weight")] = "model-2.safetensors".into();
        index["metadata"]["total_size"] = 7.into();
    });
    let problems = [
        "model.norm.weight: of model.safetensors is missing",
        "but in no file",
        "model-2",
        "total_size is 7",
    ];
    fixture.damaged(LOADS_BUT, &problems);
    fixture.inspect(&[]).code(2).stdout("").stderr(contains("hint: "));
}

#[test]
fn tensors_too_many_and_too_few() {
    let fixture = Fixture::new(&["-q"]);
    fixture.edit_tensors(|tensors| {
        tensors.insert("model.extra.weight".to_owned(), ("BF16".to_owned(), vec![2], vec![0; 4]));
        tensors.remove("model.norm.weight");
        tensors.remove(&format!("{LAYER}.biases"));
        tensors.get_mut("model.layers.0.input_layernorm.weight").unwrap().1.push(1);
    });
    let problems = [
        "model.extra.weight: is no tensor",
        "model.norm.weight: is missing",
        "biases are missing",
        "has shape",
    ];
    fixture.damaged(FAILS, &problems);
}

#[test]
fn files_that_cannot_be_read_are_told_beside_the_rest() {
    let fixture = Fixture::new(&["-q"]);
    std::fs::write(fixture.file("model-broken.safetensors"), "x").unwrap();
    fixture.damaged(FAILS, &["model-broken.safetensors: 1 bytes are too few"]);
}

#[test]
fn tokenizers() {
    let fixture = Fixture::new(&["-q"]);
    fixture.edit_json("tokenizer.json", |tokenizer| {
        tokenizer["added_tokens"].as_array_mut().unwrap().push(json!({"id": 512, "content": "<beyond>"}));
    });
    fixture.damaged(LOADS_BUT, &["token \"<beyond>\" has id 512, the embedding has 512 rows"]);
    std::fs::write(fixture.file("tokenizer.json"), "{\"model\": {}}").unwrap();
    fixture.damaged(FAILS, &["tokenizer.json: is no tokenizer, it has no added_tokens"]);
    std::fs::write(fixture.file("tokenizer.json"), "{").unwrap();
    fixture.damaged(FAILS, &["tokenizer.json: is no JSON"]);
    std::fs::remove_file(fixture.file("tokenizer.json")).unwrap();
    fixture.damaged(FAILS, &["tokenizer.json: is missing"]);
    std::fs::write(fixture.file("tokenizer.model"), "x").unwrap();
    fixture.inspect(&["--verify"]).success().stdout(contains("note: the tokenizer (tokenizer.model)"));
}

#[test]
fn model_types() {
    let fixture = Fixture::new(&[]);
    fixture.inspect(&["--verify"]).success().stdout(contains("not quantized"));
    let of = |model_type: &str| {
        fixture.edit_json("config.json", |config| config["model_type"] = model_type.into());
    };
    of("minimax");
    let output = fixture.inspect(&["--verify"]).success();
    output.stdout(contains("minimax (by tensor names, not described)").and(contains("was not checked")));
    of("bert");
    fixture.inspect(&["--verify"]).code(2).stdout(contains("\"bert\" is no model type of mlx_lm"));
    // A layer is missing as a whole: nothing can be shown, but everything is told.
    of("llama");
    fixture.edit_json("config.json", |config| config["num_hidden_layers"] = 3.into());
    fixture
        .inspect(&["--verify"])
        .code(2)
        .stdout(contains(FAILS).and(contains("layer 2 of 3 has no weights")));
    fixture.edit_json("config.json", |config| config["model_file"] = "evil.py".into());
    fixture
        .inspect(&["--verify"])
        .code(2)
        .stdout(contains("layer 2 of 3").and(contains("trust_remote_code")));
}

#[test]
fn what_is_no_model() {
    let assert = mlx_quant().args(["inspect", "org/name"]).assert();
    assert.code(2).stdout("").stderr(contains("org/name is not in the cache"));
    let directory = tempfile::tempdir().unwrap();
    let assert = mlx_quant().arg("inspect").arg(directory.path()).arg("--verify").assert();
    assert.code(2).stdout("").stderr(contains("config.json").and(contains("hint: ")));
}

#[test]
fn help_has_examples() {
    let help = contains("Examples:").and(contains("mlx-quant inspect ./Qwen3-8B-4bit --verify"));
    mlx_quant().args(["inspect", "--help"]).assert().success().stdout(help);
}
