//! DeepSeek V2 and V3 (and Kimi K2): multi-head latent attention, routed and shared experts, routers that are
//! plain parameters.

use mlx_format::checkpoint::ConfigError;

use super::{
    Architecture, EXPERTS, SHARED_EXPERTS, Source, Step, drop_inv_freq, drop_layers_from, llama::LINEARS,
    make, stack_mlp_experts,
};

const LATENT: [&str; 6] = [
    "self_attn.q_a_proj",
    "self_attn.q_b_proj",
    "self_attn.kv_a_proj_with_mqa",
    "self_attn.kv_b_proj",
    "self_attn.embed_q",
    "self_attn.unembed_out",
];

fn linears() -> Vec<&'static str> {
    [LINEARS.as_slice(), &LATENT, &SHARED_EXPERTS, &EXPERTS].concat()
}

pub(super) fn v2(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let architecture = Architecture::plain(source, "deepseek_v2", &linears())?;
    Ok(architecture.rules([drop_inv_freq(), stack_mlp_experts()]))
}

/// V3 splits `kv_b_proj` per head into the part that embeds queries (transposed) and the one that makes values.
pub(super) fn v3(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let heads = source.config.count("num_attention_heads")?;
    let (nope, value) = (source.config.count("qk_nope_head_dim")?, source.config.count("v_head_dim")?);
    let rows = |start, count| Step::Rows { start, count, of: nope + value };
    let architecture = Architecture::plain(source, "deepseek_v3", &linears())?;
    let layers = architecture.layers;
    Ok(architecture
        .rules([
            drop_layers_from(layers),
            drop_inv_freq(),
            stack_mlp_experts(),
            make(
                r"^(?<x>.*\.self_attn)\.kv_b_proj\.weight$",
                [
                    ("$x.embed_q.weight", vec![Step::SplitRows(heads), rows(0, nope), Step::Transpose]),
                    ("$x.unembed_out.weight", vec![Step::SplitRows(heads), rows(nope, value)]),
                ],
            ),
        ])
        .keep_dtype(&["e_score_correction_bias"]))
}
