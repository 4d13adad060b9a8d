//! IBM Granite: the Llama shape; mlx-lm keeps output projections and the head at 8 bits, because their small
//! values underflow the scales of the fp modes.

use mlx_format::checkpoint::ConfigError;

use super::architecture::{Architecture, Source};
use super::biases;
use super::family::Family;
use super::llama;
use super::sketch::Sketch;
use crate::decoder::{Attention, Decoder, Layer};

pub(super) const FAMILIES: &[Family] =
    &[Family { biases: biases::ATTENTION_AND_NETWORK, ..Family::new(&["granite"], granite, decoder) }];

fn granite(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let mut architecture = llama::llama(source)?.protect(&["self_attn.o_proj", "mlp.down_proj", "lm_head"]);
    architecture.family = "granite";
    Ok(architecture)
}

/// Multipliers on embedding, scores, residual branches and logits.
fn decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let residual = sketch.float_or("residual_multiplier", 1.0);
    let mut decoder = sketch.llama_with(vec![sketch.rope()?], |layer, _, attention| {
        let attention = Attention { scale: sketch.float_or("attention_multiplier", 1.0), ..attention };
        let mut stages = sketch.pre_norm(layer, Layer::Attention(attention), Layer::Mlp(sketch.mlp(layer)?));
        for stage in &mut stages {
            stage.multiplier = residual;
        }
        Ok(stages)
    })?;
    decoder.embedding.multiplier = sketch.float_or("embedding_multiplier", 1.0);
    decoder.head.multiplier = 1.0 / sketch.float_or("logits_scaling", 1.0);
    Ok(decoder)
}
