#!/usr/bin/env python3
"""Quantizes checkpoints with every calibrated recipe and loads each result with the real mlx-lm.

    scripts/mlx.sh scripts/calibrated.py --bin target/release/mlx-quant --zoo DIR [--zoo DIR ...] [--recipes awq,gptq,awq+gptq,dynamic+search,dynamic+awq+gptq+dwq]

A --zoo is a model directory or a directory of them. mlx-lm loads strictly (every tensor in its place and of its shape) and runs a
few tokens; logits must be finite. Exit status 1 if anything fails.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
from mlx_lm.utils import load_model


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", required=True)
    parser.add_argument("--zoo", action="append", required=True, type=Path)
    parser.add_argument("--recipes", default="awq,gptq,awq+gptq,dynamic+search,dynamic+awq+gptq+dwq")
    args = parser.parse_args()
    mx.set_default_device(mx.cpu)
    env = {k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", "LD_LIBRARY_PATH")}
    models = [d for zoo in args.zoo for d in ([zoo] if (zoo / "config.json").exists() else sorted(zoo.iterdir())) if (d / "config.json").exists()]
    failed = 0
    for model in models:
        cells = []
        for recipe in args.recipes.split(","):
            with tempfile.TemporaryDirectory() as work:
                out = Path(work) / "out"
                command = [args.bin, "quantize", "--recipe", recipe, "--model", model, "--mlx-path", out, "--group-size", "32"]
                command += ["--n-samples", "8", "--sequence-length", "32", "--eval-windows", "0", "--quiet", "--fallback-group-size", "32"]
                passes = recipe.split("+")
                command += ["--target-bpw", "5.0"] if "dynamic" in passes else []
                command += ["--iters", "3", "--batch-size", "2", "--valid-samples", "2"] if "dwq" in passes else []
                made = subprocess.run([str(part) for part in command], env=env, capture_output=True, text=True)
                if made.returncode:
                    cells.append(f"exit {made.returncode}: {made.stderr.strip()[-200:]}")
                    failed += 1
                    continue
                try:
                    loaded, _ = load_model(out, strict=True)
                    logits = loaded(mx.array([[1, 2, 3, 4]])).astype(mx.float32)
                    sound = bool(mx.isfinite(logits).all())
                except Exception as error:
                    cells.append(f"{type(error).__name__}: {str(error)[:200]}")
                    failed += 1
                    continue
                failed += not sound
                cells.append(f"{recipe} loads" if sound else f"{recipe}: logits are not finite")
        print(f"{model.name:20} " + ", ".join(cells), flush=True)
    print(f"{len(models)} checkpoints, {failed} failures")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
