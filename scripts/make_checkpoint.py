"""Writes a checkpoint of random bfloat16 weights: a llama of about the size asked for, or the shape of a known model.

    python3 scripts/make_checkpoint.py OUT --gigabytes 8 --layers 32 [--tokenizer DIR]
    python3 scripts/make_checkpoint.py OUT --shape llama-3.1-8b
    python3 scripts/make_checkpoint.py OUT --shape llama-70b --blocks 8
    python3 scripts/make_checkpoint.py OUT --shape qwen3-30b-a3b --blocks 6
    python3 scripts/make_checkpoint.py OUT --shape kimi-k2 --hollow      # a trillion weights, for --dry-run and recommend

For speed and memory measurements: the weights are normal with sigma 0.02, the shapes plausible (or
given by --hidden and --intermediate instead of --gigabytes), the shards at most 2 GB. Without --tokenizer a tokenizer of a few
words is written, since mlx-lm wants one; a --shape gets the demo model's, whose words are the first of its vocabulary. --hollow leaves the weights out: files have their size, and take no place where the disk knows holes.
Only the standard library is used, and a few megabytes of memory. The same arguments give the same bytes.
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


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
EXPERTS = LLAMA | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
}


# Kimi K2's: DeepSeek V3's form, 384 experts and a shared one in all blocks but the first.
KIMI = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "kv_lora_rank": 512,
    "max_position_embeddings": 131072,
    "model_type": "kimi_k2",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 384,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 8,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
}


def numbers(layers, hidden, intermediate, heads, kv_heads, vocab):
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
    }


def experts(count, chosen, intermediate):
    return {"moe_intermediate_size": intermediate, "num_experts": count, "num_experts_per_tok": chosen}


# config.json of known models, as far as shapes go; and two small ones to try scripts with. The demo's tokenizer has 6144 words.
SHAPES = {
    "llama-3.1-8b": LLAMA | numbers(32, 4096, 14336, 32, 8, 128256),
    "llama-70b": LLAMA | numbers(80, 8192, 28672, 64, 8, 128256),
    "qwen3-30b-a3b": EXPERTS | numbers(48, 2048, 6144, 32, 4, 151936) | experts(128, 8, 768),
    "kimi-k2": KIMI | numbers(61, 7168, 18432, 64, 64, 163840),
    "small": LLAMA | numbers(4, 256, 768, 4, 2, 6208) | {"head_dim": 64},
    "small-experts": EXPERTS | numbers(4, 256, 512, 4, 2, 6208) | experts(8, 2, 128) | {"head_dim": 64},
}
DEMO = Path(__file__).parent.parent / "crates/demo/files"


def mlp(prefix, hidden, intermediate):
    yield f"{prefix}.down_proj.weight", (hidden, intermediate)
    yield f"{prefix}.gate_proj.weight", (intermediate, hidden)
    yield f"{prefix}.up_proj.weight", (intermediate, hidden)


def shapes_of(config):
    """Names and shapes of a model of `SHAPES`, as its checkpoint has them."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    if config["model_type"] == "kimi_k2":
        yield from latent_shapes(config)
        return
    queries, keys = (config[f"num_{what}_heads"] * config["head_dim"] for what in ("attention", "key_value"))

    yield "model.embed_tokens.weight", (vocab, hidden)
    for i in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{i}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        if config["model_type"] == "qwen3_moe":
            yield f"{prefix}.mlp.gate.weight", (config["num_experts"], hidden)
            for expert in range(config["num_experts"]):
                yield from mlp(f"{prefix}.mlp.experts.{expert}", hidden, config["moe_intermediate_size"])
            yield f"{prefix}.self_attn.k_norm.weight", (config["head_dim"],)
            yield f"{prefix}.self_attn.q_norm.weight", (config["head_dim"],)
        else:
            yield from mlp(f"{prefix}.mlp", hidden, config["intermediate_size"])
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        yield f"{prefix}.self_attn.k_proj.weight", (keys, hidden)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, queries)
        yield f"{prefix}.self_attn.q_proj.weight", (queries, hidden)
        yield f"{prefix}.self_attn.v_proj.weight", (keys, hidden)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)


def latent_shapes(config):
    """Names and shapes of latent attention with experts."""
    hidden, vocab, heads = config["hidden_size"], config["vocab_size"], config["num_attention_heads"]
    nope, rope, values = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    query_rank, rank = config["q_lora_rank"], config["kv_lora_rank"]

    yield "model.embed_tokens.weight", (vocab, hidden)
    for i in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{i}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        if i < config["first_k_dense_replace"]:
            yield from mlp(f"{prefix}.mlp", hidden, config["intermediate_size"])
        else:
            yield f"{prefix}.mlp.gate.weight", (config["n_routed_experts"], hidden)
            yield f"{prefix}.mlp.gate.e_score_correction_bias", (config["n_routed_experts"],)
            for expert in range(config["n_routed_experts"]):
                yield from mlp(f"{prefix}.mlp.experts.{expert}", hidden, config["moe_intermediate_size"])
            shared = config["moe_intermediate_size"] * config["n_shared_experts"]
            yield from mlp(f"{prefix}.mlp.shared_experts", hidden, shared)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        attention = f"{prefix}.self_attn"
        yield f"{attention}.kv_a_layernorm.weight", (rank,)
        yield f"{attention}.kv_a_proj_with_mqa.weight", (rank + rope, hidden)
        yield f"{attention}.kv_b_proj.weight", (heads * (nope + values), rank)
        yield f"{attention}.o_proj.weight", (hidden, heads * values)
        yield f"{attention}.q_a_layernorm.weight", (query_rank,)
        yield f"{attention}.q_a_proj.weight", (query_rank, hidden)
        yield f"{attention}.q_b_proj.weight", (heads * (nope + rope), query_rank)
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
        if weights is None:
            file.truncate(8 + len(text) + offset)
            return
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


def known(args):
    """config.json and tokenizer of a known model."""
    config = dict(SHAPES[args.shape])
    if args.blocks:
        config["num_hidden_layers"] = min(args.blocks, config["num_hidden_layers"])
    tokenizer = args.tokenizer or (DEMO if DEMO.is_dir() else None)
    own = json.loads((tokenizer / "config.json").read_text()) if tokenizer else {}
    config |= {name: own.get(name, token) for name, token in (("bos_token_id", 0), ("eos_token_id", 1))}
    return dict(sorted(config.items())), tokenizer


def by_size(args, parser):
    """config.json and tokenizer of a llama of about the size asked for."""
    if bool(args.hidden) != bool(args.intermediate):
        parser.error("--hidden and --intermediate go together")
    if args.hidden:
        hidden, intermediate = args.hidden, args.intermediate
    else:
        hidden, intermediate = sizes(args.gigabytes * 1e9 / 2, args.layers, args.vocab)
    head = 128 if hidden >= 1024 else 64
    heads = hidden // head
    config = LLAMA | numbers(args.layers, hidden, intermediate, heads, heads // 2, args.vocab)
    config |= {"bos_token_id": 0, "eos_token_id": 1, "head_dim": head, "max_position_embeddings": 4096}
    return dict(sorted((config | {"rope_theta": 10000.0}).items())), args.tokenizer


def by_size_shapes(config):
    widths = config["hidden_size"], config["intermediate_size"]
    return shapes(*widths, config["num_hidden_layers"], config["vocab_size"])


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
    parser.add_argument("--shape", choices=SHAPES, help="that of a known model, instead of all sizes")
    parser.add_argument("--blocks", type=int, help="only so many of its decoder layers")
    parser.add_argument("--hollow", action="store_true", help="no weights: files of their full size that hold nothing")
    args = parser.parse_args()

    if args.blocks and not args.shape:
        parser.error("--blocks goes with --shape; a model by size has --layers")
    config, tokenizer = known(args) if args.shape else by_size(args, parser)
    args.out.mkdir(parents=True)
    tensors = list(shapes_of(config) if args.shape else by_size_shapes(config))
    files, weight_map, weights = shards(tensors), {}, None if args.hollow else Weights(args.seed)
    for i, shard in enumerate(files):
        name = f"model-{i + 1:05}-of-{len(files):05}.safetensors" if len(files) > 1 else "model.safetensors"
        write_shard(args.out / name, shard, weights)
        weight_map |= {tensor: name for tensor, _ in shard}
    total = sum(2 * math.prod(shape) for _, shape in tensors)
    largest = max(2 * math.prod(shape) for _, shape in tensors)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(args.out / "model.safetensors.index.json", index)
    write_json(args.out / "config.json", config)
    if tokenizer:
        for name in TOKENIZER_FILES:
            if (tokenizer / name).exists():
                shutil.copy(tokenizer / name, args.out)
    else:
        write_tokenizer(args.out)
    print(
        json.dumps(
            {
                "bytes": total,
                "largest_tensor_bytes": largest,
                "shards": len(files),
                "hidden_size": config["hidden_size"],
                "intermediate_size": config["intermediate_size"],
                "layers": config["num_hidden_layers"],
            }
        )
    )


if __name__ == "__main__":
    main()
