"""Compares mlx-quant with the real mlx_lm.convert, tensor for tensor, and loads its output with mlx-lm.

    scripts/mlx.sh scripts/interop.py --bin target/release/mlx-quant --model DIR
        [--builtin] [--cases quick|full] [--generate 20] [--json OUT] [--work DIR]

Each case converts the same source with both. Equal must be: the names, types, shapes and bytes of all
tensors, the safetensors metadata, config.json as parsed, and the sizes in the index. One difference is
allowed: in the entry of a layer where mlx-lm writes "group_size": null (a recipe without
--q-group-size), mlx-quant writes the number that null stands for. Then mlx-lm loads our output strictly;
two cases also generate text. Exit status 1: something differs. A case that mlx-lm itself refuses is skipped.
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.convert import convert
from mlx_lm.generate import generate_step
from mlx_lm.utils import load

from _measure import Checkpoint, measured, versions

RECIPES = ["mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"]
FLAGS = {
    "bits": "--q-bits",
    "group": "--q-group-size",
    "mode": "--q-mode",
    "recipe": "--quant-predicate",
    "dtype": "--dtype",
}
PROMPT = "The capital of France is"


def case(name, generate=False, source=None, keep=False, **settings):
    return {"name": name, "generate": generate, "source": source, "keep": keep, "settings": settings}


def quantized(name, **settings):
    return case(name, quantize=True, **settings)


QUICK = [
    quantized("4-bit", generate=True),
    quantized("3-bit g32", bits=3, group=32),
    quantized("mxfp4", mode="mxfp4"),
    quantized("mixed_4_6", recipe="mixed_4_6", generate=True),
]
FULL = [
    quantized("4-bit", generate=True, keep=True),
    *(quantized(f"{bits}-bit g64", bits=bits, group=64) for bits in (2, 3, 4, 5, 6, 8)),
    *(quantized(f"4-bit g{group}", bits=4, group=group) for group in (32, 128)),
    *(quantized(mode, mode=mode) for mode in ("mxfp4", "mxfp8", "nvfp4")),
    *(quantized(recipe, recipe=recipe, generate=recipe == "mixed_4_6") for recipe in RECIPES),
    case("float16", dtype="float16"),
    case("-d of our 4-bit", source="4-bit", dequantize=True),
]


def arguments(settings):
    found = ["-q"] if settings.get("quantize") else []
    found += ["-d"] if settings.get("dequantize") else []
    for key, flag in FLAGS.items():
        if key in settings:
            found += [flag, str(settings[key])]
    return found


def run_ours(binary, source, out, settings):
    command = [str(binary), "convert", *(["--model", str(source)] if source else []), "--mlx-path", str(out)]
    env = {k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", "LD_LIBRARY_PATH")}
    result = measured([*command, *arguments(settings), "--quiet"], env)
    return None if result["rc"] == 0 else f"exit status {result['rc']}: {result['tail'][-400:]}"


def run_theirs(source, out, settings):
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            convert(
                str(source),
                str(out),
                quantize=settings.get("quantize", False),
                dequantize=settings.get("dequantize", False),
                q_bits=settings.get("bits"),
                q_group_size=settings.get("group"),
                q_mode=settings.get("mode", "affine"),
                quant_predicate=settings.get("recipe"),
                dtype=settings.get("dtype"),
            )
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        mx.clear_cache()
    return None


def compare_data(name, ours, theirs):
    step, bad, first = 1 << 24, 0, None
    for start in range(0, len(theirs), step):
        a, b = bytes(ours[start : start + step]), bytes(theirs[start : start + step])
        if a != b:
            differ = np.flatnonzero(np.frombuffer(a, np.uint8) != np.frombuffer(b, np.uint8))
            first = start + int(differ[0]) if first is None else first
            bad += len(differ)
    return [f"{name}: {bad} of {len(theirs)} bytes differ, the first at {first}"] if bad else []


def compare_tensors(ours, theirs):
    problems = [f"{name}: missing in ours" for name in theirs.tensors.keys() - ours.tensors.keys()]
    problems += [f"{name}: only in ours" for name in ours.tensors.keys() - theirs.tensors.keys()]
    for name in sorted(ours.tensors.keys() & theirs.tensors.keys()):
        if ours.tensors[name] != theirs.tensors[name]:
            problems.append(f"{name}: {ours.tensors[name]}, mlx-lm: {theirs.tensors[name]}")
        else:
            problems += compare_data(name, ours.data(name), theirs.data(name))
    return problems


def differences(path, a, b):
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(a.keys() | b.keys()):
            where = (*path, key)
            if key not in a or key not in b:
                yield where, f"only in {'ours' if key in a else 'mlx-lm'}"
            else:
                yield from differences(where, a[key], b[key])
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b)):
            yield from differences((*path, i), x, y)
    elif type(a) is not type(b) or a != b:
        yield path, (a, b)


def compare_configs(ours, theirs):
    """The differences, and how often null was spelled out."""
    problems, nulls = [], 0
    for path, found in differences((), ours, theirs):
        layer_entry = len(path) == 3 and path[0] in ("quantization", "quantization_config")
        if layer_entry and path[2] == "group_size" and found == (ours[path[0]]["group_size"], None):
            nulls += 1
            continue
        text = found if isinstance(found, str) else "{!r}, mlx-lm: {!r}".format(*found)
        problems.append(f"config {'.'.join(map(str, path))}: {text}")
    return problems, nulls


def read_json(path):
    return json.loads(path.read_text())


def compare_indexes(our_dir, their_dir, ours):
    path = our_dir / "model.safetensors.index.json"
    if not path.exists():
        return ["index: missing in ours"]
    index = read_json(path)
    metadata, expected = index["metadata"], read_json(their_dir / path.name)["metadata"]
    problems = [f"index metadata: {metadata}, mlx-lm: {expected}"] if metadata != expected else []
    if index["weight_map"] != ours.file_of:
        problems.append("index: weight_map does not name exactly the tensors of the files")
    return problems


def compare_metadata(ours, theirs):
    found, expected = (
        [dict(m) for m in {tuple(sorted(s.metadata.items())) for s in c.shards.values()}] for c in (ours, theirs)
    )
    return [f"safetensors metadata: {found}, mlx-lm: {expected}"] if found != expected else []


def load_and_generate(directory, reference, count):
    """The number of generated tokens; problems found."""
    try:
        model, tokenizer = load(str(directory))
        prompt = tokenizer.encode(PROMPT)
        _, their_tokenizer = load(str(reference), lazy=True)
        expected = their_tokenizer.encode(PROMPT)
        if prompt != expected:
            return 0, [f"tokenizer: {prompt}, mlx-lm: {expected}"]
        tokens = 0
        for _, logprobs in generate_step(mx.array(prompt), model, max_tokens=count) if count else ():
            if not mx.isfinite(mx.logsumexp(logprobs)).item():
                return tokens, ["generation: the logits are not finite"]
            tokens += 1
    except Exception as error:
        return 0, [f"load: {type(error).__name__}: {error}"]
    finally:
        mx.clear_cache()
    return tokens, [] if tokens == count else [f"generation: {tokens} of {count} tokens"]


def run_case(args, work, kept, c):
    result = {"case": c["name"], "arguments": arguments(c["settings"])}
    our_dir, their_dir = work / "ours", work / "theirs"
    source = kept.get(c["source"]) if c["source"] else args.model
    if source is None:
        return result | {"status": "skipped", "reason": f"needs the case {c['source']}"}
    error = run_ours(args.bin, None if args.builtin and not c["source"] else source, our_dir, c["settings"])
    their_error = run_theirs(source, their_dir, c["settings"])
    if their_error:
        reason = f"mlx-lm refuses: {their_error} (mlx-quant: {'refuses' if error else 'converts'})"
        return result | {"status": "skipped", "reason": reason}
    if error:
        return result | {"status": "failed", "problems": [error]}
    try:
        ours, theirs = Checkpoint(our_dir), Checkpoint(their_dir)
    except (ValueError, KeyError) as unreadable:
        return result | {"status": "failed", "problems": [f"unreadable: {unreadable!r}"]}
    problems = compare_tensors(ours, theirs)
    result |= {"tensors": len(theirs.tensors), "mismatches": len(problems)}
    config_problems, nulls = compare_configs(read_json(our_dir / "config.json"), read_json(their_dir / "config.json"))
    other = config_problems + compare_metadata(ours, theirs) + compare_indexes(our_dir, their_dir, ours)
    tokens, load_problems = load_and_generate(our_dir, their_dir, args.generate if c["generate"] else 0)
    problems += other + load_problems
    if c["keep"]:
        kept[c["name"]] = our_dir.rename(work / "kept")
    return result | {
        "status": "failed" if problems else "equal",
        "other_mismatches": len(other),
        "loads": not load_problems,
        "generated": tokens,
        "null_group_sizes": nulls,
        "problems": problems,
    }


def describe(result):
    name = f"{result['case']:<16}"
    if result["status"] == "skipped":
        return f"{name} skipped: {result['reason']}"
    if "tensors" not in result:
        return f"{name} FAILED"
    text = f"{name} {result['tensors']:>5} tensors, {result['mismatches']} differ; config, index: "
    text += "equal" if not result["other_mismatches"] else f"{result['other_mismatches']} differ"
    if result["null_group_sizes"]:
        text += f" ({result['null_group_sizes']} null group sizes of mlx-lm are numbers in ours)"
    text += f"; loads: {'yes' if result['loads'] else 'NO'}"
    text += f"; generated {result['generated']} tokens" if result["generated"] else ""
    return text if result["status"] == "equal" else f"{text}  FAILED"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=Path, default=Path("target/release/mlx-quant"))
    parser.add_argument("--model", type=Path, required=True, help="the source, a Hugging Face directory")
    parser.add_argument(
        "--builtin", action="store_true", help="mlx-quant converts its built-in model, which must equal --model"
    )
    parser.add_argument("--cases", choices=["quick", "full"], default="quick")
    parser.add_argument("--generate", type=int, default=20, help="tokens to generate (20; 0: only load)")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--work", type=Path, help="folder for temporary outputs")
    args = parser.parse_args()
    if not os.access(args.bin, os.X_OK):
        parser.error(f"no binary at {args.bin} (build it, or give --bin)")
    if not (args.model / "config.json").exists():
        parser.error(f"no model in {args.model}")
    args.bin = args.bin.resolve()
    mx.set_default_device(mx.cpu)

    results, kept = [], {}
    with tempfile.TemporaryDirectory(dir=args.work, prefix="interop-") as folder:
        work = Path(folder)
        for c in FULL if args.cases == "full" else QUICK:
            result = run_case(args, work, kept, c)
            results.append(result)
            print(describe(result), flush=True)
            for problem in result.get("problems", [])[:10]:
                print(f"    {problem}")
            if len(result.get("problems", [])) > 10:
                print(f"    and {len(result['problems']) - 10} more")
            for directory in (work / "ours", work / "theirs"):
                shutil.rmtree(directory, ignore_errors=True)
    count = {status: sum(r["status"] == status for r in results) for status in ("equal", "failed", "skipped")}
    print(f"{count['equal']} equal, {count['failed']} failed, {count['skipped']} skipped")
    if args.json:
        record = {"versions": versions(args.bin), "model": str(args.model), "builtin": args.builtin, "results": results}
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(1 if count["failed"] or not count["equal"] else 0)


if __name__ == "__main__":
    main()
