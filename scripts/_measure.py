"""Shared by interop.py and the scripts in benches/: raw safetensors, measured commands, results.

    python3 scripts/_measure.py run LOG LABEL [KEY=VALUE ...] -- COMMAND ...
        runs a command and appends its wall time, CPU time and peak memory to LOG (JSON lines)
    python3 scripts/_measure.py save KIND LOG RESULTS_DIR BIN
        prints what LOG says and appends it to RESULTS_DIR/KIND-<UTC date>-<arch>.json

KIND is convert or memory. Only the standard library is used. Peak memory is what wait4 reports;
on Linux it is never below that of the launching process, which LOG records as floor_bytes.
"""

import argparse
import json
import math
import mmap
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
}  # fmt: skip


class Shard:
    """A safetensors file: `tensors` maps a name to (dtype, shape); `data(name)` is its raw bytes."""

    def __init__(self, path):
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        size = int.from_bytes(self._map[:8], "little")
        header = json.loads(self._map[8 : 8 + size])
        self._bytes = memoryview(self._map)[8 + size :]
        self.metadata = header.pop("__metadata__", {})
        self.tensors = {k: (v["dtype"], tuple(v["shape"])) for k, v in header.items()}
        self._spans = {k: tuple(v["data_offsets"]) for k, v in header.items()}
        self._check(path)

    def _check(self, path):
        end = 0
        for start, stop, name in sorted((*v, k) for k, v in self._spans.items()):
            dtype, shape = self.tensors[name]
            if start != end or (stop - start) * 8 != math.prod(shape) * DTYPE_BITS[dtype]:
                raise ValueError(f"{path}: {name} does not fill bytes {start}..{stop} ({end} expected)")
            end = stop
        if end != len(self._bytes):
            raise ValueError(f"{path}: {len(self._bytes)} bytes of data, the header names {end}")

    def data(self, name):
        start, stop = self._spans[name]
        return self._bytes[start:stop]


class Checkpoint:
    """All the model*.safetensors of a directory."""

    def __init__(self, directory):
        self.shards = {p.name: Shard(p) for p in sorted(Path(directory).glob("model*.safetensors"))}
        self.tensors, self.file_of = {}, {}
        for file, shard in self.shards.items():
            for name, kind in shard.tensors.items():
                if name in self.tensors:
                    raise ValueError(f"{directory}: {name} is in {self.file_of[name]} and in {file}")
                self.tensors[name], self.file_of[name] = kind, file

    def data(self, name):
        return self.shards[self.file_of[name]].data(name)


def own_peak():
    """The peak resident memory of this process, in bytes."""
    return _bytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def _bytes(maxrss):
    return maxrss * (1 if sys.platform == "darwin" else 1024)


def measured(command, env=None):
    """Runs a command; its exit status, seconds, peak memory and the end of its output."""
    with tempfile.TemporaryFile() as output:
        floor = own_peak()
        start = time.perf_counter()
        process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(max(0, output.seek(0, os.SEEK_END) - 4000))
        tail = output.read().decode(errors="replace").strip()
    return {
        "rc": process.returncode,
        "wall_s": wall,
        "user_s": usage.ru_utime,
        "system_s": usage.ru_stime,
        "peak_bytes": _bytes(usage.ru_maxrss),
        "floor_bytes": floor,
        "tail": tail,
    }


def output_of(*command):
    try:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=ROOT)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def cpu_model():
    if sys.platform == "darwin":
        return output_of("sysctl", "-n", "machdep.cpu.brand_string")
    for line in (output_of("lscpu") or "").splitlines():
        if line.startswith("Model name:"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def machine():
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "cpu": cpu_model(),
        "threads": len(affinity(0)) if affinity else os.cpu_count(),
        "threads_env": {k: v for k, v in os.environ.items() if k.endswith("_NUM_THREADS")},
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "arch": platform.machine(),
    }


def versions(binary, mlx=True):
    found = {
        "mlx-quant": output_of(str(Path(binary).resolve()), "--version"),
        "commit": output_of("git", "describe", "--always", "--dirty"),
        "python": platform.python_version(),
    }
    if mlx:
        code = "import importlib.metadata as m; print(*map(m.version, ('mlx', 'mlx-lm')))"
        if text := output_of(str(ROOT / "scripts/mlx.sh"), "-c", code):
            found["mlx"], found["mlx-lm"] = text.split()
    return found


def command_run(args):
    if shutil.which(args.command[0]) is None:
        sys.exit(f"no such command: {args.command[0]}")
    os.sync()
    result = measured(args.command)
    tail = result.pop("tail")
    if result["rc"] != 0:
        sys.exit(f"{' '.join(args.command)}: exit status {result['rc']}\n{tail}")
    last = tail.splitlines()[-1] if tail else ""
    if last.startswith('{"import_s"'):
        result |= json.loads(last)
    for pair in args.fields:
        key, value = pair.split("=", 1)
        result[key] = int(value) if value.isdigit() else value
    with open(args.log, "a") as log:
        print(json.dumps({"label": args.label, **result, "command": args.command}), file=log)


def mb(size):
    return f"{size / 1e6:,.0f} MB"


def table(rows):
    width = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(str(cell).rjust(n) for cell, n in zip(row, width)))


def print_convert(runs):
    def of(label, key):
        return [r[key] for r in runs if r["label"] == label and not r["warm_up"] and key in r]

    ours, theirs, bare = of("mlx-quant", "wall_s"), of("mlx-lm", "wall_s"), of("mlx-lm", "convert_s")
    memory, their_memory = of("mlx-quant", "peak_bytes"), of("mlx-lm", "peak_bytes")
    rows = [("pair", "mlx-quant", "mlx-lm", "of it convert()", "times", "peak", "mlx-lm's", "times")]

    def row(name, a, b, c, ma, mb_):
        rows.append(
            (name, f"{a:.3f} s", f"{b:.3f} s", f"{c:.3f} s", f"{b / a:.1f}", mb(ma), mb(mb_), f"{mb_ / ma:.1f}")
        )

    columns = (ours, theirs, bare, memory, their_memory)
    for number, values in enumerate(zip(*columns), 1):
        row(number, *values)
    medians = [statistics.median(column) for column in columns]
    row("median", *medians)
    table(rows)
    copy = statistics.median(of("cp", "wall_s"))
    print(f"cp of the source, median: {copy:.3f} s")
    print(f"without mlx-lm's start-up: {medians[2] / medians[0]:.1f} times")
    return {
        "wall_ratio": medians[1] / medians[0],
        "wall_ratio_without_imports": medians[2] / medians[0],
        "peak_ratio": medians[4] / medians[3],
        "mlx_quant_wall_s": medians[0],
        "mlx_lm_wall_s": medians[1],
        "cp_wall_s": copy,
    }


def print_memory(runs):
    rows = [("checkpoint", "largest tensor", "tool", "peak", "of the checkpoint", "wall")]
    for r in runs:
        share = f"{100 * r['peak_bytes'] / r['source_bytes']:.1f} %"
        rows.append(
            (
                mb(r["source_bytes"]),
                mb(r["largest_bytes"]),
                r["label"],
                mb(r["peak_bytes"]),
                share,
                f"{r['wall_s']:.2f} s",
            )
        )
    table(rows)
    return {}


def command_save(args):
    with open(args.log) as log:
        runs = [json.loads(line) for line in log]
    summary = {"convert": print_convert, "memory": print_memory}[args.kind](runs)
    now = datetime.now(timezone.utc)
    record = {
        "time": now.isoformat(timespec="seconds"),
        "versions": versions(args.bin, any(r["label"] == "mlx-lm" for r in runs)),
        "machine": machine(),
        "summary": summary,
        "runs": runs,
    }
    args.results.mkdir(parents=True, exist_ok=True)
    path = args.results / f"{args.kind}-{now:%Y-%m-%d}-{platform.machine()}.json"
    records = json.loads(path.read_text()) if path.exists() else []
    path.write_text(json.dumps([*records, record], indent=1) + "\n")
    print(f"results: {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run")
    run.add_argument("log")
    run.add_argument("label")
    run.add_argument("fields", nargs="*", metavar="KEY=VALUE")
    run.set_defaults(call=command_run)
    save = commands.add_parser("save")
    save.add_argument("kind", choices=["convert", "memory"])
    save.add_argument("log")
    save.add_argument("results", type=Path)
    save.add_argument("bin")
    save.set_defaults(call=command_save)
    words = sys.argv[1:]
    split = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:split])
    args.command = words[split + 1 :]
    args.call(args)


if __name__ == "__main__":
    main()
