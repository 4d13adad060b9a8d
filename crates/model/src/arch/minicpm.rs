//! MiniCPM: Llama with factors on embedding, residual branches and logits. MiniCPM 3: the same around latent attention.

use mlx_format::checkpoint::ConfigError;

use super::architecture::{Architecture, Source};
use super::biases::{self, Bias, BiasRule, OTHERS};
use super::deepseek;
use super::defaults::Defaults;
use super::family::Family;
use super::llama;
use super::rules::{make, tied};
use super::sketch::Sketch;
use crate::decoder::{Decoder, Layer};

const BIASES_3: &[BiasRule] =
    &[(&["q_a_proj", "kv_a_proj_with_mqa", "o_proj"], Bias::If("attention_bias")), (OTHERS, Bias::Never)];

pub(super) const FAMILIES: &[Family] = &[
    Family { biases: biases::NONE, ..Family::new(&["minicpm"], minicpm, minicpm_decoder) },
    Family {
        defaults: Defaults { rms_norm_eps: 1e-5, ..Defaults::LLAMA },
        biases: BIASES_3,
        lengths: deepseek::LENGTHS,
        ..Family::new(&["minicpm3"], minicpm3, minicpm3_decoder)
    },
];

/// mlx-lm's model has a head of its own where config.json does not tie it: without one, the table is written twice.
fn minicpm(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let architecture = llama::untied_by_default(source)?;
    let twice = tied(source.config) != Some(true) && !source.any_name_ends_with("lm_head.weight");
    let copy = make(
        r"^model\.embed_tokens\.weight$",
        [("model.embed_tokens.weight", vec![]), ("lm_head.weight", vec![])],
    );
    Ok(architecture.rules(twice.then_some(copy)))
}

fn minicpm3(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let names = [&llama::linears()[..], &deepseek::LATENT].concat();
    Architecture::plain(source, "minicpm3", &names)
}

fn minicpm_decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let decoder = sketch.llama_with(vec![sketch.rope()?], |layer, _, attention| {
        Ok(sketch.pre_norm(layer, Layer::Attention(attention), Layer::Mlp(sketch.mlp(layer)?)))
    })?;
    scaled(sketch, decoder)
}

fn minicpm3_decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let rope = sketch.rope_for(
        None,
        sketch.count("qk_rope_head_dim")?,
        1.0,
        sketch.rope_theta(sketch.defaults.rope_theta),
    )?;
    let value = sketch.count_or("v_head_dim", sketch.count("hidden_size")? / sketch.heads()?)?;
    let decoder = sketch.llama_with(vec![rope], |layer, _, _| {
        let attention = deepseek::latent(sketch, layer, value)?;
        Ok(sketch.pre_norm(layer, Layer::Latent(attention), Layer::Mlp(sketch.mlp(layer)?)))
    })?;
    scaled(sketch, decoder)
}

fn scaled(sketch: Sketch<'_>, mut decoder: Decoder) -> Result<Decoder, ConfigError> {
    let depth = sketch.float_or("scale_depth", 1.0) / (decoder.blocks.len() as f64).sqrt();
    for stage in decoder.blocks.iter_mut().flat_map(|block| &mut block.stages) {
        stage.multiplier = depth;
    }
    decoder.embedding.multiplier = sketch.float_or("scale_emb", 1.0);
    let base = sketch.count_or("dim_model_base", decoder.hidden_size)?;
    // What is tied is not scaled.
    if tied(sketch.config) != Some(true) {
        decoder.head.multiplier = base as f64 / decoder.hidden_size as f64;
    }
    Ok(decoder)
}
