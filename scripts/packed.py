"""Takes every packed fixture over with mlx-quant and loads the result with the real mlx_lm.

    scripts/mlx.sh scripts/packed.py BINARY

A form passes if mlx_lm loads the directory strictly and runs it, and if every packed layer that it then holds decodes (by
mx.dequantize, in float32) to the SHA-256 of the source's own numbers. Forms that mlx-quant refuses are listed with its reason.
"""
import hashlib, json, subprocess, sys, tempfile
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.utils import load_model

mx.set_default_device(mx.cpu)
FIXTURES = Path(__file__).resolve().parent.parent / "crates/quant/tests/fixtures/packed"


def decoded(module):
    """What is stored, rounded to float32 once."""
    shape = (module.group_size, module.bits)
    if module.mode != "affine":
        return np.array(mx.dequantize(module["weight"], module["scales"], None, *shape, mode=module.mode, dtype=mx.float32))
    wide = lambda name: np.array(module[name].astype(mx.float32)).astype(np.float64).repeat(module.group_size, -1)
    ones = mx.ones(module["scales"].shape)
    codes = np.array(mx.dequantize(module["weight"], ones, ones * 0, *shape)).astype(np.float64)
    return (codes * wide("scales") + wide("biases")).astype(np.float32)


def check(form, binary, target):
    run = subprocess.run([binary, "convert", "--model", form, "--mlx-path", target], capture_output=True, text=True)
    if run.returncode == 2:
        return "refused: " + run.stderr.strip().splitlines()[-1][:150]
    if run.returncode:
        return "FAILED: " + run.stderr
    model, _ = load_model(target, strict=True)
    logits = model(mx.array([[1, 2, 3, 4, 5, 6, 7, 8]]))
    if not mx.isfinite(logits).all().item():
        return "FAILED: logits are not finite"
    modules = dict(model.named_modules())
    hashes = json.loads((form / "decoded.json").read_text())
    packed = 0
    for name, expected in hashes.items():
        path, expert = name.removesuffix(".weight"), None
        if ".experts." in path:
            before, behind = path.split(".experts.")
            expert, leaf = behind.split(".")
            path = f"{before}.switch_mlp.{leaf}"
        module = modules[path]
        if "scales" not in module:
            continue
        value = decoded(module)
        value = value if expert is None else value[int(expert)]
        if hashlib.sha256(np.ascontiguousarray(value, np.float32).tobytes()).hexdigest() != expected:
            return f"FAILED: {name} decodes to other numbers"
        packed += 1
    return f"ok: {packed} of {len(hashes)} matrices taken over, the same numbers"


def main():
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        for form in sorted(path for path in FIXTURES.iterdir() if path.is_dir()):
            try:
                result = check(form, sys.argv[1], Path(temporary) / form.name)
            except Exception as error:
                result = f"FAILED: {type(error).__name__}: {error}"
            failed += result.startswith("FAILED")
            print(f"{form.name:22} {result}", flush=True)
    print(f"{failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
