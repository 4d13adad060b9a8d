//! StableLM 2: layer norms, a quarter of each head rotated; the 12B in parallel blocks with a layer norm for every
//! head.

use mlx_format::checkpoint::ConfigError;

use super::biases::{Bias, OTHERS, QKV};
use super::family::Family;
use super::llama;
use super::sketch::Sketch;
use crate::decoder::{Attention, Branch, Decoder, HeadNorms, Layer, Norm, Stage};

pub(super) const FAMILIES: &[Family] = &[Family {
    biases: &[(QKV, Bias::If("use_qkv_bias")), (OTHERS, Bias::Never)],
    ..Family::new(&["stablelm"], llama::separate_head, decoder)
}];

fn decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let norm = |path: String| Norm::layer(path, sketch.float_or("layer_norm_eps", 1e-5));
    let parallel = sketch.config.bool("use_parallel_residual", false);
    let rope = sketch.rope_of(sketch.head_dim()?, 0.25)?;
    let mut decoder = sketch.llama_with(vec![rope], |layer, _, attention| {
        let head_norm = |name: &str| norm(format!("{layer}self_attn.{name}.norms.{{head}}"));
        let norms = sketch
            .config
            .bool("qk_layernorm", false)
            .then(|| HeadNorms::new(head_norm("q_layernorm"), head_norm("k_layernorm")));
        let attention = Layer::Attention(Attention { norms, ..attention });
        let mlp = Layer::Mlp(sketch.mlp(layer)?);
        let first = norm(format!("{layer}input_layernorm"));
        Ok(if parallel {
            vec![Stage::parallel(vec![Branch::pre(first.clone(), attention), Branch::pre(first, mlp)])]
        } else {
            let second = norm(format!("{layer}post_attention_layernorm"));
            vec![Stage::new(Branch::pre(first, attention)), Stage::new(Branch::pre(second, mlp))]
        })
    })?;
    decoder.norm = norm("model.norm".to_owned());
    Ok(decoder)
}
