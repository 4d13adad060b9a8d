//! The command blocks of mlx-lm's quantization guide (those of its older form that `shared/spec/commands.md` follows, and of
//! `mlx_lm/LEARNED_QUANTS.md`), as they are printed, in a shell, against a hub that has a small model under their ids.

use std::process::Command;

use mlx_quant_hub_fixture::Kind;

use crate::place::{Place, files, fixture};

/// One command with its comments and continued lines, and the directory that it writes.
const BLOCKS: [(&str, &str); 13] = [
    (
        "# 4-bit quantization (default)\nmlx_lm.convert --hf-path meta-llama/Llama-3.2-3B-Instruct -q\n",
        "mlx_model",
    ),
    (
        "# 8-bit quantization\nmlx_lm.convert --hf-path meta-llama/Llama-3.2-3B-Instruct -q --q-bits 8\n",
        "mlx_model",
    ),
    (
        "# Custom group size (smaller = better quality, larger model)\nmlx_lm.convert --hf-path meta-llama/Llama-3.2-3B-Instruct \\\n    -q --q-bits 4 --q-group-size 32\n",
        "mlx_model",
    ),
    (
        "mlx_lm.dwq --model meta-llama/Llama-3.2-3B-Instruct \\\n    --mlx-path ./llama-3.2-3b-dwq \\\n    --q-bits 4 \\\n    --iters 100\n",
        "llama-3.2-3b-dwq",
    ),
    (
        "mlx_lm.awq --model meta-llama/Llama-3.2-3B-Instruct \\\n    --mlx-path ./llama-3.2-3b-awq \\\n    --q-bits 4\n",
        "llama-3.2-3b-awq",
    ),
    (
        "mlx_lm.dynamic_quant --model meta-llama/Llama-3.2-3B-Instruct \\\n    --mlx-path ./llama-3.2-3b-dynamic \\\n    --target-bpw 4.5  # Target bits per weight\n",
        "llama-3.2-3b-dynamic",
    ),
    (
        "mlx_lm.gptq --model meta-llama/Llama-3.2-3B-Instruct \\\n    --mlx-path ./llama-3.2-3b-gptq \\\n    --q-bits 4\n",
        "llama-3.2-3b-gptq",
    ),
    ("mlx_lm.dwq --model Qwen/Qwen3-0.6B\n", "mlx_model"),
    ("mlx_lm.dwq --help\n", ""),
    ("mlx_lm.dynamic_quant --model Qwen/Qwen3-0.6B\n", "mlx_model"),
    ("mlx_lm.awq --model Qwen/Qwen3-0.6B\n", "mlx_model"),
    ("mlx_lm.awq --help\n", ""),
    ("mlx_lm.gptq --model Qwen/Qwen3-0.6B\n", "mlx_model"),
];

#[test]
fn every_block_runs_as_printed() {
    let place = Place::new();
    for id in ["meta-llama/Llama-3.2-3B-Instruct", "Qwen/Qwen3-0.6B"] {
        place.hub.add(Kind::Model, id, files(&fixture("llama_tied")));
    }
    let bin = place.at("bin");
    std::fs::create_dir(&bin).unwrap();
    let given = place.command("");
    for name in ["convert", "awq", "gptq", "dynamic_quant", "dwq"] {
        std::os::unix::fs::symlink(given.get_program(), bin.join(format!("mlx_lm.{name}"))).unwrap();
    }
    for (at, (block, output)) in BLOCKS.iter().enumerate() {
        let directory = place.at(&format!("block-{at}"));
        std::fs::create_dir(&directory).unwrap();
        let mut shell = Command::new("sh");
        shell.args(["-c", block]).current_dir(&directory);
        let path = std::env::var("PATH").unwrap_or_default();
        shell.env("PATH", format!("{}:{path}", bin.display()));
        for (name, value) in given.get_envs() {
            match value {
                Some(value) => shell.env(name, value),
                None => shell.env_remove(name),
            };
        }
        let ran = shell.output().unwrap();
        assert!(ran.status.success(), "{block}\n{}", String::from_utf8_lossy(&ran.stderr));
        if !output.is_empty() {
            place.succeed(&format!("inspect {} --verify", directory.join(output).display()));
        }
    }
}
