#!/usr/bin/env python3
"""Wall time of gptq, awq and awq+gptq beside mlx-lm's gptq and awq, on the same text, windows and threads, in one run.

    benches/methods.py --bin target/release/mlx-quant --model DIR --reference TOOLS_DIR --calibration FILE
                       [--windows 32] [--awq-windows 8] [--rounds 2] [--torch PYTHON] [--out FILE]

TOOLS_DIR holds mlx.sh and mlx_lm_reference.py (mlx-lm on CPU by its fast paths). mlx-lm's awq takes minutes for few windows, so that
the awq pair has windows of its own. mlx-lm is run once, ours --rounds times, best taken. Beside each of ours stand the
floating-point operations that it needs and the part of the machine's fastest float32 product (numpy's or PyTorch's) that it reached.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
from _measure import machine, versions  # noqa: E402

PEAK = """
import time
import torch
torch.set_num_threads(2)
a, b = torch.rand(4096, 2048), torch.rand(2048, 2048)
best = 1e9
for _ in range(8):
    t = time.perf_counter(); a @ b; best = min(best, time.perf_counter() - t)
print(2 * 4096 * 2048 * 2048 / best)
"""


def operations(model, windows, length, sweeps=2):
    """Of the calibrating forward pass (blocks only), Gram matrices, GPTQ with factors."""
    c = json.loads((Path(model) / "config.json").read_text())
    h, f, layers = c["hidden_size"], c["intermediate_size"], c["num_hidden_layers"]
    kv = c["num_key_value_heads"] * c.get("head_dim", h // c["num_attention_heads"])
    shapes = [(h, h), (kv, h), (kv, h), (h, h), (f, h), (f, h), (h, f)]
    tokens = windows * length
    forward = tokens * (sum(2 * n * d for n, d in shapes) + 2 * 2 * length / 2 * h) * layers
    gram = tokens * (3 * h * h + f * f) * layers
    rounding = (sum((3 + 2 * sweeps) * n * d * d for n, d in shapes) + 2 / 3 * (3 * h**3 + f**3)) * layers
    head = 4 * length * 2 * (sum(n * d for n, d in shapes)) * layers + (3 + 2 * sweeps) * c["vocab_size"] * h * h
    return {"forward": forward, "gram": gram, "rounding": rounding, "tied table": head}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("bin", "model", "reference", "calibration"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--awq-windows", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--torch")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp())
    length = 512
    peak = float(subprocess.run([args.torch, "-c", PEAK], capture_output=True, text=True, check=True).stdout) if args.torch else None
    record = {"time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "machine": machine(), "versions": versions(args.bin), "model": Path(args.model).name, "matmul_peak": peak, "runs": []}

    def ours(name, command, windows):
        best = None
        for _ in range(args.rounds):
            out = work / "out"
            full = [args.bin, *command, "--model", args.model, "--mlx-path", out, "--n-samples", windows, "--data", args.calibration, "--eval-windows", 0, "--threads", 2, "--json", "--quiet"]
            start = time.perf_counter()
            done = subprocess.run([str(part) for part in full], capture_output=True, text=True, check=True)
            wall = time.perf_counter() - start
            made = json.loads(done.stdout)
            shutil.rmtree(out)
            if best is None or wall < best["wall_s"]:
                best = {"name": name, "windows": windows, "wall_s": wall, "peak_bytes": made["peak_memory_bytes"], "predicted_bytes": made["predicted_memory_bytes"]}
        parts = operations(args.model, windows, length)
        if "gptq" not in name:
            parts.pop("rounding")
        best["operations"] = sum(parts.values())
        if peak:
            best["of_peak"] = best["operations"] / best["wall_s"] / peak
        record["runs"].append(best)
        print(best, flush=True)
        return best["wall_s"]

    def theirs(method, windows):
        command = [Path(args.reference) / "mlx.sh", Path(args.reference) / "mlx_lm_reference.py", method, "--model", args.model, "--out", work / "theirs", "--json", work / "cost.json"]
        command += ["--calibration", args.calibration, "--bits", 4, "--num-samples", windows, "--sequence-length", length]
        subprocess.run([str(part) for part in command], capture_output=True, check=True, env={**os.environ, "THREADS": "2"})
        cost = json.loads((work / "cost.json").read_text())["cost"]
        shutil.rmtree(work / "theirs")
        record["runs"].append({"name": f"mlx-lm {method}", "windows": windows, **cost})
        print(record["runs"][-1], flush=True)
        return cost["wall_s"]

    gptq = ours("gptq", ["gptq"], args.windows)
    both = ours("awq+gptq", ["quantize", "--recipe", "awq+gptq"], args.windows)
    reference = theirs("gptq", args.windows)
    awq = ours("awq", ["awq"], args.awq_windows)
    awq_reference = theirs("awq", args.awq_windows)
    record["ratios"] = {"gptq": gptq / reference, "awq+gptq": both / reference, "awq": awq / awq_reference}
    print(record["ratios"])
    if args.out:
        with open(args.out, "a") as file:
            file.write(json.dumps(record) + "\n")
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
