"""Compares drafters that mlx-quant writes (`--mtp`) with mlx-vlm's own, and lets both draft.

    VENV/bin/python scripts/drafters.py --bin target/release/mlx-quant [--work DIR] [--json OUT] [--oracle DIR] [CASE ...]

VENV is that of `scripts/vision.py`; nothing is downloaded. For each drafter a tiny checkpoint in the hub's form is made:
mlx-vlm's class tells names and shapes, they are renamed as the hub has them. Then:

  names    mlx-vlm's splitter and `convert -q --mtp` make NAME-mtp at 8 bits; every tensor that differs is named
  config   every key that mlx-vlm's config.json has, ours has too, with the same value
  strict   mlx_vlm.speculative.drafters.load_drafter loads ours strictly, as a drafter of the kind `mtp`
  drafts   its output, and that of mlx-vlm's own, on random hidden states and embeddings: bit for bit

--oracle writes what mlx-vlm's splitter makes (names, types, shapes, SHA-256) for the tests of this repository. Exit status
1: something is not as it should be.
"""

import json
import re
import subprocess
from pathlib import Path

import mlx.core as mx
import numpy as np
import vision
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes
from mlx_vlm.speculative.drafters import load_drafter
from mlx_vlm.speculative.drafters.mtp_split import detect_mtp_splitter
from mlx_vlm.utils import get_model_and_args
from vision import DELTA, LATENT, QWEN, TEXT, VOCABULARY, listing, values, wrapper

QWEN3_5 = dict(TEXT, **DELTA, mtp_num_hidden_layers=1)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, shared_expert_intermediate_size=64, norm_topk_prob=True)
NEXT = dict(
    TEXT, model_type="qwen3_next", torch_dtype="bfloat16", **EXPERTS, partial_rotary_factor=0.25, linear_num_value_heads=4,
    linear_num_key_heads=2, linear_key_head_dim=32, linear_value_head_dim=32, linear_conv_kernel_dim=4, full_attention_interval=2,
    decoder_sparse_step=1, mlp_only_layers=[],
)
VISION = dict(QWEN, num_position_embeddings=64, deepstack_visual_indexes=[])
NEMOTRON = dict(
    model_type="nemotron_h", torch_dtype="bfloat16", vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
    max_position_embeddings=512, num_attention_heads=4, num_key_value_heads=2, head_dim=16, attention_bias=False, mamba_num_heads=4,
    mamba_head_dim=16, mamba_proj_bias=False, ssm_state_size=16, conv_kernel=4, n_groups=2, mlp_bias=False, layer_norm_epsilon=1e-5,
    use_bias=False, use_conv_bias=True, hybrid_override_pattern="M*E", moe_intermediate_size=64,
    moe_shared_expert_intermediate_size=64, n_group=1, n_routed_experts=4, n_shared_experts=1, topk_group=1, num_experts_per_tok=2,
    norm_topk_prob=True, routed_scaling_factor=1.0, num_nextn_predict_layers=1, mtp_hybrid_override_pattern="*E",
    tie_word_embeddings=False,
)
CONFIGS = {
    "qwen3_5": wrapper("qwen3_5", dict(QWEN3_5, model_type="qwen3_5_text"), dict(VISION, model_type="qwen3_5")),
    "qwen3_5_moe": wrapper("qwen3_5_moe", dict(QWEN3_5, **EXPERTS, model_type="qwen3_5_moe_text"),
                           dict(VISION, model_type="qwen3_5_moe")),
    "qwen3_next": NEXT,
    "glm_moe_dsa": dict(LATENT, model_type="glm_moe_dsa", torch_dtype="bfloat16", num_nextn_predict_layers=1, index_topk=64,
                        index_n_heads=4, index_head_dim=64, rope_theta=10000.0,
                        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}),
    "nemotron_h": NEMOTRON,
}


def kind(case):
    return CONFIGS[case]["model_type"]


def to_hub(case, name, shape):
    """Names and shapes on the hub of what mlx-vlm's drafter calls `name`."""
    of, config = kind(case), CONFIGS[case]
    if of == "glm_moe_dsa":
        name = name.removeprefix("mtp.").replace("shared_head_norm", "shared_head.norm")
        prefix = f"model.layers.{config['num_hidden_layers']}."
    else:
        prefix = "mtp."
    expert = re.fullmatch(r"(.*)\.switch_mlp\.(gate_proj|up_proj|down_proj|fc1|fc2)\.weight", name)
    if expert and of == "qwen3_5_moe":
        if expert[2] == "up_proj":
            return []
        rows = shape[1] if expert[2] == "down_proj" else 2 * shape[1]
        return [(f"{prefix}{expert[1]}.experts.{'down_proj' if expert[2] == 'down_proj' else 'gate_up_proj'}", (shape[0], rows, shape[2]))]
    if expert:
        part = {"fc1": "up_proj", "fc2": "down_proj"}.get(expert[2], expert[2])
        return [(f"{prefix}{expert[1]}.experts.{e}.{part}.weight", shape[1:]) for e in range(shape[0])]
    latent = re.fullmatch(r"(.*self_attn)\.(embed_q|unembed_out)\.weight", name)
    if latent:
        if latent[2] == "unembed_out":
            return []
        rows = shape[0] * (config["qk_nope_head_dim"] + config["v_head_dim"])
        return [(f"{prefix}{latent[1]}.kv_b_proj.weight", (rows, config["kv_lora_rank"]))]
    return [(prefix + name, shape)]


def drafter_of(config):
    """mlx-vlm's drafter for a config.json of its own."""
    arch, _ = get_model_and_args(config)
    return arch.Model(arch.ModelConfig.from_dict(json.loads(json.dumps(config))))


def body(case):
    """Names and shapes of the model that the heads belong to, as the hub has them."""
    config = CONFIGS[case]
    vision.CONFIGS.setdefault(case, config)
    if kind(case).startswith("qwen3_5"):
        for name, own in tree_flatten(vision.model_of(config).parameters()):
            yield from vision.to_hub(case, name, own.shape)
        return
    model_class, args_class = _get_classes(config)
    for name, own in tree_flatten(model_class(args_class.from_dict(config)).parameters()):
        shape = own.shape
        if name.endswith("conv1d.weight"):
            shape = (shape[0], shape[2], shape[1])
        expert = re.fullmatch(r"(.*)\.switch_mlp\.(gate_proj|up_proj|down_proj|fc1|fc2)\.weight", name)
        latent = re.fullmatch(r"(.*self_attn)\.(embed_q|unembed_out)\.weight", name)
        if expert:
            part = {"fc1": "up_proj", "fc2": "down_proj"}.get(expert[2], expert[2])
            yield from ((f"{expert[1]}.experts.{e}.{part}.weight", shape[1:]) for e in range(shape[0]))
        elif latent and latent[2] == "embed_q":
            rows = shape[0] * (config["qk_nope_head_dim"] + config["v_head_dim"])
            yield f"{latent[1]}.kv_b_proj.weight", (rows, config["kv_lora_rank"])
        elif not latent:
            yield name, shape


def make(case, at):
    """Writes the checkpoint, and gives names, types and shapes of its tensors."""
    at.mkdir(parents=True)
    config = CONFIGS[case]
    (at / "config.json").write_text(json.dumps(config, indent=1))
    text = config.get("text_config", config)
    own = {"qwen3_5": "qwen3_5_mtp", "qwen3_5_moe": "qwen3_5_mtp", "qwen3_next": "qwen3_5_mtp"}.get(kind(case), f"{kind(case)}_mtp")
    text = dict(text)
    if kind(case) == "qwen3_next":
        text["rope_parameters"] = {"type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25, "mrope_section": [2, 0, 0]}
    tensors = {}
    for name, parameter in tree_flatten(drafter_of({"model_type": own, "text_config": text}).parameters()):
        for hub, shape in to_hub(case, name, parameter.shape):
            tensors[hub] = shape
    for hub, shape in body(case):
        tensors[hub] = shape
    made = {}
    for name, shape in tensors.items():
        wide = "e_score_correction_bias" in name
        numbers = mx.array(values(name, int(np.prod(shape))).reshape(shape))
        made[name] = numbers if wide else numbers.astype(mx.bfloat16)
    mx.save_safetensors(str(at / "model.safetensors"), made, metadata={"format": "pt"})
    return {name: ["F32" if tensor.dtype == mx.float32 else "BF16", list(tensor.shape)] for name, tensor in made.items()}


def output(drafter, case):
    """What a drafter makes of random hidden states and tokens."""
    hidden = mx.array(values("hidden", 5 * 64).reshape(1, 5, 64)).astype(mx.bfloat16) * 8
    table = mx.array(values("table", VOCABULARY * 64).reshape(VOCABULARY, 64)).astype(mx.bfloat16) * 8
    drafter._input_embed = lambda tokens: table[tokens]
    drafter._lm_head_fn = lambda states: states @ table.T
    drafter._cache = drafter.make_cache()
    drafter._next_position = 0
    drafter._position = 0
    tokens = mx.array([[3, 14, 15, 92, 65]])
    seen = []

    def sampler(logits):
        seen.append(logits)
        return mx.argmax(logits, axis=-1)

    drafter.prefill_from_target_hidden(tokens, hidden, 35, sampler)
    drafter.draft_block(35, hidden[:, -1:], drafter._cache, 4, sampler)
    return [np.array(logits.astype(mx.float32)) for logits in seen]


def check(case, args, work):
    """A row of results."""
    source, ours, theirs = (work / case / name for name in ("source", "ours", "theirs-mtp"))
    sources = make(case, source)
    command = [args.bin, "convert", "-q", "--mtp", "--model", source, "--mlx-path", ours, "--quiet"]
    subprocess.run(list(map(str, command)), check=True)
    own = Path(f"{ours}-mtp")
    detect_mtp_splitter(source).split(str(source), str(theirs), q_bits=8, q_group_size=64)
    mine, right = listing(own), listing(theirs)
    wanted = json.loads((theirs / "config.json").read_text())
    config = json.loads((own / "config.json").read_text())
    row = {
        "case": case, "drafter": wanted["model_type"], "tensors": len(right),
        "differ": sorted(name for name in mine.keys() | right.keys() if mine.get(name) != right.get(name)),
        "config": sorted(key for key in wanted if config.get(key) != wanted[key]),
    }
    left, found = load_drafter(str(own))
    other, _ = load_drafter(str(theirs))
    row["strict"] = found == "mtp"
    one, two = output(left, case), output(other, case)
    row["drafts"] = len(one) == len(two) > 1 and all(np.isfinite(a).all() and np.array_equal(a, b) for a, b in zip(one, two))
    if args.oracle:
        args.oracle.mkdir(parents=True, exist_ok=True)
        lines = lambda found: ",\n".join(f' "{name}": "{" ".join(map(str, entry))}"' for name, entry in sorted(found.items()))
        known = {name: [dtype, *shape, digest[:16]] for name, (dtype, shape, digest) in right.items()}
        made = {name: [dtype, *shape] for name, (dtype, shape) in sources.items()}
        text = f'{{"config": {json.dumps(CONFIGS[case])},\n"source": {{\n{lines(made)}\n}},\n"drafter_config": {json.dumps(wanted)},\n'
        text += f'"drafter": {{\n{lines(known)}\n}}}}\n'
        (args.oracle / f"{case}.json").write_text(text)
    return row


if __name__ == "__main__":
    vision.run(
        __doc__, CONFIGS, check,
        lambda row: row.get("strict") and row.get("drafts") and not row["differ"] and not row["config"], "drafters",
    )
