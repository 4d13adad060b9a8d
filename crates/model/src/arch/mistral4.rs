//! Mistral 4: DeepSeek V3's latent attention with queries that grow with the position, fused experts behind a softmax
//! router.

use mlx_format::checkpoint::ConfigError;

use super::architecture::{Architecture, Source};
use super::biases::{Bias, BiasRule, OTHERS};
use super::deepseek::{self, Corrected, Routed};
use super::family::Family;
use super::rules::{split_fused_experts, split_kv_b, stack_mlp_experts};
use super::sketch::Sketch;
use crate::decoder::{Decoder, LatentAttention, Layer};

const BIASES: &[BiasRule] =
    &[(&["q_a_proj", "kv_a_proj_with_mqa", "o_proj"], Bias::If("attention_bias")), (OTHERS, Bias::Never)];

pub(super) const FAMILIES: &[Family] =
    &[Family { biases: BIASES, lengths: deepseek::LENGTHS, ..Family::new(&["mistral4"], mistral4, decoder) }];

const ROUTED: Routed = Routed { renormalizes: true, ..Routed::new(Corrected::WhereThere) };

/// The router is quantized as the rest.
fn mistral4(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let names = [&deepseek::names()[..], &["mlp.gate"]].concat();
    Ok(Architecture::plain(source, "mistral4", &names)?
        .rules(split_fused_experts())
        .rules([stack_mlp_experts()])
        .rules(split_kv_b(source)?))
}

fn decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let rope_dim = sketch.count("qk_rope_head_dim")?;
    let rope = sketch.rope_for(None, rope_dim, 1.0, sketch.rope_theta(sketch.defaults.rope_theta))?;
    let rope = if sketch.config.bool("rope_interleave", true) { rope.interleaved() } else { rope };
    let value = sketch.count("v_head_dim")?;
    let query_scaling = sketch.query_scaling();
    sketch.llama_with_heads(vec![rope], |layer, index| {
        let attention = LatentAttention { query_scaling, ..deepseek::latent(sketch, layer, value)? };
        let network = deepseek::feed_forward(sketch, ROUTED, layer, index)?;
        Ok(sketch.pre_norm(layer, Layer::Latent(attention), network))
    })
}
