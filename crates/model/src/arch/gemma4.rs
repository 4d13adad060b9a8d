//! Gemma 4, text: per-layer inputs beside the decoder, upper layers that share keys and values with lower
//! ones, and experts fused in one tensor.

use mlx_format::checkpoint::ConfigError;

use super::{Architecture, Source, Step, drop, drop_in_layers, drop_tied_head, llama, make};

pub(super) fn gemma4_text(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let linears = [
        llama::LINEARS.as_slice(),
        &[
            "embed_tokens_per_layer",
            "per_layer_model_projection",
            "per_layer_input_gate",
            "per_layer_projection",
            "router.proj",
            "switch_glu.gate_proj",
            "switch_glu.up_proj",
            "switch_glu.down_proj",
        ],
    ]
    .concat();
    let architecture = Architecture::plain(source, "gemma4", &linears)?;
    // mlx-lm's default.
    let shared = source.config.count("num_kv_shared_layers").unwrap_or(20);
    let layers = architecture.layers;
    let drop_shared = drop_in_layers(
        r"layers\.(?<l>\d+)\.self_attn\.(k_proj|v_proj|k_norm)\b",
        layers.saturating_sub(shared)..layers,
    );
    Ok(architecture
        .rules([drop(r"self_attn\.rotary_emb|input_max|input_min|output_max|output_min"), drop_shared])
        .rules([
            make(
                r"^(?<x>.*\.experts)\.gate_up_proj$",
                [
                    ("$x.switch_glu.gate_proj.weight", vec![Step::HalfOfRows(false)]),
                    ("$x.switch_glu.up_proj.weight", vec![Step::HalfOfRows(true)]),
                ],
            ),
            make(r"^(?<x>.*\.experts)\.down_proj$", [("$x.switch_glu.down_proj.weight", vec![])]),
        ])
        .rules(drop_tied_head(source, true))
        .protect(&["router.proj"]))
}
