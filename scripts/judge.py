#!/usr/bin/env python3
"""`mlx-quant eval` against the real MLX: perplexity, KL and top-1 agreement of a model and its reference.

    scripts/mlx.sh scripts/judge.py --bin target/release/mlx-quant --reference DIR --model DIR [--model DIR ...]
                   [--text FILE] [--windows 8]

MLX runs both models in float32 on the CPU, quantized layers decoded in float32. Perplexity and KL must agree within
0.5 %, top-1 within 0.1 point. Exit status 1 if one does not.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map
from mlx_lm.utils import dequantize_model, load_model, load_tokenizer

ROOT = Path(__file__).resolve().parent.parent


def dense(path):
    """The model in float32; scales become float32 before anything is decoded, so that nothing is rounded."""
    model, _ = load_model(Path(path), lazy=True)
    widen = lambda x: x.astype(mx.float32) if mx.issubdtype(x.dtype, mx.floating) else x  # noqa: E731
    model.update(tree_map(widen, model.parameters()))
    model = dequantize_model(model)
    model.update(tree_map(widen, model.parameters()))
    mx.eval(model.parameters())
    return model


def windows_of(tokenizer, text, count, length):
    prefix = tokenizer.encode("a")[:-1]
    ids = tokenizer.encode(text)[len(prefix) :]
    step = length - len(prefix)
    total = len(ids) // step
    picked = sorted({round(i) for i in np.linspace(0, total - 1, min(count, total)).tolist()})
    return [prefix + ids[i * step : (i + 1) * step] for i in picked]


def log_probabilities(model, window):
    logits = np.array(model(mx.array(window)[None])[0, :-1].astype(mx.float32)).astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", required=True)
    parser.add_argument("--reference", required=True)
    parser.add_argument("--model", action="append", required=True)
    parser.add_argument("--text", type=Path, default=ROOT / "crates/texts/files/held_out.txt")
    parser.add_argument("--windows", type=int, default=8)
    args = parser.parse_args()
    mx.set_default_device(mx.cpu)

    text = args.text.read_text(encoding="utf8")
    windows = windows_of(load_tokenizer(Path(args.reference)), text, args.windows, 512)
    reference = dense(args.reference)
    references = [log_probabilities(reference, window) for window in windows]
    failed = 0
    for path in args.model:
        model = dense(path)
        nll, kl, top1 = [], [], []
        for window, p in zip(windows, references):
            q = log_probabilities(model, window)
            nll.append(-q[np.arange(len(window) - 1), window[1:]])
            kl.append((np.exp(p) * (p - q)).sum(-1))
            top1.append(p.argmax(-1) == q.argmax(-1))
        theirs = {
            "perplexity": float(np.exp(np.concatenate(nll).mean())),
            "kl_mean": float(np.concatenate(kl).mean()),
            "top1": float(np.concatenate(top1).mean()),
        }
        command = [args.bin, "eval", "--model", path, "--reference", args.reference, "--data", str(args.text)]
        command += ["--windows", str(args.windows), "--json", "--quiet"]
        ours = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
        agrees = abs(ours["top1"] - theirs["top1"]) <= 0.001
        for key in ("perplexity", "kl_mean"):
            agrees &= abs(ours[key] - theirs[key]) <= 0.005 * theirs[key] + 1e-9
        failed += not agrees
        cells = (f"{key} {ours[key]:.5f} (MLX {theirs[key]:.5f})" for key in theirs)
        print(f"{'agrees' if agrees else 'DIFFERS'}  {Path(path).name}: {', '.join(cells)}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
