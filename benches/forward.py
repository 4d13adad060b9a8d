#!/usr/bin/env python3
"""Full-precision forward passes in one run: PyTorch, MLX and ours in turn, best of several rounds.

    benches/forward.sh MODEL --text FILE [--ours COMMAND] [--rounds 3] [--threads 2] [--out FILE]

All compute the logits of the same windows in float32 (16 of 512 tokens, evenly spaced over FILE):
PyTorch is transformers with eager and sdpa attention at batch sizes 1 and 4, of which the fastest
counts; MLX is mlx_lm's model, window by window, with OpenBLAS preloaded. Every engine runs in a process
of its own and leaves loading and a warm-up of one window out of its time. PyTorch and MLX get a malloc
that keeps its memory, which helps them; ours runs as it is.

COMMAND gets the model directory and a file of windows (JSON lists of ids) as further arguments and
prints one JSON object: tokens_per_second, seconds, flops, matmul_seconds, matmul_share,
peak_gflops_faer (a number, or an object of one per shape) and, if it likes, first_window_nll.

The peak is the best rate of any float32 matrix product here, whoever made it. FLOPs are counted once
for all: two per weight of a linear and token, and causal attention without its masked half.
Appends the raw figures to --out.
"""

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT / "scripts")  # in place of benches/, whose kernels.py transformers would import
from _measure import Checkpoint, machine, output_of, table

SHAPES = [(4096, 576, 1536), (2048, 2048, 2048)]
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "67108864",
}


def timed(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def peak(product, of, repeats=12):
    """GFLOP/s of product(x, w), which computes x @ w.T, on every shape: the best of the repeats."""
    rates = {}
    for m, k, n in SHAPES:
        x, w = of(m, k), of(n, k)
        best = min(timed(lambda: product(x, w)) for _ in range(repeats))
        rates[f"{m}x{k}x{n}"] = 2 * m * k * n / best / 1e9
    return rates


def run_torch(model_dir, windows, threads):
    import numpy
    import torch
    import transformers

    torch.set_num_threads(threads)
    ids = torch.tensor(windows)
    result = {
        "versions": {name.__name__: name.__version__ for name in (torch, transformers, numpy)},
        "peak_gflops": {
            "torch.mm": peak(lambda x, w: torch.mm(x, w.T), torch.randn),
            "numpy": peak(lambda x, w: x @ w.T, lambda m, n: torch.randn(m, n).numpy()),
        },
        "seconds": {},
    }
    for attention in ("eager", "sdpa"):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=torch.float32, attn_implementation=attention
        ).eval()
        with torch.inference_mode():
            for batch in (1, 4):
                logits = model(ids[:batch], use_cache=False).logits[0, :-1]
                result["first_window_nll"] = torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item()
                result["seconds"][f"{attention}, batch {batch}"] = timed(
                    lambda: [model(part, use_cache=False).logits for part in ids.split(batch)]
                )
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                model(ids[:1], use_cache=False)
        own = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
        products = sum(own.get(f"aten::{name}", 0) for name in ("mm", "addmm", "bmm", "baddbmm"))
        result.setdefault("matmul_share", {})[attention] = products / sum(own.values())
    return result


def run_mlx(model_dir, windows, _threads):
    import mlx.core as mx
    import mlx.nn as nn
    import mlx_lm.utils
    from mlx.utils import tree_map

    mx.set_default_device(mx.cpu)
    model, _ = mlx_lm.utils.load_model(Path(model_dir))
    model.update(tree_map(lambda w: w.astype(mx.float32), model.parameters()))
    mx.eval(model.parameters())

    ids = mx.array(windows)
    logits = model(ids[:1])[0, :-1]
    assert logits.dtype == mx.float32
    return {
        "versions": {"mlx": mx.__version__, "mlx_lm": mlx_lm.__version__},
        "first_window_nll": nn.losses.cross_entropy(logits, ids[0, 1:], reduction="mean").item(),
        "seconds": {"batch 1": timed(lambda: [mx.eval(model(ids[i : i + 1])) for i in range(len(windows))])},
        "peak_gflops": {"mx.matmul": peak(lambda x, w: mx.eval(x @ w.T), lambda m, n: mx.random.normal((m, n)))},
    }


def pick_windows(model_dir, text, count, length):
    """Evenly spaced windows of the text, each behind the beginning-of-text token where the tokenizer adds one."""
    from numpy import linspace
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    ids = tokenizer.encode(text.read_text(encoding="utf8")).ids
    prefix = tokenizer.encode("a").ids[:-1]
    ids, length = ids[len(prefix) :], length - len(prefix)
    total = len(ids) // length
    picked = sorted({round(i) for i in linspace(0, total - 1, min(count, total)).tolist()})
    return [prefix + ids[i * length : (i + 1) * length] for i in picked]


def flops(model_dir, windows):
    config = json.loads((model_dir / "config.json").read_text())
    shapes = {name: shape for name, (_, shape) in Checkpoint(model_dir).tensors.items() if len(shape) == 2}
    if "lm_head.weight" in shapes:
        del shapes["model.embed_tokens.weight"]
    heads = config["num_attention_heads"]
    width = heads * config.get("head_dim", config["hidden_size"] // heads)
    pairs = sum(len(w) * (len(w) + 1) // 2 for w in windows)
    tokens = sum(map(len, windows))
    linears = 2 * tokens * sum(map(math.prod, shapes.values()))
    attention = 2 * 2 * pairs * width * config["num_hidden_layers"]
    return {"linears": linears, "attention": attention, "total": linears + attention}


def run_engine(command, extra_env):
    done = subprocess.run(command, env=os.environ | extra_env, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"{shlex.join(map(str, command))}: exit status {done.returncode}")
    return json.loads(done.stdout)


def seconds_of(run):
    found = run["seconds"]
    return min(found.values()) if isinstance(found, dict) else found


def peaks_of(runs):
    """Every product's best rate of all rounds, as {who: {shape: GFLOP/s}}."""
    best = {}
    for run in runs:
        rates = dict(run.get("peak_gflops", {}))
        if faer := run.get("peak_gflops_faer"):
            rates["faer"] = faer if isinstance(faer, dict) else {"best": faer}
        for who, by_shape in rates.items():
            kept = best.setdefault(who, {})
            for shape, rate in by_shape.items():
                kept[shape] = max(rate, kept.get(shape, 0))
    return best


def share_of(run):
    share = run.get("matmul_share")
    if isinstance(share, dict):
        share = share[min(run["seconds"], key=run["seconds"].get).split(",")[0]]
    return share


def report(runs, work, tokens):
    peaks = peaks_of([run for rounds in runs.values() for run in rounds])
    top = max(rate for by_shape in peaks.values() for rate in by_shape.values())
    best = {name: min(rounds, key=seconds_of) for name, rounds in runs.items()}
    seconds = {name: seconds_of(run) for name, run in best.items()}
    ratios = {name: s / seconds["ours"] for name, s in seconds.items()} if "ours" in seconds else {}
    rows = [("", "seconds", "tokens/s", "GFLOP/s", "of the peak", "in matmul", "nll", "ours is times")]
    for name, run in best.items():
        rate = work["total"] / seconds[name] / 1e9
        optional = ((".2f", share_of(run)), (".4f", run.get("first_window_nll")), (".2f", ratios.get(name)))
        row = [name, f"{seconds[name]:.2f}", f"{tokens / seconds[name]:.1f}", f"{rate:.1f}", f"{rate / top:.2f}"]
        rows.append(row + ["" if value is None else format(value, digits) for digits, value in optional])
    table(rows)
    counted = best["ours"].get("flops", work["total"]) if "ours" in best else work["total"]
    print(f"{work['total']:.4g} floating point operations, {work['attention']:.4g} of them attention")
    if abs(counted / work["total"] - 1) > 0.01:
        print(f"but ours counts {counted:.4g}")
    for who, by_shape in peaks.items():
        print(f"peak, {who}: " + ", ".join(f"{shape} {rate:.1f}" for shape, rate in by_shape.items()) + " GFLOP/s")
    speeds = {name: tokens / s for name, s in seconds.items()}
    return {"tokens_per_second": speeds, "ours_is_times": ratios, "peak_gflops": top, "peaks": peaks}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--ours", metavar="COMMAND")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--out", type=Path, default=ROOT / "benches/results/forward.json")
    parser.add_argument("--engine", nargs=2, metavar=("NAME", "WINDOWS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.engine:
        run = {"torch": run_torch, "mlx": run_mlx}[args.engine[0]]
        print(json.dumps(run(args.model, json.loads(Path(args.engine[1]).read_text()), args.threads)))
        return
    if args.text is None:
        parser.error("--text is required")

    windows = pick_windows(args.model, args.text, args.windows, args.length)
    work = flops(args.model, windows)
    threads = {name: str(args.threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "windows.json"
        file.write_text(json.dumps(windows))

        def engine(name):
            return [__file__, str(args.model), "--threads", str(args.threads), "--engine", name, str(file)]

        engines = {
            "PyTorch": ([sys.executable, *engine("torch")], threads | KEEP_MEMORY),
            "MLX": ([str(ROOT / "scripts/mlx.sh"), *engine("mlx")], threads | KEEP_MEMORY),
        }
        if args.ours:
            engines["ours"] = ([*shlex.split(args.ours), str(args.model), str(file)], threads)
        runs = {name: [] for name in engines}
        for number in range(args.rounds):
            for name, (command, env) in engines.items():
                runs[name].append(run_engine(command, env) | {"load": os.getloadavg()[0]})
                print(f"round {number + 1}, {name}: {seconds_of(runs[name][-1]):.2f} s", file=sys.stderr)

    tokens = sum(map(len, windows))
    record = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": output_of("git", "describe", "--always", "--dirty"),
        "machine": machine() | {"threads": args.threads},
        "model": args.model.resolve().name,
        "windows": [len(windows), args.length],
        "flops": work,
        "summary": report(runs, work, tokens),
        "runs": runs,
    }
    records = json.loads(args.out.read_text()) if args.out.exists() else []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps([*records, record], indent=1) + "\n")
    print(f"results: {args.out}")


if __name__ == "__main__":
    main()
