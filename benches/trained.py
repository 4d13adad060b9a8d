#!/usr/bin/env python3
"""Quality of dynamic and dwq, alone and stacked, beside mlx-lm's on held-out text: bits per weight, KL, perplexity, time and memory.

    benches/trained.py --bin target/release/mlx-quant --model DIR --name NAME --calibration FILE --text FILE
                       [--theirs DIR ...] [--rows REGEX] [--out FILE.md] [--work DIR]

--theirs holds models written by tools/mlx_lm_reference.py (its .json with the cost beside it). Calibration: 32 windows of 512 tokens; dwq "short":
48 windows of 256 tokens one at a time, "long": 100 steps of 4 of them, as mlx-lm's were trained. Every model is judged by
`mlx-quant eval` on 16 windows of 512 tokens. Times were taken beside other work unless said otherwise.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
from _measure import machine, versions  # noqa: E402

SHORT = ["--n-samples", "48", "--sequence-length", "256", "--iters", "48", "--batch-size", "1"]
LONG = ["--n-samples", "400", "--sequence-length", "256", "--iters", "100", "--batch-size", "4"]


def cases(sensitivities):
    """Name and arguments."""
    calibrated = ["--n-samples", "32"]
    known = [*calibrated, "--sensitivities", sensitivities]
    for bits in (4, 3, 2):
        yield f"rtn {bits}", ["convert", "-q", "--bits", bits]
        yield f"gptq {bits}, embedding {bits}", ["gptq", "--bits", bits, "--fallback-bits", bits, *calibrated]
    for size in ("5.0", "4.506", "4.5", "3.507", "3.0"):
        target = ["--target-bpw", size, *known]
        yield f"dynamic+search {size}", ["quantize", "--recipe", "dynamic+search", *target]
        yield f"dynamic {size}", ["dynamic-quant", *target]
        yield f"dynamic+awq+gptq {size}", ["quantize", "--recipe", "dynamic+awq+gptq", *target]
    for bits in (4, 3, 2):
        for name, how in (("short", SHORT), ("long", LONG)):
            embedding = ["--bits", bits, "--fallback-bits", bits]
            yield f"rtn+dwq {bits}, {name}", ["quantize", "--recipe", "rtn+dwq", *embedding, *how]
            yield f"dwq {bits}, {name}", ["dwq", "--bits", bits, *how]
            yield f"awq+gptq+dwq {bits}, {name}", ["quantize", "--recipe", "awq+gptq+dwq", *embedding, *how]
    for size in ("5.0", "4.5", "3.507"):
        # Sensitivities of the windows that are trained on.
        yield f"dynamic+awq+gptq+dwq {size}, long", ["quantize", "--recipe", "dynamic+awq+gptq+dwq", "--target-bpw", size, *LONG]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("bin", "model", "name", "calibration", "text"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--theirs", type=Path, action="append", default=[])
    parser.add_argument("--rows", default=".")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(dir=args.work))
    (work / "cache").mkdir()

    def run(command):
        done = subprocess.run([args.bin, *map(str, command)], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{command}: {done.stderr}")
        return json.loads(done.stdout)

    def judge(directory):
        return run(["eval", "--model", directory, "--reference", args.model, "--cache", work / "cache", "--data", args.text, "--json", "--quiet"])

    rows = []

    def add(name, found, seconds, peak):
        rows.append({"name": name, "bpw": found["bits_per_weight"], "kl": found["kl_mean"], "error": found["kl_stderr"], "perplexity": found["perplexity"], "perplexity_error": found["perplexity_stderr"], "top1": found["top1"], "seconds": seconds, "peak_gb": peak})
        print(rows[-1], flush=True)
        lines = [f"## {args.name}", "", "| method | bits per weight | KL | ± | perplexity | ± | top-1 | seconds | peak, GB |", "|---|---|---|---|---|---|---|---|---|"]
        for row in rows:
            lines.append(f"| {row['name']} | {row['bpw']:.3f} | {row['kl']:.5f} | {row['error']:.5f} | {row['perplexity']:.3f} | {row['perplexity_error']:.3f} | {row['top1']:.4f} | {row['seconds']:.1f} | {row['peak_gb']:.3f} |")
        if args.out:
            head = f"<!-- {json.dumps({'machine': machine(), 'versions': versions(args.bin)})} -->\n\n"
            args.out.write_text(head + "\n".join(lines) + "\n")

    for directory in args.theirs:
        cost = json.loads(directory.with_suffix(".json").read_text())["cost"] if directory.with_suffix(".json").is_file() else json.loads(Path(f"{directory}.json").read_text())["cost"]
        add(f"mlx-lm {directory.name}", judge(directory), cost["wall_s"], cost["peak_rss_gb"])
    for at, (name, command) in enumerate(cases(work / "sensitivities.json")):
        if not re.search(args.rows, name):
            continue
        out = work / str(at)
        data = [] if command[0] == "convert" else ["--data", args.calibration, "--eval-windows", "0"]
        made = run([*command, "--model", args.model, *data, "--mlx-path", out, "--json", "--quiet"])
        seconds = made["made"]["seconds"] if "made" in made else made["seconds"]
        add(name, judge(out), seconds, made["peak_memory_bytes"] / 1e9)


if __name__ == "__main__":
    main()
