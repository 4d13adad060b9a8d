//! Which linears have a bias: the model's definition knows, the tensors must agree.
//!
//! The forward pass reads a bias where there is one, so that it needs no such table. mlx_lm does: it stops at a bias too many and at
//! one too few (`mlx_lm/models`, version 0.32.2, `nn.Linear(.., bias=..)`; transformers says the same).

use mlx_format::checkpoint::Config;

/// When a linear has a bias.
#[derive(Clone, Copy)]
enum Bias {
    Never,
    Always,
    /// Where config.json sets this key; none where it is silent.
    If(&'static str),
    Unknown,
}
use Bias::{Always, If, Never, Unknown};

const QKV: &[&str] = &["q_proj", "k_proj", "v_proj"];
const OUT: &[&str] = &["o_proj"];
const NETWORK: &[&str] = &["gate_proj", "up_proj", "down_proj", "gate_up_proj"];
const ANY: &[&str] = &[];

/// Ends of paths, and when linears there have a bias.
type Rule = (&'static [&'static str], Bias);

/// Model types, and when linears whose path ends so have a bias; the first that matches counts, nothing matches all.
#[rustfmt::skip]
const RULES: &[(&[&str], &[Rule])] = &[
    (&["llama", "iquestcoder", "xverse", "mistral", "olmo2", "nemotron", "granite", "smollm3"],
        &[(QKV, If("attention_bias")), (OUT, If("attention_bias")), (NETWORK, If("mlp_bias")), (ANY, Never)]),
    (&["seed_oss"],
        &[(QKV, If("attention_bias")), (OUT, If("attention_out_bias")), (NETWORK, If("mlp_bias")), (ANY, Never)]),
    (&["hunyuan_v1_dense", "olmo3", "cohere", "cohere2", "qwen3_next", "qwen3_5", "qwen3_5_moe"],
        &[(QKV, If("attention_bias")), (OUT, If("attention_bias")), (ANY, Never)]),
    (&["glm4", "glm4_moe"], &[(QKV, If("attention_bias")), (ANY, Never)]),
    (&["deepseek_v2", "deepseek_v3", "kimi_k2", "joyai_llm_flash"],
        &[(&["q_a_proj", "kv_a_proj_with_mqa", "o_proj"], If("attention_bias")), (ANY, Never)]),
    (&["qwen2", "qwen2_moe"], &[(QKV, Always), (ANY, Never)]),
    (&["ernie4_5"], &[(QKV, If("use_bias")), (OUT, If("use_bias")), (NETWORK, If("use_bias")), (ANY, Never)]),
    (&["stablelm"], &[(QKV, If("use_qkv_bias")), (ANY, Never)]),
    (&["lfm2"], &[(&["conv", "in_proj", "out_proj"], Unknown), (ANY, Never)]),
    (&["gpt2", "phi"], &[(ANY, Always)]),
    (&["gpt_neox"], &[(&["embed_out"], Never), (ANY, Always)]),
    (&["starcoder2", "gpt_oss"], &[(&["lm_head"], Never), (ANY, Always)]),
    (&["ministral3", "qwen3", "qwen3_moe", "exaone4", "gemma", "gemma2", "gemma3_text", "gemma4_text", "mixtral", "phi3"],
        &[(ANY, Never)]),
];

/// The same of layer norms (RMS norms have none).
#[rustfmt::skip]
const NORMS: &[(&[&str], Bias)] = &[
    (&["gpt2", "gpt_neox", "phi", "starcoder2", "nemotron"], Always),
    (&["cohere", "cohere2"], If("layer_norm_bias")),
];

/// Whether the linear at `path` (or the layer norm, if it is a `norm`) has a bias; nothing where that is not known.
pub(crate) fn has_bias(config: &Config, path: &str, norm: bool) -> Option<bool> {
    let model_type = config.model_type().ok()?;
    let bias = if norm {
        &NORMS.iter().find(|(types, _)| types.contains(&model_type))?.1
    } else {
        let (_, rules) = RULES.iter().find(|(types, _)| types.contains(&model_type))?;
        let last = path.rsplit('.').next().unwrap_or(path);
        let (_, bias) = rules.iter().find(|(ends, _)| ends.is_empty() || ends.contains(&last))?;
        bias
    };
    match bias {
        Never => Some(false),
        Always => Some(true),
        If(key) => Some(config.bool(key, false)),
        Unknown => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn norms_have_their_own() {
        let config = |json: &str| Config::parse(json.as_bytes()).unwrap();
        let cohere = config(r#"{"model_type": "cohere", "layer_norm_bias": true}"#);
        assert_eq!(has_bias(&cohere, "model.norm", true), Some(true));
        assert_eq!(has_bias(&config(r#"{"model_type": "llama"}"#), "model.norm", true), None);
    }

    #[test]
    fn by_type_and_by_key() {
        let config = |json: &str| Config::parse(json.as_bytes()).unwrap();
        let (q, down) = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj");
        let llama = config(r#"{"model_type": "llama", "attention_bias": true}"#);
        assert_eq!((has_bias(&llama, q, false), has_bias(&llama, down, false)), (Some(true), Some(false)));
        let qwen2 = config(r#"{"model_type": "qwen2"}"#);
        assert_eq!(
            (has_bias(&qwen2, q, false), has_bias(&qwen2, "model.layers.0.self_attn.o_proj", false)),
            (Some(true), Some(false))
        );
        assert_eq!(has_bias(&config(r#"{"model_type": "phimoe"}"#), q, false), None);
    }
}
