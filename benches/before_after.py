#!/usr/bin/env python3
"""Two binaries beside each other: time, memory and, with --kl, what each method loses.

    benches/before_after.py --before BIN --after BIN [--model DIR] [--rounds 3] [--commands convert,eval,gptq,awq,dynamic-quant,dwq]
                            [--light] [--threads 2] [--results DIR]
    benches/before_after.py --before BIN --after BIN --kl [--model DIR ...] [--methods rtn,awq,gptq,dynamic,dwq,awq+gptq] [--bits 4]
                            [--windows 32] [--light] [--results DIR]
    benches/before_after.py --before BIN --after BIN --kl --before-flags="--device cpu" --after-flags="--device gpu"

Time: each command is run with the one and the other in turn (A B, then B A, ...), so that what else the machine does falls on both. Printed is the least
wall time, user time and peak memory of each, and their ratios: after / before. --model is the built-in demo model where it is left out.

--kl: each method makes a model with either binary; KL to the original on the built-in held-out text is measured by the first binary for both, so that
one ruler holds for both. The error of the difference is over windows, which are the same. The first model is measured by the second binary too:
what `eval` itself has changed. Whether files are equal byte for byte is said beside it.

--before-flags and --after-flags go to every command of one side: with them the same binary stands beside itself on the processor and on a card.

A line of JSON is appended to RESULTS/before-after-DATE-ARCH.jsonl. Only the standard library is used.
"""

import argparse
import hashlib
import json
import math
import platform
import shutil
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
from _measure import machine, mb, measured, output_of, table  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results"
COMMANDS = "convert,eval,gptq,awq,dynamic-quant,dwq"
METHODS = "rtn,awq,gptq,dynamic,dwq,awq+gptq"


def texts(light, windows=32):
    """Arguments for calibration text and training."""
    count, length, steps = (4, 64, 2) if light else (windows, 512, 12)
    calibration = ["--n-samples", str(count), "--sequence-length", str(length)]
    training = ["--iters", str(steps), "--batch-size", "2", "--valid-samples", "2"] if light else ["--iters", str(steps), "--valid-samples", "8"]
    return calibration, training


def flags(args, side):
    return getattr(args, f"{side}_flags").split()


def timed_command(name, source, packed, out, args):
    calibration, training = texts(args.light, args.windows)
    # dynamic and dwq pass more for each window: less text, as their own benchmarks have.
    fewer = calibration if args.light else ["--n-samples", "8", "--sequence-length", "512"]
    write = ["--mlx-path", str(out), "--eval-windows", "0", *source]
    windows = ["--windows", "2", "--sequence-length", "64"] if args.light else ["--windows", "16"]
    return {
        "convert": ["convert", "-q", "--mlx-path", str(out), *source],
        "search": ["convert", "-q", "--search", "--mlx-path", str(out), *source],
        "eval": ["eval", "--model", str(packed), "--reference", str(args.dense), *windows],
        "gptq": ["gptq", *calibration, *write],
        "awq": ["awq", *calibration, *write],
        "dynamic-quant": ["dynamic-quant", *fewer, *write],
        "dwq": ["dwq", "--sequence-length", fewer[-1], *training, *write],
    }[name]


def time_both(args, work):
    """Runs every command with either binary in turn; the figures of each run."""
    source = ["--model", str(args.model[0])] if args.model else []
    packed, args.dense = work / "packed", args.model[0] if args.model else work / "dense"
    made = [("packed", ["convert", "-q", "--mlx-path", str(packed), *source])]
    made += [] if args.model else [("dense", ["convert", "--mlx-path", str(args.dense)])]
    for name, command in made:
        done = measured([args.before, *command, "--quiet"])
        if done["rc"] != 0:
            sys.exit(f"{name}: {done['tail']}")
    runs = []
    for name in args.commands.split(","):
        for number in range(args.rounds):
            for side in ("before", "after") if number % 2 == 0 else ("after", "before"):
                out = work / "out"
                command = timed_command(name, source, packed, out, args)
                done = measured([getattr(args, side), *command, *flags(args, side), "--threads", str(args.threads), "--quiet"])
                if done["rc"] != 0:
                    sys.exit(f"{side} {' '.join(command)}: {done['tail']}")
                shutil.rmtree(out, ignore_errors=True)
                runs.append({"command": name, "side": side, "round": number, **{k: done[k] for k in ("wall_s", "user_s", "system_s", "peak_bytes", "floor_bytes")}})
    return runs


def print_times(runs):
    rows = [("command", "wall before", "after", "ratio", "user before", "after", "ratio", "peak before", "after", "ratio")]
    ratios = {}
    for name in dict.fromkeys(run["command"] for run in runs):

        def least(side, key):
            return min(run[key] for run in runs if run["command"] == name and run["side"] == side)

        row, ratios[name] = [name], {}
        for key, shown in (("wall_s", "{:.3f} s".format), ("user_s", "{:.2f} s".format), ("peak_bytes", mb)):
            before, after = least("before", key), least("after", key)
            ratios[name][key] = after / before if before else math.nan
            row += [shown(before), shown(after), f"{ratios[name][key]:.3f}"]
        rows.append(tuple(row))
    table(rows)
    return ratios


def method_command(method, bits, args):
    calibration, training = texts(args.light, args.windows)
    width = ["--bits", str(bits)]
    same = [*width, "--fallback-bits", str(bits)]
    # What a plain rounding at this width takes: its bits, and 32 more for each group of 64.
    budget = ["--target-bpw", f"{bits + 0.5:.3f}"]
    return {
        "rtn": ["convert", "-q", *width],
        "search": ["convert", "-q", "--search", *width],
        "awq": ["awq", *width, *calibration],
        "gptq": ["gptq", *same, *calibration],
        "dynamic": ["dynamic-quant", *budget, *calibration],
        "dwq": ["dwq", *width, *calibration, *training],
        "awq+gptq": ["quantize", "--recipe", "awq+gptq", *same, *calibration],
        "dynamic+awq+gptq+dwq": ["quantize", "--recipe", "dynamic+awq+gptq+dwq", *budget, *calibration, *training],
    }[method]


def weights_hash(model):
    found = hashlib.sha256()
    for path in sorted(Path(model).glob("*.safetensors")):
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                found.update(block)
    return found.hexdigest()


def mean_and_error(values):
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def losses(args, model, work):
    """For each method the KL of either binary's model."""
    name, source = (model.name, ["--model", str(model)]) if model else ("demo", [])

    def run(binary, command):
        done = subprocess.run([binary, *map(str, command), "--threads", str(args.threads), "--quiet", "--json"], capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"{binary} {' '.join(map(str, command))}: {done.stderr}")
        return json.loads(done.stdout)

    if not model:
        model = work / "dense"
        if not model.exists():
            run(args.before, ["convert", "--mlx-path", model])
    windows = ["--windows", "4", "--sequence-length", "64"] if args.light else []

    def judge(side, made):
        found = run(getattr(args, side), ["eval", "--model", made, "--reference", model, *windows, *flags(args, side), "--cache", work / f"cache-{side}"])
        return {key: found[key] for key in ("kl_mean", "kl_stderr", "kl_by_window", "bits_per_weight", "perplexity")}

    rows = []
    for method in args.methods.split(","):
        row = {"model": name, "method": method, "bits": args.bits}
        for side in ("before", "after"):
            made = work / f"{name}-{side}"
            extra = [] if method in ("rtn", "search") else ["--eval-windows", "0"]
            run(getattr(args, side), [*method_command(method, args.bits, args), *source, "--mlx-path", made, *extra, *flags(args, side)])
            row[side] = judge("before", made) | {"sha256": weights_hash(made)}
            if side == "before":
                row["judged_by_after"] = judge("after", made)
            shutil.rmtree(made)
        differences = [b - a for a, b in zip(row["before"]["kl_by_window"], row["after"]["kl_by_window"])]
        row["difference"], row["difference_stderr"] = mean_and_error(differences)
        row["relative"] = row["difference"] / row["before"]["kl_mean"]
        row["eval_relative"] = row["judged_by_after"]["kl_mean"] / row["before"]["kl_mean"] - 1
        row["equal_files"] = row["before"]["sha256"] == row["after"]["sha256"]
        rows.append(row)
        print(f"  {name} {method}: done", file=sys.stderr, flush=True)
    return rows


def print_losses(rows):
    lines = [("model", "method", "bits", "KL before", "KL after", "after/before - 1", "files", "eval after/before - 1")]
    for row in rows:
        before, after = row["before"], row["after"]
        error = row["difference_stderr"] / before["kl_mean"]
        lines.append(
            (
                row["model"],
                row["method"],
                f"{before['bits_per_weight']:.3f}",
                f"{before['kl_mean']:.5f} ± {before['kl_stderr']:.5f}",
                f"{after['kl_mean']:.5f} ± {after['kl_stderr']:.5f}",
                f"{100 * row['relative']:+.2f} ± {100 * error:.2f} %",
                "equal" if row["equal_files"] else "differ",
                f"{row['eval_relative']:+.1e}",
            )
        )
    table(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True)
    parser.add_argument("--after", required=True)
    parser.add_argument("--model", type=Path, action="append", default=[], help="model directory; with --kl several, and `demo` for the built-in one")
    parser.add_argument("--before-flags", default="", help="for every command of this side: `--before-flags=\"--device cpu\"`")
    parser.add_argument("--after-flags", default="")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--commands", default=COMMANDS, help=f"of {COMMANDS},search")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--windows", type=int, default=32, help="calibration windows of gptq and awq")
    parser.add_argument("--light", action="store_true", help="tiny texts: whether it works, not how fast")
    parser.add_argument("--kl", action="store_true")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    for side in ("before", "after"):
        setattr(args, side, str(Path(getattr(args, side)).resolve()))
    now = datetime.now(timezone.utc)
    record = {
        "time": now.isoformat(timespec="seconds"),
        "machine": machine(),
        "threads": args.threads,
        "light": args.light,
        "windows": args.windows,
        "flags": {side: flags(args, side) for side in ("before", "after")},
        "binaries": {side: {"version": output_of(getattr(args, side), "--version"), "sha256": hashlib.sha256(Path(getattr(args, side)).read_bytes()).hexdigest()} for side in ("before", "after")},
    }
    work = Path(tempfile.mkdtemp(prefix="before-after-"))
    try:
        if args.kl:
            models = [None if str(model) == "demo" else model for model in args.model] or [None]
            record |= {"kind": "kl", "rows": [row for model in models for row in losses(args, model, work)]}
            print_losses(record["rows"])
        else:
            record |= {"kind": "time", "model": str(args.model[0].name) if args.model else "demo", "runs": time_both(args, work)}
            record["ratios"] = print_times(record["runs"])
    finally:
        shutil.rmtree(work)
    args.results.mkdir(parents=True, exist_ok=True)
    path = args.results / f"before-after-{now:%Y-%m-%d}-{platform.machine()}.jsonl"
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
    print(f"results: {path}")


if __name__ == "__main__":
    main()
