//! Qwen3-Next and Qwen 3.5: gated delta nets between attention layers, norms stored as w of `1 + w`, strays of
//! multi-token prediction and vision.

use mlx_format::checkpoint::ConfigError;

use super::qwen::SHARED_EXPERT;
use super::{
    Architecture, EXPERTS, Rule, Source, Step, drop, drop_tied_head, llama::LINEARS, make, stack_mlp_experts,
};

const DELTA_NET: [&str; 7] = [
    "linear_attn.in_proj_qkvz",
    "linear_attn.in_proj_ba",
    "linear_attn.in_proj_qkv",
    "linear_attn.in_proj_z",
    "linear_attn.in_proj_a",
    "linear_attn.in_proj_b",
    "linear_attn.out_proj",
];

/// mlx-lm adds 1 to the stored norms, in the dtype of the file.
fn add_one_to_norms() -> Rule {
    make(
        r"^(?<x>.*(\.input_layernorm|\.post_attention_layernorm|model\.norm|\.q_norm|\.k_norm)\.weight)$",
        [("$x", vec![Step::AddOne])],
    )
}

/// `[channels, 1, kernel]` to MLX's `[channels, kernel, 1]`.
fn transpose_conv() -> Rule {
    make(r"^(?<x>.*conv1d\.weight)$", [("$x", vec![Step::Transpose])])
}

fn linears() -> Vec<&'static str> {
    [LINEARS.as_slice(), &["mlp.gate"], &EXPERTS, &SHARED_EXPERT, &DELTA_NET].concat()
}

pub(super) fn qwen3_next(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let architecture =
        Architecture::plain(source, "qwen3_next", &linears())?.protect(&["mlp.gate", "shared_expert_gate"]);
    if !source.any_name_ends_with(".mlp.experts.0.up_proj.weight") {
        return Ok(architecture);
    }
    Ok(architecture.rules([drop(r"mtp\.")]).rules(drop_tied_head(source, false)).rules([
        stack_mlp_experts(),
        transpose_conv(),
        add_one_to_norms(),
    ]))
}

/// Qwen 3.5: the language model inside a vision-language checkpoint. Experts, where it has them, come fused.
pub(super) fn qwen3_5(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let untouched = source
        .tensors
        .iter()
        .any(|(name, tensor)| name.contains("conv1d.weight") && tensor.shape.last() != Some(&1));
    let mut architecture = Architecture::plain(source, "qwen3_5", &linears())?
        .rules([drop(r"vision_tower|model\.visual|mtp\.")])
        .rules(drop_tied_head(source, false))
        .rules([
            make(
                r"^(?<x>.*\.mlp)\.experts\.gate_up_proj$",
                [
                    ("$x.switch_mlp.gate_proj.weight", vec![Step::HalfOfRows(false)]),
                    ("$x.switch_mlp.up_proj.weight", vec![Step::HalfOfRows(true)]),
                ],
            ),
            make(r"^(?<x>.*\.mlp)\.experts\.down_proj$", [("$x.switch_mlp.down_proj.weight", vec![])]),
        ])
        .keep_dtype(&["A_log"]);
    if untouched {
        architecture = architecture.rules([transpose_conv(), add_one_to_norms()]);
    }
    if source.config.count("num_experts").unwrap_or(0) > 0 {
        architecture = architecture.protect(&["mlp.gate", "shared_expert_gate"]);
    }
    architecture.prefixes = vec![
        ("vision_tower", "vision_tower"),
        ("model.visual", "model.visual"),
        ("model.language_model.", "language_model.model."),
        ("language_model.", "language_model."),
        ("", "language_model."),
    ];
    Ok(architecture)
}
