//! Muse Spark: latent experts in every layer, and fixed gates on what attention and experts add. mlx-lm quantizes experts
//! alone, and those of the first and the last layer not; it is its one model of an undescribed decoder that sees.

use serde_json::Value;

use crate::arch::architecture::{Architecture, Source};
use crate::arch::family::Family;
use crate::arch::rules::{drop, join, make};
use crate::arch::{Rule, Step};

pub(super) const FAMILIES: &[Family] = &[Family::rules_only(&["muse_spark"], |source| Ok(names(source)))];

fn names(source: Source<'_>) -> Architecture {
    const LINEARS: [&str; 9] = [
        "experts.gate_proj",
        "experts.up_proj",
        "experts.down_proj",
        "self_attn.qkvg_proj",
        "self_attn.o_proj",
        "mlp.pre_expert_proj",
        "mlp.post_expert_proj",
        "embed_tokens",
        "lm_head",
    ];
    // The router, and what sees.
    const PARAMETERS: [&str; 7] = [
        "mlp.gate",
        "attn.qkv_proj",
        "attn.proj",
        "fc1",
        "fc2",
        "patch_embedding",
        "position_embedding_table",
    ];
    let count = |part: &str, key: &str| {
        let value = source.config.0.get(part)?.get(key)?;
        usize::try_from(value.as_u64()?).ok()
    };
    let layers = count("text_config", "num_hidden_layers").unwrap_or(0);
    let sees = source.config.0.get("vision_config").is_some_and(Value::is_object);
    let deaf = drop(r"^model\.audio_tower\.");
    let blind = (!sees).then(|| drop(r"^model\.(vision_tower|vision_adapter|vision_projection)\."));
    let left = format!(
        r"(qkvg_proj|o_proj|expert_proj|embed_tokens|lm_head)$|\blayers\.(0|{})\.mlp\.experts\.",
        layers.saturating_sub(1)
    );
    let mut architecture = Architecture::with_layers("muse_spark", layers, &LINEARS)
        .rules([deaf])
        .rules(blind)
        .parameters(&[&PARAMETERS[..], &["vision_projection"]].concat())
        .leave(&left);
    architecture.float32 = vec!["_alpha", "_beta"];
    // What mlx-lm has written holds gates and norms as the model reads them.
    if source.tensors.keys().any(|name| name.ends_with("_alpha")) {
        return architecture;
    }
    let width = |part: &str| {
        let shared = || Some(count(part, "hidden_size")? / count(part, "num_attention_heads")?.max(1));
        count(part, "head_dim").or_else(shared).unwrap_or(0)
    };
    let eyes = sees.then(|| tower(width("vision_config")));
    architecture.rules(layer_rules()).rules(attention(width("text_config"))).rules(eyes.into_iter().flatten())
}

/// Gates, norms and experts of a layer.
fn layer_rules() -> [Rule; 5] {
    let gate = |of: &str, names: [&'static str; 2]| {
        let [alpha, beta] = names;
        make(
            &format!(r"^(?<x>.*\.layers\.\d+)\.{of}_residual_gate\.gate$"),
            [(alpha, vec![Step::GateOfStream]), (beta, vec![Step::GateOfBranch])],
        )
    };
    [
        gate("post_attention", ["$x.add_attn_alpha", "$x.add_attn_beta"]),
        gate("post_feedforward", ["$x.add_ffn_alpha", "$x.add_ffn_beta"]),
        make(
            r"^(?<x>.*\.layers\.\d+\.(input_layernorm|(pre|post)_feedforward_layernorm|mlp\.pre_expert_norm|mlp\.experts\.post_expert_norm)\.weight)$",
            [("$x", vec![Step::AddOne])],
        ),
        make(
            r"^(?<x>.*\.mlp\.experts)\.gate_up_proj$",
            [
                ("$x.gate_proj.weight", vec![Step::HalfOfRows(false)]),
                ("$x.up_proj.weight", vec![Step::HalfOfRows(true)]),
            ],
        ),
        make(r"^(?<x>.*\.mlp\.experts\.down_proj)$", [("$x.weight", Vec::new())]),
    ]
}

/// Queries, keys, values and the output's gate in one matrix.
fn attention(width: usize) -> Vec<Rule> {
    let part =
        |name: &str| format!(r"^(?<x>.*\.language_model\.layers\.\d+\.self_attn)\.{name}_proj\.weight$");
    let turned = || vec![Step::Interleave { of: width }];
    let [q, k, v, gate] = ["q", "k", "v", "gate"].map(part);
    let parts = [(&*q, turned()), (&*k, turned()), (&*v, Vec::new()), (&*gate, Vec::new())];
    join(parts, "$x.qkvg_proj.weight").collect()
}

/// The same in the tower, with biases.
fn tower(width: usize) -> Vec<Rule> {
    let part = |name: &str| format!(r"^(?<x>.*\.vision_tower\..*\.attn)\.{name}_proj\.(?<k>weight|bias)$");
    let turned = || vec![Step::Interleave { of: width }];
    let [q, k, v] = ["q", "k", "v"].map(part);
    join([(&*q, turned()), (&*k, turned()), (&*v, Vec::new())], "$x.qkv_proj.$k").collect()
}
