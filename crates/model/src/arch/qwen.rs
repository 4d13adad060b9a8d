//! Qwen mixtures of experts, generations 2 and 3.

use mlx_format::checkpoint::ConfigError;

use super::{Architecture, EXPERTS, Source, drop_tied_head, llama::LINEARS, stack_mlp_experts};

/// The expert that every token passes, with a gate of its own.
pub(super) const SHARED_EXPERT: [&str; 4] =
    ["shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert.down_proj", "shared_expert_gate"];

/// Qwen 1.5 and 2 MoE: routers at the base width.
pub(super) fn qwen2_moe(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let linears = [LINEARS.as_slice(), &["mlp.gate"], &EXPERTS, &SHARED_EXPERT].concat();
    Ok(Architecture::plain(source, "qwen2_moe", &linears)?.rules([stack_mlp_experts()]))
}

/// Qwen 3 MoE: routers at 8 bits.
pub(super) fn qwen3_moe(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let linears = [LINEARS.as_slice(), &["mlp.gate"], &EXPERTS].concat();
    Ok(Architecture::plain(source, "qwen3_moe", &linears)?
        .rules(drop_tied_head(source, false))
        .rules([stack_mlp_experts()])
        .protect(&["mlp.gate"]))
}
