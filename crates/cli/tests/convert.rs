//! The binary as people run it: what it writes, and that bad input ends with a clear error, exit code 2 and
//! nothing written.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test panics to fail, and says what it skips")]

mod common;

use std::path::{Path, PathBuf};

use assert_cmd::Command;
use predicates::prelude::*;
use predicates::str::contains;

use crate::common::mlx_quant;

/// A small valid model that a test can damage: two shards with an index.
struct Fixture {
    directory: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../quant/tests/fixtures/zoo/llama_tied");
        let model = directory.path().join("model");
        std::fs::create_dir(&model).unwrap();
        for entry in std::fs::read_dir(source).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), model.join(entry.file_name())).unwrap();
        }
        Self { directory }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join("model").join(name)
    }

    fn edit(&self, name: &str, change: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = std::fs::read(self.file(name)).unwrap();
        change(&mut bytes);
        std::fs::write(self.file(name), bytes).unwrap();
    }

    /// Replaces the header of the first shard's JSON text.
    fn edit_header(&self, change: impl FnOnce(String) -> String) {
        self.edit(SHARD, |bytes| {
            let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            let header = change(String::from_utf8(bytes[8..8 + length].to_vec()).unwrap());
            let data = bytes.split_off(8 + length);
            *bytes = (header.len() as u64).to_le_bytes().to_vec();
            bytes.extend(header.as_bytes());
            bytes.extend(data);
        });
    }

    fn convert(&self, extra: &[&str]) -> assert_cmd::assert::Assert {
        mlx_quant()
            .args(["convert", "-q", "--model"])
            .arg(self.directory.path().join("model"))
            .arg("--mlx-path")
            .arg(self.directory.path().join("out"))
            .args(extra)
            .assert()
    }

    /// Exit code 2, the texts in the error, a hint, and nothing but the model in the directory.
    fn refuses(&self, extra: &[&str], texts: &[&str]) {
        let mut assert =
            self.convert(extra).code(2).stdout("").stderr(contains("error: ").and(contains("hint: ")));
        for text in texts {
            assert = assert.stderr(contains(*text));
        }
        let left: Vec<_> = std::fs::read_dir(self.directory.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(left, ["model"], "{}", String::from_utf8_lossy(&assert.get_output().stderr));
    }
}

const SHARD: &str = "model-00001-of-00002.safetensors";
const INDEX: &str = "model.safetensors.index.json";

#[test]
fn an_undamaged_fixture_converts() {
    let fixture = Fixture::new();
    fixture.convert(&[]).success().stdout("").stderr(contains("bits per weight"));
    let out = fixture.directory.path().join("out");
    for file in
        ["README.md", "config.json", "generation_config.json", INDEX, "model.safetensors", "tokenizer.json"]
    {
        assert!(out.join(file).is_file(), "{file}");
    }
}

#[test]
fn truncated_shard() {
    let fixture = Fixture::new();
    fixture.edit(SHARD, |bytes| bytes.truncate(bytes.len() - 100));
    fixture.refuses(&[], &[SHARD, "beyond", "download it again"]);
    fixture.edit(SHARD, |bytes| bytes.truncate(5));
    fixture.refuses(&[], &[SHARD, "too few"]);
}

#[test]
fn header_longer_than_the_file() {
    let fixture = Fixture::new();
    fixture.edit(SHARD, |bytes| bytes[..8].copy_from_slice(&50_000_000u64.to_le_bytes()));
    fixture.refuses(&[], &[SHARD, "50000000"]);
    fixture.edit(SHARD, |bytes| bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes()));
    fixture.refuses(&[], &[SHARD, "100 MB"]);
}

#[test]
fn offsets_that_overlap_or_overflow() {
    let header = |fixture: &Fixture, shape: &str, start: &str, end: &str| {
        let text = format!(
            "{{\"a.weight\":{{\"dtype\":\"BF16\",\"shape\":[2,2],\"data_offsets\":[0,8]}},\"b.weight\":{{\"dtype\":\"BF16\",\"shape\":{shape},\"data_offsets\":[{start},{end}]}}}}"
        );
        fixture.edit_header(|_| text);
    };
    let fixture = Fixture::new();
    header(&fixture, "[2,2]", "4", "12");
    fixture.refuses(&[], &[SHARD, "b.weight", "overlaps"]);
    header(&fixture, "[2,2]", "16", "24");
    fixture.refuses(&[], &[SHARD, "b.weight", "hole"]);
    header(&fixture, "[4294967296,4294967296,16]", "8", "16");
    fixture.refuses(&[], &[SHARD, "b.weight", "overflows"]);
    header(&fixture, "[3,2]", "8", "16");
    fixture.refuses(&[], &[SHARD, "b.weight", "should have 12 bytes"]);
    header(&fixture, "[2,2]", "18446744073709551608", "0");
    fixture.refuses(&[], &[SHARD, "b.weight"]);
}

#[test]
fn index_and_shards_that_disagree() {
    let fixture = Fixture::new();
    let original = std::fs::read_to_string(fixture.file(INDEX)).unwrap();
    let write = |text: String| std::fs::write(fixture.file(INDEX), text).unwrap();

    std::fs::rename(fixture.file(SHARD), fixture.file("away")).unwrap();
    fixture.refuses(&[], &[SHARD, "missing"]);
    std::fs::rename(fixture.file("away"), fixture.file(SHARD)).unwrap();

    write(original.replace(SHARD, "../x.safetensors"));
    fixture.refuses(&[], &["../x.safetensors", "leads out of the directory"]);
    write(original.replacen("model.norm.weight", "model.norn.weight", 1));
    fixture.refuses(&[], &["model.norn.weight"]);
    write(original.replacen("model.norm.weight", "model.layers.0.input_layernorm.weight", 1));
    fixture.refuses(&[], &["hint"]);
    write("{\"weight_map\": {}}".to_owned());
    fixture.refuses(&[], &["weight_map is empty"]);
    write("{".to_owned());
    fixture.refuses(&[], &[INDEX]);
}

#[test]
fn weights_with_nan() {
    let fixture = Fixture::new();
    fixture.edit(SHARD, |bytes| {
        let end = bytes.len();
        bytes[end - 2..].copy_from_slice(&half::bf16::NAN.to_le_bytes());
    });
    fixture.refuses(&[], &["NaN", SHARD, "--allow-nonfinite"]);
    fixture.convert(&["--allow-nonfinite"]).success();
}

#[test]
fn missing_or_broken_config() {
    let fixture = Fixture::new();
    std::fs::write(fixture.file("config.json"), "{\"model_type\": 3}").unwrap();
    fixture.refuses(&[], &["model_type"]);
    std::fs::write(fixture.file("config.json"), "[]").unwrap();
    fixture.refuses(&[], &["config.json", "not a JSON object"]);
    std::fs::remove_file(fixture.file("config.json")).unwrap();
    fixture.refuses(&[], &["config.json", "missing"]);
}

#[test]
fn unknown_bits_groups_and_modes() {
    let fixture = Fixture::new();
    for bits in ["0", "1", "7", "9"] {
        fixture.refuses(&["--q-bits", bits], &["bits are not supported"]);
    }
    fixture.refuses(&["--q-group-size", "16"], &["group size 16"]);
    fixture.refuses(&["--q-mode", "mxfp4", "--bits", "8"], &["mxfp4 has 4 bits"]);
    fixture.convert(&["--q-mode", "int4"]).code(2).stderr(contains("mxfp8"));
    fixture.refuses(&["--q-mode", "nvfp4", "--quant-predicate", "mixed_4_6"], &["affine"]);
    fixture.convert(&["-d"]).code(2);
}

#[test]
fn group_size_that_divides_nothing() {
    let fixture = Fixture::new();
    for name in ["model-00002-of-00002.safetensors", INDEX] {
        std::fs::remove_file(fixture.file(name)).unwrap();
    }
    let header =
        "{\"model.embed_tokens.weight\":{\"dtype\":\"BF16\",\"shape\":[2,96],\"data_offsets\":[0,384]}}";
    fixture.edit(SHARD, |bytes| {
        bytes.truncate(8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize + 384);
    });
    fixture.edit_header(|_| header.to_owned());
    std::fs::rename(fixture.file(SHARD), fixture.file("model.safetensors")).unwrap();
    std::fs::write(fixture.file("config.json"), "{\"model_type\": \"minimax\", \"num_hidden_layers\": 0}")
        .unwrap();
    fixture.refuses(&["--q-group-size", "64"], &["group size 64 divides", "model.embed_tokens: 96"]);
    fixture.convert(&["--q-group-size", "32"]).success();
}

#[test]
fn existing_output_is_left_alone() {
    let fixture = Fixture::new();
    let out = fixture.directory.path().join("out");
    std::fs::create_dir(&out).unwrap();
    std::fs::write(out.join("precious"), "x").unwrap();
    fixture.convert(&[]).code(2).stderr(contains("already exists").and(contains("hint: ")));
    assert_eq!(std::fs::read_dir(&out).unwrap().count(), 1);
}

#[test]
fn already_quantized() {
    let fixture = Fixture::new();
    fixture.convert(&[]).success();
    let (out, again) = (fixture.directory.path().join("out"), fixture.directory.path().join("again"));
    mlx_quant()
        .args(["convert", "-q", "--model"])
        .arg(&out)
        .arg("--mlx-path")
        .arg(&again)
        .assert()
        .code(2)
        .stderr(contains("already quantized").and(contains("convert -d")));
    assert!(!again.exists());
    mlx_quant().args(["convert", "-d", "--model"]).arg(&out).arg("--mlx-path").arg(&again).assert().success();
}

#[test]
fn pickles_are_never_opened() {
    let fixture = Fixture::new();
    for name in [SHARD, "model-00002-of-00002.safetensors", INDEX] {
        std::fs::remove_file(fixture.file(name)).unwrap();
    }
    fixture.refuses(&[], &["no safetensors files of a whole model"]);
    std::fs::write(fixture.file("pytorch_model.bin"), "x").unwrap();
    fixture.refuses(&[], &["pickles", "safetensors version"]);
}

#[test]
fn sources_that_cannot_be_read() {
    let fixture = Fixture::new();
    let missing = fixture.directory.path().join("nothing");
    fixture.convert(&[]).success();
    mlx_quant()
        .args(["convert", "-q", "--model"])
        .arg(&missing)
        .assert()
        .code(2)
        .stderr(contains("there is no such directory"));
    mlx_quant()
        .args(["convert", "-q", "--model", "org/name"])
        .assert()
        .code(2)
        .stderr(contains("org/name is not in the cache"));
}

/// Root may read everything, so the permission bits are tried only as another user.
#[test]
#[cfg(unix)]
fn unreadable_directory() {
    use std::os::unix::fs::PermissionsExt as _;
    let fixture = Fixture::new();
    let model = fixture.directory.path().join("model");
    std::fs::set_permissions(&model, std::fs::Permissions::from_mode(0o000)).unwrap();
    if std::fs::read_dir(&model).is_err() {
        fixture.refuses(&[], &["ermission denied"]);
    }
    std::fs::set_permissions(&model, std::fs::Permissions::from_mode(0o755)).unwrap();
    // A shard that is a directory cannot be read by anybody.
    std::fs::remove_file(fixture.file(SHARD)).unwrap();
    std::fs::create_dir(fixture.file(SHARD)).unwrap();
    fixture.refuses(&[], &[SHARD]);
}

#[test]
fn dry_run_writes_nothing_and_tells_exact_bytes() {
    let fixture = Fixture::new();
    let output = fixture.convert(&["--dry-run", "--json"]).success().get_output().stdout.clone();
    let plan: serde_json::Value = serde_json::from_slice(&output).unwrap();
    assert!(!fixture.directory.path().join("out").exists());
    fixture.convert(&[]).success();
    let written = std::fs::metadata(fixture.directory.path().join("out/model.safetensors")).unwrap().len();
    assert_eq!(plan["output_bytes"], written);
    fixture
        .convert(&["--dry-run"])
        .success()
        .stdout(contains("model.layers.{0-1}.mlp.down_proj").and(contains("4 bits, group size 64")));
}

#[test]
fn json_is_one_document() {
    let fixture = Fixture::new();
    let output = fixture.convert(&["--json", "--quiet"]).success().stderr("").get_output().stdout.clone();
    let document: serde_json::Value = serde_json::from_slice(&output).unwrap();
    assert_eq!(document["schemes"]["4 bits, group size 64"], 15);
    assert!(document["bits_per_weight"].as_f64().unwrap() > 4.0);
}

#[test]
fn recipe_file_mistakes() {
    let fixture = Fixture::new();
    let recipe = fixture.directory.path().join("model/recipe.toml");
    let path = recipe.to_str().unwrap();
    fixture.refuses(&["--recipe-file", "/no/such/file"], &["/no/such/file"]);
    std::fs::write(&recipe, "[[layer]]\npath = \"*.nothing\"\nbits = 3\n").unwrap();
    fixture.refuses(&["--recipe-file", path], &["*.nothing", "matches no"]);
    std::fs::write(&recipe, "[[layer]]\npath = \"*.down_proj\"\nbits = 1\n").unwrap();
    fixture.refuses(&["--recipe-file", path], &["1 bits"]);
    std::fs::write(&recipe, "[[layer]]\npath = \"*.down_proj\"\ngroup_size = 128\n").unwrap();
    fixture.convert(&["--recipe-file", path]).success();
}

#[test]
#[cfg(unix)]
fn called_as_mlx_lm_convert() {
    let fixture = Fixture::new();
    let link = fixture.directory.path().join("mlx_lm.convert");
    std::os::unix::fs::symlink(assert_cmd::cargo::cargo_bin("mlx-quant"), &link).unwrap();
    Command::new(&link)
        .args(["--hf-path"])
        .arg(fixture.directory.path().join("model"))
        .args(["-q", "--q-bits", "8", "--q-group-size", "32", "--trust-remote-code", "--mlx-path"])
        .arg(fixture.directory.path().join("out"))
        .assert()
        .success();
}

/// The same run, killed and repeated, ends with the bytes of an undisturbed one, and the final name never
/// names anything half-written.
#[test]
#[cfg(all(unix, feature = "demo"))]
fn killed_and_repeated() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("out");
    let binary = assert_cmd::cargo::cargo_bin("mlx-quant");
    for delay in [0u64, 2, 4, 6, 8, 10, 12, 15, 20, 30] {
        let mut child = std::process::Command::new(&binary)
            .args(["convert", "-q", "--quiet", "--mlx-path"])
            .arg(&out)
            .spawn()
            .unwrap();
        std::thread::sleep(std::time::Duration::from_millis(delay));
        child.kill().unwrap();
        child.wait().unwrap();
        if out.exists() {
            assert!(
                out.join("config.json").is_file() && out.join(INDEX).is_file(),
                "a final name is a whole model"
            );
            std::fs::remove_dir_all(&out).unwrap();
        }
    }
    mlx_quant().args(["convert", "-q", "--mlx-path"]).arg(&out).assert().success();
    let whole = directory.path().join("whole");
    mlx_quant().args(["convert", "-q", "--mlx-path"]).arg(&whole).assert().success();
    assert!(
        std::fs::read(out.join("model.safetensors")).unwrap()
            == std::fs::read(whole.join("model.safetensors")).unwrap()
    );
    let left: Vec<_> =
        std::fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "{left:?}");
}

/// A run that is killed after its first journal entry is resumed, not repeated. The source is 2 GiB of zeros, which
/// a sparse file holds without disk.
#[test]
#[cfg(unix)]
fn killed_after_a_gigabyte_and_resumed() {
    let directory = tempfile::tempdir().unwrap();
    let (model, out) = (directory.path().join("model"), directory.path().join("out"));
    std::fs::create_dir(&model).unwrap();
    std::fs::write(
        model.join("config.json"),
        "{\"model_type\": \"minimax\", \"num_hidden_layers\": 0, \"tie_word_embeddings\": false}",
    )
    .unwrap();
    let (rows, bytes) = (1u64 << 17, 1u64 << 30);
    let entry = |name: &str, start: u64| {
        let end = start + bytes;
        format!(
            "\"{name}.weight\":{{\"dtype\":\"BF16\",\"shape\":[{rows},4096],\"data_offsets\":[{start},{end}]}}"
        )
    };
    let header = format!("{{{},{}}}", entry("lm_head", 0), entry("model.embed_tokens", bytes));
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    let shard = model.join("model.safetensors");
    std::fs::write(&shard, &file).unwrap();
    std::fs::File::options()
        .write(true)
        .open(&shard)
        .unwrap()
        .set_len(file.len() as u64 + 2 * bytes)
        .unwrap();

    let arguments = ["convert", "-q", "--q-bits", "2", "--q-group-size", "128", "--threads", "2", "--model"];
    let journal = directory.path().join(".out.partial/.mlx-quant-run");
    let entries = || std::fs::read_to_string(&journal).map_or(0, |text| text.lines().count());
    // On a busy machine the run may end before the kill reaches it; then it is tried again.
    let killed = (0..5).any(|_| {
        let _ = std::fs::remove_dir_all(&out);
        let mut child = std::process::Command::new(assert_cmd::cargo::cargo_bin("mlx-quant"))
            .args(arguments)
            .arg(&model)
            .arg("--mlx-path")
            .arg(&out)
            .spawn()
            .unwrap();
        while entries() < 2 && child.try_wait().unwrap().is_none() {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        !out.exists() && entries() >= 2
    });
    assert!(killed, "a run was killed after its first journal entry and before its end");
    mlx_quant()
        .args(arguments)
        .arg(&model)
        .arg("--mlx-path")
        .arg(&out)
        .assert()
        .success()
        .stderr(contains("convert: goes on at ").and(contains(" of 2.15 GB")));
    assert!(out.join(INDEX).is_file() && !out.join(".mlx-quant-run").exists());
}

/// A full disk: exit code 1 and nothing under the final name. `/dev/shm` is not ours to fill, so a small tmpfs is
/// mounted where that is allowed.
#[test]
#[cfg(target_os = "linux")]
fn full_disk() {
    let directory = tempfile::tempdir().unwrap();
    let mount = |arguments: &[&str]| {
        std::process::Command::new("mount")
            .args(arguments)
            .arg(directory.path())
            .status()
            .is_ok_and(|status| status.success())
    };
    if !mount(&["-t", "tmpfs", "-o", "size=1m", "tmpfs"]) {
        println!("full_disk: skipped, mounting a tmpfs is not allowed here");
        return;
    }
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../quant/tests/fixtures/demo-moe");
    let out = directory.path().join("out");
    let assert =
        mlx_quant().args(["convert", "-q", "--model"]).arg(source).arg("--mlx-path").arg(&out).assert();
    let left = std::fs::read_dir(directory.path()).unwrap().count();
    let final_name = out.exists();
    let unmounted = std::process::Command::new("umount").arg(directory.path()).status().unwrap().success();
    assert.code(1).stderr(contains("is full").and(contains("hint: ")));
    assert!(left == 0 && !final_name && unmounted, "{left} left");
}
