//! Dense models, whose names mlx-lm hardly changes.

use mlx_format::checkpoint::ConfigError;

use super::words::{EMBEDDING_AND_HEAD, counted_by, named};
use crate::arch::architecture::{Architecture, Source};
use crate::arch::family::Family;
use crate::arch::rules::{ATTENTION, MLP, drop, make, turn_convolutions};
use crate::view::Step;

const EMBEDDING: [&str; 1] = ["embed_tokens"];
const WTE_AND_HEAD: [&str; 2] = ["wte", "lm_head"];

pub(super) const FAMILIES: &[Family] = &[
    Family::rules_only(&["glm"], |source| {
        let linears = [&ATTENTION[..], &["mlp.gate_up_proj", "mlp.down_proj"], &EMBEDDING_AND_HEAD];
        Ok(named(source, "glm", &linears)?.tied(source, true))
    }),
    Family::rules_only(&["nanbeige", "telechat3"], |source| {
        Ok(llama(source, "nanbeige")?.tied(source, false))
    }),
    // Blocks that do nothing are left out, or are one linear.
    Family::rules_only(&["nemotron-nas"], |source| {
        let linears = [&ATTENTION[..], &MLP, &["self_attn.linear", "mlp.linear"], &EMBEDDING_AND_HEAD];
        Ok(named(source, "nemotron-nas", &linears)?.tied(source, false))
    }),
    // Gates of the loops are no linear.
    Family::rules_only(&["iquestloopcoder"], |source| {
        Ok(llama(source, "iquestloopcoder")?.tied(source, false).parameters(&["gate_projections.#"]))
    }),
    Family::rules_only(&["gear"], |source| {
        let mixer = ["local_mixer.q_proj", "local_mixer.k_proj", "local_mixer.v_proj", "local_mixer.o_proj"];
        let architecture = named(source, "gear", &[&ATTENTION, &mixer, &MLP, &EMBEDDING_AND_HEAD])?;
        Ok(architecture
            .rules([drop("embed_scale$")])
            .rules(turn_convolutions(source, r"(key|value)_conv"))
            .parameters(&["key_conv", "value_conv"])
            .tied(source, true))
    }),
    Family::rules_only(&["youtu_llm"], |source| {
        let attention = ["q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"];
        Ok(named(source, "youtu_llm", &[&attention, &MLP, &EMBEDDING_AND_HEAD])?.tied(source, true))
    }),
    Family::rules_only(&["spark2_5"], |source| {
        let attention = ["self_attn.q_k_v_proj", "self_attn.g_proj", "self_attn.out_proj"];
        Ok(named(source, "spark2_5", &[&attention, &MLP, &["embedding", "lm_head"]])?
            .rules([make(r"^model\.embed_tokens\.(?<k>\w+)$", [("model.embedding.$k", Vec::new())])])
            .leave(r"\bself_attn\.g_proj$")
            .tied(source, true))
    }),
    Family::rules_only(&["phi3small"], |source| {
        let layer = ["self_attn.query_key_value", "self_attn.dense", "mlp.up_proj", "mlp.down_proj"];
        named(source, "phi3small", &[&layer, &EMBEDDING])
    }),
    Family::rules_only(&["qwen"], |source| {
        let layer = ["attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj"];
        named(source, "qwen", &[&layer, &WTE_AND_HEAD])
    }),
    Family::rules_only(&["plamo"], |source| named(source, "plamo", &[&ATTENTION, &MLP, &EMBEDDING_AND_HEAD])),
    Family::rules_only(&["plamo3"], |source| {
        let layer = ["mixer.qkv_proj", "mixer.o_proj", "mlp.gate_up_proj", "mlp.down_proj"];
        Ok(named(source, "plamo3", &[&layer, &EMBEDDING_AND_HEAD])?.tied(source, true))
    }),
    // The head is a plain parameter with the embedding's shape.
    Family::rules_only(&["talkie"], |source| {
        let attention = ["attn.attn_query", "attn.attn_key", "attn.attn_value", "attn.attn_resid"];
        let network = ["mlp.mlp_gate", "mlp.mlp_linear", "mlp.mlp_resid"];
        Ok(named(source, "talkie", &[&attention, &network, &["embed"]])?
            .rules([drop("rotary|(cos|sin)$")])
            .parameters(&["lm_head"]))
    }),
    Family::rules_only(&["lille-130m"], |source| {
        let attention = ["attention.qkv_proj", "attention.out_proj"];
        let network = ["feed_forward.gate_proj", "feed_forward.up_proj", "feed_forward.down_proj"];
        let linears = [&attention[..], &network, &["tok_embeddings"]];
        Ok(counted_by(source, "n_layer", "lille-130m", &linears)?.rules([drop("rotary_emb")]))
    }),
    Family::rules_only(&["openelm"], |source| {
        let layer = ["attn.qkv_proj", "attn.out_proj", "ffn.proj_1", "ffn.proj_2"];
        let linears = [&layer[..], &["token_embeddings", "lm_head"]];
        counted_by(source, "num_transformer_layers", "openelm", &linears)
    }),
    // The form of Ai2's own package, which mlx-lm needs to run it.
    Family::rules_only(&["olmo"], |source| {
        let linears = ["att_proj", "attn_out", "ff_proj", "ff_out", "wte"];
        let shares = source.config.bool("weight_tying", false);
        let head = shares.then(|| drop(r"^model\.transformer\.ff_out\."));
        Ok(counted_by(source, "n_layers", "olmo", &[&linears])?.rules(head))
    }),
    Family::rules_only(&["gpt_bigcode"], |source| {
        let layer = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"];
        let linears = [&layer[..], &WTE_AND_HEAD, &["wpe"]];
        Ok(counted_by(source, "n_layer", "gpt_bigcode", &linears)?.rules([drop(MASK)]).tied(source, true))
    }),
    Family::rules_only(&["gptj"], |source| {
        let attention = ["attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj"];
        let linears = [&attention[..], &["mlp.fc_in", "mlp.fc_out"], &WTE_AND_HEAD];
        let mut architecture = counted_by(source, "n_layer", "gptj", &linears)?.rules([drop(MASK)]);
        architecture.prefixes = vec![("transformer.", "model.")];
        Ok(architecture)
    }),
    Family::rules_only(&["baichuan_m1"], baichuan),
];

/// Masks that old checkpoints hold beside an attention layer's weights.
const MASK: &str = r"\.attn\.(masked_)?bias$";

fn llama(source: Source<'_>, family: &'static str) -> Result<Architecture, ConfigError> {
    named(source, family, &[&ATTENTION, &MLP, &EMBEDDING_AND_HEAD])
}

/// mlx-lm divides the rows of the head by their length before it packs them.
fn baichuan(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let linears = [&["self_attn.W_pack", "self_attn.o_proj"][..], &MLP, &EMBEDDING_AND_HEAD];
    let packed = source.any_name_ends_with("lm_head.scales");
    let head = (!packed).then(|| make(r"^(?<x>lm_head\.weight)$", [("$x", vec![Step::UnitRows])]));
    Ok(named(source, "baichuan_m1", &linears)?
        .tied(source, false)
        .rules(head)
        .parameters(&["self_attn.conv_k", "self_attn.conv_v"]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn olmo_ties_under_a_key_of_its_own() {
        let config =
            mlx_format::checkpoint::Config::parse(br#"{"model_type": "olmo", "weight_tying": true}"#)
                .unwrap();
        let tensors = std::collections::BTreeMap::new();
        let olmo = FAMILIES.iter().find(|family| family.types == ["olmo"]).unwrap();
        let architecture = (olmo.names)(Source { config: &config, tensors: &tensors }).unwrap();
        assert!(
            architecture.rules.iter().any(|rule| rule.captures("model.transformer.ff_out.weight").is_some())
        );
    }
}
