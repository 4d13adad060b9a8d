#!/usr/bin/env python3
"""Makes a checkpoint of seeds (crates/quant/tests/fixtures/seeds) from any small checkpoint of one family.

    python seeds.py [--set JSON] [--rename JSON] [--mlx] CHECKPOINT OUT

Names, shapes and dtypes are the checkpoint's; its numbers are replaced by what a seed gives (crates/quant/tests/common/seeds.rs
makes the same), so that only these are kept: config.json, tensors.json, the logits of two windows (of transformers where it has the
model, else of mlx-lm) and what `mlx_lm.convert -q` writes (dtype, shape and sha256 of every tensor, config.json).

Needs mlx-lm 0.32.2, transformers and torch. --set: [[PATTERN, CENTER, SPREAD], ...] of tensors whose names do not tell (norms that
store `w - 1`). --rename: [[PATTERN, NAME], ...], which turn the names into those that transformers reads. --mlx: a model that transformers computes otherwise than it was trained.
"""

import argparse
import hashlib
import json
import re
import struct
import sys
import tempfile
from pathlib import Path

import numpy as np

TOKENS = (2, 24)
DTYPES = {"BF16": 2, "F32": 4}
U64 = np.uint64


def mixed(x):
    """splitmix64's output function."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> U64(30))) * U64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> U64(27))) * U64(0x94D049BB133111EB)
        return x ^ (x >> U64(31))


def seed_of(name):
    """FNV-1a of the name."""
    h = 0xCBF29CE484222325
    for byte in name.encode():
        h = (h ^ byte) * 0x100000001B3 % 2**64
    return h


def draws(name, count):
    """`count` numbers in [0, 1)."""
    with np.errstate(over="ignore"):
        at = np.arange(1, count + 1, dtype=U64) * U64(0x9E3779B97F4A7C15) + U64(seed_of(name))
    return (mixed(at) >> U64(40)).astype(np.float64) / 2.0**24


def values(name, shape, center, spread):
    u = draws(name, int(np.prod(shape)))
    return (center + spread * (2.0 * u - 1.0)).astype(np.float32).reshape(shape)


def to_bf16(a):
    u = np.ascontiguousarray(a, np.float32).view(np.uint32)
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)


def rounded(dtype, array):
    """What a file of this dtype holds."""
    return (to_bf16(array).astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else array


def header(path):
    with open(path, "rb") as f:
        (n,) = struct.unpack("<Q", f.read(8))
        return {k: v for k, v in json.loads(f.read(n)).items() if k != "__metadata__"}, 8 + n


def distribution(name, shape, said):
    """Center and spread of a tensor's numbers, by its name."""
    for pattern, center, spread in said:
        if re.search(pattern, name):
            return center, spread
    if re.search(r"norm|ln_|scale|scalar", name) and len(shape) <= 2 and not name.endswith("bias"):
        return 1.0, 0.3
    if len(shape) == 1 or "alpha" in name or name.endswith("bias"):
        return 0.0, 0.3
    if "embed" in name or "wte" in name:
        return 0.0, 0.1
    return 0.0, round(1.56 / shape[-1] ** 0.5, 4)


def write(path, tensors):
    head, blobs, offset = {}, [], 0
    for name, (dtype, array) in tensors.items():
        data = to_bf16(array).tobytes() if dtype == "BF16" else array.astype(np.float32).tobytes()
        head[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
        blobs.append(data)
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))


def of_mlx(directory, tokens):
    import mlx.core as mx
    from mlx.utils import tree_map
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    model, _ = load_model(directory, strict=True)
    cast = lambda x: x.astype(mx.float32) if mx.issubdtype(x.dtype, mx.floating) else x
    model.update(tree_map(cast, model.parameters()))
    return np.array(model(mx.array(tokens)).astype(mx.float32))


def of_transformers(directory, tokens):
    import torch
    import transformers

    named = json.loads((directory / "config.json").read_text()).get("architectures", ["X"])[0]
    model, info = getattr(transformers, named, transformers.AutoModelForCausalLM).from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    left = {key: value for key, value in info.items() if value}
    if left:
        raise ValueError(f"not loaded: {left}")
    with torch.no_grad():
        return model.eval()(torch.tensor(tokens, dtype=torch.long), use_cache=False).logits.float().numpy()


def listing(directory, at):
    from mlx_lm.convert import convert

    convert(str(directory), str(at), quantize=True)
    head, base = header(at / "model.safetensors")
    data = (at / "model.safetensors").read_bytes()
    tensors = {}
    for name in sorted(head):
        begin, end = head[name]["data_offsets"]
        sha = hashlib.sha256(data[base + begin : base + end]).hexdigest()
        tensors[name] = {"dtype": head[name]["dtype"], "shape": head[name]["shape"], "sha256": sha}
    files = ("config.json", "model.safetensors", "model.safetensors.index.json")
    return {
        "tensors": tensors,
        "index_metadata": json.loads((at / files[2]).read_text())["metadata"],
        "config": json.loads((at / files[0]).read_text()),
        "files": {name: None for name in files},
    }


def lines(table):
    """JSON with an entry a line."""
    rows = (f"{json.dumps(key)}: {json.dumps(value, separators=(', ', ': '))}" for key, value in table.items())
    return "{\n" + ",\n".join(rows) + "\n}\n"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--set", default="[]")
    parser.add_argument("--rename", default="[]")
    parser.add_argument("--mlx", action="store_true")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    config = json.loads((args.checkpoint / "config.json").read_text())
    head, _ = header(args.checkpoint / "model.safetensors")
    spec, tensors = {}, {}
    for name in sorted(head):
        dtype, shape = head[name]["dtype"], head[name]["shape"]
        center, spread = distribution(name, shape, json.loads(args.set))
        spec[name] = [dtype, shape, center, spread]
        tensors[name] = (dtype, values(name, shape, center, spread))
    vocabulary = config.get("text_config", config)["vocab_size"]
    tokens = np.minimum(draws("tokens", int(np.prod(TOKENS))) * vocabulary, vocabulary - 1).astype(np.int32).reshape(TOKENS)
    with tempfile.TemporaryDirectory() as temporary:
        whole = Path(temporary) / "whole"
        whole.mkdir()
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (whole / name).write_bytes((args.checkpoint / name).read_bytes())
        (whole / "config.json").write_text(json.dumps(config))
        # In float32, so that what mlx-lm adds to a weight as it loads is not rounded.
        write(whole / "model.safetensors", {name: ("F32", rounded(*tensor)) for name, tensor in tensors.items()})
        mlx = of_mlx(whole, tokens)
        write(whole / "model.safetensors", tensors)
        listed = listing(whole, Path(temporary) / "converted")
        logits, said = {"logits": mlx}, "mlx-lm alone"
        try:
            if args.mlx:
                raise ValueError("not asked")
            renamed = tensors
            for pattern, to in json.loads(args.rename):
                renamed = {re.sub(pattern, to, name): tensor for name, tensor in renamed.items()}
            write(whole / "model.safetensors", renamed)
            theirs = of_transformers(whole, tokens)
            difference = np.abs(theirs - mlx).max() / np.abs(theirs).max()
            logits, said = {"logits_transformers": theirs}, f"mlx-lm and transformers differ by {difference:.1e}"
        except Exception as error:  # of many kinds: a type or a form of checkpoint that transformers does not have
            said += f" ({type(error).__name__}: {str(error)[:300]})"
        for side in logits.values():
            assert np.isfinite(side).all()
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (args.out / "tensors.json").write_text(lines(spec))
    (args.out / "convert_q4.json").write_text(json.dumps(listed, indent=None, separators=(",", ":")) + "\n")
    arrays = {"tokens": ("I32", tokens), **{name: ("F32", array.astype(np.float32)) for name, array in logits.items()}}
    head, blobs, offset = {}, [], 0
    for name, (dtype, array) in arrays.items():
        data = np.ascontiguousarray(array).tobytes()
        head[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
        blobs.append(data)
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    (args.out / "oracle.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))
    largest = max(float(np.abs(side).max()) for side in logits.values())
    print(f"{args.out.name}: {len(spec)} tensors, {len(listed['tensors'])} written, largest logit {largest:.2f}; {said}")


if __name__ == "__main__":
    sys.exit(main())
