#!/usr/bin/env python3
"""What each dependency costs a build from nothing, by cargo's own report (`cargo build --release --timings`).

    time CARGO_TARGET_DIR=/tmp/nothing cargo build --release --locked --timings
    benches/build_costs.py /tmp/nothing/cargo-timings/cargo-timing.html

Durations are wall time of rustc and of build scripts, two or more side by side, so that they are longer where the machine is busy:
compare shares, or the CPU seconds that `time` prints. A group is what is in the tree for one feature alone.
"""

import argparse
import json
import re
import subprocess
from collections import defaultdict
from pathlib import Path


def units(page: Path) -> dict[str, float]:
    """Seconds by package."""
    text = page.read_text()
    found = re.search(r"UNIT_DATA = (\[.*?\n?\]);", text, re.DOTALL)
    if not found:
        raise SystemExit(f"{page}: no UNIT_DATA; hint: give the page that cargo build --timings wrote")
    seconds: dict[str, float] = defaultdict(float)
    for unit in json.loads(found.group(1)):
        seconds[unit["name"]] += unit["duration"]
    return seconds


def packages(features: str) -> set[str]:
    """Packages that the command is built from."""
    tree = ["cargo", "tree", "--locked", "-p", "mlx-quant-cli", "--no-default-features", "--features", features]
    lines = subprocess.run([*tree, "-e", "normal,build", "--prefix", "none"], check=True, capture_output=True, text=True)
    return {line.split()[0] for line in lines.stdout.splitlines() if line.strip()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--least", type=float, default=2.0, help="seconds that a package needs for a row of its own")
    arguments = parser.parse_args()
    seconds = units(arguments.page)
    total = sum(seconds.values())
    demo, data, whole = packages("demo"), packages("demo,parquet"), packages("demo,hub,parquet")
    own = {name for name in seconds if name.startswith("mlx-")}
    group = {name: "ours" for name in own}
    group |= {name: "hub" for name in whole - data}
    group |= {name: "parquet" for name in data - demo}
    sums: dict[str, list[float]] = defaultdict(list)
    for name, one in seconds.items():
        sums[group.get(name, "the rest")].append(one)
    print(f"{total:.0f} s in {len(seconds)} packages\n\n| group | packages | s | part |\n|---|---|---|---|")
    for name, all_ in sorted(sums.items(), key=lambda item: -sum(item[1])):
        print(f"| {name} | {len(all_)} | {sum(all_):.1f} | {sum(all_) / total:.0%} |")
    print("\n| package | for | s | part |\n|---|---|---|---|")
    for name, one in sorted(seconds.items(), key=lambda item: -item[1]):
        if one >= arguments.least:
            print(f"| {name} | {group.get(name, '')} | {one:.1f} | {one / total:.1%} |")


if __name__ == "__main__":
    main()
