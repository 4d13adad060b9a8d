#!/usr/bin/env python3
"""Our quantizer against mx.quantize (CPU) in one run: GB/s of input, in turn, best of several rounds.

  cargo build --release -p mlx-format --example throughput
  scripts/mlx.sh benches/kernels.py [--threads 2] [--rounds 5] [--size 4096] [--results DIR]

Both get an array of SIZE x SIZE Gaussian weights in memory (ours: 4096 x 4096). A memcpy on as many threads stands beside.
Appends the raw figures to benches/results/.
"""
import argparse, datetime, json, platform, subprocess, sys, time
from pathlib import Path

import mlx.core as mx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
from _measure import cpu_model

CASES = [("bfloat16", b, g) for b in (2, 3, 4, 5, 6, 8) for g in (32, 64, 128)] + [("float32", 4, 64), ("float16", 4, 64)]
FP = ["mxfp4", "mxfp8", "nvfp4"]


def mlx_rate(dtype, size, **settings):
    w = (mx.random.normal((size, size)) * 0.02).astype(getattr(mx, dtype))
    mx.eval(w)
    best = 1e9
    for _ in range(3):
        start = time.perf_counter()
        mx.eval(mx.quantize(w, **settings))
        best = min(best, time.perf_counter() - start)
    return w.nbytes / best / 1e9


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--rounds", type=int, default=5)
    ap.add_argument("--size", type=int, default=4096)
    ap.add_argument("--results", default=str(ROOT / "benches" / "results"))
    ap.add_argument("--bin", default=str(ROOT / "target" / "release" / "examples" / "throughput"))
    a = ap.parse_args()
    mx.set_default_device(mx.cpu)
    ours, theirs, simd = {}, {}, ""
    for _ in range(a.rounds):
        run = json.loads(subprocess.run([a.bin, str(a.threads), "3"], check=True, capture_output=True).stdout)
        simd = run["simd"]
        for name, rate in run["gigabytes_per_second"].items():
            ours[name] = max(rate, ours.get(name, 0))
        for dtype, bits, group in CASES:
            name = f"{dtype} {bits} bits, group size {group}"
            theirs[name] = max(mlx_rate(dtype, a.size, bits=bits, group_size=group), theirs.get(name, 0))
        for mode in FP:
            name = f"bfloat16 {mode}"
            theirs[name] = max(mlx_rate("bfloat16", a.size // 4, mode=mode), theirs.get(name, 0))
    print(f"{cpu_model()}, {simd}, {a.threads} threads, best of {a.rounds} rounds, GB/s of input")
    print(f"{'':34}{'mlx-quant':>10}{'mx.quantize':>13}{'ratio':>8}{'of memcpy':>11}")
    for name in theirs:
        memcpy = ours[name.split()[0] + " memcpy"]
        print(f"{name:34}{ours[name]:10.2f}{theirs[name]:13.3f}{ours[name] / theirs[name]:8.1f}{ours[name] / memcpy:11.2f}")
    out = Path(a.results) / f"kernels-{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}-{platform.machine()}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    runs = json.loads(out.read_text()) if out.exists() else []
    runs.append({"cpu": cpu_model(), "simd": simd, "threads": a.threads, "rounds": a.rounds, "mlx": mx.__version__,
                 "gigabytes_per_second": {"mlx-quant": ours, "mx.quantize": theirs}})
    out.write_text(json.dumps(runs, indent=1) + "\n")


if __name__ == "__main__":
    main()
