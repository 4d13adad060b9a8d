"""Writes a llama checkpoint of random bfloat16 weights, of about the size asked for.

    python3 scripts/make_checkpoint.py OUT --gigabytes 8 --layers 32 [--tokenizer DIR]

For speed and memory measurements: the weights are normal with sigma 0.02, the shapes plausible (or
given by --hidden and --intermediate instead of --gigabytes), the shards at most 2 GB. Without --tokenizer a tokenizer of a few words is written, since mlx-lm wants one.
Only the standard library is used, and a few megabytes of memory.
"""

import argparse
import json
import math
import random
import shutil
import struct
import sys
from array import array
from pathlib import Path

STEP = 256
SHARD = 2_000_000_000
POOL = 1 << 20
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model",
    "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


def per_layer(hidden, intermediate):
    return 3 * hidden * hidden + 3 * hidden * intermediate + 2 * hidden


def sizes(parameters, layers, vocab):
    """The (hidden, intermediate) nearest to that many parameters, of usual proportions where it can be."""
    best = None
    for hidden in range(STEP, 32 * 1024 + 1, STEP):
        rest = parameters - 2 * vocab * hidden - hidden
        wanted = (rest / layers - per_layer(hidden, 0)) / (3 * hidden)
        intermediate = max(STEP, round(wanted / STEP) * STEP)
        total = parameters - rest + layers * per_layer(hidden, intermediate)
        ratio = intermediate / hidden
        shape = abs(math.log(ratio / 3.2))
        miss = abs(total - parameters) / parameters
        cost = (max(0, miss - 0.01) * 100 + max(0, shape - 0.25), miss)
        if best is None or cost < best[0]:
            best = cost, hidden, intermediate, miss
    _, hidden, intermediate, miss = best
    if miss > 0.1:
        sys.exit(f"no such model: {vocab} words and {layers} layers cannot make {2 * parameters / 1e9:.3f} GB")
    return hidden, intermediate


def shapes(hidden, intermediate, layers, vocab):
    yield "model.embed_tokens.weight", (vocab, hidden)
    for i in range(layers):
        prefix = f"model.layers.{i}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.mlp.down_proj.weight", (hidden, intermediate)
        yield f"{prefix}.mlp.gate_proj.weight", (intermediate, hidden)
        yield f"{prefix}.mlp.up_proj.weight", (intermediate, hidden)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        yield f"{prefix}.self_attn.k_proj.weight", (hidden // 2, hidden)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, hidden)
        yield f"{prefix}.self_attn.q_proj.weight", (hidden, hidden)
        yield f"{prefix}.self_attn.v_proj.weight", (hidden // 2, hidden)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)


def bf16(values):
    words = array("H", struct.pack(f"={len(values)}f", *values))
    words = words[1 if sys.byteorder == "little" else 0 :: 2]
    if sys.byteorder == "big":
        words.byteswap()
    return words.tobytes()


class Weights:
    """Random weights, as runs that start anywhere in one pool of values."""

    def __init__(self, seed):
        self._random = random.Random(seed)
        self._pool = memoryview(bf16([self._random.gauss(0, 0.02) for _ in range(POOL)]))
        self._norms = memoryview(bf16([self._random.gauss(1, 0.1) for _ in range(1 << 15)]))

    def write(self, file, shape):
        pool, run = (self._norms, 1 << 10) if len(shape) == 1 else (self._pool, 1 << 16)
        left = 2 * math.prod(shape)
        while left > 0:
            parts = []
            for _ in range(64):
                start = 2 * self._random.randrange((len(pool) - run) // 2)
                parts.append(pool[start : start + min(run, left)])
                left -= len(parts[-1])
                if left == 0:
                    break
            file.write(b"".join(parts))


def shards(tensors):
    found, size = [[]], 0
    for name, shape in tensors:
        count = 2 * math.prod(shape)
        if found[-1] and size + count > SHARD:
            found.append([])
            size = 0
        found[-1].append((name, shape))
        size += count
    return found


def write_shard(path, tensors, weights):
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in tensors:
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, shape in tensors:
            weights.write(file, shape)


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n")


def write_tokenizer(out):
    words = ["<s>", "</s>", "<unk>", "a", "the", "model", "of", "random", "weights"]
    write_json(
        out / "tokenizer.json",
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {
                    "id": i,
                    "content": words[i],
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": True,
                }
                for i in range(3)
            ],
            "normalizer": None,
            "pre_tokenizer": {"type": "Whitespace"},
            "post_processor": None,
            "decoder": None,
            "model": {"type": "WordLevel", "vocab": {w: i for i, w in enumerate(words)}, "unk_token": "<unk>"},
        },
    )
    write_json(
        out / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--gigabytes", type=float, default=8.0, help="size in 10^9 bytes (8)")
    parser.add_argument("--hidden", type=int, help="width, instead of --gigabytes")
    parser.add_argument("--intermediate", type=int, help="width of the feed-forward layer, with --hidden")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", type=Path, help="copy the tokenizer of this model directory")
    args = parser.parse_args()

    if bool(args.hidden) != bool(args.intermediate):
        parser.error("--hidden and --intermediate go together")
    if args.hidden:
        hidden, intermediate = args.hidden, args.intermediate
    else:
        hidden, intermediate = sizes(args.gigabytes * 1e9 / 2, args.layers, args.vocab)
    args.out.mkdir(parents=True)
    head = 128 if hidden >= 1024 else 64
    tensors = list(shapes(hidden, intermediate, args.layers, args.vocab))
    files, weight_map, weights = shards(tensors), {}, Weights(args.seed)
    for i, shard in enumerate(files):
        name = f"model-{i + 1:05}-of-{len(files):05}.safetensors" if len(files) > 1 else "model.safetensors"
        write_shard(args.out / name, shard, weights)
        weight_map |= {tensor: name for tensor, _ in shard}
    total = sum(2 * math.prod(shape) for _, shape in tensors)
    largest = max(2 * math.prod(shape) for _, shape in tensors)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(args.out / "model.safetensors.index.json", index)
    write_json(
        args.out / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "head_dim": head,
            "hidden_act": "silu",
            "hidden_size": hidden,
            "initializer_range": 0.02,
            "intermediate_size": intermediate,
            "max_position_embeddings": 4096,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": hidden // head,
            "num_hidden_layers": args.layers,
            "num_key_value_heads": hidden // head // 2,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "vocab_size": args.vocab,
        },
    )
    if args.tokenizer:
        for name in TOKENIZER_FILES:
            if (args.tokenizer / name).exists():
                shutil.copy(args.tokenizer / name, args.out)
    else:
        write_tokenizer(args.out)
    print(
        json.dumps(
            {
                "bytes": total,
                "largest_tensor_bytes": largest,
                "shards": len(files),
                "hidden_size": hidden,
                "intermediate_size": intermediate,
                "layers": args.layers,
            }
        )
    )


if __name__ == "__main__":
    main()
