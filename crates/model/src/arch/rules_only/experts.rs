//! Models with experts in transformers' usual attention, or nearly.

use mlx_format::checkpoint::ConfigError;

use super::words::{EMBEDDING_AND_HEAD, counted_by, named};
use crate::arch::architecture::{Architecture, Source};
use crate::arch::family::Family;
use crate::arch::rules::{
    ATTENTION, EXPERTS, MLP, PLAIN_EXPERTS, SHARED_EXPERTS, drop, make, split_kv_b, stack,
    stack_experts_in_place, stack_mlp_experts, stack_w_experts,
};

pub(super) const FAMILIES: &[Family] = &[
    Family::rules_only(&["Klear"], klear),
    Family::rules_only(&["deepseek"], deepseek),
    Family::rules_only(&["longcat_flash"], |source| longcat(source, "longcat_flash", &[])),
    Family::rules_only(&["longcat_flash_ngram"], longcat_ngram),
    Family::rules_only(&["phixtral", "phi-msft"], phixtral),
    Family::rules_only(&["minimax_m3_vl"], minimax_m3),
];

/// Experts stand where their stack is to be.
fn klear(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let routers = ["mlp.gate", "mlp.coefficient"];
    let linears = [&ATTENTION[..], &MLP, &PLAIN_EXPERTS, &SHARED_EXPERTS, &routers, &EMBEDDING_AND_HEAD];
    Ok(named(source, "Klear", &linears)?
        .rules([stack_experts_in_place()])
        .protect(&["mlp.gate"])
        .keep_dtype(&["expert_bias"]))
}

/// Its router is a plain parameter.
fn deepseek(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let linears = [&ATTENTION[..], &MLP, &EXPERTS, &SHARED_EXPERTS, &EMBEDDING_AND_HEAD];
    Ok(named(source, "deepseek", &linears)?.rules([stack_mlp_experts()]).parameters(&["mlp.gate"]))
}

/// Two latent attentions and two dense networks a layer.
fn longcat(
    source: Source<'_>,
    family: &'static str,
    own: &[&'static str],
) -> Result<Architecture, ConfigError> {
    const ATTENTION: [&str; 7] =
        ["q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "embed_q", "unembed_out", "o_proj"];
    const NETWORKS: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];
    let linears = [&ATTENTION[..], &NETWORKS, &["router.classifier"], own, &EMBEDDING_AND_HEAD];
    Ok(counted_by(source, "num_layers", family, &linears)?
        .rules([drop(r"^model\.mtp"), stack_mlp_experts()])
        .rules(split_kv_b(source)?)
        .protect(&["router.classifier"])
        .keep_dtype(&["e_score_correction_bias"]))
}

/// Tables of n-grams beside that of the tokens.
fn longcat_ngram(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let tables = ["word_embeddings", "embedders.#", "post_projs.#"];
    Ok(longcat(source, "longcat_flash_ngram", &tables)?.rules([make(
        r"^model\.embed_tokens\.(?<k>\w+)$",
        [("model.ngram_embeddings.word_embeddings.$k", Vec::new())],
    )]))
}

/// Phi-2 networks as experts, biases and all.
fn phixtral(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let layer = ["mixer.Wqkv", "mixer.out_proj", "moe.switch_mlp.fc1", "moe.switch_mlp.fc2", "moe.gate"];
    let linears = [&layer[..], &["embd.wte", "lm_head.linear"]];
    let experts = stack(
        r"^(?<x>.*\.moe)\.mlp\.(?<e>\d+)\.(?<p>fc1|fc2)\.(?<k>weight|bias|scales|biases)$",
        "$x.switch_mlp.$p.$k",
    );
    Ok(counted_by(source, "num_layers", "phixtral", &linears)?.rules([experts]))
}

/// The language model of MiniMax M3, whose sparse attention has an index beside it.
fn minimax_m3(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let own = ["self_attn.index_q_proj", "self_attn.index_k_proj", "block_sparse_moe.gate"];
    let linears = [&ATTENTION[..], &own, &MLP, &EXPERTS, &SHARED_EXPERTS, &EMBEDDING_AND_HEAD];
    Ok(named(source, "minimax_m3_vl", &linears)?
        .rules(stack_w_experts("block_sparse_moe"))
        // Some exports keep the network of a dense layer there.
        .rules([make(
            r"^(?<x>.*)\.block_sparse_moe\.(?<p>(gate|up|down)_proj\.\w+)$",
            [("$x.mlp.$p", Vec::new())],
        )])
        .protect(&["block_sparse_moe.gate"])
        .keep_dtype(&["e_score_correction_bias"])
        .tied(source, false))
}
