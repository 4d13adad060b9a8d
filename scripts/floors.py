#!/usr/bin/env python3
"""Checks the floor plan: arrows point down only, between crates, between the modules of a crate, and without circles between files.

    scripts/floors.py [--shelves] [--every] [--show FILE] [--root DIR]
    scripts/floors.py --self-test

An arrow is what one file of a crate uses of another: `crate::`, `super::` and plain paths, followed through re-exports to the file that defines the
item (_rust.py says how). The floors are in floors.toml beside this script, the lowest first. What is refused:

* a circle of files: each uses the next and the last the first;
* an upward import: a module at the top of a crate (a file or folder of src/) that uses one of its own floor or above. lib.rs and main.rs stand above
  everything, so nothing below may use what they define;
* a crate that depends on one of its own floor or above (Cargo.toml, dev-dependencies too);
* a module or crate that has no floor, and a floor that names what is not there.

A circle that cannot be cut stands in [[circles]] of floors.toml with all its files and the reason, which is printed. Between its files there
is no up and down; a circle that has grown, shrunk or gone is refused.

A re-export of what the file does not use itself (`pub use` in a mod.rs) is a shelf for others and no arrow, unless --shelves is given.
--show FILE lists the arrows from and to a file. Exit status 1 if anything is refused.
"""

import argparse
import json
import subprocess
import sys
import tomllib
from collections import defaultdict
from pathlib import Path

from _rust import Crate

ROOT = Path(__file__).resolve().parent.parent
FLOORS = Path(__file__).resolve().with_name("floors.toml")


def circles(arrows):
    """The sets of files that reach one another, by Tarjan's algorithm without recursion."""
    graph = defaultdict(list)
    for arrow in arrows:
        graph[arrow.source].append(arrow.target)
        graph[arrow.target] += []
    index, low, stack, found = {}, {}, [], []
    for root in sorted(graph):
        if root in index:
            continue
        work = [(root, iter(graph[root]))]
        index[root] = low[root] = len(index)
        stack.append(root)
        while work:
            node, targets = work[-1]
            for target in targets:
                if target not in index:
                    index[target] = low[target] = len(index)
                    stack.append(target)
                    work.append((target, iter(graph[target])))
                    break
                if target in stack:
                    low[node] = min(low[node], index[target])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == index[node]:
                    at = stack.index(node)
                    if len(stack) - at > 1:
                        found.append(set(stack[at:]))
                    del stack[at:]
    return sorted(found, key=lambda files: str(min(files)))


def item(name):
    """What a path names for a reader: `Plan` of `crate::plan::Plan::new`."""
    parts = name.split("::")
    return next((part for part in parts if part[0].isupper()), parts[-1])


def turned(arrows):
    """Few arrows of a circle without which there is none: those that point up in an order of the files with few items to move."""

    def cost(order):
        height = {file: at for at, file in enumerate(order)}
        return len({(a.target, item(name)) for a in arrows if height[a.target] > height[a.source] for name in a.names or [a.what]})

    order = sorted({arrow.source for arrow in arrows})
    order.sort(key=lambda file: sum(a.source == file for a in arrows) - sum(a.target == file for a in arrows))
    best, before = cost(order), None
    while before != best:
        before = best
        for file in list(order):
            rest = [other for other in order if other != file]
            tries = [rest[:at] + [file] + rest[at:] for at in range(len(order))]
            order = min([order, *tries], key=cost)
        best = cost(order)
    height = {file: at for at, file in enumerate(order)}
    return [arrow for arrow in arrows if height[arrow.target] > height[arrow.source]]


def top_module(file, source):
    """The module at the top of the crate that a file belongs to; None for the root file."""
    first = file.relative_to(source).parts[0]
    return None if first in ("lib.rs", "main.rs") else first.removesuffix(".rs")


def heights(floors):
    return {name: height for height, floor in enumerate(floors) for name in floor.split()}


def check_crate(name, root, floors, shelves=False, every=False, allowed=()):
    """The faults of a crate, as lines. `floors` lists the names of modules, the lowest floor first; `allowed` the files of circles that may stay."""
    source, faults = root.parent, []
    allowed = [{source / file for file in files} for files in allowed]
    met = []

    def shown(arrow):
        return f"{place(arrow.source)}:{arrow.line} -> {place(arrow.target)} ({arrow.what})"

    def place(file):
        return str(file.relative_to(source.parent.parent))

    crate = Crate(root)
    arrows = crate.arrows()
    for files in circles([arrow for arrow in arrows if shelves or not arrow.shelf]):
        if files in allowed:
            met.append(files)
            continue
        inside = [a for a in arrows if a.source in files and a.target in files and (shelves or not a.shelf)]
        faults.append(f"circle of {len(files)} files: {' '.join(sorted(place(file) for file in files))}")
        faults.append(f"    {len(inside)} arrows; none would be a circle without:")
        faults += [f"    {place(a.source)}:{a.line} -> {place(a.target)} ({', '.join(sorted({item(name) for name in a.names or [a.what]}))})" for a in turned(inside)]
        if every:
            faults += ["    all of them:"] + [f"    {shown(arrow)}" for arrow in inside]
    for files in allowed:
        if files not in met:
            faults.append(f"scripts/floors.toml: {name} has no circle of just {' '.join(sorted(place(file) for file in files))}; hint: take its entry out of [[circles]]")
    height = heights(floors)
    there = {path[0] for path in crate.modules if path}
    if there or floors:
        faults += [f"{place(root)}: {module} has no floor; hint: add it to [modules] {name} of scripts/floors.toml" for module in sorted(there - set(height))]
        faults += [f"scripts/floors.toml: {name} has no module {module}" for module in sorted(set(height) - there)]
    for arrow in arrows:
        here, other = top_module(arrow.source, source), top_module(arrow.target, source)
        if here is None or here == other or here not in height or any({arrow.source, arrow.target} <= files for files in met):
            continue
        if other is None:
            faults.append(f"upward: {shown(arrow)}: the root of the crate is above {here}")
        elif other in height and height[other] >= height[here]:
            faults.append(f"{'upward' if height[other] > height[here] else 'same floor'}: {shown(arrow)}: {here} may not use {other}")
    return faults


def check_ladder(packages, floors):
    """The faults between crates. `packages` maps a name to the names that it depends on."""
    height, faults = heights(floors), []
    for name, needs in sorted(packages.items()):
        if name not in height:
            faults.append(f"{name} has no floor; hint: add it to `crates` of scripts/floors.toml")
            continue
        for need in sorted(set(needs) & set(height)):
            if height[need] >= height[name]:
                faults.append(f"crates/{name}/Cargo.toml: {name} may not depend on {need}")
    return faults + [f"scripts/floors.toml: there is no crate {name}" for name in sorted(set(height) - set(packages))]


def workspace(root):
    """By folder name: the root files of each crate under crates/, and the crates (by folder) that it depends on."""
    command = ["cargo", "metadata", "--no-deps", "--offline", "--format-version", "1", "--manifest-path", root / "Cargo.toml"]
    listed = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)["packages"]
    folder = {package["name"]: Path(package["manifest_path"]).parent.name for package in listed}
    roots = {}
    for package in listed:
        targets = [t for t in package["targets"] if {"lib", "bin", "cdylib", "rlib", "proc-macro"} & set(t["kind"])]
        main = [Path(t["src_path"]) for t in targets if Path(t["src_path"]).name in ("lib.rs", "main.rs")]
        roots[folder[package["name"]]] = min(main, key=lambda path: path.name)
    needs = {folder[p["name"]]: [folder[d["name"]] for d in p["dependencies"] if d["name"] in folder] for p in listed}
    return roots, needs


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--self-test", action="store_true", help="tries this script on small made-up crates")
    parser.add_argument("--shelves", action="store_true", help="counts re-exports as arrows")
    parser.add_argument("--every", action="store_true", help="lists every arrow of a circle, not only those to turn")
    parser.add_argument("--show", metavar="FILE", help="lists the arrows from and to the files whose path ends so")
    parser.add_argument("--root", type=Path, default=ROOT)
    args = parser.parse_args()
    if args.self_test:
        from floors_test import run

        return run()
    floors = tomllib.loads(FLOORS.read_text())
    roots, needs = workspace(args.root)
    if args.show:
        for root in roots.values():
            for arrow in Crate(root).arrows():
                if any(str(file).endswith(args.show) for file in (arrow.source, arrow.target)):
                    shelf = ", a re-export" if arrow.shelf else ""
                    print(f"{arrow.source.relative_to(args.root)}:{arrow.line} -> {arrow.target.relative_to(args.root)} ({arrow.what}{shelf})")
        return 0
    circles_that_stay = floors.get("circles", [])
    for circle in circles_that_stay:
        print(f"a circle of {len(circle['files'])} files of {circle['crate']} stays: {circle['reason']}")
    faults = check_ladder(needs, floors["crates"])
    for name, root in sorted(roots.items()):
        allowed = [circle["files"] for circle in circles_that_stay if circle["crate"] == name]
        faults += check_crate(name, root, floors["modules"].get(name, []), args.shelves, args.every, allowed)
    named = set(floors["modules"]) | {circle["crate"] for circle in circles_that_stay}
    faults += [f"scripts/floors.toml: there is no crate {name}" for name in sorted(named - set(roots))]
    print("\n".join(faults) or f"{len(roots)} crates: no circle of files, no upward import")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
