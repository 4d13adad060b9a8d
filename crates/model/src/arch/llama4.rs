//! Llama 4: three layers that turn and see their own chunk alone to each global one whose queries grow with the
//! position; one expert a token, whose weight is a factor on what it reads.

use mlx_format::checkpoint::{Config, ConfigError};
use serde_json::Value;

use super::architecture::{Architecture, Source};
use super::biases::{Bias, BiasRule, OTHERS, OUT, QKV};
use super::defaults::Defaults;
use super::family::{ExpertWidths, Family};
use super::keys::first_width;
use super::rules::{ATTENTION, gated, make};
use super::sketch::{Sketch, linears};
use crate::decoder::{
    Attention, Decoder, Experts, HeadNorms, Layer, Linear, Moe, Norm, QueryScaling, Router, Scores,
    SharedExpert,
};
use crate::ops::Activation;
use crate::view::Step;

const BIASES: &[BiasRule] =
    &[(QKV, Bias::If("attention_bias")), (OUT, Bias::If("attention_bias")), (OTHERS, Bias::Never)];

pub(super) const FAMILIES: &[Family] = &[Family {
    defaults: Defaults { rms_norm_eps: 1e-5, rope_theta: 500_000.0, head_dim: Some(128), ..Defaults::LLAMA },
    biases: BIASES,
    inner_width: |config: &Config| first_width(config, &["intermediate_size_mlp"]),
    experts: ExpertWidths {
        expert: &["intermediate_size"],
        shared: &["intermediate_size"],
        ..ExpertWidths::USUAL
    },
    ..Family::new(&["llama4"], llama4, decoder)
}];

const DENSE: [&str; 3] = gated!("feed_forward");
const EXPERTS: [&str; 3] = gated!("feed_forward.experts");
const SHARED: [&str; 3] = gated!("feed_forward.shared_expert");
const ROUTER: &str = "feed_forward.router";

/// Experts come fused, their matrices turned: `[experts, in, out]`.
fn llama4(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let names = [&ATTENTION[..], &DENSE, &EXPERTS, &SHARED, &["embed_tokens", ROUTER, "lm_head"]].concat();
    let half = |second| vec![Step::Transpose, Step::HalfOfRows(second)];
    Ok(Architecture::plain(source, "llama4", &names)?.rules([
        make(
            r"^(?<x>.*\.feed_forward\.experts)\.gate_up_proj$",
            [("$x.gate_proj.weight", half(false)), ("$x.up_proj.weight", half(true))],
        ),
        make(
            r"^(?<x>.*\.feed_forward\.experts)\.down_proj$",
            [("$x.down_proj.weight", vec![Step::Transpose])],
        ),
    ]))
}

fn decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let activation = sketch.activation("hidden_act", Activation::Silu)?;
    let chunk = sketch.count_or("attention_chunk_size", 8192)?;
    let interval = sketch.count_or("interleave_moe_layer_step", 1)?.max(1);
    let normed = sketch.config.bool("use_qk_norm", true);
    let tuned = match sketch.config.get("attn_temperature_tuning") {
        Some(value) => value.as_bool().unwrap_or_else(|| value.as_f64().is_some_and(|value| value != 0.0)),
        None => true,
    };
    let scaling = QueryScaling {
        beta: sketch.float_or("attn_scale", 0.1),
        original: sketch.float_or("floor_scale", 8192.0),
        first: 1,
    };
    let mut decoder = sketch.llama_with(vec![sketch.rope()?.interleaved()], |layer, index, attention| {
        let turns = match sketch.of_layer("no_rope_layers", index).and_then(Value::as_u64) {
            Some(turns) => turns != 0,
            None => (index + 1) % 4 != 0,
        };
        let norm = || Norm { path: None, ..sketch.rms("") };
        let norms = HeadNorms { after_rope: true, ..HeadNorms::new(norm(), norm()) };
        let attention = Attention {
            norms: (normed && turns).then_some(norms),
            rope: turns.then_some(0),
            chunk: turns.then_some(chunk),
            query_scaling: (tuned && !turns).then_some(scaling),
            ..attention
        };
        let network = |names| Sketch::gated(layer, names, activation);
        let routed = match sketch.config.get("moe_layers").and_then(Value::as_array) {
            Some(list) => list.iter().any(|layer| layer.as_u64() == Some(index as u64)),
            None => (index + 1).is_multiple_of(interval),
        };
        let network = if routed {
            let count = sketch.count("num_local_experts")?;
            let [router] = linears(layer, [ROUTER]);
            Layer::Moe(Moe {
                router: Router {
                    scores: Scores::Sigmoid,
                    before: true,
                    ..Router::new(router, sketch.top_k("num_experts_per_tok", count)?)
                },
                latent: None,
                experts: Experts::Stacked { count, mlp: network(EXPERTS) },
                shared: Some(SharedExpert { mlp: network(SHARED), gate: None }),
            })
        } else {
            Layer::Mlp(network(DENSE))
        };
        Ok(sketch.pre_norm(layer, Layer::Attention(attention), network))
    })?;
    decoder.head.linear = Some(Linear::new(sketch.place.name("lm_head")));
    Ok(decoder)
}
