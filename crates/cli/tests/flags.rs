//! Every flag of the guide, in both spellings, does something.
#![allow(clippy::unwrap_used, reason = "a test panics to fail")]

mod common;

use std::collections::BTreeSet;

use mlx_quant_hub_fixture::Kind;

use crate::common::{hub, knows, mlx_quant, two_blocks, with_heads};

/// Command lines that take each flag once. `{}` is a directory with `model`, `heads`, `four` (quantized), `text.txt` and `recipe.toml`,
/// `{moe}` a mixture of experts.
const LINES: &[&str] = &[
    "convert -m {}/model -q --q-bits 3 --q-group-size 32 --dtype float16 --recipe-file {}/recipe.toml --mlx-path {}/o1 --restart --overwrite --threads 1 --device cpu --precision float32 --seed 5 --low-memory --quiet",
    "convert --hf-path {}/model --quantize --bits 3 --group-size 128 --q-mode affine --search --mlx-path {}/o2 --json --verbose",
    "convert --model {}/model -q --quant-predicate mixed_3_6 --allow-nonfinite --allow-unread --text-only --keep-eos --dry-run",
    "convert --model {}/four -d --mlx-path {}/o3 --trust-remote-code",
    "convert --model {moe} -q --q-mode nvfp4 --q-global-scale --mlx-path {}/o15",
    "convert --model {}/heads -q --mtp --mlx-path {}/o12",
    "gptq --model {}/heads --mtp --n-samples 2 --sequence-length 48 --eval-windows 0 --mlx-path {}/o13",
    "convert --model {}/four --dequantize --dry-run --revision main",
    "awq --model {}/model --n-samples 2 --sequence-length 48 --data {}/text.txt --strict --batch-size 2 --n-grid 5 --embed-bits 6 --embed-group-size 32 --eval-windows 0 --mlx-path {}/o4 --restart --overwrite --quiet",
    "awq --hf-path {}/model --num-samples 2 --max-seq-length 48 --data-path {}/text.txt --statistics {}/statistics --restart-block --eval-windows 1 --mlx-path {}/o5 --json --verbose",
    "gptq -m {}/model --bits 3 --group-size 32 --n-samples 2 --sequence-length 48 --block-size 32 --damping 0.02 --correction 0.25 --strict --allow-unread --text-only --keep-eos --sweeps 1 --act-order --fallback-bits 5 --fallback-group-size 32 --eval-windows 0 --mlx-path {}/o6 --restart --overwrite --dtype bfloat16 --recipe-file {}/recipe.toml --threads 2 --seed 7 --low-memory --device cpu --precision float32",
    "gptq --model {}/model --q-mode mxfp4 --n-samples 2 --sequence-length 48 --eval-windows 0 --mlx-path {}/o14",
    "gptq --model {}/model --q-bits 2 --q-group-size 64 --n-samples 2 --sequence-length 48 --dry-run --trust-remote-code --revision main",
    "dynamic-quant --model {}/model --target-bpw 4.5 --min-bits 3 --max-bits 6 --sensitivities {}/s.json --report-ppl --strict --n-samples 2 --sequence-length 48 --eval-windows 1 --mlx-path {}/o7 --restart --overwrite",
    "dynamic-quant --model {}/model --target-size 4.4MB --low-bits 3 --high-bits 6 --sensitivities {}/s.json --n-samples 2 --sequence-length 48 --eval-windows 0 --mlx-path {}/o8",
    "dynamic_quant --model {}/model --target-kl 0.5 --n-samples 2 --sequence-length 48 --mlx-path {}/o9",
    "dwq --model {}/model --iters 2 --batch-size 2 --learning-rate 0.00001 --temperature 1.5 --quantized-model {}/four --target-dir {}/targets --valid-samples 1 --strict --grad-checkpoint --n-samples 4 --sequence-length 48 --eval-windows 0 --mlx-path {}/o10 --restart --overwrite",
    "dwq --model {}/model --targets-only --target-dir {}/targets2 --iters 2 --num-valid-samples 1 --n-samples 4 --sequence-length 48",
    "quantize --recipe dynamic+awq+gptq+learn+dwq --model {}/model --target-bpw 4.5 --strict --n-grid 4 --block-size 64 --learn-steps 2 --learn-batch 1 --iters 2 --valid-samples 1 --n-samples 3 --sequence-length 48 --eval-windows 0 --mlx-path {}/o11 --restart --overwrite",
    "eval --model {}/four --reference {}/model --data {}/text.txt --suite {}/suite.jsonl --strict --allow-unread --windows 2 --sequence-length 48 --cache {}/cache --report {}/r.md --low-memory --threads 1 --device cpu --precision float32 --json --verbose",
    "eval -m {}/four --data-path {}/text.txt --windows 2 --max-seq-length 48 --dry-run --quiet",
    "eval --hf-path {}/four --windows 2 --sequence-length 48",
    "inspect {}/four --verify --threads 1 --json --verbose",
    "inspect {}/four --quiet",
    "inspect --model {}/four",
    "inspect --hf-path {}/four",
    "compare --model {}/model --methods basic,gptq --q-bits 4 --q-group-size 64 --output {}/c1 --restart --keep none --data {}/text.txt --eval-data {}/text.txt --strict --allow-unread --windows 2 --n-samples 2 --sequence-length 48 --batch-size 2 --iters 2 --learn-steps 2 --share-statistics --threads 1 --low-memory --device cpu --precision float32 --seed 9 --json --verbose",
    "compare -m {}/model --methods basic --bits 3 --group-size 32 --mlx-path {}/c2 --data-path {}/text.txt --num-samples 2 --max-seq-length 48 --quiet",
    "compare --hf-path {}/model --dry-run",
    "recommend --model {}/model --memory 16GB --time 1h --target-bpw 4.5 --quality best --q-bits 4 --q-group-size 64 --n-samples 8 --sequence-length 64 --iters 5 --measure --threads 1 --device cpu --precision float32 --json --verbose",
    "recommend -m {}/model --size 4MB --bits 4 --group-size 64 --num-samples 8 --max-seq-length 64 --quiet",
    "recommend --hf-path {}/model --target-size 4MB",
    "devices --threads 1 --measure --json --verbose",
    "devices --quiet",
    "convert --model some-org/tiny --revision main --stream -q --mlx-path {}/h1 --upload-repo my-org/h1 --private",
    "gptq --model some-org/tiny --revision main --n-samples 2 --sequence-length 48 --eval-windows 0 --mlx-path {}/h2 --upload-repo my-org/h2 --private",
    "eval --model some-org/tiny --revision main --windows 1 --sequence-length 16",
    "inspect some-org/tiny --revision main",
    "compare --model some-org/tiny --revision main --dry-run",
    "recommend --model some-org/tiny --revision main",
    "upload {}/four --upload-repo my-org/four --private --reference some-org/tiny --revision main --json --verbose",
    "upload {}/four --upload-repo my-org/four --quiet",
];

/// Long flags of a command, aliases included, as its help lists them.
fn listed(command: &str) -> BTreeSet<String> {
    let shown = mlx_quant().args([command, "--help"]).output().unwrap().stdout;
    let text = String::from_utf8(shown).unwrap();
    let options = text.split_once("Examples:").map_or(text.as_str(), |parts| parts.0);
    let mut flags = BTreeSet::new();
    for line in options.lines() {
        let trimmed = line.trim();
        let part = trimmed.split("  ").next().unwrap_or_default();
        // The end of a list of aliases may begin a line.
        if part.starts_with('-') && !part.ends_with(']') {
            flags.extend(
                part.split([',', ' '])
                    .filter(|word| word.starts_with("--"))
                    .map(|word| word.split(['=', '<', '[', '.']).next().unwrap_or_default().to_owned()),
            );
        }
    }
    // Lists of aliases may go over several lines.
    let words = options.split_whitespace().collect::<Vec<_>>().join(" ");
    for start in ["[aliases: ", "[alias: "] {
        for rest in words.split(start).skip(1) {
            let names = rest.split(']').next().unwrap_or_default();
            flags.extend(names.split(", ").map(|name| format!("--{}", name.trim_start_matches('-'))));
        }
    }
    flags.remove("--help");
    flags
}

#[test]
#[cfg_attr(not(feature = "hub"), ignore = "needs --features hub")]
fn all_are_taken() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    let model = two_blocks(root, "model");
    with_heads(root, "heads", |_, _| {});
    let hub = hub();
    hub.add_directory(Kind::Model, "some-org/tiny", &model);
    let mut four = mlx_quant();
    four.args(["convert", "-q", "--quiet", "--model"])
        .arg(model)
        .arg("--mlx-path")
        .arg(root.join("four"))
        .assert()
        .success();
    std::fs::write(root.join("text.txt"), "A text of some length for windows. ".repeat(200)).unwrap();
    let question = "{\"question\": \"A text of\", \"choices\": [\"some\", \"words\"], \"answer\": 0}\n";
    std::fs::write(root.join("suite.jsonl"), question).unwrap();
    std::fs::write(root.join("recipe.toml"), "[[layer]]\npath = \"*.mlp.down_proj\"\nbits = 6\n").unwrap();
    let moe = concat!(env!("CARGO_MANIFEST_DIR"), "/../quant/tests/fixtures/demo-moe");
    for line in LINES {
        let line = line.replace("{}", root.to_str().unwrap()).replace("{moe}", moe);
        let mut run = mlx_quant();
        knows(&mut run, &hub, root).args(line.split_whitespace()).current_dir(root);
        let made = run.output().unwrap();
        assert!(made.status.success(), "{line}\n{}", String::from_utf8_lossy(&made.stderr));
    }
    for name in ["o1", "o2", "o4", "o7", "o9", "o10", "o11", "o12", "o12-mtp", "o13", "o13-mtp", "o14", "o15"]
    {
        assert!(root.join(name).join("config.json").exists(), "{name}");
    }
}

/// No flag of any command is missing above.
#[test]
fn none_is_left_out() {
    let commands = [
        "convert",
        "awq",
        "gptq",
        "dynamic-quant",
        "dwq",
        "quantize",
        "eval",
        "inspect",
        "compare",
        "recommend",
        "devices",
        "upload",
    ];
    let used = |command: &str| -> BTreeSet<&str> {
        // Flags that several commands share are one piece of code.
        let shared = ["awq", "gptq", "dynamic-quant", "dynamic_quant", "dwq", "quantize"];
        let own = |line: &&&str| {
            let name = line.split_whitespace().next().unwrap_or_default();
            name == command || (shared.contains(&command) && shared.contains(&name))
        };
        LINES
            .iter()
            .filter(own)
            .flat_map(|line| line.split_whitespace())
            .filter(|word| word.starts_with("--"))
            .collect()
    };
    for command in commands {
        let used = used(command);
        let flags = listed(command);
        assert!(flags.len() > 3, "{command}: {flags:?}");
        let missing: Vec<_> = flags.iter().filter(|flag| !used.contains(flag.as_str())).collect();
        assert!(missing.is_empty(), "{command}: no test takes {missing:?}");
    }
}

/// The guide's own list (shared/spec/commands.md), so that none can be dropped unnoticed.
#[test]
fn the_guide_is_covered() {
    let quantizing = [
        "--model",
        "--hf-path",
        "--mlx-path",
        "--q-bits",
        "--bits",
        "--q-group-size",
        "--group-size",
        "--dtype",
        "--recipe-file",
        "--dry-run",
        "--low-memory",
        "--device",
        "--threads",
        "--seed",
        "--json",
        "--quiet",
        "--verbose",
    ];
    let calibrated = [
        "--n-samples",
        "--num-samples",
        "--sequence-length",
        "--max-seq-length",
        "--data",
        "--data-path",
        "--batch-size",
    ];
    let all = |own: &[&'static str]| [&quantizing[..], &calibrated[..], own].concat();
    let cases: Vec<(&str, Vec<&str>)> = vec![
        (
            "convert",
            [&quantizing[..], &["--quantize", "--dequantize", "--q-mode", "--quant-predicate", "--search"]]
                .concat(),
        ),
        ("awq", all(&["--n-grid", "--embed-bits", "--embed-group-size"])),
        (
            "gptq",
            all(&["--block-size", "--correction", "--damping", "--fallback-bits", "--fallback-group-size"]),
        ),
        (
            "dynamic-quant",
            all(&[
                "--target-bpw",
                "--min-bits",
                "--low-bits",
                "--max-bits",
                "--high-bits",
                "--sensitivities",
                "--report-ppl",
            ]),
        ),
        (
            "dwq",
            all(&[
                "--iters",
                "--learning-rate",
                "--temperature",
                "--quantized-model",
                "--target-dir",
                "--targets-only",
            ]),
        ),
        ("quantize", all(&["--recipe", "--learn-steps", "--learn-batch"])),
        (
            "eval",
            vec!["--model", "--reference", "--data", "--windows", "--sequence-length", "--cache", "--json"],
        ),
        ("compare", vec!["--methods"]),
        ("recommend", vec!["--memory", "--time", "--target-bpw", "--size", "--quality"]),
        ("inspect", vec!["--verify"]),
    ];
    for (command, flags) in cases {
        let listed = listed(command);
        let missing: Vec<_> = flags.into_iter().filter(|flag| !listed.contains(*flag)).collect();
        assert!(missing.is_empty(), "{command} lacks {missing:?}");
    }
}
