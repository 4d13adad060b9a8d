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
}
use Bias::{Always, If, Never};

const QKV: &[&str] = &["q_proj", "k_proj", "v_proj"];
const OUT: &[&str] = &["o_proj"];
const NETWORK: &[&str] = &["gate_proj", "up_proj", "down_proj", "gate_up_proj"];
const ANY: &[&str] = &[];

/// Ends of paths, and when linears there have a bias.
type Rule = (&'static [&'static str], Bias);

/// Model types, and when linears whose path ends so have a bias; the first that matches counts, nothing matches all.
#[rustfmt::skip]
const RULES: &[(&[&str], &[Rule])] = &[
    (&["llama", "iquestcoder", "xverse", "mistral", "olmo2", "nemotron", "granite"],
        &[(QKV, If("attention_bias")), (OUT, If("attention_bias")), (NETWORK, If("mlp_bias")), (ANY, Never)]),
    (&["seed_oss"],
        &[(QKV, If("attention_bias")), (OUT, If("attention_out_bias")), (NETWORK, If("mlp_bias")), (ANY, Never)]),
    (&["hunyuan_v1_dense", "olmo3", "cohere", "cohere2"],
        &[(QKV, If("attention_bias")), (OUT, If("attention_bias")), (ANY, Never)]),
    (&["glm4", "glm4_moe"], &[(QKV, If("attention_bias")), (ANY, Never)]),
    (&["qwen2", "qwen2_moe"], &[(QKV, Always), (ANY, Never)]),
    (&["ernie4_5"], &[(QKV, If("use_bias")), (OUT, If("use_bias")), (NETWORK, If("use_bias")), (ANY, Never)]),
    (&["stablelm"], &[(QKV, If("use_qkv_bias")), (ANY, Never)]),
    (&["ministral3", "qwen3", "qwen3_moe", "exaone4", "gemma", "gemma2", "gemma3_text", "mixtral", "phi3"], &[(ANY, Never)]),
];

/// Whether the linear at `path` has a bias; nothing where that is not known.
pub(crate) fn has_bias(config: &Config, path: &str) -> Option<bool> {
    let model_type = config.model_type().ok()?;
    let (_, rules) = RULES.iter().find(|(types, _)| types.contains(&model_type))?;
    let last = path.rsplit('.').next().unwrap_or(path);
    let (_, bias) = rules.iter().find(|(ends, _)| ends.is_empty() || ends.contains(&last))?;
    Some(match bias {
        Never => false,
        Always => true,
        If(key) => config.bool(key, false),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_type_and_by_key() {
        let config = |json: &str| Config::parse(json.as_bytes()).unwrap();
        let (q, down) = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj");
        let llama = config(r#"{"model_type": "llama", "attention_bias": true}"#);
        assert_eq!((has_bias(&llama, q), has_bias(&llama, down)), (Some(true), Some(false)));
        let qwen2 = config(r#"{"model_type": "qwen2"}"#);
        assert_eq!(
            (has_bias(&qwen2, q), has_bias(&qwen2, "model.layers.0.self_attn.o_proj")),
            (Some(true), Some(false))
        );
        assert_eq!(has_bias(&config(r#"{"model_type": "gpt2"}"#), q), None);
    }
}
