//! GLM-4, dense (fused gate and up) and mixture of experts (sigmoid routing; the router is a plain parameter).

use mlx_format::checkpoint::ConfigError;

use super::architecture::{Architecture, Source};
use super::biases::{Bias, BiasRule, OTHERS, QKV};
use super::deepseek::{self, Corrected, Routed};
use super::defaults::Defaults;
use super::family::Family;
use super::llama;
use super::rules::{EXPERTS, SHARED_EXPERTS, drop_layers_from, stack_mlp_experts};
use super::sketch::{Sketch, linears};
use crate::decoder::{Attention, Decoder, Gate, Layer, Mlp, Stage};
use crate::ops::Activation;

const BIASES: &[BiasRule] = &[(QKV, Bias::If("attention_bias")), (OTHERS, Bias::Never)];

pub(super) const FAMILIES: &[Family] = &[
    Family {
        defaults: Defaults { rms_norm_eps: 1.5625e-7, ..Defaults::LLAMA },
        biases: BIASES,
        ..Family::new(&["glm4"], dense, dense_decoder)
    },
    Family {
        defaults: Defaults { rms_norm_eps: 1e-5, ..Defaults::LLAMA },
        biases: BIASES,
        ..Family::new(&["glm4_moe"], moe, moe_decoder)
    },
    Family {
        defaults: Defaults { rms_norm_eps: 1e-5, rope_theta: 1_000_000.0, ..Defaults::LLAMA },
        biases: BIASES,
        ..Family::new(&["solar_open"], moe, solar_open)
    },
];

/// The network of a dense model: gate and up in one, then down.
const NETWORK: [&str; 2] = ["mlp.gate_up_proj", "mlp.down_proj"];

fn dense(source: Source<'_>) -> Result<Architecture, ConfigError> {
    Architecture::plain(source, "glm4", &[&llama::linears()[..], &NETWORK[..1]].concat())
}

fn moe(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let linears = [&llama::linears()[..], &SHARED_EXPERTS, &EXPERTS].concat();
    let architecture = Architecture::plain(source, "glm4_moe", &linears)?;
    let layers = architecture.layers;
    Ok(architecture
        .rules([drop_layers_from(layers), stack_mlp_experts()])
        .keep_dtype(&["e_score_correction_bias"]))
}

/// Norms before and after each layer; half of each head turns in pairs of neighbours.
fn dense_decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let activation = sketch.activation("hidden_act", Activation::Silu)?;
    let rope = sketch.rope_of(sketch.head_dim()?, 0.5)?.interleaved();
    sketch.llama_with(vec![rope], |layer, _, attention| {
        let norm = |name: &str| sketch.rms(format!("{layer}{name}"));
        let [gate_up, down] = linears(layer, NETWORK);
        let mlp = Mlp::new(Gate::Fused(gate_up), activation, down);
        Ok(vec![
            Stage::sandwich(
                norm("input_layernorm"),
                Layer::Attention(attention),
                norm("post_self_attn_layernorm"),
            ),
            Stage::sandwich(norm("post_attention_layernorm"), Layer::Mlp(mlp), norm("post_mlp_layernorm")),
        ])
    })
}

/// DeepSeek V3's routing on grouped-query attention.
fn moe_decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    routed(sketch, 0.5)
}

/// Solar Open: the same with whole heads that turn.
fn solar_open(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    routed(sketch, 1.0)
}

fn routed(sketch: Sketch<'_>, turned: f64) -> Result<Decoder, ConfigError> {
    let rope = sketch.rope_of(sketch.head_dim()?, turned)?;
    sketch.llama_with(vec![rope], |layer, index, attention| {
        let normed = sketch.config.bool("use_qk_norm", false);
        let norms = normed.then(|| sketch.head_norms(layer, "q_norm", "k_norm"));
        let feed_forward = deepseek::feed_forward(sketch, Routed::new(Corrected::Always), layer, index)?;
        Ok(sketch.pre_norm(layer, Layer::Attention(Attention { norms, ..attention }), feed_forward))
    })
}
