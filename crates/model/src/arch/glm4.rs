//! GLM-4, dense (fused gate and up) and mixture of experts (sigmoid routing; the router is a plain parameter).

use mlx_format::checkpoint::ConfigError;

use super::{
    Architecture, EXPERTS, SHARED_EXPERTS, Source, drop_layers_from, llama::LINEARS, stack_mlp_experts,
};

pub(super) fn dense(source: Source<'_>) -> Result<Architecture, ConfigError> {
    Architecture::plain(source, "glm4", &[LINEARS.as_slice(), &["mlp.gate_up_proj"]].concat())
}

pub(super) fn moe(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let linears = [LINEARS.as_slice(), &SHARED_EXPERTS, &EXPERTS].concat();
    let architecture = Architecture::plain(source, "glm4_moe", &linears)?;
    let layers = architecture.layers;
    Ok(architecture
        .rules([drop_layers_from(layers), stack_mlp_experts()])
        .keep_dtype(&["e_score_correction_bias"]))
}
