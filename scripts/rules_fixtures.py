"""What mlx_lm.convert writes for a tiny checkpoint of each model type, as digests for crates/quant/tests/rules.rs.

    python scripts/rules_fixtures.py CHECKPOINTS [TYPE ...]

needs mlx-lm 0.32.2. CHECKPOINTS is a folder of small checkpoints in the hub's form, one for each type (names, dtypes, shapes and
config.json are all that is taken of them; the project's are made by tools/breadth/make.py). Values are functions of a tensor's
name, so that the test makes the same ones; see `fill`.

A fixture groups tensors by their names with numbers replaced by `#`: `source` says dtype, shape and which numbers there are;
`written` has for each conversion what it changes in config.json (null: removed; `quantization` stands for its copy, too), and
of each kind of tensor the beginning of a SHA-256 over the line "NAME DTYPE SHAPE\\n" and the bytes of each, by name.
"""

import hashlib
import json
import re
import shutil
import struct
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np

mx.set_default_device(mx.cpu)
ROOT = Path(__file__).resolve().parent.parent / "crates/quant/tests/fixtures"
TOKENIZER = ROOT / "zoo/llama_tied"
CASES = {"q4": {}, "mxfp4": {"q_mode": "mxfp4"}, "mixed_4_6": {"quant_predicate": "mixed_4_6"}}
# Where the last bit depends on how an exponential is computed.
ZEROS = ("residual_gate.gate",)


def header(file):
    with open(file, "rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        tensors = json.loads(opened.read(length))
        tensors.pop("__metadata__", None)
        return tensors, 8 + length


def fill(name, dtype, shape):
    """Bytes of a tensor: SplitMix64 from the FNV-1a hash of its name; its upper 8 bits / 64 (bfloat16), 24 bits / 2^22 (float32)
    as signed numbers, or its upper byte as it is."""
    seed = 0xCBF29CE484222325
    for byte in name.encode():
        seed = ((seed ^ byte) * 0x100000001B3) % 2**64
    count = int(np.prod(shape, dtype=np.int64))
    if name.endswith(ZEROS):
        return bytes(count * {"BF16": 2, "F32": 4}[dtype])
    with np.errstate(over="ignore"):
        state = np.uint64(seed) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    if dtype == "BF16":
        values = (state >> np.uint64(56)).astype(np.uint8).view(np.int8).astype(np.float32) / 64
        return (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    if dtype == "F32":
        return ((state >> np.uint64(32)).astype(np.uint32).view(np.int32) // 256 / np.float64(2**22)).astype("<f4").tobytes()
    assert dtype in ("U8", "I8", "F8_E4M3"), dtype
    return (state >> np.uint64(56)).astype(np.uint8).tobytes()


def write(source, target):
    """The checkpoint of SOURCE with other values."""
    target.mkdir()
    tensors, _ = header(source / "model.safetensors")
    head, data = {}, b""
    for name in sorted(tensors):
        own = fill(name, tensors[name]["dtype"], tensors[name]["shape"])
        head[name] = {**tensors[name], "data_offsets": [len(data), len(data) + len(own)]}
        data += own
    head = json.dumps(head).encode()
    (target / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + data)
    shutil.copy(source / "config.json", target)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, target)
    return tensors


def kind(name):
    return re.sub(r"\d+", "#", name)


def grouped(tensors):
    kinds = {}
    for name in sorted(tensors):
        numbers = ".".join(re.findall(r"\d+", name))
        one = kinds.setdefault(kind(name), {})
        one.setdefault((tensors[name]["dtype"], tuple(tensors[name]["shape"])), []).append(numbers)
    return {
        name: [[dtype, list(shape), " ".join(numbers)] for (dtype, shape), numbers in one.items()]
        for name, one in sorted(kinds.items())
    }


def digests(directory):
    places = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors, base = header(file)
        places |= {name: (file, base, info) for name, info in tensors.items()}
    sums = {}
    for name in sorted(places):
        file, base, info = places[name]
        digest = sums.setdefault(kind(name), hashlib.sha256())
        digest.update(f"{name} {info['dtype']} {info['shape']}\n".encode())
        with open(file, "rb") as opened:
            start, end = info["data_offsets"]
            opened.seek(base + start)
            digest.update(opened.read(end - start))
    return {name: digest.hexdigest()[:20] for name, digest in sums.items()}


def convert(source, target, arguments):
    from mlx_lm import utils
    from mlx_lm.convert import convert, mixed_quant_predicate_builder

    try:
        return convert(str(source), str(target), quantize=True, **arguments)
    except Exception as error:
        if "expected keys for mixed" in str(error):
            raise
        # Its tokenizer was what failed: configuration classes of transformers refuse some configs that mlx-lm takes.
    from mlx.utils import tree_map_with_path

    shutil.rmtree(target, ignore_errors=True)
    model, config = utils.load_model(source, lazy=True)
    cast = getattr(model, "cast_predicate", lambda _: True)
    floating = lambda name, value: cast(name) and mx.issubdtype(value.dtype, mx.floating)
    model.update(
        tree_map_with_path(lambda k, v: v.astype(mx.bfloat16) if floating(k, v) else v, model.parameters())
    )
    recipe = arguments.get("quant_predicate")
    predicate = mixed_quant_predicate_builder(recipe, model) if recipe else None
    model, config = utils.quantize_model(
        model, config, None, None, mode=arguments.get("q_mode", "affine"), quant_predicate=predicate
    )
    utils.save_model(target, model)
    utils.save_config(config, target / "config.json")


def fixture(source):
    with tempfile.TemporaryDirectory() as folder:
        tensors = write(source, Path(folder) / "source")
        config = json.loads((source / "config.json").read_text())
        written = {}
        for case, arguments in CASES.items():
            target = Path(folder) / case
            try:
                convert(Path(folder) / "source", target, arguments)
            except ValueError as error:
                # A recipe looks for down_proj, and for a number in each path (LongCat's table of n-grams has none).
                assert case == "mixed_4_6", error
                if "expected keys for mixed" not in str(error):
                    written[case] = None
                continue
            out = json.loads((target / "config.json").read_text())
            assert out.pop("quantization_config") == out["quantization"]
            both = sorted(set(config) | set(out))
            changed = {key: out.get(key) for key in both if config.get(key) != out.get(key)}
            written[case] = {"changed": changed, "tensors": digests(target)}
    return {"config": config, "source": grouped(tensors), "written": written}


def compact(value, depth=0):
    """JSON with a line for each of the outer entries."""
    if depth < 3 and isinstance(value, dict) and value:
        inner = ",\n".join(f"{json.dumps(key)}: {compact(one, depth + 1)}" for key, one in value.items())
        return "{\n" + inner + "\n}"
    return json.dumps(value, separators=(",", ":"))


def main():
    checkpoints = Path(sys.argv[1])
    (ROOT / "rules").mkdir(exist_ok=True)
    for name in sys.argv[2:] or sorted(path.name for path in checkpoints.iterdir()):
        try:
            made = fixture(checkpoints / name)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {str(error)[:200]}")
            continue
        (ROOT / "rules" / f"{name}.json").write_text(compact(made) + "\n")
        print(name, len(made["source"]), "kinds", flush=True)


if __name__ == "__main__":
    main()
