//! nanochat: norms without weights everywhere, of the embedding too; heads turn the other way round and are normed
//! afterwards.

use mlx_format::checkpoint::ConfigError;

use super::architecture::{Architecture, Source};
use super::biases;
use super::family::Family;
use super::sketch::{Sketch, linears};
use crate::decoder::{
    Attention, Block, Branch, Decoder, Frequencies, Gate, HeadNorms, Layer, Linear, Mlp, Norm, Projections,
    Stage,
};
use crate::ops::Activation;

pub(super) const FAMILIES: &[Family] =
    &[Family { biases: biases::NONE, ..Family::new(&["nanochat"], nanochat, decoder) }];

const EMBEDDING: &str = "wte";

/// Queries, keys, values, output; the two linears of the network.
const LAYER: [&str; 6] = ["attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"];

fn nanochat(source: Source<'_>) -> Result<Architecture, ConfigError> {
    Architecture::plain(source, "nanochat", &[&[EMBEDDING, "lm_head"][..], &LAYER].concat())
}

fn decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let norm = || Norm { path: None, ..sketch.rms("") };
    let activation = sketch.activation("hidden_act", Activation::ReluSquared)?;
    let mut rope = sketch.rope()?;
    if let Frequencies::Fixed(frequencies) = &mut rope.frequencies {
        for frequency in frequencies.iter_mut() {
            *frequency = -*frequency;
        }
    }
    let (heads, kv_heads, head_dim) = (sketch.heads()?, sketch.kv_heads()?, sketch.head_dim()?);
    let block = |index| {
        let layer = format!("transformer.h.{index}.");
        let [q, k, v, output, up, down] = linears(&layer, LAYER);
        let norms = HeadNorms { after_rope: true, ..HeadNorms::new(norm(), norm()) };
        let attention = Attention {
            norms: Some(norms),
            ..Attention::new(heads, kv_heads, head_dim, Projections::Separate { q, k, v }, output)
        };
        let mlp = Mlp::new(Gate::None(up), activation, down);
        let stages = vec![
            Stage::new(Branch::pre(norm(), Layer::Attention(attention))),
            Stage::new(Branch::pre(norm(), Layer::Mlp(mlp))),
        ];
        let first = (index == 0).then(norm);
        Block { norm: first, ..Block::new(layer, stages) }
    };
    let blocks = (0..sketch.layers()?).map(block).collect();
    let mut decoder = sketch.decoder(vec![rope], blocks)?;
    decoder.embedding.path = format!("transformer.{EMBEDDING}");
    decoder.norm = norm();
    decoder.head.linear = Some(Linear::new("lm_head"));
    decoder.head.softcap = sketch.float_or_null("final_logit_softcapping", 15.0);
    Ok(decoder)
}
