//! InternLM 2 (names of its own; queries, keys and values in one matrix, key head by key head) and 3 (the Llama shape).

use mlx_format::checkpoint::ConfigError;

use super::architecture::{Architecture, Source};
use super::biases::{Bias, BiasRule, NETWORK, OTHERS, OUT, QKV};
use super::family::Family;
use super::llama;
use super::rules::{drop, tied};
use super::sketch::{Sketch, linears};
use crate::decoder::{Attention, Branch, Decoder, Gate, Layer, Linear, Mlp, Projections, Stage};
use crate::ops::Activation;

const BIASES: &[BiasRule] = &[(&["wqkv", "wo"], Bias::Unless("bias")), (OTHERS, Bias::Never)];

const BIASES_3: &[BiasRule] = &[
    (QKV, Bias::If("qkv_bias")),
    (OUT, Bias::If("qkv_bias")),
    (NETWORK, Bias::If("bias")),
    (OTHERS, Bias::Never),
];

pub(super) const FAMILIES: &[Family] = &[
    Family { biases: BIASES, ..Family::new(&["internlm2"], internlm2, internlm2_decoder) },
    Family { biases: BIASES_3, ..Family::new(&["internlm3"], llama::untied_by_default, internlm3_decoder) },
];

const EMBEDDING: &str = "tok_embeddings";
const HEAD: &str = "output";

/// Queries, keys and values in one, output; gate, up, down.
const LAYER: [&str; 5] =
    ["attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w3", "feed_forward.w2"];

fn internlm2(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let names = [&[EMBEDDING, HEAD][..], &LAYER].concat();
    let tied = tied(source.config) == Some(true);
    Ok(Architecture::plain(source, "internlm2", &names)?
        .rules([drop(r"attention\.rope\.inv_freq")])
        .rules(tied.then(|| drop(r"^output\.weight$"))))
}

fn internlm2_decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let activation = sketch.activation("hidden_act", Activation::Silu)?;
    let mut decoder = sketch.llama_with(vec![sketch.rope()?], |layer, _, attention| {
        let [qkv, output, gate, up, down] = linears(layer, LAYER);
        let attention = Attention { projections: Projections::Interleaved(qkv), output, ..attention };
        let mlp = Mlp::new(Gate::Separate { gate, up }, activation, down);
        let norm = |name: &str| sketch.rms(format!("{layer}{name}"));
        Ok(vec![
            Stage::new(Branch::pre(norm("attention_norm"), Layer::Attention(attention))),
            Stage::new(Branch::pre(norm("ffn_norm"), Layer::Mlp(mlp))),
        ])
    })?;
    decoder.embedding.path = format!("model.{EMBEDDING}");
    decoder.head.linear = (tied(sketch.config) != Some(true)).then(|| Linear::new(HEAD));
    Ok(decoder)
}

fn internlm3_decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    sketch.llama_with(vec![sketch.rope()?], |layer, _, attention| {
        Ok(sketch.pre_norm(layer, Layer::Attention(attention), Layer::Mlp(sketch.mlp(layer)?)))
    })
}
