#!/usr/bin/env python3
"""Wall time and peak memory of dwq and of dynamic's measurement beside mlx-lm's float32 path, same tokens and threads, in one run.

    benches/trained_time.py --bin target/release/mlx-quant --model DIR --reference TOOLS_DIR --calibration FILE
                            [--rounds 2] [--only dynamic|dwq] [--torch PYTHON] [--out FILE]

dwq: 48 windows of 256 tokens in steps of 4, from round-to-nearest at 4 bits, 8 held-out windows, on both sides. dynamic: 8 windows of 512 tokens;
ours is the measurement with all candidates and plain writing (dynamic+search), mlx-lm's its command. mlx-lm runs once, ours --rounds times, best
taken. Then another size is planned from the kept sensitivities.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
from _measure import machine, versions  # noqa: E402
from methods import PEAK  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("bin", "model", "reference", "calibration"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", choices=("dynamic", "dwq"))
    parser.add_argument("--torch")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp())
    peak = float(subprocess.run([args.torch, "-c", PEAK], capture_output=True, text=True, check=True).stdout) if args.torch else None
    record = {"time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "machine": machine(), "versions": versions(args.bin), "model": Path(args.model).name, "matmul_peak": peak, "runs": []}

    def add(**run):
        record["runs"].append(run)
        print(run, flush=True)

    def ours(name, command, remove=True):
        best = None
        for _ in range(args.rounds):
            out = work / "out"
            full = [args.bin, *command, "--model", args.model, "--mlx-path", out, "--data", args.calibration, "--eval-windows", 0, "--threads", 2, "--json", "--quiet"]
            start = time.perf_counter()
            done = subprocess.run([str(part) for part in full], capture_output=True, text=True, check=True)
            wall = time.perf_counter() - start
            made = json.loads(done.stdout)
            if out.exists():
                shutil.rmtree(out)
            if best is None or wall < best["wall_s"]:
                operations = made["operations"]
                best = {"name": name, "wall_s": wall, "peak_bytes": made.get("peak_memory_bytes"), "predicted_bytes": made.get("predicted_memory_bytes", made.get("peak_memory")), "operations": operations, "rate": operations / wall, "of_peak": operations / wall / peak if peak else None}
        add(**best)
        return best

    def theirs(name, command):
        out = work / f"theirs-{len(record['runs'])}"
        full = [Path(args.reference) / "mlx.sh", "mlx_lm_reference.py", *command, "--model", args.model, "--out", out, "--json", f"{out}.json", "--calibration", args.calibration]
        subprocess.run([str(part) for part in full], cwd=args.reference, capture_output=True, check=True)
        cost = json.loads(Path(f"{out}.json").read_text())["cost"]
        add(name=name, wall_s=cost["wall_s"], peak_bytes=cost["peak_rss_gb"] * 1e9)
        return out, cost

    def ratio(name, own, other):
        add(name=f"{name}: ratio", time=own["wall_s"] / other["wall_s"], memory=own["peak_bytes"] / (other["peak_rss_gb"] * 1e9) if own["peak_bytes"] else None)

    rounds = args.rounds
    if args.only != "dwq":
        known = work / "sensitivities.json"
        measure = ["dynamic-quant", "--n-samples", 8, "--sequence-length", 512, "--target-bpw", 5.0]
        own = ours("dynamic, measurement and plain writing", ["quantize", "--recipe", "dynamic+search", *measure[1:]])
        _, cost = theirs("mlx-lm dynamic", ["dynamic", "--target-bpw", "5.0", "--num-samples", 8, "--sequence-length", 512])
        ratio("dynamic", own, cost)
        args.rounds = 1
        ours("dynamic, whole", [*measure, "--sensitivities", known])
        ours("dynamic, another size planned", ["dynamic-quant", "--n-samples", 8, "--target-bpw", 4.2, "--sensitivities", known, "--dry-run"])
    if args.only != "dynamic":
        args.rounds = rounds
        own = ours("dwq", ["quantize", "--recipe", "rtn+dwq", "--bits", 4, "--fallback-bits", 4, "--n-samples", 48, "--sequence-length", 256, "--iters", 12, "--batch-size", 4, "--valid-samples", 8])
        student, _ = theirs("mlx-lm rtn", ["rtn", "--bits", 4])
        _, cost = theirs("mlx-lm dwq", ["dwq", "--student", student, "--lr", "1e-5", "--num-samples", 48, "--sequence-length", 256, "--batch-size", 4])
        ratio("dwq", own, cost)
    if args.out:
        with args.out.open("a") as file:
            file.write(json.dumps(record) + "\n")
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
