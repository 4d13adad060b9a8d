//! Mixtral and Phi-3.5-MoE: experts w1, w2, w3 stacked as gate, down, up; the router is quantized like the rest.

use mlx_format::checkpoint::ConfigError;

use super::architecture::{Architecture, Source};
use super::biases::{self, Bias, BiasRule, OTHERS, OUT, QKV};
use super::defaults::Defaults;
use super::family::Family;
use super::rules::{ATTENTION, EXPERTS, drop_tied_head, stack_w_experts};
use super::sketch::Sketch;
use crate::decoder::{Attention, Branch, Decoder, Experts, Layer, Linear, Moe, Norm, Router, Scores, Stage};
use crate::ops::Activation;

pub(super) const FAMILIES: &[Family] = &[
    Family {
        defaults: Defaults { rms_norm_eps: 1e-5, rope_theta: 1_000_000.0, ..Defaults::LLAMA },
        biases: biases::NONE,
        ..Family::new(&["mixtral"], mixtral, decoder)
    },
    Family {
        biases: PHIMOE_BIASES,
        norm_bias: Bias::Always,
        ..Family::new(&["phimoe"], phimoe, phimoe_decoder)
    },
];

const PHIMOE_BIASES: &[BiasRule] =
    &[(QKV, Bias::Always), (OUT, Bias::Always), (&["lm_head"], Bias::Always), (OTHERS, Bias::Never)];

const ROUTER: &str = "block_sparse_moe.gate";

fn mixtral(source: Source<'_>) -> Result<Architecture, ConfigError> {
    Ok(phimoe(source)?.rules(drop_tied_head(source, false)))
}

/// Always has a head of its own.
fn phimoe(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let linears = [ATTENTION.as_slice(), &EXPERTS, &["embed_tokens", ROUTER, "lm_head"]].concat();
    Ok(Architecture::plain(source, "mixtral", &linears)?.rules(stack_w_experts("block_sparse_moe")))
}

fn decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let window = sketch.window_or(None);
    sketch.llama_with(vec![sketch.rope()?], |layer, _, attention| {
        let moe = experts(sketch, layer, Scores::SoftmaxOfChosen)?;
        Ok(sketch.pre_norm(layer, Layer::Attention(Attention { window, ..attention }), Layer::Moe(moe)))
    })
}

/// Phi-3.5-MoE: layer norms, biases of attention and head, and weights of experts that sparsemixer makes.
fn phimoe_decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let norm = |path: String| Norm::layer(path, sketch.float_or("rms_norm_eps", 1e-5));
    let scores = Scores::Sparsemixer { jitter: sketch.float_or("router_jitter_noise", 0.01) };
    let window = sketch.window_or(None);
    let mut decoder = sketch.llama_with(vec![sketch.rope()?], |layer, _, attention| {
        let attention = Layer::Attention(Attention { window, ..attention });
        let moe = Layer::Moe(experts(sketch, layer, scores)?);
        Ok(vec![
            Stage::new(Branch::pre(norm(format!("{layer}input_layernorm")), attention)),
            Stage::new(Branch::pre(norm(format!("{layer}post_attention_layernorm")), moe)),
        ])
    })?;
    decoder.norm = norm("model.norm".to_owned());
    Ok(decoder)
}

fn experts(sketch: Sketch<'_>, layer: &str, scores: Scores) -> Result<Moe, ConfigError> {
    let activation = sketch.activation("hidden_act", Activation::Silu)?;
    let count = sketch.count("num_local_experts")?;
    let top_k = sketch.top_k("num_experts_per_tok", count)?;
    let mlp = Sketch::gated(&format!("{layer}block_sparse_moe."), EXPERTS, activation);
    let router = Router { scores, ..Router::new(Linear::new(format!("{layer}{ROUTER}")), top_k) };
    Ok(Moe { router, latent: None, experts: Experts::Stacked { count, mlp }, shared: None })
}
