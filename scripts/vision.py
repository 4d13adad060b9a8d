"""Compares vision models that mlx-quant writes with mlx-vlm's own conversions, and runs both with an image.

    VENV/bin/python scripts/vision.py --bin target/release/mlx-quant [--work DIR] [--json OUT] [--oracle DIR] [CASE ...]

VENV needs mlx-vlm 0.7.10, mlx-lm 0.32.2 and mlx 0.32.4 (mlx-cpu on Linux); nothing is downloaded. For each wrapper a
tiny checkpoint in the hub's form is made: mlx-vlm's class tells names and shapes, they are renamed and turned as the
hub has them, and mlx-vlm's own sanitize has to give every name and shape back. Then:

  names    both convert it at 4 bits; every tensor that differs is named, and every layer that the two round differently
  strict   mlx_vlm.utils.load_model loads ours strictly
  image    its logits with an image are those of mlx-vlm's own conversion at equal bits, bit for bit
  text     mlx_lm.utils.load_model loads the same directory, with the logits of our text-only build, bit for bit; of types
           that it has no model of, it says so

--oracle writes what mlx-vlm's own conversion holds (names, types, shapes, SHA-256) for the tests of this repository, by
the names that ours have where mlx-vlm reads two; values follow from names by `values`, which the tests compute again.
Exit status 1: something is not as it should be.
"""

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.utils import load_model as load_mlx_lm
from mlx_vlm import utils as vlm
from mlx_vlm.models.gemma3n import vision as gemma3n_vision
from mlx_vlm.quant_utils import quantize_model
from mlx_vlm.utils import get_model_and_args, skip_multimodal_module, update_module_configs

VOCABULARY, IMAGE = 256, 255
# Types that mlx-lm has no model of.
MLX_VLM_ALONE = {"glm4v", "internvl", "lfm2_vl", "idefics3", "smolvlm"}
TEXT = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, vocab_size=VOCABULARY, rms_norm_eps=1e-6, rope_theta=10000.0, max_position_embeddings=512,
    tie_word_embeddings=False,
)
SIGLIP = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, patch_size=14, image_size=56)
QWEN = dict(depth=2, hidden_size=64, num_heads=4, intermediate_size=128, out_hidden_size=64, patch_size=14, in_channels=3,
            spatial_merge_size=2, temporal_patch_size=2)
MOON = dict(model_type="moonvit", num_hidden_layers=2, depth=2, hidden_size=64, embed_dim=64, num_attention_heads=4, num_heads=4,
            intermediate_size=128, patch_size=14, init_pos_emb_height=8, init_pos_emb_width=8, merge_kernel_size=[2, 2])
LATENT = dict(
    TEXT, num_key_value_heads=4, moe_intermediate_size=64, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2,
    n_group=1, topk_group=1, kv_lora_rank=64, q_lora_rank=64, qk_rope_head_dim=16, qk_nope_head_dim=64, v_head_dim=64,
    first_k_dense_replace=1, routed_scaling_factor=1.0, topk_method="noaux_tc", scoring_func="sigmoid", norm_topk_prob=True,
    moe_layer_freq=1, rope_scaling=None, attention_bias=False,
)
LATENT.pop("head_dim")
MROPE = {"type": "mrope", "rope_type": "mrope", "mrope_section": [4, 2, 2]}
DELTA = dict(
    linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=32, linear_value_head_dim=32, linear_conv_kernel_dim=4,
    full_attention_interval=2, layer_types=["linear_attention", "full_attention"],
    rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 0], "mrope_interleaved": True, "rope_theta": 10000.0,
                     "partial_rotary_factor": 0.25},
)
GEMMA4 = dict(
    TEXT, model_type="gemma4_text", num_hidden_layers=4, num_kv_shared_layers=2, global_head_dim=32, sliding_window=32,
    vocab_size_per_layer_input=VOCABULARY, hidden_size_per_layer_input=64, tie_word_embeddings=True,
    layer_types=["sliding_attention", "full_attention"] * 2, use_double_wide_mlp=False,
    rope_parameters={
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
)
GEMMA4.pop("rope_theta")


def wrapper(model_type, text, vision, **around):
    config = dict(model_type=model_type, torch_dtype="bfloat16", vocab_size=VOCABULARY, image_token_index=IMAGE, image_token_id=IMAGE)
    return config | around | dict(text_config=dict(text), vision_config=dict(vision))


def flat(model_type, text, vision):
    """A config.json with the keys of the language model beside the others."""
    config = dict(text, model_type=model_type, torch_dtype="bfloat16", image_token_id=IMAGE, vision_config=dict(vision))
    config.pop("head_dim")
    return config


CONFIGS = {
    "gemma3": wrapper(
        "gemma3", dict(TEXT, model_type="gemma3_text", sliding_window=32, sliding_window_pattern=2, query_pre_attn_scalar=16, tie_word_embeddings=True,
                       mm_tokens_per_image=4),
        dict(SIGLIP, model_type="siglip_vision_model"), hidden_size=64, pad_token_id=0),
    "gemma4": wrapper(
        "gemma4", GEMMA4,
        dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, head_dim=16,
             patch_size=16, pooling_kernel_size=2, default_output_length=4, position_embedding_size=64, use_clipped_linears=True),
        audio_config=dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, subsampling_conv_channels=[8, 4],
                          output_proj_dims=64, attention_chunk_size=4, attention_context_left=5),
        audio_token_id=254, hidden_size=64, tie_word_embeddings=True),
    "gemma4_unified": wrapper(
        "gemma4_unified", dict(GEMMA4, model_type="gemma4_unified_text", hidden_size_per_layer_input=0, num_kv_shared_layers=0,
                               attention_k_eq_v=False),
        dict(patch_size=4, pooling_kernel_size=2, model_patch_size=8, mm_embed_dim=64, mm_posemb_size=64, num_soft_tokens=4,
             output_proj_dims=64),
        audio_config=dict(audio_samples_per_token=64, audio_embed_dim=64, hidden_size=64, output_proj_dims=64),
        audio_token_id=254, video_token_id=253, hidden_size=64, tie_word_embeddings=True),
    "qwen2_vl": flat("qwen2_vl", dict(TEXT, rope_scaling=MROPE), dict(QWEN, model_type="qwen2_vl", embed_dim=64, mlp_ratio=2)),
    "qwen2_5_vl": flat("qwen2_5_vl", dict(TEXT, rope_scaling=MROPE),
                       dict(QWEN, model_type="qwen2_5_vl", fullatt_block_indexes=[1], window_size=56)),
    "qwen3_vl": wrapper("qwen3_vl", dict(TEXT, model_type="qwen3_vl_text", rope_scaling=MROPE),
                        dict(QWEN, model_type="qwen3_vl", num_position_embeddings=64, deepstack_visual_indexes=[0])),
    "qwen3_vl_moe": wrapper(
        "qwen3_vl_moe", dict(TEXT, model_type="qwen3_vl_moe_text", rope_scaling=MROPE, num_experts=4, num_experts_per_tok=2,
                             moe_intermediate_size=64, decoder_sparse_step=1, mlp_only_layers=[], norm_topk_prob=True),
        dict(QWEN, model_type="qwen3_vl_moe", num_position_embeddings=64, deepstack_visual_indexes=[0])),
    "qwen3_5": wrapper("qwen3_5", dict(TEXT, **DELTA, model_type="qwen3_5_text"),
                       dict(QWEN, model_type="qwen3_5", num_position_embeddings=64, deepstack_visual_indexes=[])),
    "qwen3_5_moe": wrapper(
        "qwen3_5_moe", dict(TEXT, **DELTA, model_type="qwen3_5_moe_text", num_experts=4, num_experts_per_tok=2,
                            moe_intermediate_size=64, shared_expert_intermediate_size=64, norm_topk_prob=True),
        dict(QWEN, model_type="qwen3_5_moe", num_position_embeddings=64, deepstack_visual_indexes=[])),
    "mistral3": wrapper("mistral3", dict(TEXT, model_type="mistral"),
                        dict(SIGLIP, model_type="pixtral", head_dim=16, rope_theta=10000.0), spatial_merge_size=2),
    "mistral3_ministral3": wrapper(
        "mistral3", dict(TEXT, model_type="ministral3", rope_parameters={
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 32.0,
            "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}),
        dict(SIGLIP, model_type="pixtral", head_dim=16, rope_theta=10000.0), spatial_merge_size=2),
    "llava": wrapper("llava", dict(TEXT, model_type="llama"), dict(SIGLIP, model_type="clip_vision_model", projection_dim=64),
                     vision_feature_layer=-2, vision_feature_select_strategy="default"),
    "pixtral": wrapper("pixtral", dict(TEXT, model_type="mistral"),
                       dict(SIGLIP, model_type="pixtral", head_dim=16, rope_theta=10000.0), vision_feature_layer=-1),
    "kimi_k25": wrapper("kimi_k25", dict(LATENT, model_type="kimi_k2"), MOON, media_placeholder_token_id=IMAGE),
    "llama4": wrapper(
        "llama4", dict(TEXT, model_type="llama4_text", num_hidden_layers=4, intermediate_size_mlp=128, num_local_experts=4,
                       num_experts_per_tok=1, interleave_moe_layer_step=2, attention_chunk_size=32, use_qk_norm=True,
                       attention_bias=False, rope_scaling=None),
        dict(SIGLIP, model_type="llama4_vision_model", intermediate_size=256, initializer_range=0.02, norm_eps=1e-5, num_channels=3,
             pixel_shuffle_ratio=0.5, projector_dropout=0.0, projector_input_dim=64, projector_output_dim=64, rope_theta=10000.0,
             vision_feature_layer=-1, vision_feature_select_strategy="default", vision_output_dim=64)),
    "muse_glimmer": wrapper(
        "muse_glimmer", dict(TEXT, model_type="muse_glimmer_text", num_hidden_layers=4, sliding_window=32,
                             layer_types=["sliding_attention"] * 3 + ["full_attention"],
                             rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
                             layer_rope_theta=[10000.0] * 3 + [0.0]),
        dict(model_type="muse_glimmer_vision", patch_size=14, patch_temporal=2, merge_size=2, pos_emb_height=8, pos_emb_width=8,
             hidden_size=64, intermediate_size=128, num_attention_heads=4, num_hidden_layers=2, max_position_embeddings=64),
        out_hidden_size=256, projector_hidden_size=64, video_token_id=254),
    "glm4v": wrapper(
        "glm4v", dict(TEXT, model_type="glm4v_text", attention_bias=True, partial_rotary_factor=0.5,
                      rope_scaling={"rope_type": "default", "mrope_section": [1, 1, 2]}),
        dict(QWEN, model_type="glm4v", image_size=56),
        video_token_id=254, vision_start_token_id=253, vision_end_token_id=252, eos_token_id=[1]),
    "internvl": wrapper(
        "internvl", dict(TEXT, model_type="qwen3"),
        dict(SIGLIP, model_type="internvl_vision", image_size=[56, 56], patch_size=[14, 14], layer_scale_init_value=0.1,
             attention_bias=True, use_qk_norm=False, norm_type="layer_norm"),
        downsample_ratio=0.5),
    "lfm2_vl": wrapper(
        "lfm2_vl", dict(model_type="lfm2", hidden_size=64, intermediate_size=128, block_ff_dim=128, block_auto_adjust_ff_dim=False,
                        num_hidden_layers=2, num_attention_heads=4, num_heads=4, num_key_value_heads=2, vocab_size=VOCABULARY,
                        max_position_embeddings=512, norm_eps=1e-6, rope_theta=10000.0, conv_L_cache=3, conv_bias=False,
                        layer_types=["conv", "full_attention"], block_dim=64, conv_dim=64, conv_dim_out=64, tie_word_embeddings=True),
        dict(SIGLIP, model_type="siglip2_vision_model", num_patches=16, num_channels=3, vision_use_head=False),
        downsample_factor=2, projector_hidden_size=64, vision_feature_layer=-1),
    "idefics3": wrapper("idefics3", dict(TEXT, model_type="llama"), dict(SIGLIP, model_type="idefics3_vision"), scale_factor=2),
    "smolvlm": wrapper("smolvlm", dict(TEXT, model_type="llama"), dict(SIGLIP, model_type="smolvlm_vision"), scale_factor=2),
}

GEMMA3N = dict(
    TEXT, model_type="gemma3n_text", num_hidden_layers=4, num_kv_shared_layers=2, vocab_size_per_layer_input=240, altup_num_inputs=2,
    altup_active_idx=0, altup_coef_clip=120.0, altup_correct_scale=True, laurel_rank=64, hidden_size_per_layer_input=64,
    sliding_window=32, activation_sparsity_pattern=[0.95, 0.95, 0.0, 0.0], final_logit_softcapping=30.0,
    layer_types=["sliding_attention", "full_attention"] * 2, rope_local_base_freq=10000.0, tie_word_embeddings=True,
)


def gemma3n(hidden_size):
    return wrapper(
        "gemma3n", dict(GEMMA3N, intermediate_size=[128] * 4),
        dict(model_type="gemma3n_vision", hidden_size=hidden_size, num_hidden_layers=2, vocab_offset=240, vocab_size=8, rms_norm_eps=1e-6),
        audio_config=dict(hidden_size=64, conf_num_hidden_layers=1, conf_num_attention_heads=4, conf_attention_chunk_size=4,
                          conf_attention_context_left=5, conf_conv_kernel_size=3, sscp_conv_channel_size=[8, 4], vocab_offset=248,
                          vocab_size=8),
        image_token_id=241, image_token_index=241, audio_token_id=249, vision_soft_tokens_per_image=256, hidden_size=64,
        tie_word_embeddings=True)


# mlx-vlm's tower of Gemma 3n has 300 million weights whatever config.json says: once in its form with few and narrow blocks,
# once as it is, which is too large for a listing.
CONFIGS["gemma3n"] = gemma3n(64)
CONFIGS["gemma3n_whole"] = gemma3n(2048)
WITHOUT_LISTING = {"gemma3n_whole"}
WHOLE = {name: getattr(gemma3n_vision, name) for name in ("gemma3n_mobilenet_def", "MobileNetV5MultiScaleFusionAdapter")}


def narrow_tower(case):
    """Gives mlx-vlm's Gemma 3n the blocks of this case."""
    edge, residual, attention = gemma3n_vision._er, gemma3n_vision._uir, gemma3n_vision._mmqa
    blocks = [
        [edge(3, 16, 2)],
        [residual(3, 5, 24, 2, 6.0)],
        [residual(5, 5, 32, 2, 6.0), attention(2, 16, 2), residual(0, 0, 32, 1, 2.0)],
        [residual(5, 5, 64, 2, 6.0), attention(2, 16, 1), residual(0, 0, 64, 1, 2.0)],
    ]
    adapter = WHOLE["MobileNetV5MultiScaleFusionAdapter"]
    narrow = {
        "gemma3n_mobilenet_def": lambda: blocks,
        "MobileNetV5MultiScaleFusionAdapter":
            lambda in_chs, out_chs, output_resolution: adapter(in_chs=[96], out_chs=64, output_resolution=output_resolution),
    }
    for name, own in (narrow if case == "gemma3n" else WHOLE).items():
        setattr(gemma3n_vision, name, own)


def as_read(case, name):
    """What mlx-vlm calls a tensor or module of ours: it takes mlx-lm's names of two models as well."""
    of = CONFIGS[case]["model_type"]
    if of == "muse_glimmer" and name.startswith(("model.", "lm_head")):
        return f"language_model.{name}"
    if of == "gemma3n" and name.startswith("model."):
        return re.sub(r"^language_model\.", "language_model.model.", name.removeprefix("model."))
    return name


def as_written(case, name):
    """The other way round."""
    of = CONFIGS[case]["model_type"]
    if of == "muse_glimmer":
        return name.removeprefix("language_model.")
    if of == "gemma3n":
        return "model." + re.sub(r"^language_model\.model\.", "language_model.", name)
    return name

def values(name, count):
    """Numbers that follow from a tensor's name and an element's index, all of them float32: of norms' weights around 1."""
    h = (np.arange(count, dtype=np.uint64) * 2654435761 + zlib.crc32(name.encode())) % 2**32
    h = (h ^ h >> np.uint64(15)) * 2246822519 % 2**32
    h ^= h >> np.uint64(13)
    numbers = ((h >> np.uint64(16)).astype(np.int64) - 32768).astype(np.float32) * np.float32(2.0**-18)
    last = name.rsplit(".", 2)[-2:]
    return numbers + np.float32(1.0) if "norm" in last[0] and last[-1] == "weight" else numbers


def turned(shape):
    """The shape of a convolution's weight on the hub."""
    return (shape[0], shape[-1], *shape[1:-1])


def to_hub(case, name, shape):
    """Names and shapes on the hub of what mlx-vlm calls `name`."""
    of = CONFIGS[case]["model_type"]
    expert = re.fullmatch(r"(.*\.mlp)\.switch_mlp\.(gate_proj|up_proj|down_proj)\.weight", name)
    fused = re.fullmatch(r"(.*\.feed_forward\.experts)\.(gate_proj|up_proj|down_proj)\.weight", name)
    if of == "llama4" and fused:
        if fused[2] == "up_proj":
            return []
        rows = shape[1] if fused[2] == "down_proj" else 2 * shape[1]
        return [(f"{fused[1]}.{'down_proj' if fused[2] == 'down_proj' else 'gate_up_proj'}", (shape[0], shape[2], rows))]
    if of in ("qwen3_vl_moe", "qwen3_5_moe") and expert:
        name = name.replace("language_model.model.", "model.language_model.")
        at, part = expert[1].replace("language_model.model.", "model.language_model."), expert[2]
        if part == "up_proj":
            return []
        rows, columns = (shape[1], shape[2]) if part == "down_proj" else (2 * shape[1], shape[2])
        turn = of == "qwen3_vl_moe"
        name = f"{at}.experts.{'down_proj' if part == 'down_proj' else 'gate_up_proj'}"
        return [(name, (shape[0], columns, rows) if turn else (shape[0], rows, columns))]
    if expert:
        return [(f"{expert[1]}.experts.{e}.{expert[2]}.weight", shape[1:]) for e in range(shape[0])]
    latent = re.fullmatch(r"(.*\.self_attn)\.(embed_q|unembed_out)\.weight", name)
    if latent:
        if latent[2] == "unembed_out":
            return []
        text = CONFIGS[case]["text_config"]
        return [(f"{latent[1]}.kv_b_proj.weight",
                 (shape[0] * (text["qk_nope_head_dim"] + text["v_head_dim"]), text["kv_lora_rank"]))]
    if of == "gemma3" and name == "language_model.lm_head.weight":
        return []
    kernels = r"patch_embed\.proj|patch_embedding|patch_conv|patch_embeddings\.projection|visual\.downsample|vision_tower\.downsample"
    kernels += r"|subsample_conv_projection.*conv|depthwise_conv1d|\.conv1d|\.conv\.conv"
    if len(shape) > 2 and re.search(rf"({kernels})\.weight$", name) or of == "gemma3n" and "vision_tower" in name and len(shape) == 4:
        shape = turned(shape)
    if of in ("qwen2_vl", "qwen2_5_vl"):
        name = re.sub(r"^language_model\.", "", re.sub(r"^vision_tower\.", "visual.", name))
    elif of.startswith("qwen") or of == "glm4v":
        name = re.sub(r"^vision_tower\.", "model.visual.", name)
        name = re.sub(r"^language_model\.model\.", "model.language_model.", name)
        name = re.sub(r"^language_model\.lm_head\.", "lm_head.", name)
    elif of == "gemma3n":
        name = as_written(case, name)
    elif of in ("idefics3", "smolvlm"):
        name = re.sub(r"^language_model\.(?!lm_head)", "text_model.", name)
        name = name.removeprefix("language_model.") if "lm_head" in name else f"model.{name}"
    elif of == "lfm2_vl":
        name = "model." + re.sub(r"^vision_tower\.", "vision_tower.vision_model.", re.sub(r"^language_model\.model\.", "language_model.", name))
    elif of == "muse_glimmer":
        name = re.sub(r"^vision_", "model.vision_", re.sub(r"^language_model\.model\.", "model.language_model.", name))
        name = re.sub(r"^language_model\.lm_head\.", "lm_head.", name)
    elif of.startswith("gemma4"):
        name = "model." + re.sub(r"^language_model\.model\.", "language_model.", name)
    elif of in ("mistral3", "pixtral"):
        name = re.sub(r"^vision_tower\.vision_model\.", "vision_tower.", name)
    elif of.startswith("kimi"):
        name = re.sub(r"^vision_tower\.(blocks|final_layernorm)\.", r"vision_tower.encoder.\1.", name)
        name = re.sub(r"(encoder\.blocks\.\d+)\.attn\.", r"\1.", name)
    return [(name, shape)]


def model_of(config):
    """mlx-vlm's model for a config.json, as its load_model makes it."""
    config = json.loads(json.dumps(config))
    arch, _ = get_model_and_args(config)
    for key in ("text_config", "vision_config", "audio_config"):
        config.setdefault(key, {})
    made = arch.ModelConfig.from_dict(config)
    made = update_module_configs(made, arch, config, ["text", "vision", "perceiver", "projector", "audio"])
    return arch.Model(made)


def make(case, at):
    """Writes the checkpoint, and gives names, types and shapes of its tensors."""
    at.mkdir(parents=True)
    config = CONFIGS[case]
    tensors = {}
    for name, own in tree_flatten(model_of(config).parameters()):
        for hub, shape in to_hub(case, name, own.shape):
            # A part of the towers lies in float32, as some are published.
            wide = case == "llava" and "vision_tower" in hub
            bounds = re.search(r"\.(input|output)_(max|min)$", hub)
            numbers = mx.array(values(hub, int(np.prod(shape))).reshape(shape))
            if bounds:
                numbers = mx.array(8.0 if bounds[2] == "max" else -8.0)
            tensors[hub] = numbers if wide else numbers.astype(mx.bfloat16)
    mx.save_safetensors(str(at / "model.safetensors"), tensors, metadata={"format": "pt"})
    (at / "config.json").write_text(json.dumps(config, indent=1))
    (at / "preprocessor_config.json").write_text('{"image_processor_type": "none"}')
    return {name: ["F32" if tensor.dtype == mx.float32 else "BF16", list(tensor.shape)] for name, tensor in tensors.items()}


def theirs(source, ours, entries, at):
    """mlx-vlm's own conversion of the layers that `ours` rounds, at the bits of its `entries`, else 4; gives where it would do otherwise."""
    model = vlm.load_model(source, lazy=True)
    config = vlm.load_config(source)
    own = getattr(model, "quant_predicate", None) or (lambda path, module: True)
    cast = getattr(model, "cast_predicate", None) or (lambda name: True)
    differently = {"rounded": [], "kept": [], "bits": []}

    def predicate(path, module):
        wish = not skip_multimodal_module(path) and own(path, module)
        rounded = f"{path}.scales" in ours
        if rounded != bool(wish):
            differently["rounded" if rounded else "kept"].append(path)
        entry = entries.get(path)
        if rounded and isinstance(entry, dict) != isinstance(wish, dict):
            differently["bits"].append(path)
        return entry if rounded and isinstance(entry, dict) else rounded

    def dtype(name, value):
        return value.astype(mx.bfloat16) if cast(name) and mx.issubdtype(value.dtype, mx.floating) else value

    model.update(tree_map_with_path(dtype, model.parameters()))
    model, config = quantize_model(model, config, 64, 4, quant_predicate=predicate)
    at.mkdir(parents=True)
    tensors = dict(tree_flatten(model.parameters()))
    mx.eval(tensors)
    mx.save_safetensors(str(at / "model.safetensors"), tensors, metadata={"format": "mlx"})
    (at / "config.json").write_text(json.dumps(config, indent=1))
    return differently


def listing(at):
    """Types, shapes and SHA-256 of all tensors of a directory."""
    found = {}
    for file in sorted(at.glob("*.safetensors")):
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8 : 8 + length]).items():
            if name != "__metadata__":
                start, end = (8 + length + offset for offset in entry["data_offsets"])
                found[name] = [entry["dtype"], entry["shape"], hashlib.sha256(data[start:end]).hexdigest()]
    return found


def picture(case):
    """An image as the processor of this model would give it, and how many tokens stand for it."""
    of = CONFIGS[case]["model_type"]
    square = lambda *shape: mx.array(values("image", int(np.prod(shape))).reshape(shape)).astype(mx.float32) * 8
    if of.startswith("qwen") or of in ("glm4v", "muse_glimmer"):
        return dict(pixel_values=square(16, 3 * 2 * 14 * 14), image_grid_thw=mx.array([[1, 4, 4]])), 4
    if of.startswith("kimi"):
        return dict(pixel_values=square(16, 3, 14, 14), image_grid_hws=mx.array([[1, 4, 4]])), 4
    if of == "mistral3":
        return dict(pixel_values=square(1, 3, 56, 56), image_sizes=mx.array([[56, 56]])), 4
    if of == "pixtral":
        return dict(pixel_values=square(1, 3, 56, 56), image_sizes=mx.array([[56, 56]])), 16
    if of == "gemma3":
        return dict(pixel_values=square(1, 3, 56, 56)), 4
    if of == "gemma4":
        return dict(pixel_values=square(1, 3, 64, 64)), 4
    if of in ("llama4", "internvl"):
        return dict(pixel_values=square(1, 3, 56, 56)), 4
    if of == "gemma3n":
        return dict(pixel_values=square(1, 3, 256, 256)), 256
    if of in ("idefics3", "smolvlm"):
        return dict(pixel_values=square(1, 1, 3, 56, 56)), 4
    if of == "lfm2_vl":
        around = dict(spatial_shapes=mx.array([[4, 4]]), pixel_attention_mask=mx.ones((1, 16), dtype=mx.int32))
        return dict(pixel_values=square(1, 16, 3 * 14 * 14), **around), 4
    if of == "gemma4_unified":
        return dict(pixel_values=square(1, 4, 3 * 8 * 8), image_position_ids=mx.array([[[0, 0], [1, 0], [0, 1], [1, 1]]])), 4
    return dict(pixel_values=square(1, 3, 56, 56)), 16


def tokens_around(case, tokens):
    return mx.array([[1, 2, 3, *[CONFIGS[case]["image_token_id"]] * tokens, 4, 5, 6, 7]])


def logits_with_image(model, case):
    image, tokens = picture(case)
    ids = tokens_around(case, tokens)
    out = model(ids, mask=mx.ones_like(ids), **image)
    return np.array(getattr(out, "logits", out).astype(mx.float32))


def logits_of_text(at):
    model = load_mlx_lm(at)[0]
    return np.array(model(mx.array([[1, 2, 3, 4, 5, 6, 7]])).astype(mx.float32))


def check(case, args, work):
    """A row of results."""
    narrow_tower(case)
    source, ours, plain, reference = (work / case / name for name in ("source", "ours", "text", "theirs"))
    sources = make(case, source)
    convert = [args.bin, "convert", "-q", "--model", source, "--quiet", "--mlx-path"]
    alone = CONFIGS[case]["model_type"] in MLX_VLM_ALONE
    for command in [[*convert, ours]] + [[*convert, plain, "--text-only"]] * (not alone):
        subprocess.run(list(map(str, command)), check=True)
    mine = {as_read(case, name): entry for name, entry in listing(ours).items()}
    entries = json.loads((ours / "config.json").read_text())["quantization"]
    entries = {as_read(case, path): entry for path, entry in entries.items()}
    differently = theirs(source, mine, entries, reference)
    right = listing(reference)
    differ = sorted(name for name in mine.keys() | right.keys() if mine.get(name) != right.get(name))
    row = {"case": case, "tensors": len(right), "towers": sum(not name.startswith("language_model.") for name in mine),
           "kept though mlx-vlm rounds it": differently["kept"], "rounded though mlx-vlm keeps it": differently["rounded"],
           "at other bits than mlx-vlm's": differently["bits"],
           "differ": differ}
    model = vlm.load_model(ours)
    row["strict"] = True
    left, other = logits_with_image(model, case), logits_with_image(vlm.load_model(reference), case)
    row["image"] = bool(np.isfinite(left).all() and np.array_equal(left, other))
    row["image rms difference"] = float(np.sqrt(np.mean((left - other) ** 2)) / np.sqrt(np.mean(other**2)))
    blind = logits_with_image_hidden(model, case)
    row["the image counts"] = not np.array_equal(blind, left)
    if alone:
        try:
            load_mlx_lm(ours)
            row["text"] = False
        except ValueError as error:
            row["text"], row["mlx_lm"] = str(error) == f"Model type {CONFIGS[case]['model_type']} not supported.", str(error)
    else:
        row["text"] = bool(np.array_equal(logits_of_text(ours), logits_of_text(plain)))
    if args.oracle and case not in WITHOUT_LISTING:
        args.oracle.mkdir(parents=True, exist_ok=True)
        lines = lambda found: ",\n".join(f' "{name}": "{" ".join(map(str, entry))}"' for name, entry in sorted(found.items()))
        known = {as_written(case, name): [dtype, *shape, digest[:16]] for name, (dtype, shape, digest) in right.items()}
        made = {name: [dtype, *shape] for name, (dtype, shape) in sources.items()}
        config = json.dumps(CONFIGS[case])
        text = f'{{"config": {config},\n"source": {{\n{lines(made)}\n}},\n"mlx_vlm": {{\n{lines(known)}\n}}}}\n'
        (args.oracle / f"{case}.json").write_text(text)
    return row


def logits_with_image_hidden(model, case):
    """As with an image, which is black."""
    image, tokens = picture(case)
    ids = tokens_around(case, tokens)
    # Idefics 3 leaves out images of zeros.
    image["pixel_values"] = mx.full(image["pixel_values"].shape, 0.25 if "connector" in model else 0.0)
    out = model(ids, mask=mx.ones_like(ids), **image)
    return np.array(getattr(out, "logits", out).astype(mx.float32))


def run(description, cases, check, fine, what):
    """The command line: each case in a folder of its own, a line of JSON for each; ends with 1 unless all are fine."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("cases", nargs="*", default=[])
    parser.add_argument("--bin", default="target/release/mlx-quant")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--oracle", type=Path)
    args = parser.parse_args()
    mx.set_default_device(mx.cpu)
    work = args.work or Path(tempfile.mkdtemp())
    rows = []
    for case in args.cases or cases:
        shutil.rmtree(work / case, ignore_errors=True)
        try:
            row = check(case, args, work)
        except Exception as error:
            row = {"case": case, "error": f"{type(error).__name__}: {str(error)[:500]}"}
        rows.append(row)
        print(json.dumps(row), flush=True)
    if args.json:
        args.json.write_text("".join(json.dumps(row) + "\n" for row in rows))
    good = sum("error" not in row and bool(fine(row)) for row in rows)
    print(f"{good} of {len(rows)} {what} as they should be")
    sys.exit(good != len(rows))


if __name__ == "__main__":
    run(
        __doc__, CONFIGS, check,
        lambda row: row.get("image") and row.get("text") and row.get("the image counts") and not row["differ"], "wrappers",
    )
