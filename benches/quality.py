#!/usr/bin/env python3
"""KL of our methods and of mlx-lm's on held-out text: a table, with standard errors and bits per weight.

    benches/quality.py --bin target/release/mlx-quant --model DIR --name NAME --calibration FILE --text FILE
                       [--theirs DIR] [--bits 4,3,2] [--out FILE.md] [--work DIR]

Ours: convert, convert --search, awq, gptq, awq+gptq, 32 windows of 512 tokens, at the sizes that mlx-lm's methods
end at (gptq: embedding at 6 bits; awq: embedding at 4 bits in groups of 32) and with the embedding at the width of the rest.
--theirs holds models written by mlx-lm, one directory for each; they are judged the same way. Every model is judged by
`mlx-quant eval` on its files (which agrees with MLX to 1e-6, see scripts/judge.py). A ratio is to the row named behind it.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
from _measure import machine, versions  # noqa: E402

EMBEDDING = '[[layer]]\npath = "model.embed_tokens"\nbits = 6\n'


def cases(bits):
    """Name, arguments, whether the embedding has a width of its own."""
    b = ["--bits", str(bits)]
    yield f"rtn {bits}", ["convert", "-q", *b]
    yield f"search {bits}", ["convert", "-q", "--search", *b]
    yield f"awq {bits}", ["awq", *b]
    yield f"gptq {bits}, embedding {bits}", ["gptq", *b, "--fallback-bits", str(bits)]
    yield f"awq+gptq {bits}, embedding {bits}", ["quantize", "--recipe", "awq+gptq", *b, "--fallback-bits", str(bits)]
    yield f"rtn {bits}, embedding 6", ["convert", "-q", *b, "--recipe-file", "EMBEDDING"]
    yield f"awq {bits}, embedding 6", ["awq", *b, "--embed-bits", "6"]
    yield f"gptq {bits}, embedding 6", ["gptq", *b]
    yield f"awq+gptq {bits}, embedding 6", ["quantize", "--recipe", "awq+gptq", *b]
    yield f"awq {bits}, embedding 4 g32", ["awq", *b, "--embed-bits", "4", "--embed-group-size", "32"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("bin", "model", "name", "calibration", "text"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--theirs", type=Path, action="append", default=[])
    parser.add_argument("--bits", default="4,3,2")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(dir=args.work))
    (work / "embedding.toml").write_text(EMBEDDING)
    (work / "cache").mkdir()

    def run(command):
        done = subprocess.run([args.bin, *map(str, command)], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{command}: {done.stderr}")
        return json.loads(done.stdout)

    def judge(name, path):
        found = run(["eval", "--json", "--quiet", "--model", path, "--reference", args.model, "--data", args.text, "--cache", work / "cache"])
        row = {"name": name, **{k: found[k] for k in ("bits_per_weight", "kl_mean", "kl_stderr", "top1", "perplexity")}}
        print(f"{name:34} {row['bits_per_weight']:.3f} {row['kl_mean']:.5f} ± {row['kl_stderr']:.5f}", flush=True)
        return row

    rows, experts = [judge(f"mlx-lm {path.name}", path) for path in args.theirs], {}
    for bits in map(int, args.bits.split(",")):
        for name, command in cases(bits):
            out = work / "out"
            command = [work / "embedding.toml" if part == "EMBEDDING" else part for part in command]
            calibrated = command[0] != "convert"
            more = ["--n-samples", args.windows, "--data", args.calibration, "--eval-windows", 0] if calibrated else []
            made = run([*command, "--model", args.model, "--mlx-path", out, "--json", "--quiet", *more])
            row = judge(name, out)
            if calibrated:
                row["seconds"] = made["made"]["quantize_seconds"]
                experts.update({k: v for k, v in made["made"]["experts"].items() if k.endswith("down_proj")})
            rows.append(row)
            shutil.rmtree(out)
    lines = [f"## {args.name}", "", "| model | bits per weight | KL | top-1 | perplexity |", "|---|---|---|---|---|"]
    for row in rows:
        lines.append("| {name} | {bits_per_weight:.3f} | {kl_mean:.4f} ± {kl_stderr:.4f} | {top1:.4f} | {perplexity:.3f} |".format(**row))
    if experts:
        lines += ["", "Tokens by expert (32 windows of 512):", ""]
        lines += [f"- {path}: {found['tokens']}, fell back: {found['fell_back'] or 'none'}" for path, found in experts.items()]
    text = "\n".join(lines) + "\n"
    print(text)
    if args.out:
        with open(args.out, "a") as file:
            file.write(text + "\n")
        with open(args.out.with_suffix(".jsonl"), "a") as file:
            record = {"name": args.name, "machine": machine(), "versions": versions(args.bin), "windows": args.windows, "rows": rows}
            file.write(json.dumps(record) + "\n")
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
