#!/usr/bin/env python3
"""Stops every command that quantizes at many moments and repeats it: what comes out must be what an undisturbed run writes.

    scripts/crash_matrix.py --bin target/release/mlx-quant [--moments 5] [--signals KILL,INT,TERM] [--commands a,b] [--scale 1]
                            [--jobs 1] [--seed 1] [--json FILE] [--work DIR] [--only COMMAND:SIGNAL:NUMBER] [--list]
                            [--fixture target/debug/hub-fixture]
    scripts/crash_matrix.py --bin target/release/mlx-quant --latency [--moments 5] [--commands a,b] [--json FILE]
    scripts/crash_matrix.py --self-test

A moment is a time within the run, a change of a file (writes, renames, removals: inside of writes too), or the instant at which something gets its
final name. All are drawn from --seed and can be repeated one by one with --only. After each stop:

* a final name that exists holds everything, with the bytes of the undisturbed run (or, with --overwrite, of the model that was there before)
  and nothing beside them but the run's own records, which the next command that meets the model removes;
* the same command again ends with the files and bytes of the undisturbed run, and no others, there and beside it. Every fifth stop is followed by a
  second one before that. (Where the stopped run had finished, a repetition may refuse the existing output.)
* SIGINT and SIGTERM end the command within 2 seconds, with exit status 130; nothing panics.

Undisturbed runs are made twice: what differs between them (times, memory) is named in NOT_THE_SAME and compared without it.
With --fixture (the hub of the tests, a program) `convert --stream` is among the commands.
--latency asks only for the 2 seconds, on models with one very large layer, large steps of dwq, a large head. --scale makes texts longer.
Only the standard library is used. Exit status 1 if anything fails.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from _stop import Run

ROOT = Path(__file__).resolve().parent.parent
TOKEN = "hf_fakeTokenThatNobodyMaySee4711"
LATENCY = 2.0
INTERRUPTED = 130
REFUSED = 2
# Of a comparison: figures of time and memory, the order of times, whether it was resumed.
NOT_THE_SAME = re.compile(r"^cmp/(report\.(json|md|html|svg)|work/.*\.json)$")
# What is measured, and what says that an earlier run had a part in it.
MEASURED = re.compile(r"seconds|memory|^resumed|^speed$|^faster$|^reference_cached$")


def cases(scale):
    """Name -> arguments of each command; `OUT` places are relative to the folder that it runs in."""

    def windows(count, length=64):
        return ["--n-samples", str(count * scale), "--sequence-length", str(length)]

    out = ["--mlx-path", "out", "--threads", "2", "--quiet"]
    light = ["--eval-windows", "1"]
    dwq = ["--iters", str(2 * scale), "--batch-size", "2", "--valid-samples", "2"]
    stacked = ["--recipe", "dynamic+awq+gptq+dwq", "--target-bpw", "4.5"]
    return {
        "convert": ["convert", "-q", "--model", "MODEL", *out],
        "convert-search": ["convert", "-q", "--search", "--bits", "3", *out],
        "convert-overwrite": ["convert", "-q", "--overwrite", "--model", "MODEL", *out],
        "gptq-overwrite": ["gptq", "--overwrite", *windows(6), *light, *out],
        "dynamic-kl-overwrite": ["quantize", "--overwrite", "--recipe", "dynamic+search", "--target-kl", "0.08", *windows(3), "--eval-windows", "2", *out],
        "awq": ["awq", *windows(6), *light, *out],
        "gptq": ["gptq", *windows(8), *light, *out],
        "gptq-low-memory": ["gptq", "--low-memory", *windows(6), *light, *out],
        "gptq-statistics": ["gptq", "--statistics", "kept", *windows(6), *light, *out],
        "dynamic": ["dynamic-quant", *windows(3), *light, *out],
        "dynamic-kept": ["dynamic-quant", "--sensitivities", "kept.json", *windows(3), *light, *out],
        "dynamic-kl": ["quantize", "--recipe", "dynamic+search", "--target-kl", "0.08", *windows(3), "--eval-windows", "2", *out],
        "dwq": ["dwq", *windows(6), *dwq, *light, *out],
        "dwq-norms": ["dwq", "--bits", "2", *windows(6), *dwq, *light, *out],
        "dwq-targets": ["dwq", "--target-dir", "kept", *windows(6), *dwq, *light, *out],
        "dwq-low-memory": ["dwq", "--low-memory", *windows(6), *dwq, *light, *out],
        "learn": ["quantize", "--recipe", "gptq+learn", "--learn-steps", str(4 * scale), "--learn-batch", "2", *windows(4), *light, *out],
        "quantize": ["quantize", *stacked, *windows(4), *dwq, *light, *out],
        "quantize-low-memory": ["quantize", "--low-memory", *stacked, *windows(4), *dwq, *light, *out],
        "compare": ["compare", "--methods", "basic,gptq,dwq", "--keep", "all", *windows(4), "--iters", str(2 * scale), "--windows", "2", "--output", "cmp", "--threads", "2", "--quiet"],
    }


# What stands in the folder before a command begins, made by another one.
BEFORE = {
    "convert-overwrite": ["convert", "-q", "--bits", "8", "--mlx-path", "out", "--quiet"],
    "gptq-overwrite": ["convert", "-q", "--bits", "8", "--mlx-path", "out", "--quiet"],
    "dynamic-kl-overwrite": ["convert", "-q", "--bits", "8", "--mlx-path", "out", "--quiet"],
}

STREAM = {"stream": ["convert", "-q", "--stream", "--model", "some-org/Tiny", "--mlx-path", "out", "--threads", "2", "--quiet"]}


def hub(fixture, work):
    """A hub on this machine that has the demo model in two shards; the process and what a command must know of it."""
    model = work / "hub/models/some-org/Tiny"
    if not model.exists():
        shutil.copytree(ROOT / "crates/demo/files", model)
        shutil.copytree(ROOT / "crates/demo-blocks/files", model, dirs_exist_ok=True)
    command = [fixture, "--models", work / "hub/models", "--token", TOKEN]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    endpoint = json.loads(process.stdout.readline())["endpoint"]
    return process, {"HF_ENDPOINT": endpoint, "HF_TOKEN": TOKEN, "NO_PROXY": "*"}


def latency_cases():
    out = ["--mlx-path", "out", "--threads", "2", "--quiet", "--eval-windows", "0"]
    large = ["--model", "LARGE", "--n-samples", "2", "--sequence-length", "64", *out]
    dwq = ["--n-samples", "24", "--sequence-length", "512", "--iters", "2", "--batch-size", "24", "--valid-samples", "2", *out]
    return {
        "large-search": ["quantize", "--recipe", "search", *large],
        "large-gptq": ["gptq", *large],
        "large-awq": ["awq", *large],
        "large-refine": ["quantize", "--recipe", "refine", *large],
        "large-dynamic": ["dynamic-quant", *large],
        "dwq-step": ["dwq", *dwq],
        "convert-large": ["convert", "-q", "--model", "LARGE", "--mlx-path", "out", "--threads", "2", "--quiet"],
    }


def plain(path, name):
    """What a file says but for what is measured."""
    if not NOT_THE_SAME.match(name):
        return path.read_bytes()
    if name.endswith(".json"):

        def without(value):
            if isinstance(value, dict):
                return {k: without(v) for k, v in value.items() if not MEASURED.search(k) and k != "model"}
            return [without(v) for v in value] if isinstance(value, list) else value

        return json.dumps(without(json.loads(path.read_text())), sort_keys=True).encode()
    text = path.read_text().rstrip()
    if not text.endswith({".html": "</html>", ".svg": "</svg>"}.get(path.suffix, "")):
        raise ValueError("it breaks off")
    return f"{path.suffix} {'|'.join(sorted(set(re.findall('basic|gptq|dwq|awq|dynamic', text))))}".encode()


def files_of(folder):
    """Every file below a folder with the hash of what it says, or why it says nothing."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not name.startswith((".cache/", ".log")):
            try:
                found[name] = hashlib.sha256(plain(path, name)).hexdigest()
            except ValueError as error:
                found[name] = f"damaged: {error}"
        elif path.is_dir() and not name.startswith(".cache") and not any(path.iterdir()):
            found[name + "/"] = "empty"
    return found


def differences(found, expected):
    """What is not as in the undisturbed run."""
    missing = sorted(expected.keys() - found.keys())
    other = sorted(name for name in found.keys() & expected.keys() if found[name] != expected[name])
    left = sorted(found.keys() - expected.keys())

    def few(names):
        return " ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")

    return [f"{what}: {few(names)}" for what, names in (("missing", missing), ("other bytes", other), ("left over", left)) if names]


def is_hidden(name):
    return any(part.startswith(".") for part in Path(name).parts)


# A run's own records: killed between the last rename and their removal, it leaves them to the next command that meets the model. The
# comparison after the repetition asks that they are gone.
RECORDS = re.compile(r"^(out|cmp/models/[^/]+)/\.(mlx-quant-run|state-.*)$")


def final_faults(found, expected, before):
    """What is wrong with the final names after a stop: they may be missing, but what is there must be whole. `before` is what stood
    there when the command began: that must still be there, or what the command makes."""
    faults = []
    whole = {"out": [n for n in expected if n.startswith("out/")]}
    for name in expected:
        if match := re.match(r"cmp/models/[^/]+/", name):
            whole.setdefault(match[0].rstrip("/"), []).append(name)
    for final, names in whole.items():
        there = {n: h for n, h in found.items() if n.startswith(final + "/") and not RECORDS.match(n)}
        old = {n: h for n, h in before.items() if n.startswith(final + "/")}
        if not there and old:
            faults.append(f"{final} is gone")
        if there and there != old and (wrong := differences(there, {n: expected[n] for n in names})):
            faults.append(f"{final} has its name, but {'; '.join(wrong)}")
    faults += [f"{n} has its name, but {h}" for n, h in found.items() if str(h).startswith("damaged") and not is_hidden(n)]
    return faults


class Matrix:
    def __init__(self, args, work, commands):
        self.args, self.work, self.bin = args, work, str(Path(args.bin).resolve())
        self.before = {}
        self.cases, self.models, self.hub = commands, {}, {"HF_HUB_OFFLINE": "1"}

    def make_models(self, names):
        used = {word for name in names for word in self.cases[name]}
        # The demo model's tokenizer, so that the built-in texts are words for these too.
        words = ["--tokenizer", ROOT / "crates/demo/files", "--vocab", 6144]
        sizes = {
            "MODEL": ["--gigabytes", 0.2 * self.args.scale, "--layers", 4],
            "LARGE": ["--hidden", self.args.hidden, "--intermediate", self.args.intermediate, "--layers", 1, *words],
        }
        for word in used & set(sizes):
            folder = self.models[word] = self.work / word.lower()
            if not folder.exists():
                command = [sys.executable, ROOT / "scripts/make_checkpoint.py", folder, *sizes[word]]
                subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)

    def command(self, name):
        return [self.bin, *(str(self.models.get(word, word)) for word in self.cases[name])]

    def environment(self, folder):
        env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_"))}
        cache = str(folder / ".cache")
        return env | {"XDG_CACHE_HOME": cache, "HOME": cache, "HF_HOME": f"{cache}/huggingface"} | self.hub

    def prepare(self, name, folder):
        """Puts into a folder what a command finds there; what that is."""
        if name not in BEFORE:
            return {}
        made = self.work / f"{name}-before"
        if not made.exists():
            made.mkdir()
            subprocess.run([self.bin, *BEFORE[name]], cwd=made, env=self.environment(folder), check=True, stderr=subprocess.DEVNULL)
        shutil.copytree(made, folder, dirs_exist_ok=True)
        return files_of(made)

    def start(self, name, folder):
        return Run(self.command(name), folder, self.environment(folder), folder / ".log")

    def undisturbed(self, name):
        """Files, seconds, number of changes and final names of runs that nobody stops; the folder of one stays, for its cache."""
        seen = []
        for turn in range(1 if self.args.latency else 2):
            folder = self.work / f"{name}-undisturbed-{turn}"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            self.prepare(name, folder)
            status, seconds, changes, names = self.start(name, folder).count(3600)
            if status != 0:
                sys.exit(f"{name}: exit status {status} without being stopped\n{(folder / '.log').read_text()}")
            seen.append((files_of(folder), seconds, changes, names))
        if wrong := differences(seen[0][0], seen[-1][0]):
            sys.exit(f"{name}: two undisturbed runs differ: {'; '.join(wrong)}")
        return seen[0][0], min(one[1] for one in seen), min(one[2] for one in seen), seen[0][3]

    def moment(self, draw, index, known):
        _, seconds, changes, names = known
        if self.args.latency:
            # Spread over the run: few of them shall still meet every part of it.
            return "time", (index + draw.random()) / self.args.moments * 0.97 * seconds, 0
        kind = draw.choices(["time", "change", "name"], [4, 4, 2])[0]
        if kind == "time":
            return kind, draw.uniform(0, 0.97) * seconds, 0
        delay = draw.choice([0, draw.uniform(0, 0.002)])
        if kind == "change":
            return kind, draw.randint(1, max(1, changes - 1)), delay
        # The output itself as often as all other names together: after it comes what must not be left half done.
        return kind, [draw.choice([names[-1], draw.choice(names)])], delay

    def stopped(self, name, folder, number, draw, index, known, redraw=True):
        """Starts a command and stops it; what happened. A run that ends before its moment is drawn again."""
        limit = 20 * known[1] + 120
        for attempt in range(4):
            moment = self.moment(draw, index, known)
            run = self.start(name, folder)
            reached = run.wait_for(moment, limit)
            after = time.perf_counter() - run.start
            latency, status = run.stop(number, limit)
            log = (folder / ".log").read_text(errors="replace")
            if reached or not redraw or attempt == 3:
                return {"moment": moment, "reached": reached, "after_s": round(after, 4), "latency_s": round(latency, 4), "status": status, "log": log[-600:]}
            for entry in list(folder.iterdir()):
                if entry.name != ".cache":
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            self.prepare(name, folder)

    def try_one(self, name, signal_name, index, known):
        draw = random.Random(f"{self.args.seed}/{name}/{signal_name}/{index}")
        folder = self.work / f"{name}-{signal_name}-{index}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        if (cache := self.work / f"{name}-undisturbed-0/.cache").exists():
            shutil.copytree(cache, folder / ".cache", ignore=shutil.ignore_patterns("huggingface"))
        before = self.prepare(name, folder)
        number = getattr(signal, f"SIG{signal_name}")
        result = {"command": name, "signal": signal_name, "index": index, "seed": self.args.seed, "stops": [], "faults": []}
        faults = result["faults"]
        for turn in range(2 if index % 5 == 4 and not self.args.latency else 1):
            stop = self.stopped(name, folder, number, draw, index, known, redraw=turn == 0)
            result["stops"].append(stop)
            faults += self.stop_faults(stop, number)
            if not self.args.latency:
                found = files_of(folder)
                faults += final_faults(found, known[0], before)
                result["finished"] = all(found.get(n) == h for n, h in known[0].items())
        if not self.args.latency:
            status, seconds, *_ = self.start(name, folder).count(20 * known[1] + 120)
            log = (folder / ".log").read_text(errors="replace")
            result |= {"repeated_status": status, "repeated_s": round(seconds, 4)}
            if status != 0 and not (status == REFUSED and result["finished"]):
                faults.append(f"repeated: exit status {status}: {log.strip()[-400:]}")
            if "panicked" in log:
                faults.append(f"repeated: {log.strip()[-400:]}")
            faults += [f"at the end: {wrong}" for wrong in differences(files_of(folder), known[0])]
        if not (faults and self.args.keep):
            shutil.rmtree(folder)
        return result

    def stop_faults(self, stop, number):
        faults = []
        allowed = {-signal.SIGKILL} if number == signal.SIGKILL else {INTERRUPTED, -number}
        if stop["status"] not in allowed | {0} and not (not stop["reached"] and stop["status"] == REFUSED):
            faults.append(f"stopped: exit status {stop['status']}: {stop['log'].strip()[-400:]}")
        if "panicked" in stop["log"]:
            faults.append(f"stopped: {stop['log'].strip()[-400:]}")
        if number != signal.SIGKILL and stop["latency_s"] > self.args.within:
            faults.append(f"it took {stop['latency_s']:.2f} s to stop, {stop['after_s']:.2f} s into the run")
        return faults


def summary(results):
    rows = defaultdict(lambda: [0, 0, 0, 0.0])
    for result in results:
        row = rows[result["command"], result["signal"]]
        row[0] += 1
        row[1] += bool(result["stops"][0]["reached"])
        row[2] += bool(result["faults"])
        row[3] = max(row[3], *(stop["latency_s"] for stop in result["stops"]))
    print(f"{'command':22} {'signal':6} {'stops':>6} {'in time':>8} {'failed':>7} {'slowest to stop':>16}")
    for (command, name), (count, reached, failed, latency) in rows.items():
        print(f"{command:22} {name:6} {count:6} {reached:8} {failed:7} {latency:14.3f} s")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", default="target/release/mlx-quant")
    parser.add_argument("--self-test", action="store_true", help="tries this script on made-up commands")
    parser.add_argument("--moments", type=int, default=5, help="stops of each command by each signal")
    parser.add_argument("--commands", help="only these, separated by commas")
    parser.add_argument("--signals", default=None, help="of KILL, INT, TERM [default: all; with --latency INT]")
    parser.add_argument("--jobs", type=int, default=1, help="commands at once; each has two threads")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--scale", type=int, default=1, help="longer runs")
    parser.add_argument("--latency", action="store_true")
    parser.add_argument("--within", type=float, default=LATENCY, metavar="SECONDS", help="what SIGINT and SIGTERM may take; a machine whose disk others use may need more")
    parser.add_argument("--hidden", type=int, default=4096, help="width of the large layer of --latency")
    parser.add_argument("--intermediate", type=int, default=8192, help="its other width")
    parser.add_argument("--only", metavar="COMMAND:SIGNAL:NUMBER", help="one stop again, its folder kept if it fails")
    parser.add_argument("--keep", action="store_true", help="keeps the folders of stops that failed")
    parser.add_argument("--fixture", type=Path, help="the hub-fixture program, for convert --stream")
    parser.add_argument("--json", type=Path, help="appends a line for each stop")
    parser.add_argument("--work", type=Path, help="where to work [default: a temporary directory]")
    parser.add_argument("--list", action="store_true", help="prints the commands")
    args = parser.parse_args()
    if args.self_test:
        from crash_matrix_test import run

        return run()
    work = args.work or Path(tempfile.mkdtemp(prefix="crash-matrix-"))
    work.mkdir(parents=True, exist_ok=True)
    commands = latency_cases() if args.latency else cases(args.scale) | (STREAM if args.fixture else {})
    matrix = Matrix(args, work.resolve(), commands)
    if args.list:
        for name, command in matrix.cases.items():
            print(f"{name:22} mlx-quant {' '.join(command)}")
        return 0
    if args.only:
        name, signal_name, index = args.only.split(":")
        plan, args.keep = [(name, signal_name, int(index))], True
    else:
        names = args.commands.split(",") if args.commands else list(matrix.cases)
        signals = (args.signals or ("INT" if args.latency else "KILL,INT,TERM")).split(",")
        plan = [(name, s, index) for name in names for s in signals for index in range(args.moments)]
    results, known, server = [], {}, None
    if args.fixture:
        server, matrix.hub = hub(args.fixture.resolve(), matrix.work)
    matrix.make_models(dict.fromkeys(name for name, _, _ in plan))
    for name in dict.fromkeys(name for name, _, _ in plan):
        known[name] = matrix.undisturbed(name)
        print(f"{name}: {known[name][1]:.2f} s, {known[name][2]} changes of files", flush=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        for result in pool.map(lambda one: matrix.try_one(*one, known[one[0]]), plan):
            results.append(result)
            for fault in result["faults"]:
                again = f"--seed {args.seed} --scale {args.scale} --only {result['command']}:{result['signal']}:{result['index']}"
                moment = result["stops"][-1]["moment"]
                print(f"FAILED {again} ({moment[0]} {moment[1]}, {result['stops'][-1]['after_s']:.3f} s into the run): {fault}", flush=True)
            if args.json:
                with args.json.open("a") as file:
                    file.write(json.dumps(result) + "\n")
    if server:
        server.stdin.close()
        server.wait()
    summary(results)
    if not args.work and not args.keep:
        shutil.rmtree(work)
    failed = sum(bool(result["faults"]) for result in results)
    print(f"{failed} of {len(results)} failed" if failed else f"all {len(results)} stops were mended by the same command")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
