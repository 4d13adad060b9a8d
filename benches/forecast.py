#!/usr/bin/env python3
"""What `recommend` foresees beside what each method then takes, on one model.

    benches/forecast.py --bin target/release/mlx-quant --model DIR [--n-samples 16] [--iters 8] > benches/results/forecast-DATE.txt

The machine is measured anew first. The model's files are dropped from the page cache before the conversion, as the forecast reads the
disk. Memory is the child's own peak. Prints a line a method: predicted and measured time and memory, and their ratios.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from pathlib import Path


def run(command):
    """Wall time and largest resident set (bytes) of a command."""
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{command} ended with {status}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", required=True)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--n-samples", default="16")
    parser.add_argument("--iters", default="8")
    args = parser.parse_args()
    sizes = ["--n-samples", args.n_samples, "--iters", args.iters]
    recommend = [args.bin, "recommend", "--measure", "--json", "--quiet", "--model", args.model, *sizes]
    foreseen = json.loads(subprocess.run([str(part) for part in recommend], capture_output=True, text=True, check=True).stdout)
    machine = foreseen["machine"]
    print(f"{args.model.name}, {args.n_samples} windows, {args.iters} steps; {machine['products'] / 1e9:.0f} GFLOP/s")
    print(f"{'method':22} {'seconds':>9} {'measured':>9} {'ratio':>6} {'MB':>8} {'measured':>9} {'ratio':>6}")
    for method in foreseen["methods"]:
        needs = method["forecast"]
        with tempfile.TemporaryDirectory() as work:
            command = [args.bin, *shlex.split(method["command"])[1:], "--mlx-path", str(Path(work) / "out"), "--quiet"]
            if method["method"] == "basic":
                for file in args.model.glob("*.safetensors"):
                    with open(file, "rb") as opened:
                        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            seconds, memory = run(command)
            shutil.rmtree(work, ignore_errors=True)
            os.makedirs(work, exist_ok=True)
        print(
            f"{method['method']:22} {needs['seconds']:9.2f} {seconds:9.2f} {needs['seconds'] / seconds:6.2f} "
            f"{needs['peak_memory'] / 1e6:8.0f} {memory / 1e6:9.0f} {needs['peak_memory'] / memory:6.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
