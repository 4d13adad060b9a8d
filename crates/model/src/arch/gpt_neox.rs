//! GPT-NeoX and Pythia: fused, per-head interleaved q, k, v (which stay so); buffers stored as tensors.

use mlx_format::checkpoint::ConfigError;

use super::architecture::{Architecture, Source};
use super::biases::{Bias, OTHERS};
use super::family::Family;
use super::rules::drop;
use super::sketch::{Sketch, linears};
use crate::decoder::{Attention, Block, Branch, Decoder, Gate, Layer, Linear, Mlp, Norm, Projections, Stage};
use crate::ops::Activation;

pub(super) const FAMILIES: &[Family] = &[Family {
    biases: &[(&[HEAD], Bias::Never), (OTHERS, Bias::Always)],
    norm_bias: Bias::Always,
    ..Family::new(&["gpt_neox"], gpt_neox, decoder)
}];

const EMBEDDING: &str = "embed_in";
const HEAD: &str = "embed_out";

/// Queries, keys and values in one, output; the two linears of the network.
const LAYER: [&str; 4] =
    ["attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"];

fn gpt_neox(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let linears = [&[EMBEDDING, HEAD][..], &LAYER].concat();
    let mut architecture = Architecture::plain(source, "gpt_neox", &linears)?
        .rules([drop(r"\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$")]);
    architecture.prefixes =
        vec![("gpt_neox.layers.", "model.h."), ("gpt_neox.", "model."), ("model.", "model."), ("", "model.")];
    Ok(architecture)
}

/// Parallel blocks with a norm for each branch; the activation is the one that the config names (mlx-lm always takes
/// the tanh form).
fn decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let norm = |path: String| Norm::layer(path, sketch.float_or("layer_norm_eps", 1e-5));
    let activation = sketch.activation("hidden_act", Activation::Gelu)?;
    let (heads, head_dim) = (sketch.heads()?, sketch.head_dim()?);
    let theta = sketch.float_or("rotary_emb_base", sketch.rope_theta(10000.0));
    let rope = sketch.rope_for(None, head_dim, sketch.float_or("rotary_pct", 0.25), theta)?;
    let block = |index| {
        let layer = format!("model.h.{index}.");
        let [qkv, output, first, second] = linears(&layer, LAYER);
        let attention = Attention::new(heads, heads, head_dim, Projections::Interleaved(qkv), output);
        let mlp = Mlp::new(Gate::None(first), activation, second);
        let branches = [
            Branch::pre(norm(format!("{layer}input_layernorm")), Layer::Attention(attention)),
            Branch::pre(norm(format!("{layer}post_attention_layernorm")), Layer::Mlp(mlp)),
        ];
        let stages = if sketch.config.bool("use_parallel_residual", true) {
            vec![Stage::parallel(branches.into())]
        } else {
            branches.map(Stage::new).into()
        };
        Block::new(layer, stages)
    };
    let blocks = (0..sketch.layers()?).map(block).collect();
    let mut decoder = sketch.decoder(vec![rope], blocks)?;
    decoder.embedding.path = format!("model.{EMBEDDING}");
    decoder.norm = norm("model.final_layer_norm".to_owned());
    // mlx-lm's model always has one.
    decoder.head.linear = Some(Linear::new(format!("model.{HEAD}")));
    Ok(decoder)
}
